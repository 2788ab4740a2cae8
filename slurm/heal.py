"""What is put right in the queue, and what is taken out of it: by hand, by cron, or by whoever submits next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ablations.planner import PlannedRun
from slurm.cluster import Slurm, Task, me
from slurm.ledger import CANCELLED, TOKEN, WITHDRAWN, Ledger, Reservation
from slurm.look import Survey
from slurm.reconcile import stuck


def mend(found: Survey, slurm: Slurm) -> list[str]:
    """Adopts arrays that Slurm took without saying so, ends those that it took twice and tasks that wait in vain, and
    lets held ones go; one line for each thing done."""
    ledger, done = Ledger(found.store), []
    queue = found.queue or ()
    for submission in found.submissions.values():
        jobs = sorted({task.job for task in queue if task.name == submission.name and task.ours}, key=int)
        if jobs and submission.job is None and not submission.awaited:
            submission.job = jobs[0]
            ledger.write(submission)
            done.append(f"array {jobs[0]} is {submission.name}, whose sbatch had not answered")
        if twice := [job for job in jobs if submission.job is not None and job != submission.job]:
            slurm.cancel(twice)
            done.append(f"{submission.name} was taken twice: {', '.join(twice)} ended, {submission.job} goes on")
    never = [i for i, s in found.standings.items() if s.stuck == "cancel"]
    done += [f"{i} waited for a task that did not end well: taken back" for i in cancel(never, found, slurm, WITHDRAWN)]
    vain = list(_vain(found, ledger))  # whose runs were taken back before, but Slurm did not hear of it
    slurm.cancel(vain)
    done += [f"task {task} waited in vain for a run that it has no more: ended" for task in vain]
    held = {i: s.task.id for i, s in found.standings.items() if s.stuck == "release" and s.task and s.task.ours}
    slurm.release(held.values())
    done += [f"{i}: task {task} was held after a failed launch: released" for i, task in held.items()]
    return done


def _vain(found: Survey, ledger: Ledger) -> Iterator[str]:
    for task in filter(lambda task: task.ours, found.queue or ()):
        token = task.name.removeprefix("sdae-")
        ours = token != task.name and TOKEN.fullmatch(token)
        submission = ledger.read(token) if ours and stuck(task) else None
        if submission is not None and (identity := submission.runs.get(task.index)) is not None:
            standing = found.standings.get(identity)
            failed = standing is not None and standing.state == "failed"
            if failed or ledger.lost(identity, token) or found.store.run(identity).done:
                yield task.id


def cancellable(found: Survey) -> list[str]:
    """Runs of a survey that this user has in the queue, or on their way into it."""
    spots, mine = found.spots(), {s.token for s in found.submissions.values() if s.user == me()}
    return [
        i for i, s in found.standings.items()
        if i in found.reservations and found.reservations[i].token in mine
        and (i in spots or (s.state in ("queued", "waiting") and not s.open))
    ]  # fmt: skip


def abandoned(found: Survey, slurm: Callable[[], Slurm]) -> dict[str, Task]:
    """This user's tasks that go on although their runs were cancelled: Slurm did not answer to scancel."""
    ledger, places = Ledger(found.store), dict[tuple[str, int], str]()
    for identity, reservation in found.reservations.items():
        if reservation.token == CANCELLED and identity in found.standings:
            submission = ledger.read(ledger.orderer(identity, reservation))
            for index, run in submission.runs.items() if submission else ():
                if submission and run == identity:
                    places[submission.name, index] = identity
    queue = slurm().queue({me()}) if places else ()
    return {places[task.name, task.index]: task for task in queue if task.ours and (task.name, task.index) in places}


def cancel(identities: Iterable[str], found: Survey, slurm: Slurm, token: str = CANCELLED) -> list[str]:
    """Takes runs away from their tasks, then ends these: a task that starts all the same finds its run gone."""
    ledger, ended = Ledger(found.store), []
    queued = {task.id for task in found.queue or () if task.ours}
    for identity in identities:
        reservation = found.reservations.get(identity, Reservation())
        if reservation.token == CANCELLED or ledger.reserve(identity, reservation, token):
            ended.append(identity)
    tasks = (found.standings[identity].task for identity in ended)
    slurm.cancel(task.id for task in tasks if task is not None and task.id in queued)
    return ended


def forgive(runs: Iterable[PlannedRun], found: Survey) -> None:
    """Marks failed runs as retried: attempts are counted anew."""
    for run in runs:
        if found.standings[run.id].state in ("failed", "lost"):
            found.store.run(run.id).note("retry")
