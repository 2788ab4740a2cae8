"""examples/slurm-on-one-machine: what the other tests of Slurm stand on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytest_plugins = ("slurm_cluster",)
pytestmark = pytest.mark.xdist_group("slurm")
HOUSE = Path(__file__).resolve().parents[1] / "examples" / "slurm-on-one-machine"


@pytest.fixture
def calm(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, left with every node up and an empty queue."""
    yield cluster
    cluster.revive()
    cluster.cancel_all()


def submit(cluster: Cluster, out: Path, script: str, *words: object) -> str:
    return cluster.sbatch("--open-mode=append", "--output", out, *words, "--wrap", script)


def lines(out: Path) -> list[str]:
    return out.read_text().splitlines() if out.exists() else []


def begun(cluster: Cluster, out: Path) -> None:
    """Waits until the job says `began`: it runs, and its shell has come so far."""
    cluster.until(lambda: "began" in lines(out), cluster.queue)


def test_a_job_runs_and_is_accounted_for(calm: Cluster, tmp_path: Path) -> None:
    job = submit(calm, tmp_path / "out", "echo $SLURM_CONF; sinfo -h -o %P", "--export=NONE")
    calm.wait(job)
    assert lines(tmp_path / "out") == [str(calm.conf), "main*", "short", "low", "spot"]
    calm.until(lambda: calm.sacct("-X", "-j", job, "-o", "State") == "COMPLETED", f"job {job} in the accounting")


def test_an_array_runs_no_more_at_a_time_than_its_limit(calm: Cluster, tmp_path: Path) -> None:
    job = submit(calm, tmp_path / "%a", "date +%s.%N; sleep 0.7; date +%s.%N", "--array=0-4%2")
    calm.wait(job)
    spans = [tuple(map(float, lines(tmp_path / str(task)))) for task in range(5)]
    at_once = max(sum(a <= began < b for a, b in spans) for began, _ in spans)
    assert at_once <= 2


def test_pretend_gpus_are_given_out_and_waited_for(calm: Cluster, tmp_path: Path) -> None:
    words = ("--nodelist=node1", "--mem=100M")
    script = f'echo "$CUDA_VISIBLE_DEVICES"; until [ -e {tmp_path}/go ]; do sleep 0.1; done'
    pair = [submit(calm, tmp_path / name, script, "--gpus-per-node=1", *words) for name in "ab"]
    both = submit(calm, tmp_path / "both", script, "--gpus-per-node=2", *words)
    calm.until(lambda: [calm.state(job) for job in pair] == ["RUNNING"] * 2, calm.queue)
    assert calm.state(both) == "PENDING"
    (tmp_path / "go").touch()
    calm.wait(both)
    assert sorted(lines(tmp_path / "a") + lines(tmp_path / "b")) == ["0", "1"]
    assert lines(tmp_path / "both") == ["0,1"]
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        calm.sbatch("--gpus-per-node=3", "--wrap", "true")


def test_a_job_goes_on_without_controller_and_slurmd(calm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = submit(calm, out, f"echo began; until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo ended", "-w", "node2")
    begun(calm, out)
    calm.restart_controller()
    calm.kill_slurmd(2)
    assert calm.pids(2)
    assert calm.state(job) == "RUNNING"
    calm.start_slurmd(2)
    (tmp_path / "go").touch()
    calm.wait(job)
    assert lines(out) == ["began", "ended"]


@pytest.mark.parametrize("reported", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_jobs_of_a_dead_node_run_elsewhere(calm: Cluster, tmp_path: Path, reported: bool) -> None:
    out = tmp_path / "out"
    job = submit(calm, out, "echo $SLURMD_NODENAME began; [ $SLURM_RESTART_COUNT ] || sleep 100 & wait")
    calm.until(lambda: lines(out), calm.queue)
    node = int(lines(out)[0].split()[0].removeprefix("node"))
    assert calm.pids(node)
    calm.kill_node(node)
    assert calm.pids(node) == []
    if reported:
        calm.report_down(node)
    calm.wait(job, "PENDING")
    calm.wait(job)
    assert len(lines(out)) == 2
    assert lines(out)[1] != lines(out)[0]
    calm.revive()
    states = lambda: calm.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()  # noqa: E731
    calm.until(lambda: states() == ["idle"] * 4, calm.queue)


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "after"), [("low", ["began", "told", "began"]), ("spot", ["began", "told"])])
def test_main_preempts(calm: Cluster, tmp_path: Path, partition: str, after: list[str]) -> None:
    """low is told, ended and queued again; spot is told and ended for good."""
    out = tmp_path / "out"
    script = "trap 'echo told' USR2; echo began; [ $SLURM_RESTART_COUNT ] || while :; do sleep 0.2; done"
    job = submit(calm, out, script, "-p", partition, "-N4", "--exclusive", "--signal=B:USR2@120")
    begun(calm, out)
    main = calm.sbatch("-N1", "--exclusive", "--wrap", "true")
    calm.wait(main)
    calm.wait(job)
    assert [line for line in lines(out) if line in ("began", "told")] == after
    calm.until(
        lambda: "PREEMPTED" in calm.sacct("--duplicates", "-X", "-j", job, "-o", "State"), "PREEMPTED in accounting"
    )


@pytest.mark.slow
def test_short_is_short(calm: Cluster) -> None:
    job = calm.sbatch("-p", "short", "--time=6", "--wrap", "true")
    calm.until(lambda: "PartitionTimeLimit" in calm.squeue("-j", job, "-o", "%r"), calm.queue)


def test_limits_can_be_changed_for_a_while(calm: Cluster) -> None:
    words = ("--array=0-20", "--hold", "--wrap", "true")
    with calm.configured(MaxArraySize=20), pytest.raises(AssertionError, match="Invalid job array specification"):
        calm.sbatch(*words)
    calm.sbatch(*words)


# up.sh and down.sh


def script(name: str, *words: object, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", str(HOUSE / name), *map(str, words)],
        env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_up_twice_is_harmless_and_settings_stay(calm: Cluster, tmp_path: Path) -> None:
    def daemons() -> dict[str, str]:
        return {path.name: path.read_text() for path in (calm.dir / "run").glob("*.pid")}

    job = submit(calm, tmp_path / "out", "echo began; sleep 100")
    begun(calm, tmp_path / "out")
    before = daemons()
    assert script("up.sh", calm.dir)[0] == 0
    assert daemons() == before
    assert len(before) == 8
    assert calm.state(job) == "RUNNING"
    refused = f"up.sh: ONE_MACHINE_NODES=2: {calm.dir} runs with 4; take it down first\n"
    assert script("up.sh", calm.dir, ONE_MACHINE_NODES="2") == (2, "", refused)


def test_bad_usage_gives_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with tempfile.TemporaryDirectory(dir="/tmp") as new, socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for called, said in (
            (script("up.sh"), "usage: up.sh DIR"),
            (script("up.sh", "--purge"), "usage: up.sh DIR"),
            (script("up.sh", new, "more"), "usage: up.sh DIR"),
            (script("up.sh", tmp_path / "file"), "not a folder"),
            (script("up.sh", tmp_path), "holds other things"),
            (script("up.sh", Path(new, "x" * 64)), "the sockets in it allow 64"),
            (script("up.sh", Path(new, "a b")), "letters, digits and . _ - only"),
            (script("up.sh", new, ONE_MACHINE_NODES="many"), "ONE_MACHINE_NODES=many: a whole number from 1 to 64"),
            (script("up.sh", new, ONE_MACHINE_GPUS="7"), "ONE_MACHINE_GPUS=7: a whole number from 0 to 6"),
            (script("up.sh", new, ONE_MACHINE_PORT=port), f"ONE_MACHINE_PORT={port}: port {port} is taken"),
            (script("down.sh"), "usage: down.sh DIR [--purge]"),
            (script("down.sh", new, "--all"), "usage: down.sh DIR [--purge]"),
            (script("down.sh", tmp_path), "no cluster of up.sh"),
        ):
            assert called[:2] == (2, ""), called
            assert said in called[2]
            assert called[2].count("\n") == 1, called
    assert script("down.sh", tmp_path / "none") == (0, f"down.sh: {tmp_path}/none: nothing there\n", "")


@pytest.mark.slow
def test_it_goes_down_with_tests_that_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "test_killed.py").write_text(
        "import os, pathlib\n"
        "pytest_plugins = ('slurm_cluster',)\n"
        "def test_killed(cluster):\n"
        "    pathlib.Path('dir').write_text(str(cluster.dir))\n"
        "    cluster.sbatch('--wrap', 'sleep 100')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    code = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."], cwd=tmp_path, timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}, check=False,
    ).returncode  # fmt: skip
    assert code == -9
    folder = Path((tmp_path / "dir").read_text())
    assert folder != cluster.dir
    cluster.until(lambda: not folder.exists(), f"{folder} is gone")
    assert str(folder) not in Path("/etc/hosts").read_text()

    def left() -> list[str]:
        """Command lines of processes that know the folder: down.sh itself ends a moment after the folder has gone."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{folder}/".encode() in proc.joinpath("environ").read_bytes():
                    found.append(proc.joinpath("cmdline").read_text().replace("\0", " "))
        return found

    cluster.until(lambda: not left(), lambda: f"no process of {folder}: {left()}")
