"""Random faults at random moments over a sweep on a real Slurm, while `sweep heal` and `retry` are called as by cron.

Whatever happens, every run must end done, once, with the numbers of a run that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slurm_runs import Yard, ended, once, wrapper
from slurm_target import metrics_of

if TYPE_CHECKING:
    from slurm_cluster import Cluster

STEPS, PAUSE = 24, 0.15  # of a run: about 4 seconds
GRACE = 20.0  # seconds; Slurm needs 10 to miss a node, and 10 more before what it requeued may start
CRON = 4.0  # seconds between two calls
LATE = """[ $((RANDOM % 2)) = 0 ] || {sbatch} "$@" > /dev/null
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1"""
DEADLY = """[ $((RANDOM % 2)) = 0 ] || {sbatch} "$@" > /dev/null
kill -9 $PPID
sleep 0.2
exit 1"""


class Campaign:
    def __init__(self, cluster: Cluster, house: Path, folder: Path, seed: int, runs: int):
        self.cluster, self.random = cluster, random.Random(seed)
        self.yard = Yard(cluster, folder, house, partition="low", warn_seconds=10)
        self.yard.artifact(5, chain=True)
        self.seeds = range(runs // 10)
        self.names = ("own.yaml", "--seeds", ",".join(map(str, self.seeds)))
        self.runs = list(self.yard.planned(folder / "own.yaml", seeds=self.seeds))
        self.yard.orders(all={"steps": STEPS, "pause": PAUSE, "save": 2})
        self.struck: Counter[str] = Counter()
        self.called: Counter[str] = Counter()
        self.moody = {
            name: wrapper(folder / name, "sbatch", text.format(sbatch=shutil.which("sbatch", path=cluster.env["PATH"])))
            for name, text in (("late", LATE), ("deadly", DEADLY))
        }
        self.down: dict[int, tuple[float, Callable[[int], None]]] = {}  # when and how a node comes back

    def go(self, faults: int, seconds: float) -> None:
        """So many faults while runs are left, then on until all are done. AssertionError where they are not in time."""
        assert self.yard.submit(*self.names)["left"] == []
        end, strikes = time.monotonic() + seconds, 0
        over = threading.Event()
        cron = threading.Thread(target=self._cron, args=(over,))
        cron.start()
        try:
            while not self.done():
                assert time.monotonic() < end, f"{self.tell()}\n{self.yard.tell(self.runs)}"
                assert cron.is_alive(), "cron has failed"
                self._mend_nodes()
                if strikes < faults:
                    strikes += self._strike()
                    # as many as there are, spread over the work that is left
                    time.sleep(self.random.uniform(0, 2.0))
                else:
                    time.sleep(0.5)
        finally:
            over.set()
            cron.join()
            for node, (_, back) in self.down.items():
                back(node)
        self.faults = strikes

    def done(self) -> bool:
        return all(self.yard.run(run).done for run in self.runs)

    def check(self) -> None:
        once(self.yard, self.runs)
        for run in self.runs:
            assert (self.yard.run(run).result() or {})["metrics"] == metrics_of(run, STEPS), run
        assert set(self.yard.states().values()) == {"done"}
        tasks = [note["job"] for run in self.runs for note in self.yard.run(run).notes() if note["event"] == "start"]
        assert len(tasks) >= len(self.runs)
        self.cluster.until(lambda: not any(map(self.yard.jobs, self.runs)), self.cluster.queue)

    def tell(self) -> str:
        attempts = sum(len(self.yard.starts(run)) for run in self.runs)
        return f"{len(self.runs)} runs, {attempts} attempts; faults: {dict(self.struck)}; cron: {dict(self.called)}"

    # As somebody's cron would
    def _cron(self, over: threading.Event) -> None:
        draw = random.Random(self.random.random())
        while not over.wait(CRON):
            verb = draw.choice(("heal", "heal", "retry"))
            words = ("heal", "--grace", GRACE) if verb == "heal" else ("retry", *self.names, "--on", "slurm")
            mood = draw.choice((None, None, None, *self.moody.values()))
            called = ended(self.yard.start("sweep", verb, *words[1:], "--json", first=mood))
            assert "Traceback" not in called.err, called
            report = json.loads(called.out) if called.code in (0, 1) and called.out else {}
            what = verb if called.code == 0 else f"{verb}: exit code {called.code}"
            self.called[f"{what}, submitted" if report.get("submitted") else what] += 1

    # Faults
    def _strike(self) -> int:
        """One fault; 0 where there was nothing to be struck."""
        faults: list[Callable[[], bool]] = [
            self.scancel, self.requeue, self.kill, self.warn, self.preempt, self.kill_slurmd, self.kill_node,
            self.report_down, self.restart_controller, self.suspend,
        ]  # fmt: skip
        weights = [4, 4, 4, 3, 2, 2, 1, 1, 1, 2]
        (fault,) = self.random.choices(faults, weights)
        struck = False
        with contextlib.suppress(AssertionError, OSError):  # Slurm does not answer, or it has ended just now
            struck = fault()
        self.struck[fault.__name__] += struck
        return int(struck)

    def _running(self) -> list[str]:
        rows = self.cluster.squeue("--me", "--array", "--state=R", "--format=%F_%K %j").splitlines()
        return [row.split()[0] for row in rows if row.split()[1].startswith("sdae-")]

    def _process(self) -> int | None:
        claims = [run.claimed() for run in map(self.yard.run, self.runs)]
        pids = [int(claim["pid"]) for claim in claims if claim]
        return self.random.choice(pids) if pids else None

    def _task(self, *words: object) -> bool:
        running = self._running()
        if running:
            self.cluster.run(*words, self.random.choice(running))
        return bool(running)

    def _node(self) -> int | None:
        nodes = [node for node in range(1, 5) if node not in self.down]
        return self.random.choice(nodes) if len(nodes) > 2 else None

    def scancel(self) -> bool:
        return self._task("scancel")

    def requeue(self) -> bool:
        return self._task("scontrol", "requeue")

    def warn(self) -> bool:
        return self._task("scancel", "--signal=USR2")

    def kill(self) -> bool:
        pid = self._process()
        if pid:
            os.kill(pid, signal.SIGKILL)
        return bool(pid)

    def suspend(self) -> bool:
        """A process that stands still for a while."""
        pid = self._process()
        if pid:
            os.kill(pid, signal.SIGSTOP)
            timer = threading.Timer(self.random.uniform(0.5, 8), _resume, (pid,))
            timer.daemon = True
            timer.start()
        return bool(pid)

    def preempt(self) -> bool:
        node = self._node()
        if node:
            self.cluster.sbatch(f"--nodelist=node{node}", "--cpus-per-task=2", "--wrap", "sleep 1")
        return bool(node)

    def kill_slurmd(self) -> bool:
        node = self._node()
        if node:
            self.cluster.kill_slurmd(node)
            self._back(node, 5)
        return bool(node)

    def kill_node(self) -> bool:
        node = self._node()
        if node:
            self._back(node, 30)
            self.cluster.kill_node(node)
        return bool(node)

    def report_down(self) -> bool:
        node = self._node()
        if node:
            self.cluster.report_down(node)
            self._back(node, 10, self._resume_node)
        return bool(node)

    def restart_controller(self) -> bool:
        self.cluster.restart_controller()
        return True

    def _back(self, node: int, seconds: float, how: Callable[[int], None] | None = None) -> None:
        self.down[node] = time.monotonic() + self.random.uniform(0, seconds), how or self.cluster.start_slurmd

    def _resume_node(self, node: int) -> None:
        with contextlib.suppress(AssertionError):  # it has come back by itself
            self.cluster.run("scontrol", "update", f"nodename=node{node}", "state=resume")

    def _mend_nodes(self) -> None:
        for node, (moment, back) in list(self.down.items()):
            if time.monotonic() > moment:
                back(node)
                del self.down[node]


def _resume(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def own_cluster() -> Iterator[Cluster]:
    """A Slurm for as long as this lasts, where pytest brings none."""
    from slurm_cluster import HOUSE, SETTINGS, Cluster

    with tempfile.TemporaryDirectory(prefix="sdae-", dir="/tmp") as name:
        cluster = Cluster(Path(name) / "slurm")
        settings = {f"ONE_MACHINE_{key}": value for key, value in SETTINGS.items()}
        try:
            subprocess.run(["bash", HOUSE / "up.sh", cluster.dir], env=cluster.env | settings, check=True)
            yield cluster
        finally:
            subprocess.run(["bash", HOUSE / "down.sh", cluster.dir, "--purge"], env=cluster.env, check=True)
