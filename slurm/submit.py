"""Hands runs to Slurm: one array per group of equal resources, needs first, each run to one array.

Decide first, act once: `arrays` says what would be submitted, `submit` reserves, writes and calls sbatch.
A run is reserved before sbatch is called and the reservation's token is the job's name, so an sbatch that timed out but
was accepted is found again, and of two submitters one has the run (`slurm.ledger`).
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from ablations.planner import PlannedRun
from sdae.config import Config, dump
from sdae.errors import UserError
from sdae.files import flush, make_folder, write_atomically
from sdae.released import located
from sdae.store import Store
from slurm.cluster import Busy, Limits, Refused, Slurm
from slurm.job import SweepJob
from slurm.ledger import Ledger, Reservation, Submission, job_name, new_token
from slurm.local import EXECUTE
from slurm.look import Survey
from slurm.profile import Profile, Resources
from slurm.snapshot import snapshot

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between tries while Slurm does not answer
SIGNAL = "USR2"  # before a time limit; SUBMITIT_PREEMPT_SIGNAL may ask submitit for another, which no run listens to
REQUEUES = 1_000_000  # that submitit allows; whether a run gets on is seen in its checkpoints (`slurm.job`)
TOO_MANY = re.compile(r"(Assoc|QOS)\w*Submit")  # the words after it are the same for every limit

Spot = tuple[str, int]  # array job and index


@dataclass
class Array:
    """One sbatch: runs by index, and what Slurm lets it wait for."""

    resources: Resources
    runs: dict[int, PlannedRun]
    dependency: str | None = None

    @property
    def spec(self) -> str:
        """`0-3,7%2`."""
        parts: list[list[int]] = []
        for index in sorted(self.runs):
            if parts and index == parts[-1][1] + 1:
                parts[-1][1] = index
            else:
                parts.append([index, index])
        limit = self.resources.array_parallelism
        return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in parts) + (f"%{limit}" if limit else "")


@dataclass
class Report:
    """What became of a submission. arrays: as `add` tells of them. raced: runs that somebody else submitted meanwhile.
    later: runs whose needs are not in the queue yet. left: runs for which Slurm has no room now."""

    arrays: list[dict[str, Any]] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    raced: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def add(self, array: Array, job: str, text: str) -> dict[str, Spot]:
        """Tells of an array that was handed over; where its runs are now."""
        stages = sorted({run.config.stage for run in array.runs.values()})
        runs = {str(index): run.id for index, run in sorted(array.runs.items())}
        self.arrays.append({
            "job": job, "stages": stages, "tasks": len(runs), "array": array.spec, "dependency": array.dependency,
            "runs": runs, "sbatch": text,
        })  # fmt: skip
        self.submitted += [run.id for run in array.runs.values()]
        return {run.id: (job, index) for index, run in array.runs.items()}


def chosen(runs: Iterable[PlannedRun], survey: Survey, *, failed: bool = False) -> list[PlannedRun]:
    """The runs to submit: nobody has them, and their needs are done, queued or chosen as well.

    failed: the failed ones too.
    """
    picked: dict[str, PlannedRun] = {}
    for run in runs:  # topological
        standing = survey.standings[run.id]
        wanted = standing.open or (failed and standing.state == "failed")
        if wanted and all(need in picked or survey.comes(need) for need in run.needs):
            picked[run.id] = run
    return list(picked.values())


def levels(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """Runs that wait for none of the others, then those that wait for these, and so on."""
    depth: dict[str, int] = {}
    for run in runs:
        depth[run.id] = 1 + max((depth[need] for need in run.needs if need in depth), default=-1)
    return [[r for r in runs if depth[r.id] == level] for level in range(max(depth.values(), default=-1) + 1)]


def arrays(runs: Sequence[PlannedRun], spots: Mapping[str, Spot], profile: Profile, limits: Limits) -> list[Array]:
    """Runs whose needs are done or have a spot in a queued array, as arrays.

    The first run that waits for a task takes that task's index, so that aftercorr pairs them; those that share a need
    with it wait together until their needs have ended, well or not: each looks again when it starts.
    """
    groups: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in runs:
        jobs = sorted({spots[need][0] for need in run.needs if need in spots})
        groups.setdefault((profile.resources(run.config.stage).key, *jobs), []).append(run)
    made = []
    for (_, *jobs), members in groups.items():
        resources = profile.resources(members[0].config.stage)
        paired: dict[int, PlannedRun] = {}
        rest = members
        if len(jobs) == 1:
            rest = []
            for run in members:
                index = next(spots[need][1] for need in run.needs if need in spots)
                if paired.setdefault(index, run) is not run:
                    rest.append(run)
            made.append(Array(resources, paired, f"aftercorr:{jobs[0]}"))
        for start in range(0, len(rest), limits.array):
            chunk = rest[start : start + limits.array]
            tasks = sorted({spots[need] for run in chunk for need in run.needs if need in spots})
            after = "afterany:" + ":".join(f"{job}_{index}" for job, index in tasks) if tasks else None
            made.append(Array(resources, dict(enumerate(chunk)), after))
    return made


SlurmJobEnvironment.USR_SIG = SIGNAL


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's executor as the writer of the sbatch text: a dry run needs no srun on this machine."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def script(array: Array, token: str, ledger: Ledger, code: Path) -> str:
    """The text for sbatch. Its set-up puts submitit's pickle where the task looks for it, once (a requeued task finds
    the one that its checkpoint wrote), so nothing is left to do after sbatch has accepted the array."""
    folder = ledger.folder(token).absolute()
    executor = _Executor(folder, REQUEUES, python=array.resources.python)
    parameters = array.resources.parameters()
    additional = {**parameters.pop("additional_parameters", {}), "array": array.spec}
    executor.parameters["map_count"] = len(array.runs)  # logs are named as for an array
    theirs = f'{shlex.quote(str(folder))}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"'
    setup = [
        *(parameters.pop("setup", None) or []),
        f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}",
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"cd {shlex.quote(str(code))}",
        f"[ -e {theirs} ] || cp {shlex.quote(str(folder / 'job.pkl'))} {theirs}",
    ]
    if (pictures := os.environ.get("SDAE_DATA")) and not os.path.isabs(pictures):
        setup.insert(0, f"export SDAE_DATA={shlex.quote(os.path.abspath(pictures))}")
    executor.update_parameters(
        **parameters, job_name=job_name(token), dependency=array.dependency, setup=setup,
        additional_parameters=additional,
    )  # fmt: skip
    return str(executor._make_submission_file_text(executor._submitit_command_str, token))


def dry_run(runs: Sequence[PlannedRun], store: Store, profile: Profile, limits: Limits, survey: Survey) -> Report:
    """What `submit` would do; nothing is written. Job ids are not known, so arrays are called JOB1, JOB2, .."""
    report, ledger, spots = Report(), Ledger(store), survey.spots()
    code = snapshot(ledger, make=False)
    runs, report.left = within(runs, limits, survey.queued)
    for level in levels(runs):
        for array in arrays(level, spots, profile, limits):
            job = f"JOB{len(report.arrays) + 1}"
            spots |= report.add(array, job, script(array, job.lower(), ledger, code))
    return report


def within(runs: Sequence[PlannedRun], limits: Limits, queued: int) -> tuple[list[PlannedRun], list[str]]:
    """The runs for which the queue has room, needs first, and the ids of the others."""
    room = len(runs) if limits.tasks is None else max(0, limits.tasks - queued)
    return list(runs[:room]), [run.id for run in runs[room:]]


def submit(
    runs: Sequence[PlannedRun],
    store: Store,
    slurm: Slurm,
    profile: Profile,
    survey: Survey,
    *,
    scale: str,
    target: str = EXECUTE,
    sleep: Callable[[float], None] = time.sleep,
) -> Report:
    """Submits runs that `chosen` has picked. Raises UserError where sbatch refuses; what was submitted stays so."""
    store.must_be_real()
    report, ledger, spots = Report(), Ledger(store), survey.spots()
    limits = slurm.limits()
    runs, report.left = within(runs, limits, survey.queued or len(slurm.queue()))
    if not runs:
        return report
    store.open()
    ledger.open()
    code = snapshot(ledger)
    for level in levels(runs):
        reachable = [run for run in level if all(need in spots or store.run(need).done for need in run.needs)]
        report.later += [run.id for run in level if run not in reachable]
        waiting = arrays(reachable, spots, profile, limits)
        while waiting:
            array = waiting.pop(0)
            sender = _Sender(array, store, ledger, slurm, code, scale, target, sleep)
            try:
                job = sender.send(survey.reservations, profile)
            except Refused as error:
                if not TOO_MANY.search(str(error)):
                    before = f" ({len(report.submitted)} runs were submitted before)" if report.submitted else ""
                    raise UserError(f"{error}{before}") from None
                if len(array.runs) == 1:
                    report.left += [run.id for run in array.runs.values()]
                else:  # there is room for fewer: halves keep their indices
                    items = list(array.runs.items())
                    halves = items[: len(items) // 2], items[len(items) // 2 :]
                    waiting[:0] = [Array(array.resources, dict(half), array.dependency) for half in halves]
                continue
            except Busy as error:
                report.trouble.append(
                    f"{error}; whether it took {sender.name} is not known: `sdae-cli sweep heal` finds out"
                )
                return report
            report.raced += sender.raced
            if job is not None:
                spots |= report.add(array, job, sender.text)
    return report


class _Sender:
    """One array on its way to sbatch."""

    def __init__(
        self, array: Array, store: Store, ledger: Ledger, slurm: Slurm, code: Path, scale: str, target: str,
        sleep: Callable[[float], None],
    ):  # fmt: skip
        self.array, self.store, self.ledger, self.slurm = array, store, ledger, slurm
        self.code, self.scale, self.target, self.sleep = code, scale, target, sleep
        self.token = new_token()
        self.name = job_name(self.token)
        self.raced: list[str] = []
        self.text = ""

    def send(self, reservations: Mapping[str, Reservation], profile: Profile) -> str | None:
        """The array's job id; None where others have taken all of its runs."""
        before = {run.id: reservations.get(run.id, Reservation()) for run in self.array.runs.values()}
        taken: list[tuple[str, Reservation]] = []
        failed = [run.id for run in self.array.runs.values() if self.store.run(run.id).failure() is not None]
        try:
            for index, run in list(self.array.runs.items()):
                if self.ledger.reserve(run.id, before[run.id], self.token):
                    taken.append((run.id, before[run.id]))
                else:
                    self.raced.append(run.id)
                    del self.array.runs[index]
            if not taken:
                return None
            submission = self._write(profile)
        except UserError:
            self._take_back(taken, failed)
            raise
        try:
            submission.job = self._sbatch(submission)
        except Refused:
            self._take_back(taken, failed)
            raise
        self.ledger.write(submission)
        return submission.job

    def _take_back(self, taken: list[tuple[str, Reservation]], failed: list[str]) -> None:
        """Nothing was submitted: what runs had failed of is told on, and may be retried."""
        for identity, _ in taken:
            if identity in failed:
                self.store.run(identity).recall_failure()  # before others may take the run
        self.ledger.forget(self.token, taken)

    def _write(self, profile: Profile) -> Submission:
        """All that the array needs, the record of its submission last."""
        resources, folder = self.array.resources, self.ledger.folder(self.token)
        self.ledger.keep()
        make_folder(folder)
        folder.chmod(0o711)  # nobody else lists or changes it; others of a shared store open the record by its name
        try:
            job = DelayedSubmission(SweepJob(str(self.store.root.absolute()), self.token))
            job.set_timeout(resources.minutes, REQUEUES)
            job.dump(folder / "job.pkl")
            (folder / "job.pkl").chmod(0o600)  # it is unpickled: nobody else reads or writes it
            flush(folder / "job.pkl")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
        runs = self.array.runs
        orders = {
            run.id: {"config": dump(absolute(run.config)), "needs": list(run.needs), "feeds": run.feeds}
            for run in runs.values()
        }
        self.ledger.write_runs(self.token, orders)
        write_atomically(folder / "profile.json", profile.model_dump_json())
        self.text = script(self.array, self.token, self.ledger, self.code)
        write_atomically(folder / "submission.sh", self.text)
        for run in runs.values():  # retried runs begin anew: what they failed of is history
            self.store.run(run.id).forget_failure()
        submission = Submission(
            self.token, {index: run.id for index, run in runs.items()}, time.time(), resources.minutes,
            resources.warn_seconds, resources.nodes * resources.tasks_per_node, self.code.name, self.target, self.scale,
        )  # fmt: skip
        self.ledger.write(submission)
        return submission

    def _sbatch(self, submission: Submission) -> str:
        """The array's job id. After a silence sbatch is called again only where Slurm says that it has no such job."""
        file, unknown = self.ledger.folder(self.token) / "submission.sh", False
        for pause in (*PAUSES, 0.0):
            try:
                if not unknown:
                    unknown = True
                    return self.slurm.submit(file.absolute())
                if (job := self.found(submission)) is not None:
                    return job
                unknown = False
                continue
            except Busy as error:
                last = error
            self.sleep(pause)
        raise last

    def found(self, submission: Submission) -> str | None:
        """The array that Slurm has under this name, if any."""
        try:
            tasks = [task for task in self.slurm.queue() if task.name == self.name]
            tasks = tasks or self.slurm.history([self.name], submission.time) or []
        except Refused as error:  # not sbatch's own refusal: it may have taken the array
            raise Busy(str(error)) from None
        return tasks[0].job if tasks else None


def absolute(config: Config) -> Config:
    """The config with the files that it names found from any folder."""
    path = config.data.path
    if path is not None and not os.path.isabs(path) and not path.startswith(("$", "~")):
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": os.path.abspath(path)})})
    weights = getattr(getattr(config, "init", None), "weights", "") or ""
    if weights.startswith("file:") and not os.path.isabs(weights[5:]):
        init = config.init.model_copy(update={"weights": f"file:{os.path.abspath(located(weights[5:]))}"})  # type: ignore[union-attr]
        config = config.model_copy(update={"init": init})
    return config
