"""Rounds of the concurrency campaign, that it finds what it is for, and what a process sees through its stale disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from sdae.config import dump, run_id
from sdae.errors import RunFailed
from sdae.store import Store
from slurm.worker import run

HERE = Path(__file__).parent
SEED = os.environ.get("SDAE_SEED", "0")  # the same rounds each time; `make trust` plays others


def python(*words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A process of its own: the campaign's torch is a fake."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def campaign(out: Path, *words: str) -> dict[str, Any]:
    print("SDAE_SEED", SEED)
    done = python(str(HERE / "concurrency_campaign.py"), "--seed", SEED, "--out", str(out), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["failures"] == []
    assert report["counts"]["finished"] == report["counts"]["runs"]
    return report


def test_whatever_eight_processes_do_each_run_is_done_once(tmp_path: Path) -> None:
    assert campaign(tmp_path / "report.json", "--rounds", "1")["rounds"] == 1
    again = campaign(tmp_path / "report.json", "--rounds", "3")  # goes on
    assert again["rounds"] == 3
    assert again["counts"]["runs"] >= 3


@pytest.mark.slow
def test_twenty_rounds(tmp_path: Path) -> None:
    report = campaign(tmp_path / "report.json", "--rounds", "20")
    assert report["counts"].keys() >= {"killed", "rounds over NFS", "rounds on one machine", "commands again"}


BROKEN = """
from concurrency_campaign import *
import analysis.frame, concurrency.rounds, os, sys, time
from sdae.store import RunFolder

def take(folder, file, fresh):
    if folder.claimed():
        return False
    time.sleep(0.01)
    os.rename(fresh, file)
    return True

if sys.argv[1] == "claims":
    RunFolder._take = take
    concurrency.rounds.RACES = 1.0
else:
    analysis.frame._stamp = lambda folder: int(os.path.exists(folder + "/config.yaml"))
prepare()
whole = sweeps()
for number in range(40):
    counts, wrong = play(f"0 {number}", whole)
    if wrong:
        print(wrong)
    if any(word in wrong for word in sys.argv[2:]):
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"), [("claims", ("by two at a time", "was finished 2 times")), ("index", ("the index is wrong",))]
)
def test_the_campaign_finds(what: str, words: tuple[str, ...]) -> None:
    done = python("-c", BROKEN, what, *words)
    assert any(word in done.stdout for word in words), done.stdout + done.stderr


def test_a_failure_that_was_retried_at_once_is_not_written_again(tmp_path: Path) -> None:
    config = tiny()
    store = Store(tmp_path / "runs")
    folder = store.run(run_id(config))
    folder.create(config)

    def execute(*_: object, **__: object) -> None:
        folder.fail("NonFiniteLoss", "the loss is nan at step 3")
        folder.forget_failure()  # `sweep retry`, in another terminal
        raise RunFailed("the loss is nan at step 3")

    assert run(execute, folder, store, dump(config), None)["outcome"] == "failed"
    assert folder.state() == "started"


def test_a_refused_run_takes_nothing_of_another_s_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder goes at once, whatever another process writes to the same place while it is being removed."""
    config = tiny()
    store = Store(tmp_path / "runs")
    folder = store.run(run_id(config))
    folder.create(config)

    def slowly(path: Path) -> None:
        folder.create(config)
        (folder.path / "provenance.json").write_text("another's")
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr("sdae.store.shutil.rmtree", slowly)
    store.remove(folder.id)
    assert folder.path.is_dir()
    assert (folder.path / "provenance.json").read_text() == "another's"
    assert folder.state() == "started"
    assert [path.name for path in store.root.iterdir() if path.suffix == ".tmp"] == []


def test_a_folder_that_went_before_the_claim_is_made_again(tmp_path: Path) -> None:
    config = tiny()
    folder = Store(tmp_path / "runs").run(run_id(config))
    with folder.claim() as mine:
        assert mine


STALE = """
import os, sys, time
from pathlib import Path
from concurrency import stale

stale.install()
root = Path(sys.argv[1])
mine, elsewhere = root / "mine", root / "elsewhere"
for folder in (mine, elsewhere):
    folder.mkdir()
(mine / "a").write_text("old")
(mine / "b").symlink_to("old")
disk = stale.Disk(str(root), 0, lag=1000.0)
stale.use(disk)

def others(work):  # as another machine does it
    stale.use(None)
    work()
    stale.use(disk)

def change():
    (mine / "new").write_text("newer")
    os.replace(mine / "new", mine / "a")
    (mine / "c").write_text("c")
    (mine / "b").unlink()

assert (mine / "a").read_text() == "old" and not (mine / "c").exists()
assert sorted(os.listdir(mine)) == ["a", "b"] and os.readlink(mine / "b") == "old"
others(change)
assert (mine / "a").read_text() == "old" and (mine / "a").stat().st_size == 3  # by its old name, the old file
assert not (mine / "c").exists() and sorted(os.listdir(mine)) == ["a", "b"] and os.readlink(mine / "b") == "old"
(elsewhere / "x").write_text("x")
assert not (mine / "c").exists()  # a change in another folder tells nothing of this one
try:
    os.link(elsewhere / "x", mine / "c")  # decided by the server
    sys.exit("linked over what is there")
except FileExistsError:
    pass
assert (mine / "a").read_text() == "newer" and (mine / "c").read_text() == "c"
assert sorted(os.listdir(mine)) == ["a", "c"]
quick = stale.Disk(str(root), 0, lag=0.05)
stale.use(quick)
assert not (mine / "d").exists()
stale.use(None)
(mine / "d").write_text("d")
stale.use(quick)
time.sleep(0.06)
assert (mine / "d").exists()
stale.use(stale.Disk(str(root), 0, life=2))
for number in range(5):
    (mine / str(number)).write_text("")
"""


def test_what_a_process_sees_of_changes_by_others(tmp_path: Path) -> None:
    done = python("-c", STALE, str(tmp_path))
    assert (done.returncode, done.stderr) == (-9, "")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["0", "1", "a", "c", "d"]  # its life was over
