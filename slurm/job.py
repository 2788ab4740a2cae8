"""What a task of an array does. submitit pickles only where the store is and which array it is; all else is read there
when the task starts, so that a requeued pickle is never old.

The task looks whether it still has the run, whether the run's need is truly done and whether nobody else runs it. On
the warning signal the run saves its state at the end of a step; then submitit's own handler requeues the job.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission

from sdae.errors import Interrupted, RunFailed
from sdae.store import GRACE_SECONDS, SUBMISSION, RunFolder, Store, number
from slurm.ledger import Ledger, Submission
from slurm.machine import THREADS
from slurm.reconcile import LOST, PATIENCE, stalled
from slurm.worker import record, run

POLL = 2.0  # seconds between two looks at the store
TERM_WAIT = 120.0  # seconds after SIGTERM in which Slurm ends or requeues the job itself
SLACK = 90.0  # seconds that the warning may come before its time


@dataclass(frozen=True)
class Place:
    """Where this process is: array job, index, how often it was restarted, rank."""

    job: str
    index: int
    restart: int = 0
    rank: int = 0
    began: float = field(default_factory=time.time)

    @classmethod
    def here(cls) -> Place:
        environment = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        job, index = environment.array_job_id, environment.array_task_id
        return cls(job, int(index), restart, environment.global_rank)


class SweepJob:
    """The function that submitit calls; `checkpoint` is its protocol: the same again, as the state is in the store."""

    def __init__(self, store: str, token: str):
        self.store, self.token = store, token

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(SweepJob(self.store, self.token))

    def __call__(self) -> str:
        os.environ[SUBMISSION] = self.token
        paths = submitit.JobEnvironment().paths
        for pickle in (paths.submitted_pickle, paths.result_pickle):  # submitit stumbles over what a killed one left
            pickle.with_suffix(".pkl.save_tmp").unlink(missing_ok=True)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler; the training loop has its own meanwhile
        attempt = Attempt(Store(self.store), self.token, Place.here())
        if attempt.place.rank == 0:
            signal.signal(signal.SIGUSR2, _interrupt)  # what comes while it waits or loads must be noted, too
        try:
            refusal = attempt.begin() if attempt.place.rank == 0 else attempt.follow()
            if refusal is not None:
                return refusal
            outcome = attempt.execute()
        except Interrupted as error:
            outcome = {"outcome": "interrupted", "signals": error.signals}
        finally:
            signal.signal(signal.SIGUSR2, requeue)
        if attempt.place.rank:
            return str(outcome["outcome"])
        return attempt.end(outcome, lambda: requeue(signal.SIGUSR2, None))  # type: ignore[operator, misc]


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted("told to stop before the first step", [number])


class Attempt:
    """One start of one task."""

    begun = float("inf")  # when it came to execute its run, after waiting for others

    def __init__(self, store: Store, token: str, place: Place):
        self.store, self.token, self.place = store, token, place
        self.ledger = Ledger(store)
        submission = self.ledger.read(token)
        if submission is None or place.index not in submission.runs:
            raise RunFailed(f"{self.ledger.folder(token)}: tells of no run for task {place.index}")
        self.submission: Submission = submission
        self.folder: RunFolder = store.run(submission.runs[place.index])
        self.order: dict[str, Any] = self.ledger.runs(token)[self.folder.id]

    # Before
    def begin(self) -> str | None:
        """Why this task must not execute its run (None: it must), noted for the other ranks and for `sweep status`."""
        refusal = self._refusal()
        if refusal is None and stalled(self.folder.notes(), self.folder.saved_step) >= PATIENCE:
            self._fail("NoProgress", f"{PATIENCE} attempts brought no checkpoint after step {self.folder.saved_step}")
        if refusal is None:
            self.begun = time.time()
            self._note("start")
        else:
            self._note("end", outcome=refusal)
        return refusal

    def _refusal(self) -> str | None:
        if self.folder.done:
            return "done"
        if self._superseded():
            return "superseded"
        missing = [need for need in self.order["needs"] if not self.store.run(need).done]
        if missing:
            print(f"{self.folder.id} waits for {missing[0]}, which is not done in {self.store.root}")
            return "waiting"
        patience = time.time() + 2 * GRACE_SECONDS  # the claim of a lost node holds for so long after its last beat
        while (claim := self.folder.claimed()) is not None:
            if time.time() > patience:
                print(f"{self.folder.id} is being run elsewhere: {claim}")
                return "elsewhere"
            time.sleep(POLL)
        if self.folder.done:
            return "done"
        if self._superseded():
            return "superseded"
        # It may have failed meanwhile: in an array that Slurm took as well, or on a node that Slurm had given up
        failure = self.folder.failure() or {}
        failed = failure.get("submission") == self.token and str(failure.get("class")) not in LOST
        meanwhile = not self.place.restart or number(failure, "time") > self.place.began
        return "failed" if failed and meanwhile else None

    def _superseded(self) -> bool:
        """Whether the run has been given to another array, or this array is one that Slurm took twice."""
        submission = self.ledger.read(self.token) or self.submission
        return self.ledger.lost(self.folder.id, self.token) or submission.job not in (None, self.place.job)

    def follow(self) -> str | None:
        """What rank 0 found, for the other ranks."""
        while True:
            for note in reversed(self.folder.notes()):
                if (note.get("job"), note.get("restart")) == (self._job, self.place.restart):
                    return None if note["event"] == "start" else str(note.get("outcome"))
            time.sleep(POLL)

    # The run
    def execute(self) -> dict[str, Any]:
        threads = self.order["config"].get("efficiency", {}).get("threads")
        if threads:
            os.environ.update(dict.fromkeys(THREADS, str(threads)))
        module, _, name = self.submission.target.partition(":")
        return run(_Late(module, name), self.folder, self.store, self.order["config"], None)

    # After
    def end(self, outcome: dict[str, Any], requeue: Callable[[], None]) -> str:
        """Notes how the run ended; what did not end is requeued. Raises RunFailed where it failed: Slurm must know."""
        what = str(outcome["outcome"])
        if what == "interrupted":
            self._interrupted(set(outcome["signals"]), requeue)
            return what
        if what in ("failed", "refused"):
            if what == "refused":
                record(self.folder, self.order["config"], "BadInput", outcome["message"], self.token)
            self._note("end", outcome="failed")
            raise RunFailed(outcome["message"])
        self._note("end", outcome=what)
        return what

    def _interrupted(self, signals: set[int], requeue: Callable[[], None]) -> None:
        limit = 60 * self.submission.minutes - self.submission.warn_seconds - SLACK
        timed_out = signal.SIGTERM not in signals and time.time() - self.place.began >= limit
        step = self.folder.saved_step
        if timed_out and time.time() - self.begun >= limit and stalled(self.folder.notes(), step):
            minutes = self.submission.minutes
            told = f"{minutes} minutes brought no checkpoint after step {step}: the profile's `time` must be longer"
            self._fail("NoProgress", told)
        self._note("end", outcome="interrupted", timed_out=timed_out)
        try:
            if signal.SIGUSR2 not in signals:  # told to end: by scancel, or preempted without a warning
                time.sleep(TERM_WAIT)
            requeue()
        except Exception as error:  # whatever kept submitit from it: the run must not be forgotten
            kind = "TimedOut" if timed_out else "Preempted"
            cause = "scontrol is not there" if isinstance(error, FileNotFoundError) else str(error)
            where = f"job {self._job} could not be requeued on {socket.gethostname()}"
            message = f"its state is saved, but {where}: {cause}"
            if not (self._superseded() or self.folder.claimed()):  # else it is another's by now
                self.folder.fail(kind, f"{message}; `sdae-cli sweep heal` submits it again", submission=self.token)
            raise RunFailed(message) from error

    @property
    def _job(self) -> str:
        return f"{self.place.job}_{self.place.index}"

    def _fail(self, kind: str, message: str) -> None:
        record(self.folder, self.order["config"], kind, message, self.token)
        self._note("end", outcome="failed")
        raise RunFailed(f"{self.folder.id}: {message}")

    def _note(self, event: str, **facts: Any) -> None:
        step, host = self.folder.saved_step, socket.gethostname()
        self.folder.note(
            event, token=self.token, job=self._job, restart=self.place.restart, step=step, host=host, **facts
        )


class _Late:
    """A function by name, imported when it is called: what a bad import prints belongs into the run's log."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        print(f"python {sys.version.split()[0]} on {socket.gethostname()}, {os.getcwd()}", flush=True)
        return getattr(importlib.import_module(self.module), self.name)(*arguments, **options)
