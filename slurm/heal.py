"""What is put right in the queue, and what is taken out of it: by hand, by cron, or by whoever submits next."""

from __future__ import annotations

from collections.abc import Iterable

from ablations.planner import PlannedRun
from slurm.cluster import Slurm
from slurm.ledger import CANCELLED, Ledger, Reservation
from slurm.look import Survey


def mend(found: Survey, slurm: Slurm) -> list[str]:
    """Adopts arrays that Slurm took without saying so, ends those that it took twice and tasks that wait in vain, and
    lets held ones go; one line for each thing done."""
    ledger, done = Ledger(found.store), []
    queue = found.queue or ()
    for submission in found.submissions.values():
        jobs = sorted({task.job for task in queue if task.name == submission.name}, key=int)
        if jobs and submission.job is None and not submission.submitter_lives:
            submission.job = jobs[0]
            ledger.write(submission)
            done.append(f"array {jobs[0]} is {submission.name}, whose sbatch had not answered")
        if twice := [job for job in jobs if submission.job is not None and job != submission.job]:
            slurm.cancel(twice)
            done.append(f"{submission.name} was taken twice: {', '.join(twice)} ended, {submission.job} goes on")
    stuck = {i: s for i, s in found.standings.items() if s.stuck and s.task}
    never = [i for i, s in stuck.items() if s.stuck == "cancel"]
    done += [f"{i} waited for a task that did not end well: taken back" for i in cancel(never, found, slurm)]
    held = {i: s.task.id for i, s in stuck.items() if s.stuck == "release" and s.task}
    slurm.release(held.values())
    done += [f"{i}: task {task} was held after a failed launch: released" for i, task in held.items()]
    return done


def cancellable(found: Survey) -> list[str]:
    """Runs of a survey that are in the queue, or on their way into it."""
    spots = found.spots()
    return [
        i for i, s in found.standings.items()
        if i in spots or (s.state in ("queued", "waiting") and i in found.reservations and not s.open)
    ]  # fmt: skip


def cancel(identities: Iterable[str], found: Survey, slurm: Slurm) -> list[str]:
    """Takes runs away from their tasks, then ends these: a task that starts all the same finds its run gone."""
    ledger, spots, ended = Ledger(found.store), found.spots(), []
    for identity in identities:
        if ledger.reserve(identity, found.reservations.get(identity, Reservation()), CANCELLED):
            ended.append(identity)
    slurm.cancel(f"{job}_{index}" for job, index in (spots[i] for i in ended if i in spots))
    return ended


def forgive(runs: Iterable[PlannedRun], found: Survey) -> None:
    """Marks failed runs as retried: attempts are counted anew."""
    for run in runs:
        if found.standings[run.id].state in ("failed", "lost"):
            found.store.run(run.id).note("retry")
