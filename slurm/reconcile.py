"""What became of a run: the store's word first, then squeue's, then sacct's. Pure: no file, no command, no clock.

Neither squeue nor sacct is believed too soon. sacct lags, shows jobs that are about to run again as ended, and forgets;
a node may be slow, a file system late. So what looks like an end counts only once it is older than a grace, a run whose
process still beats its heart is running whatever Slurm says, and states that we do not know are shown, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slurm.cluster import Task
from slurm.ledger import CANCELLED, Reservation, Submission

LAG = 60.0  # seconds after its end in which an ended job's files may still be invisible here, or Slurm requeue it
SUBMITTING = 600.0  # seconds that a submitter on another machine may take to call sbatch
PATIENCE = 5  # attempts without a new checkpoint before a run counts as failed

ALIVE = {
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "SPECIAL_EXIT",
}  # fmt: skip
WAITING = {"PENDING", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED",
    "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
LOST = {"Lost", "NodeFailure", "Preempted", "TimedOut"}  # not the run's fault: submitted again by `heal` and `submit`
CLASSES = {
    "TIMEOUT": "TimedOut", "DEADLINE": "TimedOut", "OUT_OF_MEMORY": "OutOfMemory", "NODE_FAIL": "NodeFailure",
    "BOOT_FAIL": "NodeFailure", "LAUNCH_FAILED": "NodeFailure", "RECONFIG_FAIL": "NodeFailure",
    "PREEMPTED": "Preempted", "CANCELLED": "Cancelled",
}  # fmt: skip
HELD = "launch failed requeued held"
NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Seen:
    """What the store says of a run. heard: when its heart last beat. step: of its last checkpoint. submission: the
    token under which it failed, None where that was not in an array."""

    state: str  # done | running | failed | started | new, as `RunFolder.state`
    failure: str | None = None
    submission: str | None = None
    heard: float = 0.0
    step: int = 0
    notes: Sequence[Mapping[str, Any]] = ()
    needs_done: bool = True


@dataclass(frozen=True)
class Standing:
    """state: waiting | queued | running | done | failed | lost | started | new | unknown. task: as Slurm has it.

    verdict: class and message of a failure that nobody has written down yet. stuck: what heal must do about the task.
    """

    state: str
    task: Task | None = None
    verdict: tuple[str, str] | None = None
    stuck: str | None = None
    detail: str = ""
    free: bool = False  # waits, but in nobody's queue

    @property
    def open(self) -> bool:
        """Whether nobody has the run, so that it may be submitted."""
        return self.free or self.state in ("new", "started", "lost")


def judge(
    seen: Seen,
    held: Reservation,
    submission: Submission | None,
    queue: Sequence[Task] | None,
    history: Sequence[Task] | None,
    *,
    now: float,
    grace: float,
) -> Standing:
    """queue, history: the tasks of this run's array index, under its submission's name; None where Slurm is silent."""
    task = _chosen(queue or (), submission)
    if seen.state in ("done", "running"):
        return Standing(seen.state, task)
    if seen.state == "failed" and seen.submission in (held.token, None):
        return Standing("lost" if seen.failure in LOST else "failed", task)
    if held.token in ("", CANCELLED):
        return Standing("started" if seen.state == "failed" else seen.state)
    if task is not None:
        return _queued(task, seen)
    if queue is None:
        return Standing("unknown", detail="Slurm does not answer")
    task = _chosen(history or (), submission)
    if task is not None and task.state in ENDED:
        if now - max(task.ended, seen.heard) < min(LAG, grace):
            return Standing("running", task, detail="ends")
        return _ended(task, seen, held)
    notes = [float(note["time"]) for note in seen.notes]
    known = (task.submitted, task.started, task.ended) if task else ()
    heard = max((held.time, submission.time if submission else 0.0, seen.heard, *notes, *known))
    unsent = submission is None or submission.job is None
    if unsent and task is None and not notes:
        lives = submission is not None and submission.submitter_lives
        if lives or now - heard < max(grace, SUBMITTING):
            return Standing("queued", detail="is being submitted")
        return Standing("started", detail="was never submitted")
    if now - heard < grace:
        return Standing("running" if seen.heard or (task and task.started) else "queued", task, detail="awaited")
    what = f"job {task.id if task else submission and submission.job}"
    told = f" ({task.state} is the last that sacct has)" if task else ""
    return _failed("Lost", f"{what} is gone without a trace{told}", task, seen, held)


def _chosen(tasks: Sequence[Task], submission: Submission | None) -> Task | None:
    """The last of the rows; that of the recorded array, where Slurm has taken one twice."""
    own = [task for task in tasks if submission is not None and task.job == submission.job]
    rows = own or list(tasks)
    return rows[-1] if rows else None


def _queued(task: Task, seen: Seen) -> Standing:
    if task.state in WAITING:
        if task.reason == NEVER:
            return Standing("waiting", task, stuck="cancel", detail=NEVER)
        if task.reason.lower() == HELD or task.state == "REQUEUE_HOLD":
            return Standing("queued", task, stuck="release", detail=task.reason)
        return Standing("queued" if seen.needs_done else "waiting", task, detail=task.reason)
    if task.state in ALIVE or task.state in ENDED:  # squeue shows ended jobs for some minutes
        if task.state in ENDED and task.state != "COMPLETED":
            return Standing("running", task, detail=f"ends: {task.state}")
        return Standing("running", task)
    return Standing("unknown", task, detail=task.state)


def _ended(task: Task, seen: Seen, held: Reservation) -> Standing:
    mine = [note for note in seen.notes if note.get("token") == held.token]
    last = mine[-1] if mine else {}
    if not seen.needs_done and task.state != "CANCELLED":
        return Standing("started", task, detail="its need is not done")
    kind = CLASSES.get(task.state)
    if task.state == "CANCELLED" and " by " not in task.reason:  # by Slurm: kill-on-invalid-dep
        return Standing("started", task, detail="its dependency was not met")
    if kind is None and last.get("event") == "end" and last.get("outcome") != "failed":
        return Standing("started", task, detail=str(last.get("outcome")))
    if kind is None:
        if number := _signal(task.code):
            kind, how = "Killed", f"was killed by signal {number} (9: often out of memory)"
        elif task.state == "COMPLETED":
            kind, how = "Lost", "ended without a result"
        else:
            kind, how = "JobFailed", f"ended as {task.state} with exit code {task.code.partition(':')[0]}"
        return _failed(kind, f"job {task.id} {how}; see its log", task, seen, held)
    where = f" on {task.node}" if task.node not in ("", "None assigned") else ""
    return _failed(kind, f"job {task.id} ended as {task.state}{where}", task, seen, held)


def _signal(code: str) -> int:
    """The signal in sacct's EXIT:SIGNAL, 0 where it was none; a shell exits with 128 + the signal that its child died of."""
    first, _, second = (int(part) if part.isdigit() else 0 for part in code.partition(":"))
    return second or max(0, first - 128)


def _failed(kind: str, message: str, task: Task | None, seen: Seen, held: Reservation) -> Standing:
    """Lost where the run is not to blame and gets on; else failed."""
    if kind in LOST:
        count = stalled(seen.notes, seen.step)
        tries = count or held.number
        if tries >= (1 if kind == "TimedOut" and count else PATIENCE):
            message = f"{message}; {tries} attempt(s) brought no checkpoint after step {seen.step}"
            return Standing("failed", task, ("NoProgress", message))
    return Standing("lost" if kind in LOST else "failed", task, (kind, message))


def stalled(notes: Sequence[Mapping[str, Any]], step: int) -> int:
    """How many attempts in a row began at this step, since the run was last retried."""
    count = 0
    for note in reversed(notes):
        if note["event"] == "retry" or (note["event"] == "start" and note["step"] != step):
            break
        count += note["event"] == "start"
    return count


def with_needs(standing: Standing, needs: Sequence[str]) -> Standing:
    """A run that nobody has waits where a need (given by state) will not be done by itself."""
    if standing.state in ("new", "started") and any(need in ("failed", "waiting", "lost") for need in needs):
        return replace(standing, state="waiting", free=True)
    return standing
