"""Sweeps on a real Slurm of several nodes (examples/slurm-on-one-machine): nothing is lost, nothing is run twice.

Real runs give the numbers of the local executor. All else is tried with runs that pretend (`slurm_target`), handed over
by sdae-cli as a user calls it. Scenes wait for Slurm most of their time, so they are all begun at once.

    python tests/test_slurm_real.py --faults 200     # the campaign of random faults, longer than in the tests
    python tests/test_slurm_real.py --numbers        # every run of scale smoke against the local executor
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from calling import ROOT
from slurm_campaign import Campaign, own_cluster
from slurm_runs import Yard, checkout, ended, once
from slurm_target import metrics_of
from test_resume import science

from ablations.planner import available
from sdae.config import STAGES
from sdae.store import RunFolder, Store
from slurm.look import recorded

if TYPE_CHECKING:
    from slurm_cluster import Cluster

    from ablations.planner import PlannedRun

pytestmark = pytest.mark.xdist_group("slurm")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("house"))


@pytest.fixture
def yard(cluster: Cluster, house: Path, tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(cluster, tmp_path, house)
    yield yard
    yard.forget()


# Real runs


DETERMINISTIC = ("gflop_per_image", "flop_counter_gflop", "parameters")  # of a cost run, which measures time and memory
KEPT = {"momentum": 1, "epochs": 1, "tokens": 1, "epoch": 1}  # values of a grid, the first ones
LEFT_OUT = {  # longer in other rows; a transfer each from MAE and from SdAE
    "table2": ("mae-100", "mae-300", "sdae-100"), "table3": ("mae-300", "mae-1600"), "table4": ("mae-300", "sdae-300"),
    "figure4b": ("masked", "full", "folds-2", "folds-4"),
}  # fmt: skip


def shorten(artifacts: Path) -> None:
    """Leaves out what differs from another run in a number alone: a quarter of the suite's runs at smoke remains."""
    for name in available():
        file = artifacts / f"{name}.yaml"
        values = yaml.safe_load(file.read_text())
        for row in LEFT_OUT.get(name, ()):
            del values["rows"][row]
        for row in values["rows"].values():
            grid = row.get("grid", {})
            grid.update({key: entries[: KEPT.get(key, len(entries))] for key, entries in grid.items()})
        file.write_text(yaml.safe_dump(values, sort_keys=False))


def same(ours: Store, theirs: Store, run: PlannedRun) -> None:
    """Bit for bit the same weights, rows and scores."""
    if run.config.stage != "cost":
        assert science(ours, run.config) == science(theirs, run.config), run.id
        return
    metrics = [(store.run(run.id).result() or {})["metrics"] for store in (ours, theirs)]
    assert metrics[0].keys() == metrics[1].keys()
    assert [metrics[0].get(key) for key in DETERMINISTIC] == [metrics[1].get(key) for key in DETERMINISTIC]


def compare(yard: Yard, *artifacts: str, parallel: int = 3, **profile: Any) -> list[str]:
    """Runs artifacts on Slurm and here, and compares them; the ids of their runs."""
    yard.profile(array_parallelism=parallel, **profile)
    try:
        runs = yard.submit(*artifacts)["submitted"]
        here = ended(yard.start("sweep", "submit", *artifacts, "--store", "local", "--jobs", 2, "--json"), 1200)
        assert here.code == 0, here
        yard.done(runs, 1200)
        once(yard, runs)
        assert yard.states() == dict.fromkeys(runs, "done")
        for run in recorded(yard.store):
            same(yard.store, Store(yard.folder / "local"), run)
    finally:
        yard.forget()
    return list(runs)


@pytest.mark.slow
def test_all_artifacts_have_the_numbers_of_the_local_executor(cluster: Cluster, tmp_path: Path) -> None:
    """Each kind of arm once (see `shorten`)."""
    yard = Yard(cluster, tmp_path / "yard", checkout(tmp_path / "house", pretend=False))
    shorten(yard.house / "ablations")
    runs = compare(yard)
    assert len(runs) == 30
    assert {run.partition("-")[0] for run in runs} == set(STAGES)


@pytest.mark.slow
def test_two_nodes_give_the_numbers_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    """To 1e-6, with steps so small that no rounding grows; and bit for bit those of two nodes that nobody has warned,
    made to save and requeued."""
    warned, calm = (Yard(cluster, tmp_path / name, nodes=2, cpus=1, time="60") for name in ("warned", "calm"))
    row = {"runs": {"pretrain": {"recipe": "sdae", "optim": {"epochs": 3000}}}}
    columns = {"loss": {"run": "pretrain", "metric": "loss"}}
    try:
        for yard in (warned, calm):
            file = yard.folder / "long.yaml"
            file.write_text(yaml.safe_dump({"title": "Long", "columns": columns, "rows": {"only": row}}))
            yard.artifact(1, chain=True)
        (long,) = warned.planned(file)
        warned.submit("long.yaml")
        folder = warned.run(long)  # a fast machine is done before the second heartbeat
        warned.until(lambda: folder.metrics() and folder.metrics()[-1]["step"] >= 30, "step 30", [long])
        cluster.run("scancel", "--signal=USR2", *warned.jobs(long))
        smoke = (ROOT / "ablations" / "scales" / "smoke.yaml").read_text()
        gentle = calm.folder / "gentle.yaml"  # larger steps make something of the last digit
        gentle.write_text(smoke.replace("base_lr: 4.0e-3", "base_lr: 2.0e-5"))
        words = ("own.yaml", "--scale", gentle)
        runs = calm.submit("long.yaml")["submitted"] + calm.submit(*words)["submitted"]
        here = ended(calm.start("sweep", "submit", *words, "--store", "local", "--jobs", 1), 1200)
        assert here.code == 0, here
        calm.done(runs, 1200)
        warned.done([long], 1200)
        once(calm, runs)
        once(warned, [long])
        assert calm.starts(long) == [0]
        assert len(warned.starts(long)) == 2
        assert warned.starts(long)[1] > 0
        same(warned.store, calm.store, warned.planned(file)[long])
        for identity in runs[1:]:
            together, alone = calm.run(identity), Store(calm.folder / "local").run(identity)
            assert (together.result() or {})["world_size"] == 2
            ours, wanted = numbers(together), numbers(alone)
            assert ours == pytest.approx(wanted, rel=1e-6)
    finally:
        warned.forget()
        calm.forget()


def numbers(folder: RunFolder) -> dict[str, float]:
    """Loss and learning rate of each row, and the scores."""
    rows = {f"{key} {row['step']}": row[key] for row in folder.metrics() for key in ("loss", "lr")}
    metrics = (folder.result() or {})["metrics"]
    return rows | {key: metrics[key] for key in ("loss", "top1", "top5") if key in metrics}


# Many faults


@pytest.mark.slow
def test_twenty_faults_at_random_moments(cluster: Cluster, house: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("SDAE_SEED", "0"))
    print("seed", seed)
    campaign = Campaign(cluster, house, tmp_path, seed, 40)
    try:
        campaign.go(20, 900)
        print(campaign.tell())
        campaign.check()
    finally:
        campaign.yard.forget()
        cluster.revive()


# Scenes: one fault each, all at once


Scene = Callable[[Yard], None]
NODES = {4: threading.Lock(), 3: threading.Lock()}  # for scenes that need a node of their own
ELSEWHERE = {"exclude": "node[3-4]"}


def alone(yard: Yard, node: int | None = None, **profile: Any) -> str:
    """One run, submitted, that waits before its last step; its id."""
    where = {"sbatch": {"nodelist": f"node{node}"}} if node else ELSEWHERE
    yard.profile(**where, **profile)
    yard.orders(all={"wait": True})
    (run,) = yard.planned(yard.artifact())
    assert yard.submit("own.yaml")["submitted"] == [run]
    return run


def scancel(yard: Yard) -> None:
    """What somebody cancels by hand has failed, until it is retried; then it goes on."""
    run = alone(yard)
    yard.stepped(run, 3)
    yard.cluster.run("scancel", *yard.jobs(run))
    row = yard.settled(run, "failed", "lost")
    assert row["state"] == "failed", str(row)
    assert row["failure"]["class"] == "Cancelled"
    assert yard.submit("own.yaml")["submitted"] == []
    assert yard.heal()["submitted"] == []
    assert yard.submit("retry", "own.yaml")["submitted"] == [run]
    yard.finished(run)
    assert yard.starts(run)[1] >= 3


def requeue(yard: Yard) -> None:
    """A requeued run is queued, then runs; it goes on from its state, though its pickle is the first one."""
    run = alone(yard)
    yard.stepped(run, 4)
    (job,) = yard.jobs(run)
    yard.cluster.run("scontrol", "requeue", job)
    seen: set[str] = set()

    def again() -> bool:
        seen.add(yard.states()[run])
        return len(yard.starts(run)) > 1

    yard.until(again, "another start", [run])
    assert seen <= {"queued", "running"}, seen
    assert yard.heal()["submitted"] == []
    yard.finished(run)
    assert yard.starts(run)[1] >= 4
    assert (yard.run(run).result() or {})["by"]["job"] == job.partition("_")[0]


def killed(yard: Yard) -> None:
    """A step killed with SIGKILL is a failure of its own class; retry goes on from the state."""
    run = alone(yard)
    beat = yard.stepped(run, 3)
    os.kill(beat["pid"], signal.SIGKILL)
    row = yard.settled(run, "failed", "lost")
    assert (row["state"], row["failure"]["class"]) == ("failed", "Killed"), str(row)
    assert yard.submit("own.yaml")["submitted"] == []
    assert yard.submit("retry", "own.yaml")["submitted"] == [run]
    yard.finished(run)
    assert yard.starts(run)[1] >= 3


def time_out(yard: Yard) -> None:
    """A limit shorter than the run: it is warned, saves, is requeued, and goes on until it is done."""
    yard.profile(**ELSEWHERE, time="2", warn_seconds=10)  # Slurm may warn a minute too early
    (run,) = yard.planned(yard.artifact())
    yard.orders(all={"wait": True, "save": 1000})  # before the last step; states are saved at a warning alone
    yard.submit("own.yaml")
    yard.noted(run, "start", 2)
    assert yard.states()[run] == "running"
    assert yard.heal()["submitted"] == []
    yard.orders()
    yard.done([run])
    assert (yard.run(run).result() or {})["metrics"] == metrics_of(run)
    once(yard, [run])
    starts = yard.starts(run)
    assert starts == sorted(set(starts))
    first = yard.noted(run)[0]
    assert (first["outcome"], first["timed_out"]) == ("interrupted", True)


def no_progress(yard: Yard) -> None:
    """Where an attempt brings nothing, more of the same will not help: whether the run says so or Slurm ends it."""
    yard.profile(**ELSEWHERE, time="1", warn_seconds=10)
    idle, deaf = yard.planned(yard.artifact(2))
    yard.orders(**{idle: {"save": 0, "steps": 10**6}, deaf: {"save": 0, "steps": 10**6, "deaf": True}})
    yard.submit("own.yaml")
    for run in (idle, deaf):
        row = yard.settled(run, "failed", "lost")
        assert (row["state"], row["failure"]["class"]) == ("failed", "NoProgress"), str(row)
    assert yard.heal()["submitted"] == []
    for run in (idle, deaf):
        assert len(yard.starts(run)) == 1
    yard.profile(**ELSEWHERE)
    yard.orders()
    assert sorted(yard.submit("retry", "own.yaml")["submitted"]) == sorted([idle, deaf])
    yard.finished(idle, deaf)


def no_scontrol(yard: Yard) -> None:
    """Without scontrol a warned run cannot requeue itself: it says so, and heal submits it again."""
    path = yard.folder / "bin"
    path.mkdir()
    for folder in ("/bin", "/usr/bin", str(Path(shutil.which("srun") or "").parent)):
        for program in Path(folder).iterdir():
            if program.name != "scontrol" and not (path / program.name).is_symlink():
                (path / program.name).symlink_to(program)
    run = alone(yard, setup=[f"export PATH={path}"])
    yard.stepped(run, 3)
    yard.cluster.run("scancel", "--signal=USR2", *yard.jobs(run))
    row = yard.settled(run, "failed", "lost")
    assert (row["state"], row["failure"]["class"]) == ("lost", "Preempted"), str(row)
    assert "scontrol is not there" in row["failure"]["message"]
    assert yard.heal()["submitted"] == [run]
    yard.finished(run)
    assert yard.starts(run)[1] >= 3


def failing_need(yard: Yard) -> None:
    """A dependant of a failed run waits in vain in Slurm's eyes; heal takes it out, and retry brings both back."""
    yard.profile(**ELSEWHERE, sbatch={"kill-on-invalid-dep": "no"})
    pretrain, finetune = yard.planned(yard.artifact(chain=True))
    yard.orders(pretrain={"fail": "the loss is nan at step 9"})
    yard.submit("own.yaml")
    row = yard.settled(pretrain, "failed", "lost")
    assert row["failure"] == {"class": "Pretended", "message": "the loss is nan at step 9", "attempt": 1}
    yard.cluster.until(lambda: "DependencyNeverSatisfied" in str(yard.rows()[finetune]), yard.cluster.queue)
    assert yard.states()[finetune] == "waiting"
    healed = yard.heal()
    assert any(finetune in line for line in healed["mended"])
    assert healed["submitted"] == []
    yard.cluster.until(lambda: not yard.jobs(finetune), yard.cluster.queue)
    assert yard.states() == {pretrain: "failed", finetune: "waiting"}
    yard.orders()
    assert yard.submit("retry", "own.yaml")["submitted"] == [pretrain, finetune]
    yard.finished(pretrain, finetune)


def slurmd_restart(yard: Yard) -> None:
    """A run does not notice that its node's daemon has died and come back."""
    with NODES[4]:
        run = alone(yard, 4)
        yard.stepped(run, 3)
        yard.cluster.kill_slurmd(4)
        yard.cluster.start_slurmd(4)  # at once: a node that is silent for some seconds is down
        assert yard.states()[run] == "running"
        yard.finished(run)
        assert yard.starts(run) == [0]


def dead_node(yard: Yard) -> None:
    """The runs of a dead node run elsewhere, and are called neither failed nor lost before."""
    with NODES[4]:
        run = alone(yard, 4)
        beat = yard.stepped(run, 4)
        (job,) = yard.jobs(run)
        yard.cluster.kill_node(4)
        seen = set()

        def again() -> bool:
            seen.add(yard.states(grace=15)[run])
            if "PENDING" in yard.cluster.squeue("--job", job, "--format=%T"):
                with contextlib.suppress(AssertionError):  # it has begun meanwhile
                    yard.cluster.run("scontrol", "update", f"jobid={job}", "reqnodelist=")
            return len(yard.starts(run)) > 1

        try:
            yard.until(again, "again", [run])
        finally:
            yard.cluster.start_slurmd(4)
        assert seen <= {"queued", "running"}, seen
        assert yard.heal()["submitted"] == []
        yard.finished(run)
        assert yard.starts(run)[1] >= beat["step"]


def preempted(yard: Yard) -> None:
    """A run of the low partition makes room, saved, and goes on when there is room again."""
    with NODES[3]:
        run = alone(yard, 3, partition="low", cpus=2)
        yard.stepped(run, 3)
        above = yard.cluster.sbatch("--nodelist=node3", "--cpus-per-task=2", "--wrap", "sleep 5")
        yard.noted(run)
        assert yard.states()[run] in ("queued", "running")
        yard.finished(run)
        assert yard.noted(run)[0]["outcome"] == "interrupted"
        assert yard.starts(run)[1] >= 3
        yard.cluster.wait(above)


def cancelled_by_preemption(yard: Yard) -> None:
    """On a partition that cancels, a preempted run requeues itself where it may; else it is lost: heal submits it."""
    with NODES[3]:
        run = alone(yard, 3, partition="spot", cpus=2)
        yard.stepped(run, 3)
        above = yard.cluster.sbatch("--nodelist=node3", "--cpus-per-task=2", "--wrap", "sleep 5")
        yard.noted(run)
        yard.cluster.wait(above)
        yard.cluster.until(lambda: yard.states()[run] == "lost" or len(yard.starts(run)) > 1, lambda: yard.tell([run]))
        if yard.states()[run] == "lost":
            assert yard.rows()[run]["failure"]["class"] == "Preempted"
            assert yard.heal()["submitted"] == [run]
        yard.finished(run)
        assert yard.starts(run)[1] >= 3


def held_launch(yard: Yard) -> None:
    """A task whose launch failed is held by Slurm; heal lets it go."""
    with NODES[3]:
        last = int(yard.cluster.sbatch("--nodelist=node3", "--wrap", "true"))
        blocks = [yard.cluster.dir / "spool" / "node3" / f"job{last + n:05d}" for n in range(1, 60)]
        for block in blocks:  # where the node wants to make a folder
            block.touch()
        try:
            run = alone(yard, 3)
            yard.cluster.until(lambda: "held" in yard.cluster.squeue("--format=%j %r").lower(), yard.cluster.queue)
        finally:
            for block in blocks:
                if block.is_file():
                    block.unlink()
        row = yard.settled(run, "queued")
        assert "held" in row["detail"].lower()
        assert any(run in line for line in yard.heal()["mended"])
        yard.finished(run)


FAST = (scancel, requeue, killed, failing_need)
SLOW = (
    time_out, no_progress, no_scontrol, slurmd_restart, dead_node, preempted, cancelled_by_preemption, held_launch,
)  # fmt: skip


@pytest.fixture(scope="module")
def begun(
    request: pytest.FixtureRequest, cluster: Cluster, house: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Scene], Future[None]]]:
    """Begins a scene; where this process has all of the tests of this module, all that were asked for at once."""
    together = request.config.getoption("dist", "no") in ("no", "loadgroup", "loadfile")
    items = request.session.items if together else []
    wanted = {item.callspec.params["scene"] for item in items if "scene" in getattr(item, "fixturenames", ())}  # type: ignore[attr-defined]
    under_way: dict[Scene, Future[None]] = {}
    yards = []

    def begin(scene: Scene) -> Future[None]:
        if scene not in under_way:
            yards.append(Yard(cluster, tmp_path_factory.mktemp(scene.__name__), house))
            under_way[scene] = pool.submit(scene, yards[-1])
        return under_way[scene]

    with ThreadPoolExecutor(len(FAST + SLOW)) as pool:
        for scene in (*SLOW, *FAST):
            if scene in wanted:
                begin(scene)
        yield begin
        pool.shutdown(cancel_futures=True)
    for yard in yards:
        yard.forget()
    cluster.revive()


def test_real_runs_give_the_numbers_of_the_local_executor(
    cluster: Cluster, tmp_path: Path, begun: Callable[[Scene], Future[None]]
) -> None:
    """A pre-training and its fine-tuning, while the scenes are played: not on nodes that these take down."""
    yard = Yard(cluster, tmp_path)
    yard.artifact(1, chain=True)
    assert len(compare(yard, "own.yaml", **ELSEWHERE)) == 2


@pytest.mark.parametrize("scene", [*FAST, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)])
def test_scene(scene: Scene, begun: Callable[[Scene], Future[None]]) -> None:
    begun(scene).result()


def main() -> None:
    """Sweeps of 40 runs and 20 faults each, one after another, until there were as many faults as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--numbers", action="store_true", help="no faults: all runs of scale smoke, really run")
    options = parser.parse_args()
    with own_cluster() as cluster, tempfile.TemporaryDirectory() as name:
        if options.numbers:
            runs = compare(Yard(cluster, Path(name)), parallel=4)
            print(f"{len(runs)} runs have the numbers of the local executor")
            return
        house, faults = checkout(Path(name) / "house"), 0
        while faults < options.faults:
            seed = options.seed + faults
            print(f"after {faults} faults: seed {seed}", flush=True)
            campaign = Campaign(cluster, house, Path(name) / str(seed), seed, 40)
            campaign.go(20, 900)
            campaign.check()
            print(campaign.tell(), flush=True)
            faults += campaign.faults
            cluster.revive()
            cluster.cancel_all()
    print(f"{faults} faults: every run done, once")


if __name__ == "__main__":
    main()
