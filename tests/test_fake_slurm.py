"""The model of Slurm by itself: what the proof of the reconciler stands on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import KILL_WAIT, Element, FakeSlurm, World
from submitit.core.utils import DelayedSubmission

from sdae.errors import RunFailed
from slurm.cluster import Busy, Refused
from slurm.submit import TOO_MANY


class Work:
    """What a task does: takes time, and fails where it is told to."""

    world: World
    done: list[tuple[float, str]]

    def __init__(self, seconds: float, fails: bool = False):
        self.seconds, self.fails = seconds, fails

    def __call__(self) -> None:
        Work.world.pause(self.seconds)
        if self.fails:
            raise RunFailed("as told")
        Work.done.append((Work.world.now, Work.world.host()))


@pytest.fixture
def slurm() -> Any:
    world = Work.world = World(1)
    Work.done = []
    slurm = FakeSlurm(world, nodes=2, slots=2)
    slurm.delay = (1, 1)
    yield slurm
    world.close()
    assert not world.errors


def script(folder: Path, array: str = "0", seconds: float = 100, fails: bool = False, **options: object) -> Path:
    values = {"job-name": "sdae-a", "time": 60, "signal": "USR2@60", "requeue": "", "array": array} | {
        key.replace("_", "-"): value for key, value in options.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    DelayedSubmission(Work(seconds, fails)).dump(folder / "job.pkl")
    lines = [f"#SBATCH --{key}={value}" if value != "" else f"#SBATCH --{key}" for key, value in values.items()]
    file = folder / "submission.sh"
    file.write_text("\n".join(["#!/bin/bash", *lines, f"[ -e there ] || cp {folder}/job.pkl there", "srun true"]))
    return file


def states(slurm: FakeSlurm) -> list[str]:
    return [f"{task.state} {task.reason}".strip() for task in slurm.queue()]


def only(slurm: FakeSlurm) -> Element:
    (element,) = slurm.all()
    return element


def test_an_array_keeps_to_its_limit_and_dependants_wait(slurm: FakeSlurm, tmp_path: Path) -> None:
    first = slurm.submit(script(tmp_path / "a", "0-3,6%2"))
    slurm.submit(script(tmp_path / "b", "0-1", job_name="sdae-b", dependency=f"aftercorr:{first}"))
    slurm.submit(script(tmp_path / "c", "0", job_name="sdae-c", dependency=f"afterany:{first}_0:{first}_6"))
    most = 0
    for _ in range(600):
        slurm.world.advance(1)
        most = max(most, sum(element.array.name == "sdae-a" for element in slurm.running()))
    assert most == 2
    assert len(Work.done) == 8
    assert not slurm.queue()
    ends = {element.id: element.ended for element in slurm.all()}
    starts = {element.id: element.started for element in slurm.all()}
    assert starts["101_0"] >= ends["100_0"]
    assert starts["101_1"] >= ends["100_1"]
    assert starts["102_0"] >= max(ends["100_0"], ends["100_6"])
    rows = slurm.history(["sdae-a"], 0) or []
    assert [(task.id, task.state) for task in rows] == [(f"100_{i}", "COMPLETED") for i in (0, 1, 2, 3, 6)]


@pytest.mark.parametrize("kill", [True, False])
def test_a_dependency_that_cannot_be_met(kill: bool, slurm: FakeSlurm, tmp_path: Path) -> None:
    first = slurm.submit(script(tmp_path / "a", fails=True))
    more = script(
        tmp_path / "b", job_name="sdae-b", dependency=f"aftercorr:{first}", kill_on_invalid_dep="yes" if kill else "no"
    )
    slurm.submit(more)
    slurm.world.advance(300)
    assert states(slurm) == ([] if kill else ["PENDING DependencyNeverSatisfied"])
    assert [task.state for task in slurm.history(["sdae-b"], 0) or []] == ["CANCELLED" if kill else "PENDING"]


def test_requeued_it_runs_again_and_each_attempt_has_a_row(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.submit(script(tmp_path, seconds=50))
    slurm.world.advance(20)
    element = only(slurm)
    old = element.process
    slurm.requeue(element, "REQUEUED")
    slurm.world.advance(3)
    assert states(slurm) == ["PENDING BeginTime"]
    slurm.world.advance(300)
    assert old is not None
    assert not old.alive
    assert [task.state for task in slurm.history(["sdae-a"], 0) or []] == ["REQUEUED", "COMPLETED"]
    assert element.restart == 1


def test_sacct_is_late_and_forgets(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.faults.lag, slurm.faults.purge = 10, 100
    slurm.submit(script(tmp_path, seconds=50))
    told = set()
    for _ in range(60):
        slurm.world.advance(1)
        (queue, rows) = slurm.queue(), slurm.history(["sdae-a"], 0) or []
        told.add((queue[0].state if queue else None, rows[-1].state if rows else None))
    assert {("RUNNING", None), ("RUNNING", "PENDING")} & told
    slurm.world.advance(200)
    assert slurm.history(["sdae-a"], 0) == []
    slurm.faults.sacct = False
    assert slurm.history(["sdae-a"], 0) is None


def test_a_lost_node_takes_its_processes_along(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.submit(script(tmp_path, "0-3", seconds=500))
    slurm.world.advance(30)
    slurm.lose_node("node1", notice=40, back=1000)
    assert [element.process.alive for element in slurm.all() if element.process].count(False) == 2
    slurm.world.advance(30)
    assert [task.state for task in slurm.queue()] == ["RUNNING"] * 4  # Slurm does not know yet
    slurm.world.advance(20)
    assert sorted(task.state for task in slurm.history(["sdae-a"], 0) or []).count("NODE_FAIL") == 2
    slurm.world.advance(2000)
    assert len(Work.done) == 4


def test_a_frozen_node_works_on_when_it_thaws(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.submit(script(tmp_path, seconds=100))
    slurm.world.advance(30)
    slurm.freeze_node(only(slurm).node, 200, notice=1000)
    slurm.world.advance(190)
    assert not Work.done
    slurm.world.advance(30)
    assert len(Work.done) == 1


def test_the_time_limit_warns_then_ends(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.submit(script(tmp_path, seconds=10_000, time=10))
    slurm.world.advance(20)
    element, got = only(slurm), list[int]()
    process = element.process
    assert process is not None
    process.handler = got.append
    slurm.world.advance(540)
    assert got == [signal.SIGUSR2]
    slurm.world.advance(110)
    assert element.state == "TIMEOUT"
    slurm.world.advance(KILL_WAIT + 1)
    assert got == [signal.SIGUSR2, signal.SIGTERM]
    assert not process.alive


def test_what_sbatch_says_and_does(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.array_limit, slurm.task_limit = 4, 6
    with pytest.raises(Refused, match="Invalid job array"):
        slurm.submit(script(tmp_path, "0-4"))
    slurm.submit(script(tmp_path, "0-3"))
    with pytest.raises(Refused) as refused:
        slurm.submit(script(tmp_path, "0-3"))
    assert TOO_MANY.search(str(refused.value))
    with pytest.raises(Refused, match="dependency"):
        slurm.submit(script(tmp_path, "0", dependency="aftercorr:7"))
    slurm.task_limit = 100
    slurm.faults.unheard = 1.0
    with pytest.raises(Busy):
        slurm.submit(script(tmp_path))
    assert len(slurm.arrays) == 2
    slurm.faults.unheard, slurm.faults.late = 0.0, 1.0
    with pytest.raises(Busy):
        slurm.submit(script(tmp_path))
    slurm.world.advance(60)
    assert len(slurm.arrays) == 3
    slurm.faults.late, slurm.faults.twice = 0.0, 1.0
    slurm.submit(script(tmp_path))
    assert len(slurm.arrays) == 5
    slurm.deaf = {"squeue"}
    with pytest.raises(Busy):
        slurm.queue()


def test_cancel_hold_and_release(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.nodes = dict.fromkeys(slurm.nodes, False)
    job = slurm.submit(script(tmp_path, "0-2"))
    slurm.cancel([f"{job}_1"])
    elements = slurm.all()
    slurm.hold(elements[0])
    slurm.nodes = dict.fromkeys(slurm.nodes, True)
    slurm.world.advance(300)
    assert [element.state.split()[0] for element in elements[1:]] == ["CANCELLED", "COMPLETED"]
    assert states(slurm)[0].endswith("launch failed requeued held")
    slurm.release([f"{job}_0"])
    slurm.world.advance(300)
    assert len(Work.done) == 2


def test_a_killed_process_stops_where_it_waits_and_others_take_turns() -> None:
    world, seen = World(2), list[tuple[str, float]]()

    def work(name: str) -> int:
        for _ in range(3):
            world.pause(10)
            seen.append((name, world.now))
        return 0

    one = world.start("a", lambda: work("one"))
    world.start("b", lambda: work("two"), delay=5)
    world.advance(16)
    one.kill()
    world.advance(100)
    world.close()
    began = seen[0][1] - 10
    assert [(name, when - began) for name, when in seen] == [("one", 10), ("two", 15), ("two", 25), ("two", 35)]
