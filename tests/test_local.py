"""The local executor, with runs that only pretend: order, sharing, failures, dead workers, stops, resuming."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ablations.planner import Sweep, plan
from sdae.errors import UserError
from sdae.store import Store
from slurm.local import Summary, failed_part, followed, run_local, tail
from slurm.look import survey
from slurm.machine import gpus
from slurm.status import overview, status

TARGET = "local_target:execute"
ROOT = Path(__file__).parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def table5() -> Sweep:
    return plan(["table5"], "smoke")


def go(sweep: Sweep, store: Store, **options: object) -> Summary:
    return run_local(sweep, store, target=TARGET, **options)  # type: ignore[arg-type]


def span(store: Store, identity: str) -> tuple[float, float]:
    text = store.run(identity).log.read_text()
    return tuple(float(re.findall(rf"{word} ([\d.]+)", text)[-1]) for word in ("began", "ended"))  # type: ignore[return-value]


def test_needs_come_first_and_nothing_is_run_twice(store: Store) -> None:
    sweep, seen = plan(["table1", "table5", "figure4b"], "smoke"), []
    summary = go(sweep, store, jobs=2, on_update=lambda s: seen.append(dict(s.states)))
    assert summary.ok
    assert summary.ran == sweep.unique
    assert max(sum(s == "running" for s in states.values()) for states in seen) == 2
    for run in sweep.runs.values():
        for need in run.needs:
            assert span(store, need)[1] <= span(store, run.id)[0]
    log = store.run(next(iter(sweep.runs))).log.read_text()
    assert "from below python" in log  # file descriptor 1, not only sys.stdout
    assert "threads 1" in log
    again = go(sweep, store, jobs=2)
    assert again.ok
    assert again.ran == 0


def test_a_cost_run_is_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.03")
    sweep = plan(["table1", "table5"], "smoke")
    assert go(sweep, store, jobs=2).ok
    spans = {identity: span(store, identity) for identity in sweep.runs}
    for identity, (began, ended) in spans.items():
        if identity.startswith("cost"):
            assert not any(a < ended and began < b for other, (a, b) in spans.items() if other != identity)


def test_longest_chain_first(store: Store) -> None:
    sweep = plan(["table2"], "smoke")
    assert go(sweep, store, jobs=1).ok
    first = min(sweep.runs, key=lambda identity: span(store, identity)[0])
    assert "table2.mae-1600.finetune" in sweep.runs[first].feeds


@pytest.mark.parametrize(
    ("mode", "kind", "recorded"),
    [
        ("fail", "NonFiniteLoss", True),
        ("crash", "ZeroDivisionError", True),
        ("kill", "WorkerDied", True),
        ("refuse", "", False),
    ],
)
def test_failures_stop_only_what_needs_them(
    mode: str, kind: str, recorded: bool, store: Store, monkeypatch: pytest.MonkeyPatch, table5: Sweep
) -> None:
    monkeypatch.setenv("FAKE_PRETRAIN", mode)
    summary = go(table5, store, jobs=2)
    assert len(summary.having("failed")) == len(summary.having("waiting")) == 4
    assert all("waits for pretrain-" in summary.messages[i] for i in summary.having("waiting"))
    for identity in summary.having("failed"):
        failure = store.run(identity).failure()
        assert (failure is not None) == recorded
        assert not recorded or (failure["class"], failure["attempt"]) == (kind, 1)
    monkeypatch.delenv("FAKE_PRETRAIN")
    if recorded:  # stays failed until retry
        assert go(table5, store).ran == 0
        document = status(table5.runs.values(), survey(table5.runs.values(), store))
        assert document["counts"] == {"failed": 4, "waiting": 4}
        assert {row["failure"]["class"] for row in document["runs"] if row["state"] == "failed"} == {kind}
        part = failed_part(table5, store)
        assert set(part.runs) == set(table5.runs)
        assert go(part, store, retry=True).ok
        assert failed_part(table5, store).unique == 0
    else:  # bad input: nothing was recorded, so it is tried again
        assert go(table5, store).ok


def test_a_worker_that_is_seen_to_be_dead_first_is_heard_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, table5: Sweep
) -> None:
    """Else one that had said it was ready, and was killed at once, would be taken for one that cannot start."""
    monkeypatch.setenv("FAKE_PRETRAIN", "kill")
    monkeypatch.setattr(selectors.DefaultSelector, "select", lambda self, seconds: time.sleep(0.05) or [])
    summary = go(table5, store, jobs=2)
    assert len(summary.having("failed")) == 4
    assert {(store.run(i).failure() or {})["class"] for i in summary.having("failed")} == {"WorkerDied"}


def test_two_processes_share_the_work(store: Store, monkeypatch: pytest.MonkeyPatch, table5: Sweep) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    found: list[Summary] = []
    threads = [threading.Thread(target=lambda: found.append(go(table5, store, jobs=1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.ok for summary in found] == [True, True]
    assert all(store.run(i).log.read_text().count("began") == 1 for i in table5.runs)


SCRIPT = """
import sys
from ablations.planner import plan
from sdae.store import Store
from slurm.local import run_local
summary = run_local(plan(["table5"], "smoke"), Store(sys.argv[1]), jobs=2, target="local_target:execute")
print("interrupted", summary.interrupted, len(summary.having("done")))
"""


def start(store: Store, seconds: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT.parent)])
    environment = dict(os.environ, FAKE_SECONDS=seconds, PYTHONPATH=path)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.root)], env=environment, stdout=subprocess.PIPE, text=True
    )
    for _ in range(6000):
        if sum("running" in store.run(i).state() for i in store.ids()) == 2:
            return process
        time.sleep(0.01)
    raise AssertionError("no run began")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_lets_runs_save_and_goes_on_later(number: signal.Signals, store: Store, table5: Sweep) -> None:
    process = start(store, "30")
    process.send_signal(number)
    assert process.communicate(timeout=600)[0].strip() == "interrupted True 0"
    assert {store.run(i).state() for i in store.ids()} == {"started"}
    assert go(table5, store).ok


def test_killed_it_leaves_no_worker_behind(store: Store, table5: Sweep) -> None:
    process = start(store, "3")
    process.kill()
    process.communicate()
    assert go(table5, store).ok  # what the orphans still hold is waited for or taken over
    for _ in range(3000):
        if not any(store.run(i).claimed() for i in store.ids()):
            return
        time.sleep(0.01)
    raise AssertionError("a worker lives on")


def test_missing_pictures_are_told_before_anything_starts(store: Store) -> None:
    sweep = plan(["table5"], "paper", data_path="/nowhere")
    with pytest.raises(UserError, match="/nowhere"):
        go(sweep, store)
    assert not store.root.exists()


def test_bad_calls(store: Store, table5: Sweep) -> None:
    with pytest.raises(UserError, match="--jobs 0"):
        go(table5, store, jobs=0)
    with pytest.raises(UserError, match="a worker could not start: ModuleNotFoundError"):
        run_local(table5, store, target="no_such_module:execute")


def test_a_sign_that_is_written_by_halves_is_followed_whole(store: Store) -> None:
    run = store.run("pretrain-0123456789abcdef")
    run.path.mkdir(parents=True)
    run.log.write_bytes("é".encode()[:1])

    def sleep(seconds: float) -> None:
        run.log.write_bytes("é".encode())
        (run.path / "result.json").write_text("{}")

    assert "".join(followed(run, 0, sleep, queued=True)) == "é"


@pytest.mark.parametrize(
    ("visible", "names"), [("0,2", ["0", "2"]), ("0,-1,1", ["0"]), ("", []), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])]
)
def test_gpus_are_those_that_cuda_sees(visible: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == names


def test_tail_follow_and_overview(store: Store, table5: Sweep) -> None:
    assert tail(store.root / "absent") == []
    assert go(table5, store).ok
    run = store.run(next(iter(table5.runs)))
    assert tail(run.log, 1)[0].startswith("ended")
    assert "".join(followed(run, 0, time.sleep)) == run.log.read_text()
    rows = {row["artifact"]: row for row in overview(table5.scale, [0], store)}
    assert rows["table5"]["done"] == rows["table5"]["runs"] == 8
    assert (rows["table3"]["runs"], rows["table3"]["filled"]) == (6, 3)
