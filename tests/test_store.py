"""Run folders: one process at a time, no half files, nothing that a dead process can hold."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from sdae import store as module
from sdae.config import parse, run_id
from sdae.errors import UserError
from sdae.files import process_start, write_atomically
from sdae.store import GRACE_SECONDS, RunFolder, Store

ROOT = Path(__file__).resolve().parents[1]
HOLD = "import sys, time; from pathlib import Path; from sdae.store import RunFolder\n"
HOLD += "with RunFolder(Path(sys.argv[1])).claim() as owned: print(owned, flush=True); time.sleep(60)"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = parse({})
    out = Store(tmp_path).run(run_id(config))
    out.create(config)
    return out


def hold(folder: RunFolder) -> subprocess.Popen[str]:
    """Another process that claims the run and keeps it; says first whether it got it."""
    return subprocess.Popen([sys.executable, "-c", HOLD, folder.path], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Claims


def test_a_claim_holds_until_its_process_is_killed(folder: RunFolder) -> None:
    with folder.claim() as mine:
        assert mine
        assert folder.state() == "running"
        other = hold(folder)
        assert answer(other) == "False"
        other.kill()
        other.communicate()
    assert folder.claimed() is None
    assert folder.state() == "started"
    assert not [path for path in folder.path.iterdir() if "claim" in path.name]

    other = hold(folder)
    assert answer(other) == "True"
    claim = folder.claimed()
    assert claim is not None
    assert claim["pid"] == other.pid
    with folder.claim() as mine:
        assert not mine
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert folder.claimed() is None
    with folder.claim() as mine:
        assert mine


def test_a_pid_used_again_is_not_the_old_process(folder: RunFolder) -> None:
    with folder.claim():
        claim = json.loads((folder.path / "claim.json").read_text())
    (folder.path / "claim.json").write_text(json.dumps(claim | {"started": "1"}))
    assert folder.claimed() is None
    (folder.path / "claim.json").write_text(json.dumps(claim))
    assert folder.claimed() == claim
    assert process_start(os.getpid()) == claim["started"]
    assert process_start(2**22 + 1) is None


WITHOUT_ITS_FIRST_THREAD = """
import ctypes, os, sys, threading, time
threading.Thread(target=time.sleep, args=(99,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit of this thread alone
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this needs /proc")
def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """A killed process, as its first thread is a zombie, still has files and locks while its others end."""
    with subprocess.Popen([sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD], stdout=subprocess.PIPE, text=True) as other:
        answer(other)
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert process_start(other.pid) is not None
        other.kill()
        while len(os.listdir(f"/proc/{other.pid}/task")) > 1:
            time.sleep(0.01)
        assert process_start(other.pid) is None


def test_another_machine_lives_while_its_heart_beats(folder: RunFolder) -> None:
    claim = {"host": "elsewhere", "pid": 1, "started": "1", "token": "x", "time": time.time() - 2 * GRACE_SECONDS}
    (folder.path / "claim.json").write_text(json.dumps(claim))
    folder.write("heartbeat.json", {"time": time.time() - 10})
    assert folder.claimed() == claim
    folder.write("heartbeat.json", {"time": time.time() - 2 * GRACE_SECONDS})
    assert folder.claimed() is None
    with folder.claim() as mine:
        assert mine


@pytest.mark.parametrize("content", ["", "{", "null", "[]"])
def test_a_torn_claim_is_nobody_s(content: str, folder: RunFolder) -> None:
    (folder.path / "claim.json").write_text(content)
    assert folder.claimed() is None
    with folder.claim() as mine:
        assert mine


def race(root: Path, rounds: int, barrier: Barrier, wins: Any) -> None:
    for number in range(rounds):
        folder = RunFolder(root / f"pretrain-{number}")
        barrier.wait()
        with folder.claim() as mine:
            if mine:
                wins[number] += 1
            barrier.wait()


def test_a_dead_claim_is_taken_over_by_one_only(tmp_path: Path) -> None:
    rounds, racers = 100, 8
    dead = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": "1", "token": "dead", "time": 0}
    for number in range(rounds):
        (tmp_path / f"pretrain-{number}").mkdir()
        (tmp_path / f"pretrain-{number}" / "claim.json").write_text(json.dumps(dead | {"token": f"dead{number}"}))
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(racers), context.Array("i", rounds)
    processes = [context.Process(target=race, args=(tmp_path, rounds, barrier, wins)) for _ in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * racers
    assert list(wins) == [1] * rounds


# Files


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_is_whole_or_absent(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    write_atomically(file, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, full)
        with pytest.raises(UserError, match=r"result\.json: cannot be written: No space left on device"):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write_atomically(file, b"new")
    assert file.read_text() == "new"


def write_for_ever(file: Path) -> None:
    for i in range(10**9):
        write_atomically(file, f"{i % 10}" * 100_000)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(file,))
    process.start()
    seen = set()
    end = time.monotonic() + 1.0
    while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < end + 300):
        if file.exists():
            content = file.read_text()
            assert len(content) == 100_000
            assert len(set(content)) == 1
            seen.add(content[0])
    process.kill()  # in the middle of it
    process.join()
    assert len(file.read_text()) == 100_000
    assert len(seen) > 1


def test_states_of_a_run(tmp_path: Path) -> None:
    config = parse({})
    folder = Store(tmp_path / "store").run(run_id(config))
    assert folder.state() == "new"
    assert (folder.config(), folder.result(), folder.failure(), folder.metrics(), folder.claimed()) == (
        None, None, None, [], None,
    )  # fmt: skip
    folder.create(config)
    assert folder.state() == "started"
    assert folder.config() == config
    folder.fail("Boom", "it broke", "trace")
    assert folder.state() == "failed"
    folder.forget_failure()
    assert folder.state() == "started"
    folder.fail("Boom", "again")
    failure = folder.failure()
    assert failure is not None
    assert (failure["class"], failure["message"], failure["attempt"]) == ("Boom", "again", 2)
    folder.finish({"metrics": {"loss": 1.0}})
    assert folder.state() == "done"
    assert folder.failure() is None
    with pytest.raises(UserError, match="this config is"):
        folder.create(parse({"seed": 1}))


def test_rows_that_were_cut_off_are_left_out(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": 0.5})
    with open(folder.metrics_file, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3]
    folder.truncate_metrics(2)
    folder.append_metrics({"step": 3, "loss": 0.25})
    assert [(row["step"], row["loss"]) for row in folder.metrics()] == [(1, 0.5), (2, 0.5), (3, 0.25)]


# The store


def test_runs_are_found_by_the_beginning_of_their_id(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.ids() == []
    for name in ("pretrain-aa01", "pretrain-ab02", "finetune-aa03", ".hidden-1", "notes"):
        (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store" / "a-file").write_text("")
    assert store.ids() == ["finetune-aa03", "pretrain-aa01", "pretrain-ab02"]
    assert store.find("pretrain-ab").id == "pretrain-ab02"
    for prefix, part in (("pretrain-", "2 runs"), ("linprobe", "no run"), ("", "3 runs")):
        with pytest.raises(UserError, match=part):
            store.find(prefix)
    for odd in ("../x", ".hidden-1", "a/b"):
        with pytest.raises(UserError, match="not a run's id"):
            store.run(odd)


def as_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


@pytest.mark.parametrize(
    "where",
    [as_file, lambda tmp_path: as_file(tmp_path) / "store", lambda _: Path("/proc/store")],
    ids=["a file", "below a file", "in /proc"],
)
def test_stores_that_cannot_be(where: Callable[[Path], Path], tmp_path: Path) -> None:
    def use() -> None:
        store = Store(where(tmp_path))
        assert store.ids() == []
        assert store.run("pretrain-a").state() == "new"
        store.open()

    with pytest.raises(UserError, match="store") as caught:
        use()
    assert "\n" not in str(caught.value)


def test_opening_leaves_no_trace(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").open()
    assert list((tmp_path / "a" / "b").iterdir()) == []
