"""A real Slurm for tests: `pytest_plugins = ("slurm_cluster",)` in a test module gives the fixture `cluster`.

One cluster (examples/slurm-on-one-machine) for all workers of a test run, in a folder of its own. Each worker that uses
it holds a shared lock for as long as it lives, and starts a `flock ... down.sh` that waits for all of these locks to
go: so the cluster goes down after its last user, whether that one ended or was killed.

Tests that use it belong in `@pytest.mark.xdist_group("slurm")`, for `--dist loadgroup`; without that they take turns.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, TypeVar

import pytest

HOUSE = Path(__file__).resolve().parents[1] / "examples" / "slurm-on-one-machine"
SETTINGS = {"INSTALL": "no", "GRACE": "10"}  # of up.sh, where the environment has no others
PATIENCE = 300.0  # seconds; who waits for what a Slurm that others fill, on a slow machine, comes to in time
T = TypeVar("T")


def until(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = PATIENCE) -> T:
    """What `condition` returns as soon as that is true; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """False for a zombie as well, which stays in /proc until somebody reaps it."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


class Cluster:
    """A Slurm of pretend nodes on this machine. Nodes are counted from 1; jobs are ids as sbatch prints them."""

    until = staticmethod(until)

    def __init__(self, folder: Path):
        self.dir = folder
        self.conf = folder / "etc" / "slurm.conf"
        inherited = {k: v for k, v in os.environ.items() if not re.match("(SLURM|SBATCH|ONE_MACHINE)_", k)}
        self.env = inherited | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    # Commands

    def run(self, *words: object, timeout: float = PATIENCE) -> str:
        """A command's stdout, stripped. AssertionError with its stderr where it fails or takes longer."""
        return _output([str(word) for word in words], self.env, timeout)

    def sbatch(self, *words: object) -> str:
        """Submits, and returns the job's id. Its output is lost unless the words have an --output."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *words).partition(";")[0]

    def squeue(self, *words: object) -> str:
        return self.run("squeue", "--noheader", *words)

    def sacct(self, *words: object) -> str:
        """Rows with | between the fields. It lags by seconds: wait on `squeue`, look here afterwards."""
        return self.run("sacct", "--noheader", "--parsable2", *words)

    def state(self, job: str) -> str:
        """RUNNING, PENDING, .. as squeue has it, several of an array with blanks between; empty once it is over."""
        rows = [line.split() for line in self.squeue("--array", "--format=%i %F %T").splitlines()]
        return " ".join(state for each, array, state in rows if job in (each, array))

    def wait(self, job: str, state: str = "") -> None:
        """Until the job is in this state, over where none is given."""
        until(lambda: self.state(job) == state, lambda: f"job {job} {state or 'over'}\n{self.queue()}")

    def queue(self) -> str:
        """Jobs and nodes, for messages."""
        return self.run("squeue") + "\n" + self.run("sinfo", "--Node", "--partition=main", "--long")

    # Nodes and daemons

    @property
    def nodes(self) -> list[str]:
        return self.run("scontrol", "show", "hostnames", self.run("sinfo", "-h", "-p", "main", "-o", "%N")).split()

    def pids(self, node: int) -> list[int]:
        """The processes of jobs on a node, their step daemons first."""
        daemons, others = [], []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone, or a zombie
                if proc.joinpath("exe").readlink().name.startswith("slurmstepd"):
                    log = self.dir / "log" / f"slurmd-node{node}.log"
                    if any(fd.readlink() == log for fd in proc.joinpath("fd").iterdir()):
                        daemons.append(int(proc.name))
                else:
                    values = proc.joinpath("environ").read_bytes().split(b"\0")
                    if {f"SLURMD_NODENAME=node{node}".encode(), f"SLURM_CONF={self.conf}".encode()} <= set(values):
                        others.append(int(proc.name))
        return daemons + others

    def kill_slurmd(self, node: int) -> None:
        """The node's daemon alone: its jobs go on."""
        self._kill(f"slurmd-node{node}", signal.SIGKILL)

    def kill_node(self, node: int) -> None:
        """The daemon and every process of a job, as a power cut does. Slurm takes half a minute to notice."""
        self.kill_slurmd(node)

        def empty() -> bool:
            pids = self.pids(node)
            for pid in pids:  # step daemons first, or they would report the deaths of the others
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        until(empty, f"no process on node {node}")

    def report_down(self, node: int) -> None:
        """Tells Slurm that the node is down, as a health check does: its jobs are requeued without a time-out."""
        self.run("scontrol", "update", f"nodename=node{node}", "state=down", "reason=test")

    def start_slurmd(self, node: int) -> None:
        self.run("slurmd", "-f", self.conf, "-N", f"node{node}")

    def restart_controller(self) -> None:
        self._kill("slurmctld", signal.SIGTERM)
        self.run("slurmctld", "-f", self.conf)

        def answers() -> bool:
            with contextlib.suppress(Failed):
                return "is UP" in self.run("scontrol", "ping")
            return False

        until(answers, "slurmctld answers")

    def revive(self) -> None:
        """Starts whatever has died and resumes the nodes that are down or drained."""
        _output(["bash", str(HOUSE / "up.sh"), str(self.dir)], self.env, PATIENCE)

    def cancel_all(self) -> None:
        """Cancels every job and waits until none is left, on the nodes as well."""
        jobs = set(self.squeue("--format=%A").split())
        if jobs:
            self.run("scancel", *sorted(jobs))
        until(lambda: not self.squeue(), lambda: f"an empty queue\n{self.queue()}")

    @contextlib.contextmanager
    def configured(self, **keys: object) -> Iterator[None]:
        """Within, the keys of slurm.conf have these values: `with cluster.configured(MaxArraySize=20):`."""
        before = self.conf.read_text()
        text = before
        for key, value in keys.items():
            text, found = re.subn(rf"^{key}=.*$", f"{key}={value}", text, flags=re.M)
            text += "" if found else f"{key}={value}\n"
        try:
            self.conf.write_text(text)
            self.restart_controller()
            yield
        finally:
            self.conf.write_text(before)
            self.restart_controller()

    def _kill(self, daemon: str, number: signal.Signals) -> None:
        try:
            pid = int((self.dir / "run" / f"{daemon}.pid").read_text())
            os.kill(pid, number)
        except (OSError, ValueError):
            return  # does not run
        until(lambda: not _runs(pid), f"{daemon} has ended")


class Failed(AssertionError):
    """A command that failed. `code`: its exit code, None where it took too long; `text`: what it said."""

    def __init__(self, words: list[str], code: int | None, text: str):
        super().__init__(f"{' '.join(words)}: {'too slow' if code is None else f'exit code {code}'}: {text}")
        self.code, self.text = code, text


def _output(words: list[str], env: dict[str, str], timeout: float) -> str:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:  # a pipe would wait for daemons
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout
            ).returncode
        out.seek(0)
        err.seek(0)
        answer, complaint = out.read().strip(), err.read().strip()
    if code != 0:
        raise Failed(words, code, complaint or answer)
    return answer


def _lock(path: Path, kind: int, seconds: float) -> IO[bytes]:
    """The file, locked (fcntl.LOCK_SH or LOCK_EX) until it is closed or this process dies."""
    file = path.open("ab")

    def locked() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        return False

    try:
        until(locked, f"a lock on {path}", seconds)
    except AssertionError:
        file.close()
        raise
    return file


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running Slurm, shared by the workers of this test run. Leave it calm: `cancel_all()` and `revive()`."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    # Not below pytest's folder: Unix sockets want a short path
    folder = Path("/tmp", f"sdae-slurm-{hashlib.sha256(str(shared).encode()).hexdigest()[:8]}")
    cluster, lock = Cluster(folder), shared / "slurm.lock"
    down = ["bash", str(HOUSE / "down.sh"), str(folder), "--purge"]
    settings = {f"ONE_MACHINE_{k}": v for k, v in SETTINGS.items()}
    settings |= {k: v for k, v in os.environ.items() if k.startswith("ONE_MACHINE_")}
    alive, watch = _lock(lock, fcntl.LOCK_SH, PATIENCE), None
    try:
        if shutil.which("flock"):
            watch = subprocess.Popen(
                ["flock", str(lock), *down], env=cluster.env, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            _output(["bash", str(HOUSE / "up.sh"), str(folder)], cluster.env | settings, PATIENCE)
        except Failed as failed:
            if failed.code != 3:  # 3: this machine lacks something
                raise
            stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            stop(f"no Slurm for tests: {failed.text}")
        yield cluster
        with contextlib.suppress(BlockingIOError):  # others use it still
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _output(down, cluster.env, PATIENCE)
    finally:
        alive.close()
        if watch and not folder.exists():
            watch.wait(PATIENCE)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests of the cluster take turns where workers run them at the same time."""
    if "cluster" not in getattr(item, "fixturenames", ()) or not hasattr(item.config, "workerinput"):
        return (yield)
    with _lock(Path(item.config.option.basetemp).parent / "slurm.turn", fcntl.LOCK_EX, 3600):
        return (yield)
