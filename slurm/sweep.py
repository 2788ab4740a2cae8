"""What the sweep commands do on a cluster: look, write down what became of runs, mend, then act once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ablations.planner import PlannedRun
from sdae.errors import UserError
from sdae.store import GRACE_SECONDS, Store
from slurm.cluster import Busy, Limits, NoSlurm, Refused, Slurm, Unanswered
from slurm.heal import abandoned, cancel, cancellable, forgive, mend
from slurm.ledger import Ledger
from slurm.look import Survey, last_submission, settle, survey
from slurm.profile import Profile, load_profile
from slurm.submit import Report, chosen, dry_run, submit


@dataclass
class Outcome:
    """survey: how the runs stood before. mended: what was put right first. report: what was submitted."""

    survey: Survey
    report: Report = field(default_factory=Report)
    mended: list[str] = field(default_factory=list)


def look(
    runs: Sequence[PlannedRun], store: Store, *, grace: float = GRACE_SECONDS, slurm: Slurm | None = None
) -> Survey:
    """How runs stand; what Slurm said of those that ended without a word is written down."""
    found = survey(runs, store, slurm, grace=grace)
    settle(found, runs)
    return found


def preview(runs: Sequence[PlannedRun], store: Store, profile: Profile, *, failed: bool = False) -> Outcome:
    """What `hand_over` would do, on a machine with or without Slurm; nothing is written."""
    store.must_be_real()
    slurm, limits = None, Limits()
    try:
        slurm = Slurm()
        limits = slurm.limits()
    except (NoSlurm, Busy, Refused):  # absent, or installed and belonging to no cluster
        slurm = None  # what the store says must do
    found = survey(runs, store, slurm)
    return Outcome(found, dry_run(chosen(runs, found, failed=failed), store, profile, limits, found))


def hand_over(
    runs: Sequence[PlannedRun],
    store: Store,
    profile: Profile,
    scale: str,
    *,
    failed: bool = False,
    grace: float = GRACE_SECONDS,
    slurm: Slurm | None = None,
) -> Outcome:
    """Submits what nobody has; with `failed`, what has failed too. Raises UserError where Slurm is absent or refuses,
    Unanswered where it does not answer."""
    store.must_be_real()
    slurm = slurm or Slurm()
    try:
        found = look(runs, store, grace=grace, slurm=slurm)
        _must_be_known(found, "nothing was submitted")
        outcome = Outcome(found, mended=mend(found, slurm))
        if outcome.mended:
            found = outcome.survey = look(runs, store, grace=grace, slurm=slurm)
        wanted = chosen(runs, found, failed=failed)
        if failed:
            forgive(wanted, found)
        outcome.report = submit(wanted, store, slurm, profile, found, scale=scale)
    except Busy as error:
        raise Unanswered(f"{error}: nothing was submitted") from None
    return outcome


def take_back(runs: Sequence[PlannedRun], store: Store, slurm: Slurm | None = None) -> tuple[Survey, list[str]]:
    """The runs of these that `cancel` would end. Raises as `hand_over`."""
    found = look(runs, store, slurm=slurm)
    _must_be_known(found, "nothing was cancelled")
    try:
        left = abandoned(found, lambda: slurm or Slurm())
    except Busy as error:
        raise Unanswered(f"{error}: nothing was cancelled") from None
    for identity, task in left.items():
        found.standings[identity] = replace(found.standings[identity], task=task)
    found.queue = [*(found.queue or ()), *left.values()]
    return found, [*cancellable(found), *left]


def _must_be_known(found: Survey, so: str) -> None:
    if found.trouble:
        raise (Unanswered if found.away else UserError)(f"{found.trouble}: {so}")


def end(identities: Sequence[str], found: Survey, slurm: Slurm | None = None) -> list[str]:
    try:
        return cancel(identities, found, slurm or Slurm())
    except Busy as error:
        raise Unanswered(f"{error}: the runs are taken back, their tasks go on; cancel again") from None


def profile_of(store: Store, path: Path | None) -> Profile:
    """The profile of a file; none given: that of the latest submission."""
    if path is not None:
        return load_profile(path)
    last = last_submission(store)
    if last is None:
        raise UserError("--profile: missing (a YAML file such as those in examples/profiles)")
    return load_profile(Ledger(store).folder(last.token) / "profile.json")
