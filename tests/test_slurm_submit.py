"""How sweeps get into the queue of a real Slurm, and out of it: once each, or not at all with a line that says why.

Runs pretend (`slurm_target`), or their jobs stay in the queue; sdae-cli is called as its users call it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from calling import ROOT, assert_refused
from slurm_runs import Yard, checkout, ended, healed, once, wrapper

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = pytest.mark.xdist_group("slurm")
HELD = {"sbatch": {"begin": "now+1hour"}}  # jobs that stay in the queue


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("house"))


@pytest.fixture
def yard(cluster: Cluster, house: Path, tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(cluster, tmp_path, house)
    yield yard
    yard.forget()


def test_what_is_missing_is_submitted_once(yard: Yard) -> None:
    """Twice the same: the second time nothing. More: only what is new. Edited meanwhile: what is queued stays."""
    yard.profile(**HELD)
    first = yard.ids(3, chain=True)
    report = yard.submit("own.yaml")
    assert sorted(report["submitted"]) == sorted(first)
    assert [array["array"] for array in report["arrays"]] == ["0-2"] * 2
    assert report["arrays"][1]["dependency"] == f"aftercorr:{report['arrays'][0]['job']}"
    assert yard.submit("own.yaml")["submitted"] == []
    assert yard.in_queue() == sorted(first)
    more = yard.ids(4, chain=True)  # the file is edited while its jobs wait
    assert set(yard.submit("own.yaml")["submitted"]) == {*more} - {*first}
    assert yard.in_queue() == sorted(more)
    (yard.folder / "own.yaml").write_text("title: broken\n")
    assert set(yard.rows()) == set(more)  # what was handed over needs no file any more
    assert yard.heal()["submitted"] == []
    assert yard.cancel().out == f"{len(more)} runs ended\n"
    yard.cluster.until(lambda: yard.in_queue() == [], yard.cluster.queue)


def test_several_shells_submit_each_run_once(yard: Yard) -> None:
    yard.profile(**HELD)
    runs = yard.ids(12, chain=True)
    words = ("sweep", "submit", "own.yaml", "--on", "slurm", "--profile", "profile.yaml", "--json")
    reports = [ended(shell) for shell in [yard.start(*words) for _ in range(3)]]
    assert [report.code for report in reports] == [0, 0, 0], reports
    assert yard.in_queue() == sorted(runs)
    told = [run for report in reports for run in json.loads(report.out)["submitted"]]
    assert sorted(told) == sorted(runs)


TIMED_OUT = """{sbatch} "$@" >/dev/null
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1"""


def test_an_sbatch_that_times_out_after_its_job_was_taken(yard: Yard) -> None:
    yard.profile(**HELD)
    runs = yard.ids(2, chain=True)
    slow = wrapper(yard.folder / "bin", "sbatch", TIMED_OUT.format(sbatch=shutil.which("sbatch")))
    report = yard.submit("own.yaml", first=slow)
    assert sorted(report["submitted"]) == sorted(runs)
    assert not report["trouble"]
    assert yard.in_queue() == sorted(runs)
    assert yard.submit("own.yaml")["submitted"] == []


def test_a_submitter_that_dies_after_its_job_was_taken(yard: Yard) -> None:
    """heal finds the array by its name."""
    yard.profile(**HELD)
    runs = yard.ids(2)
    taken = yard.folder / "taken"
    mute = f'{shutil.which("sbatch")} "$@" >/dev/null; touch {taken}; while kill -0 $PPID; do sleep 0.2; done'
    first = wrapper(yard.folder / "bin", "sbatch", mute)
    shell = yard.start("sweep", "submit", "own.yaml", "--on", "slurm", "--profile", "profile.yaml", first=first)
    yard.cluster.until(taken.exists, yard.cluster.queue)
    shell.kill()
    shell.communicate()
    assert set(yard.states().values()) == {"queued"}
    assert yard.submit("own.yaml")["submitted"] == []
    healed = yard.heal()
    assert healed["submitted"] == []
    assert yard.in_queue() == sorted(runs)
    assert yard.cancel().out == "2 runs ended\n"
    yard.cluster.until(lambda: yard.in_queue() == [], yard.cluster.queue)


def test_cancel_ends_only_what_is_ours(yard: Yard, cluster: Cluster, house: Path) -> None:
    """Not the jobs of another store, nor those of another kind, nor those of another user."""
    yard.profile(**HELD)
    mine = yard.ids(2)
    other = Yard(cluster, yard.folder / "other", house, **HELD)
    theirs = other.ids(2)
    assert theirs == mine
    plain = cluster.sbatch("--begin=now+1hour", "--wrap", "true")
    words = ("--parsable", "--begin=now+1hour", "--array=0-1", "--output=/dev/null", "--wrap", "true")
    try:
        yard.submit("own.yaml")
        other.submit("own.yaml")
        names = {f"sdae-{path.name}" for path in yard.store.root.glob(".slurm/jobs/*")}
        namesake = cluster.run(
            "runuser", "-u", "nobody", "--", "sbatch", f"--job-name={names.pop()}", "-D", "/", *words
        )
        assert yard.cancel().out == "2 runs ended\n"
        yard.cluster.until(lambda: yard.in_queue() == [], yard.cluster.queue)
        assert other.in_queue() == sorted(mine)
        assert cluster.state(plain) == "PENDING"
        assert cluster.state(namesake) == "PENDING PENDING"
        assert set(yard.states().values()) == {"new"}
        assert yard.heal()["submitted"] == []  # they were cancelled because nobody wants them
        assert yard.submit("own.yaml")["submitted"] == mine
    finally:
        cluster.run("scancel", "--user=nobody")
        cluster.run("scancel", plain)
        other.forget()


@pytest.mark.slow
def test_arrays_are_split_where_slurm_wants_it(yard: Yard, cluster: Cluster) -> None:
    """At MaxArraySize; and where a user may have no more jobs the rest is told, and submitted later."""
    runs = yard.ids(10)
    yard.profile(**HELD, array_parallelism=2)
    cluster.cancel_all()
    cluster.run("sacctmgr", "--immediate", "add", "account", "few")
    try:
        cluster.run("sacctmgr", "--immediate", "add", "user", "root", "account=few", "MaxSubmitJobs=12")
        with cluster.configured(MaxArraySize=4):
            others = cluster.sbatch("--begin=now+1hour", "--array=0-3", "--wrap", "true")
            report = yard.submit("own.yaml")
            assert [array["array"] for array in report["arrays"]] == ["0-3%2", "0-3%2"]
            assert report["left"] == runs[8:]
            assert yard.submit("own.yaml")["left"] == runs[8:]
            cluster.run("scancel", others)
            cluster.wait(others)
            assert yard.submit("own.yaml")["submitted"] == runs[8:]
            assert yard.in_queue() == sorted(runs)
    finally:
        yard.forget()
        cluster.cancel_all()
        for what in (("user", "root", "account=few"), ("account", "few")):  # accounting lags behind the queue
            cluster.until(partial(deleted, cluster, *what), cluster.queue)


def deleted(cluster: Cluster, *what: str) -> bool:
    try:
        cluster.run("sacctmgr", "--immediate", "delete", *what)
    except AssertionError:
        return False
    return True


FULL = """array=$(grep -oP '(?<=--array=)[0-9,-]+' "${{@: -1}}")
tasks=$(tr , '\\n' <<< "$array" | awk -F- '{{n += $NF - $1 + 1}} END {{print n}}')
if [ $(($(cat {taken}) + tasks)) -gt 7 ]; then
    echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ..)" >&2
    exit 1
fi
{sbatch} "$@" && echo $(($(cat {taken}) + tasks)) > {taken}"""


def test_a_limit_that_nobody_tells_of(yard: Yard) -> None:
    """sbatch says no to an array: as many of its tasks as have room are submitted, with their own indices."""
    yard.profile(**HELD)
    runs = yard.ids(10)
    taken = yard.folder / "taken"
    taken.write_text("0")
    text = FULL.format(sbatch=shutil.which("sbatch"), taken=taken)
    report = yard.submit("own.yaml", first=wrapper(yard.folder / "bin", "sbatch", text))
    assert report["submitted"] == runs[:7]
    assert report["left"] == runs[7:]
    assert yard.in_queue() == sorted(runs[:7])
    assert yard.submit("own.yaml")["submitted"] == runs[7:]


def test_jobs_run_the_code_as_it_was(yard: Yard, tmp_path: Path) -> None:
    """Edits after the submission do not reach queued jobs; what is submitted after them has them."""
    yard.house = checkout(tmp_path / "edited")
    yard.env["PYTHONPATH"] = str(yard.house)
    yard.profile(sbatch={"begin": "now+4"})
    before, after = yard.ids(2)
    yard.artifact(1)
    yard.submit("own.yaml")
    (yard.house / "sdae" / "run.py").write_text("def execute(*_, **__):\n    raise ValueError('edited')\n")
    shutil.rmtree(yard.house / "slurm")
    yard.done([before])
    shutil.copytree(ROOT / "slurm", yard.house / "slurm")
    yard.profile()
    yard.artifact(2)
    assert yard.submit("own.yaml")["submitted"] == [after]
    assert yard.settled(after, "failed")["failure"]["message"] == "edited"
    snapshots = {path.name for path in yard.store.root.glob(".slurm/code/*")}
    assert len(snapshots) == 2


def test_a_job_submits_a_sweep(yard: Yard, tmp_path: Path) -> None:
    """What the surrounding job says of itself in its environment must not reach the inner ones."""
    (run,) = yard.ids(1)
    yard.profile(memory="300M")
    words = "-m cli.main sweep submit own.yaml --on slurm --profile profile.yaml"
    outer = yard.cluster.run(
        "env", f"PYTHONPATH={yard.house}", "sbatch", "--parsable", "--mem-per-cpu=400M", "--ntasks=2",
        "--chdir", tmp_path, "--output", tmp_path / "outer", "--wrap", f"{sys.executable} {words}",
    )  # fmt: skip
    yard.cluster.wait(outer)
    assert "1 run submitted" in (tmp_path / "outer").read_text()
    yard.finished(run)


# What is not there


@pytest.mark.slow
def test_without_accounting(yard: Yard) -> None:
    """A run that is gone from the queue is lost after the grace, as nobody can say what became of it."""
    off = wrapper(yard.folder / "bin", "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    (run,) = yard.ids(1)
    yard.orders(all={"wait": True})
    yard.submit("own.yaml", first=off)
    beat = yard.stepped(run, 3)
    os.kill(beat["pid"], signal.SIGKILL)
    yard.cluster.until(lambda: not yard.jobs(run), yard.cluster.queue)
    words = ("sweep", "status", "--json", "--grace", 2)

    def lost() -> bool:
        (row,) = json.loads(yard.cli(*words, first=off).out)["runs"]
        assert row["state"] in ("running", "queued", "lost")
        return bool(row["state"] == "lost")

    assert not lost()
    yard.cluster.until(lost, lambda: yard.tell([run]))
    called = yard.cli("sweep", "heal", "--grace", 2, "--json", first=off)
    assert json.loads(called.out)["submitted"] == [run]
    yard.finished(run)


@pytest.mark.slow
def test_without_a_controller(yard: Yard, cluster: Cluster) -> None:
    """While slurmctld is away nothing is taken for lost and nothing is submitted; the runs go on meanwhile."""
    yard.profile(array_parallelism=2)
    runs = yard.ids(3, chain=True)
    yard.orders(all={"steps": 40})
    yard.submit("own.yaml")
    yard.stepped(runs[0], 3)
    os.kill(int((cluster.dir / "run" / "slurmctld.pid").read_text()), signal.SIGKILL)
    try:
        words = ("own.yaml", "--on", "slurm", "--profile", "profile.yaml", "--seeds", "0,1")
        shells = [
            yard.start("sweep", *verb)  # squeue asks for a while
            for verb in (("status", "--json"), ("submit", *words), ("heal", "--grace", 1), ("cancel", "--yes"))
        ]
        status, *others = map(ended, shells)
        told = json.loads(status.out)
        assert "squeue: " in told["trouble"]
        assert told["counts"].keys() <= {"running", "unknown", "done"}
        for called, what in zip(others, ("submitted", "submitted", "cancelled"), strict=True):
            assert (called.code, called.out) == (1, ""), called
            assert called.err.startswith("error: squeue: ") and f"nothing was {what}\n" in called.err
        yard.done(runs[:1])
    finally:
        cluster.restart_controller()
    # It has not heard of what ended meanwhile, runs that again, and may end what waited for it
    healed(yard, runs, 10)
    once(yard, runs)
    assert all(yard.starts(run) == [0] for run in runs)


# Bad input


def nothing_left(yard: Yard) -> None:
    assert yard.store.ids() == []
    assert list(yard.store.root.glob(".slurm/runs/*")) == []
    assert list(yard.store.root.glob(".slurm/jobs/*")) == []
    assert list(yard.store.root.glob("**/*.tmp")) == []


def test_bad_profiles(yard: Yard) -> None:
    yard.ids(1)
    words = ("sweep", "submit", "own.yaml", "--on", "slurm", "--profile", "profile.yaml")
    for profile, parts in (
        ({"partition": "nowhere"}, ("sbatch", "invalid partition specified: nowhere")),
        ({"constraint": "fast"}, ("sbatch", "Invalid feature")),
        ({"gpus": 3, "tasks": 1}, ("sbatch", "Requested node configuration is not available")),
        ({"cpu": 1}, ("profile.yaml", "cpu", "cpus")),
        ({"array_parallelism": 0}, ("profile.yaml", "array_parallelism", "0")),
        ({"stages": {"pretraining": {}}}, ("profile.yaml", "pretraining", "pretrain")),
    ):
        yard.profile(**profile)  # type: ignore[arg-type]
        called = yard.cli(*words)
        assert called.code == 2, (profile, called)
        assert_refused(called, *parts)
        nothing_left(yard)
    assert yard.in_queue() == []


def test_no_slurm_no_profile(yard: Yard, tmp_path: Path) -> None:
    yard.ids(1)
    words = ("sweep", "submit", "own.yaml", "--on", "slurm")
    assert_refused(yard.cli(*words), "--profile: missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    yard.env["PATH"] = str(empty)
    assert_refused(yard.cli(*words, "--profile", "profile.yaml"), "no Slurm on this machine", "sbatch")
    assert_refused(yard.cli(*words, "--profile", "absent.yaml"), "absent.yaml")
    assert not yard.store.root.exists()
    called = yard.cli(*words, "--profile", "profile.yaml", "--dry-run")
    assert called.code == 0, called
    assert "#SBATCH --array=0" in called.out
    yard.env |= {"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "none")}  # installed, of no cluster
    called = yard.cli(*words, "--profile", "profile.yaml", "--dry-run")
    assert (called.code, called.out.count("#SBATCH --array=0")) == (0, 1), called
    assert not yard.store.root.exists()


@pytest.mark.parametrize("free", [-1, 0, 3, 12])  # blocks that are left; -1: not even for the code
def test_a_full_disk(yard: Yard, free: int) -> None:
    """One line, and no job without its run's reservation, nor the other way round."""
    yard.profile(**HELD)
    yard.store.root.mkdir()
    size = "64k" if free < 0 else "4m"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", yard.store.root], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    words = ("sweep", "submit", "own.yaml", "--on", "slurm", "--profile", "profile.yaml")
    first: list[str] = []
    try:
        if free >= 0:
            first = yard.ids(1)
            yard.submit("own.yaml")
            with (yard.store.root / "filling").open("wb") as file:
                file.write(b"\0" * os.statvfs(yard.store.root).f_bsize * (os.statvfs(yard.store.root).f_bavail - free))
        runs = yard.ids(18, chain=True)
        assert_refused(yard.cli(*words), "runs", "No space left")
        reserved = {link.name.rpartition(".")[0] for link in yard.store.root.glob(".slurm/runs/*")}
        assert set(yard.in_queue()) == reserved
        assert list(yard.store.root.glob("**/*.tmp")) == []
        if free >= 0:
            (yard.store.root / "filling").unlink()
            yard.submit("own.yaml")
            assert yard.in_queue() == sorted({*first, *runs})
    finally:
        yard.forget()
        subprocess.run(["umount", "--lazy", yard.store.root], check=True)
