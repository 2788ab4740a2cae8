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
from slurm.ledger import FREE, SUBMITTING, Reservation, Submission

LAG = 60.0  # seconds after its end in which an ended job's files may still be invisible here, or Slurm requeue it
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
DEADLY = {4, 6, 7, 8, 9, 11, 15}  # signals that a process dies of, and which its own exit codes are not
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
    missed: bool = False  # Slurm should know of its task, but did not when it was asked

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
    if held.token in FREE:
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
    attempts = [note for note in seen.notes if note["event"] in ("start", "end")]
    noted = [float(note["time"]) for note in seen.notes]
    known = (task.submitted, task.started, task.ended) if task else ()
    heard = max((held.time, submission.time if submission else 0.0, seen.heard, *noted, *known))
    unsent = submission is None or submission.job is None
    if unsent and task is None and not attempts:
        lives = submission is not None and submission.submitter_lives
        patience = grace if submission is not None and submission.here else max(grace, SUBMITTING)
        if lives or now - heard < patience:  # an sbatch that has outlived its submitter may yet succeed
            return Standing("queued", detail="is being submitted")
        return Standing("started", detail="was never submitted")
    if now - heard < grace:
        return Standing("running" if seen.heard or (task and task.started) else "queued", task, detail="awaited")
    if not missed(seen.notes, held.token):
        return Standing("running" if seen.heard else "queued", task, detail="awaited", missed=True)
    if outcome := _outcome(seen, held):
        return Standing("started", task, detail=outcome)
    what = f"job {task.id if task else submission and submission.job}"
    told = f" ({task.state} is the last that sacct has)" if task else ""
    return _failed("Lost", f"{what} is gone without a trace{told}", task, seen)


def _chosen(tasks: Sequence[Task], submission: Submission | None) -> Task | None:
    """The last of the rows; of those of the recorded array alone, as Slurm may have taken one twice."""
    known = submission.job if submission is not None else None
    rows = [task for task in tasks if known in (None, task.job)]
    return rows[-1] if rows else None


def _queued(task: Task, seen: Seen) -> Standing:
    if task.state in WAITING:
        waits = "queued" if seen.needs_done and task.reason != NEVER else "waiting"
        return Standing(waits, task, stuck=stuck(task), detail=task.reason)
    if task.state in ALIVE or task.state in ENDED:  # squeue shows ended jobs for some minutes
        if task.state in ENDED and task.state != "COMPLETED":
            return Standing("running", task, detail=f"ends: {task.state}")
        return Standing("running", task)
    return Standing("unknown", task, detail=task.state)


def stuck(task: Task) -> str | None:
    """What must be done about a task that waits and will not start by itself."""
    if task.state in WAITING and task.reason == NEVER:
        return "cancel"
    held = task.state in WAITING and task.reason.lower() == HELD
    return "release" if held or task.state == "REQUEUE_HOLD" else None


def _ended(task: Task, seen: Seen, held: Reservation) -> Standing:
    if not seen.needs_done and task.state != "CANCELLED":
        return Standing("started", task, detail="its need is not done")
    kind = CLASSES.get(task.state)
    if task.state == "CANCELLED" and " by " not in task.reason:  # by Slurm: kill-on-invalid-dep
        return Standing("started", task, detail="its dependency was not met")
    if kind is None and (outcome := _outcome(seen, held)):
        return Standing("started", task, detail=outcome)
    if kind is None:
        if number := _signal(task.code):
            kind, how = "Killed", f"was killed by signal {number} (9: often out of memory)"
        elif task.state == "COMPLETED":
            kind, how = "Lost", "ended without a result"
        else:
            kind, how = "JobFailed", f"ended as {task.state} with exit code {task.code.partition(':')[0]}"
        return _failed(kind, f"job {task.id} {how}; see its log", task, seen)
    where = f" on {task.node}" if task.node not in ("", "None assigned") else ""
    return _failed(kind, f"job {task.id} ended as {task.state}{where}", task, seen)


def _outcome(seen: Seen, held: Reservation) -> str:
    """How the last attempt of this reservation ended by its own word, if it did and was no failure."""
    mine = [n for n in seen.notes if n.get("token") == held.token and n["event"] in ("start", "end")]
    outcome = str(mine[-1].get("outcome", "")) if mine else ""
    return "" if outcome == "failed" else outcome


def _signal(code: str) -> int:
    """The signal in sacct's EXIT:SIGNAL, or 0. The job script exits with 128 + the signal that its step died of, and
    sacct takes 128 off: 137 is told as 9:0."""
    first, _, second = (int(part) if part.isdigit() else 0 for part in code.partition(":"))
    return second or (first % 128 if first % 128 in DEADLY else 0)


def _failed(kind: str, message: str, task: Task | None, seen: Seen) -> Standing:
    """Lost where the run is not to blame and gets on; else failed."""
    if kind in LOST:
        count = stalled(seen.notes, seen.step)
        tries = max(count, 1 + stalled(seen.notes, seen.step, "lost"))
        if tries >= (1 if kind == "TimedOut" and count else PATIENCE):
            message = f"{message}; {tries} attempt(s) brought no checkpoint after step {seen.step}"
            return Standing("failed", task, ("NoProgress", message))
    return Standing("lost" if kind in LOST else "failed", task, (kind, message))


def stalled(notes: Sequence[Mapping[str, Any]], step: int, event: str = "start") -> int:
    """How many attempts in a row began (`start`) or were lost at this step, since the run was last retried."""
    count = 0
    for note in reversed(notes):
        if note["event"] == "retry" or (note["event"] in ("start", "lost") and note["step"] != step):
            break
        count += note["event"] == event
    return count


def missed(notes: Sequence[Mapping[str, Any]], token: str) -> bool:
    """Whether the last that was noted is that Slurm did not know of this array's task."""
    last = notes[-1] if notes else {}
    return last.get("event") == "missed" and last.get("token") == token


def with_needs(standing: Standing, needs: Sequence[str]) -> Standing:
    """A run that nobody has waits where a need (given by state) will not be done by itself."""
    if standing.state in ("new", "started") and any(need in ("failed", "waiting", "lost") for need in needs):
        return replace(standing, state="waiting", free=True)
    return standing
