"""A Slurm for real processes: its state is one file beside the store, which commands change one at a time, and its
tasks are children of the process that calls `Controller.step`. Clocks are `time.time`, which a campaign may put
forward.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slurm.cluster import Busy, Limits, Refused, Task

KILL_WAIT = 0.15  # seconds from SIGTERM to SIGKILL
SLOTS = 3  # tasks at once


@dataclass
class Job:
    """A task of an array. needs: job and index of each that must have ended; well: with success."""

    task: Task
    script: str
    needs: list[tuple[str, int]] = field(default_factory=list)
    well: bool = False
    kill: bool = False  # kill-on-invalid-dep
    restart: int = 0
    pid: int = 0
    told: float = 0.0  # when it was told to end
    ends: str = ""  # the state that it was told to end in
    again: bool = False  # it has asked to be requeued

    @property
    def over(self) -> bool:
        return self.task.ended > 0


class Queue:
    """What of Slurm the suite calls (`slurm.cluster.Slurm`); faults: the share of calls that get no answer."""

    def __init__(self, folder: Path, seed: object = 0, faults: float = 0.0):
        self.file, self.lock = str(folder / "queue.pkl"), str(folder / "queue.lock")
        self.random, self.faults = random.Random(f"queue {seed}"), faults

    @contextlib.contextmanager
    def state(self) -> Iterator[dict[str, Job]]:
        """Tasks by id, for one command alone; changes stay."""
        with open(self.lock, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                before = Path(self.file).read_bytes() if os.path.exists(self.file) else pickle.dumps({})
                jobs = pickle.loads(before)
                yield jobs
                if (after := pickle.dumps(jobs)) != before:
                    Path(f"{self.file}.new").write_bytes(after)
                    os.rename(f"{self.file}.new", self.file)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a task that was started meanwhile has this descriptor, too

    def _busy(self, share: float = 1.0) -> None:
        if self.random.random() < share * self.faults:
            raise Busy("Unable to contact slurm controller (connect failure)")

    def submit(self, script: Path) -> str:
        self._busy()
        text = script.read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
        indices: list[int] = []
        for part in options["array"].partition("%")[0].split(","):
            first, _, last = part.partition("-")
            indices += range(int(first), int(last or first) + 1)
        kind, *after = options.get("dependency", "").split(":")
        with self.state() as jobs:
            number = str(100 + len({job.task.job for job in jobs.values()}))
            if after and any(not any(j.task.job == a.partition("_")[0] for j in jobs.values()) for a in after):
                raise Refused("sbatch: error: Batch job submission failed: Job dependency problem")
            for index in indices:
                needs = [(j, int(i) if i else index) for j, _, i in (a.partition("_") for a in after)]
                needs = [need for need in needs if f"{need[0]}_{need[1]}" in jobs]
                task = Task(options["job-name"], number, index, "PENDING", "None", submitted=time.time())
                never = options.get("kill-on-invalid-dep") == "yes"
                jobs[task.id] = Job(task, str(script), needs, kind == "aftercorr", never)
        self._busy(2.0)  # it was accepted, but nobody heard of it
        return number

    def queue(self, users: Iterable[str] = ()) -> list[Task]:
        self._busy()
        with self.state() as jobs:
            return [job.task for job in jobs.values() if not job.over]

    def history(self, names: Sequence[str], since: float, jobs: Sequence[str] = ()) -> list[Task] | None:
        self._busy()
        with self.state() as known:
            return [job.task for job in known.values() if job.task.name in names]

    def cancel(self, ids: Iterable[str]) -> None:
        self._busy()
        wanted = set(ids)
        with self.state() as jobs:
            for identity, job in jobs.items():
                if (identity in wanted or job.task.job in wanted) and not job.over and not job.ends:
                    _end(job, "CANCELLED")

    def release(self, ids: Iterable[str]) -> None:
        pass  # nothing is ever held here

    def limits(self) -> Limits:
        return Limits()


def _end(job: Job, state: str) -> None:
    """A waiting task has ended; a running one is told to."""
    if job.pid:
        job.ends = state
    else:
        job.task = replace(job.task, state=state, reason=state, ended=time.time())


class Controller(Queue):
    """start: forks a task and gives its pid."""

    def __init__(self, folder: Path, start: Callable[[Job], int]):
        super().__init__(folder)
        self.start = start

    def step(self, exits: dict[int, int]) -> None:
        """What has ended (statuses as of `os.wait`, by pid), what must end, what may start."""
        with self.state() as jobs:
            for job in jobs.values():
                if job.pid in exits:
                    self._exited(job, exits[job.pid])
                elif job.pid and job.ends:
                    self._tell(job)
            running = sum(job.pid > 0 for job in jobs.values())
            for job in jobs.values():
                if not job.over and not job.pid and running < SLOTS and self._may_start(job, jobs):
                    job.task = replace(job.task, state="RUNNING", reason="None", started=time.time(), node="node")
                    job.pid = self.start(job)
                    running += 1

    def _may_start(self, job: Job, jobs: dict[str, Job]) -> bool:
        needs = [jobs[f"{number}_{index}"] for number, index in job.needs]
        if job.well and any(need.over and need.task.state != "COMPLETED" for need in needs):
            if job.kill:
                _end(job, "CANCELLED")
            else:
                job.task = replace(job.task, reason="DependencyNeverSatisfied")
            return False
        return all(need.over for need in needs)

    def _tell(self, job: Job) -> None:
        with contextlib.suppress(ProcessLookupError):
            if not job.told:
                job.told = time.monotonic()
                os.kill(job.pid, signal.SIGTERM)
            elif time.monotonic() - job.told > KILL_WAIT:
                os.kill(job.pid, signal.SIGKILL)

    def _exited(self, job: Job, status: int) -> None:
        job.pid, job.told = 0, 0.0
        if job.ends:
            state, code = job.ends, "0:15"
        elif job.again:
            job.restart, job.again = job.restart + 1, False
            job.task = replace(job.task, state="PENDING", reason="BeginTime", started=0.0)
            return
        elif os.WIFSIGNALED(status):
            state, code = "FAILED", f"0:{os.WTERMSIG(status)}"
        else:
            number = os.WEXITSTATUS(status)
            state, code = "FAILED" if number else "COMPLETED", f"{number}:0"
        job.ends = ""
        job.task = replace(job.task, state=state, reason=state, code=code, ended=time.time())

    def signal(self, draw: Any, number: int) -> None:
        """A signal to some running task."""
        with self.state() as jobs:
            pids = [job.pid for job in jobs.values() if job.pid]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(pids), number)

    def requeue(self, identity: str) -> None:
        """As `scontrol requeue`, by the task itself."""
        with self.state() as jobs:
            jobs[identity].again = True

    def left(self) -> list[str]:
        with self.state() as jobs:
            return [f"{i} {j.task.state} {j.task.reason}" for i, j in jobs.items() if not j.over]
