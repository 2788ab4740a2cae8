"""How runs stand: the store, one squeue, at most one sacct, and what follows from them (`slurm.reconcile`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.planner import PlannedRun
from sdae.config import dump, parse
from sdae.errors import UserError
from sdae.store import GRACE_SECONDS, RunFolder, Store, number
from slurm.cluster import Busy, NoSlurm, Refused, Slurm, Task
from slurm.ledger import CANCELLED, FREE, Ledger, Reservation, Submission
from slurm.reconcile import LOST, Seen, Standing, judge, missed, with_needs
from slurm.worker import record


@dataclass
class Survey:
    """standings: by run. trouble: why Slurm told nothing; away: it may answer later."""

    store: Store
    standings: dict[str, Standing] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    submissions: dict[str, Submission] = field(default_factory=dict)
    queue: Sequence[Task] | None = ()
    trouble: str | None = None
    away: bool = False

    def having(self, *states: str) -> set[str]:
        return {identity for identity, standing in self.standings.items() if standing.state in states}

    @property
    def queued(self) -> int:
        return sum(task.ours for task in self.queue or ())

    def spots(self) -> dict[str, tuple[str, int]]:
        """Where in the queue runs are that will end by themselves."""
        alive = {task.id for task in self.queue or ()}
        standings = self.standings.items()
        return {
            i: (s.task.job, s.task.index) for i, s in standings if s.task and s.task.id in alive and s.stuck != "cancel"
        }

    def comes(self, need: str) -> bool:
        """Whether a need is done, or in the queue."""
        standing = self.standings.get(need)
        if standing is None or standing.state == "done":
            return self.store.run(need).done
        return need in self.spots()


def survey(
    runs: Iterable[PlannedRun], store: Store, slurm: Slurm | None = None, *, grace: float = GRACE_SECONDS
) -> Survey:
    """How runs (needs first) stand. slurm: asked only where a run was handed to it; None: that of this machine."""
    ledger, runs, now = Ledger(store), list(runs), time.time()
    found = Survey(store, reservations=ledger.reservations() if ledger.exists() else {})
    states = {run.id: store.run(run.id).state() for run in runs}
    held = {
        run.id: found.reservations[run.id]
        for run in runs
        if states[run.id] != "done" and found.reservations.get(run.id, Reservation()).token not in FREE
    }
    for token in sorted({reservation.token for reservation in held.values()}):
        if (submission := ledger.read(token)) is not None:
            found.submissions[token] = submission
    places = {  # job name and array index
        identity: (submission.name, index)
        for submission in found.submissions.values()
        for index, identity in submission.runs.items()
        if identity in held and held[identity].token == submission.token
    }
    history: list[Task] | None = []
    if held:
        try:
            slurm = slurm or Slurm()
            found.queue = slurm.queue({submission.user for submission in found.submissions.values()})
            there = {(task.name, task.index) for task in found.queue}
            gone = [i for i in held if states[i] in ("new", "started", "failed") and places.get(i) not in there]
            if tokens := {held[i].token for i in gone} & found.submissions.keys():
                known = [found.submissions[token] for token in sorted(tokens)]
                jobs = [s.job for s in known if s.job is not None]
                since = min(s.time for s in known)
                history = slurm.history([s.name for s in known], since, jobs if len(jobs) == len(known) else ())
        except (Busy, Refused, NoSlurm) as error:
            found.queue, found.trouble, found.away = None, str(error), isinstance(error, Busy)
    rows, past = _by_place(found.queue or ()), _by_place(history or ())
    for run in runs:
        reservation, place = held.get(run.id, Reservation()), places.get(run.id)
        submission = found.submissions.get(reservation.token)
        queue = None if found.queue is None else rows.get(place, ())
        seen = _seen(store, run, states[run.id])
        standing = judge(seen, reservation, submission, queue, past.get(place, ()), now=now, grace=grace)
        needs = [found.standings[need].state for need in run.needs if need in found.standings]
        found.standings[run.id] = with_needs(standing, needs)
    return found


def _by_place(tasks: Iterable[Task]) -> dict[tuple[str, int] | None, list[Task]]:
    found: dict[tuple[str, int] | None, list[Task]] = {}
    for task in tasks:
        found.setdefault((task.name, task.index), []).append(task)
    return found


def _seen(store: Store, run: PlannedRun, state: str) -> Seen:
    if state == "done":
        return Seen(state)
    folder = store.run(run.id)
    failure = (folder.failure() or {}) if state == "failed" else {}
    if state == "new":
        notes = folder.notes()
        return Seen(state, notes=notes, needs_done=all(store.run(need).done for need in run.needs))
    return Seen(
        state, _text(failure.get("class")), _text(failure.get("submission")), number(folder.heartbeat() or {}, "time"),
        folder.saved_step, folder.notes(), all(store.run(need).done for need in run.needs),
    )  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def settle(found: Survey, runs: Iterable[PlannedRun]) -> None:
    """Writes down what Slurm said of runs that ended without a word, as sacct forgets.

    Slurm may miss a task for a moment, so that it did is noted the first time, and unsaid once it has it again.
    """
    store, ledger = found.store, Ledger(found.store)
    queued = {task.id for task in found.queue or ()}
    for run in runs:
        standing, folder = found.standings[run.id], store.run(run.id)
        token = found.reservations.get(run.id, Reservation()).token
        # What sacct alone knows is not there: it tells of a task as waiting for ever that the controller has forgotten
        there = standing.state in ("queued", "running", "waiting") and standing.task and standing.task.id in queued
        with contextlib.suppress(OSError):
            if standing.missed:
                folder.note("missed", token=token)
            elif there and missed(folder.notes(), token):
                folder.note("seen", token=token)
        verdict = standing.verdict
        if verdict is not None and not folder.done and not folder.claimed() and ledger.holder(run.id).token == token:
            try:
                record(folder, dump(run.config), *verdict, token)
            except UserError:  # who may only read leaves it to somebody who may write
                continue
            for_its_need = verdict[0] == "Lost" and run.needs  # then Slurm may have cancelled it
            if verdict[0] in LOST and not for_its_need:
                folder.note("lost", token=token, step=folder.saved_step)


def recorded(store: Store) -> list[PlannedRun]:
    """The runs that were handed over, needs first, as they were then."""
    ledger = Ledger(store)
    held = {i: ledger.orderer(i, r) if r.token in FREE else r.token for i, r in ledger.reservations().items()}
    orders = {token: ledger.runs(token) for token in set(held.values())}
    runs = []
    for identity, token in held.items():
        if (order := orders[token].get(identity)) is not None:
            lists = [order.get(key) for key in ("needs", "feeds")] if isinstance(order, dict) else [None]
            if not all(isinstance(found, list) and all(isinstance(i, str) for i in found) for found in lists):
                raise UserError(f"{ledger.folder(token) / 'runs.json'}: what it says of {identity} cannot be used")
            needs, feeds = tuple(order["needs"]), list(order["feeds"])
            runs.append(PlannedRun(identity, parse(order.get("config"), identity), needs, feeds))
    return sorted(runs, key=lambda run: (len(run.needs), run.id))


def wanted(runs: Iterable[PlannedRun], store: Store) -> list[PlannedRun]:
    """The runs without those that a user has cancelled."""
    reservations = Ledger(store).reservations()
    return [run for run in runs if reservations.get(run.id, Reservation()).token != CANCELLED]


def find(store: Store, prefix: str) -> RunFolder:
    """A run by its id or by a unique beginning of it, also one that waits in Slurm's queue and has no folder yet."""
    waiting = {i for i in Ledger(store).reservations() if i.startswith(prefix)}
    if len(waiting) == 1 and not any(i.startswith(prefix) for i in store.ids()):
        return store.run(waiting.pop())
    return store.find(prefix)


def queued(store: Store, identity: str) -> bool:
    """Whether a run has been handed to Slurm."""
    return Ledger(store).holder(identity).token not in FREE


def log_of(store: Store, identity: str) -> Path:
    """A run's log; where it has none yet, what Slurm kept of its job: the error that came before ours could be told."""
    run, ledger = store.run(identity), Ledger(store)
    submission = ledger.read(ledger.holder(identity).token) if ledger.exists() and not run.log.exists() else None
    for index, other in (submission.runs if submission else {}).items():
        if submission and other == identity:
            stem = f"{submission.job}_{index}_0_log"  # what a task prints; before it, what the batch script does
            logs = [ledger.folder(submission.token) / f"{stem}.{kind}" for kind in ("err", "out")]
            return next((log for log in logs if log.exists() and log.stat().st_size), run.log)
    return run.log


def last_submission(store: Store) -> Submission | None:
    """The latest array that was written down."""
    ledger = Ledger(store)
    return max(filter(None, map(ledger.read, ledger.tokens())), key=lambda submission: submission.time, default=None)
