"""A run folder that another process, or another's hand, has changed meanwhile: nothing of theirs is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calling import ROOT, spawn
from conftest import tiny

import sdae.stages.pretrain as stage
from analysis.check import check, mend
from sdae.config import Config, run_id
from sdae.data.feed import make_pictures
from sdae.errors import Interrupted, UserError
from sdae.files import process_start
from sdae.run import execute
from sdae.store import AHEAD_SECONDS, GRACE_SECONDS, RunFolder, Store
from slurm.cluster import Busy, Refused
from slurm.ledger import Ledger
from slurm.submit import _Sender

LONG_AGO = time.time() - 100_000


def claim_of(time: float) -> str:
    return json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "time": time, "token": uuid.uuid4().hex})


def finished(root: Path) -> tuple[Store, Config, RunFolder]:
    store, config = Store(root), tiny("pretrain", optim={"epochs": 1, "warmup_epochs": 0})
    execute(config, store)
    return store, config, store.run(run_id(config))


@pytest.mark.parametrize(
    ("ahead", "lives"), [(-GRACE_SECONDS, False), (-1, True), (600, True), (2 * AHEAD_SECONDS, False)]
)
def test_a_clock_that_ran_ahead_holds_no_run_for_ever(ahead: float, lives: bool, tmp_path: Path) -> None:
    run = Store(tmp_path).run("pretrain-0123456789abcdef")
    run.path.mkdir()
    (run.path / "claim.json").write_text(claim_of(time.time() + ahead))
    assert (run.claimed() is not None) == lives
    with run.claim() as mine:
        assert mine != lives


@pytest.mark.parametrize(
    "error", [UserError("metrics.jsonl: cannot be written: Stale file handle"), OSError(116, "Stale")]
)
def test_who_was_taken_for_dead_leaves_the_folder_to_its_new_owner(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = Store(tmp_path), tiny()
    folder = store.run(run_id(config))

    def run(*_: Any) -> None:
        (folder.path / "claim.json").write_text(claim_of(time.time()))
        (folder.path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
        raise error

    monkeypatch.setattr(stage, "run", run)
    with pytest.raises((UserError, Interrupted)):
        execute(config, store)
    assert folder.metrics() == [{"step": 5, "loss": 1.0}]
    assert folder.failure() is None


@pytest.mark.parametrize("result", [{}, {"metrics": 3, "id": "x"}, {"metrics": {"loss": 1}}])
def test_a_result_of_something_else_is_no_result(result: dict[str, Any], tmp_path: Path) -> None:
    store, config, folder = finished(tmp_path)
    (folder.path / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="not the result of this run"):
        execute(config, store)


# results check --repair


def test_a_run_that_begins_between_check_and_repair_stays(tmp_path: Path) -> None:
    store, config = Store(tmp_path), tiny()
    folder = store.run(run_id(config))
    folder.checkpoints.mkdir(parents=True)
    os.utime(folder.path, (LONG_AGO, LONG_AGO))
    found = check(store)["findings"]
    assert [finding.repair is not None for finding in found] == [True]
    folder.create(config)
    mend(found)
    assert not found[0].repaired
    assert folder.config() is not None
    again = store.run("pretrain-0123456789abcdef")
    again.path.mkdir()
    os.utime(again.path, (LONG_AGO, LONG_AGO))
    mend(check(store)["findings"])
    assert not again.path.exists(), "what is still empty goes"


def test_a_result_that_is_written_between_check_and_repair_stays(tmp_path: Path) -> None:
    store, _, folder = finished(tmp_path)
    file = folder.path / "result.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    found = check(store)["findings"]
    file.write_bytes(whole)
    mend(found)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:50])
    mend(check(store)["findings"])
    assert not file.exists()


def test_states_behind_a_link_are_not_removed(tmp_path: Path) -> None:
    """Neither by `results check --repair` nor by the same command again."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "state-00000003.safetensors").write_text("of a run of mine")
    store, config, folder = finished(tmp_path / "theirs")
    for file in folder.checkpoints.iterdir():
        file.unlink()
    folder.checkpoints.rmdir()
    folder.checkpoints.symlink_to(mine)
    found = check(store, deep=True)["findings"]
    assert any("a link" in finding.problem for finding in found)
    mend(found)
    execute(config, store)
    assert [file.name for file in mine.iterdir()] == ["state-00000003.safetensors"]


def test_a_listed_file_that_is_a_dangling_link_is_one_finding(tmp_path: Path) -> None:
    store, _, folder = finished(tmp_path)
    file = folder.checkpoints / "model.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    assert [f.where for f in check(store)["findings"]] == [str(file)]


# Slurm's records


def test_folders_that_a_link_leads_to_are_not_cleared(tmp_path: Path) -> None:
    """A store that came from elsewhere: `jobs` leads to where the user's own folders are."""
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    os.utime(thesis, (LONG_AGO, LONG_AGO))
    store = Store(tmp_path / "runs")
    (store.root / ".slurm").mkdir(parents=True)
    (store.root / ".slurm" / "jobs").symlink_to("../..")
    with pytest.raises(UserError, match="jobs: a link"):
        Ledger(store).open()
    (store.root / ".slurm" / "jobs").unlink()
    for name in ("thesis", "0123456789ab"):
        (store.root / ".slurm" / "jobs" / name).mkdir(parents=True)
        os.utime(store.root / ".slurm" / "jobs" / name, (LONG_AGO, LONG_AGO))
    Ledger(store).open()
    assert [path.name for path in (store.root / ".slurm" / "jobs").iterdir()] == ["thesis"], "no array's name"
    assert thesis.is_dir()


def test_a_refusal_of_squeue_is_not_one_of_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch was not heard of again; that sacct says no does not tell that it took nothing."""

    def refused(*_: object) -> Any:
        raise Refused("sacct: error: Protocol authentication error")

    slurm = SimpleNamespace(queue=list, history=refused)
    sender = SimpleNamespace(slurm=slurm, name="sdae-x")
    with pytest.raises(Busy, match="Protocol authentication error"):
        _Sender.found(sender, SimpleNamespace(time=0.0))  # type: ignore[arg-type]


# What is printed


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="this needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "sweep", "list"], stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: what is printed: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_terminal_without_some_signs_gets_the_others(tmp_path: Path) -> None:
    called = spawn("paper", "table", "5", "--store", tmp_path, PYTHONIOENCODING="ascii")
    assert (called.code, called.err) == (0, ""), called.err
    assert "Multi fold" in called.out and called.out.isascii()


# Processes


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this needs Linux")
def test_a_killed_packer_leaves_no_process(tmp_path: Path) -> None:
    """Its workers wait for the next part, and the server of their forks for them: they would for ever."""
    folder = make_pictures(tmp_path / "files", 60, (320, 240))
    words = ["data", "prepare", folder, "--out", tmp_path / "out", "--form", "shards", "--side", 64, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 300
    while len(below(process.pid)) < 4 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)  # the tracker of resources, the server of forks, two workers
    others = {pid: process_start(pid) for pid in below(process.pid)}
    assert len(others) >= 4
    process.kill()
    process.wait()
    end = time.monotonic() + 300
    while left := [pid for pid, began in others.items() if began is not None and process_start(pid) == began]:
        assert time.monotonic() < end, f"processes {left} are left"
        time.sleep(0.1)


def below(pid: int) -> list[int]:
    """Processes below another one."""
    try:
        mine = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*mine, *(further for child in mine for further in below(child))]
