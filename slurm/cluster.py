"""What Slurm is asked and told, one function per command; nothing else in the suite starts a Slurm program.

Slurm answers, says no (`Refused`), or does not answer in time (`Busy`: what was asked may have been done all the same).
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdae.errors import UserError

TIMEOUT = 60.0  # seconds that a Slurm command may take
AT_ONCE = 200  # ids per scancel, so that a command line stays short
BUSY = re.compile(  # of slurm_strerror: a controller that is away, restarting or overloaded
    r"timed out|unable to contact|temporarily|zero bytes|connection (refused|reset)|communication|try again|backup",
    re.I,
)


class NoSlurm(UserError):
    """This machine has no Slurm."""


class Refused(UserError):
    """Slurm said no, for good."""


class Busy(Exception):
    """Slurm did not answer."""


class Unanswered(UserError):
    """What a command could not do since Slurm did not answer: to be tried again."""

    code = 1


@dataclass(frozen=True)
class Task:
    """One task of a job array, as squeue or sacct tells of it. Times are seconds since 1970, 0.0 where not told."""

    name: str
    job: str
    index: int
    state: str
    reason: str = ""  # of sacct: the state in full, e.g. CANCELLED by 1000
    code: str = ""
    node: str = ""
    submitted: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    user: str = ""  # whose it is, where that was told

    @property
    def id(self) -> str:
        return f"{self.job}_{self.index}"

    @property
    def ours(self) -> bool:
        return self.user in ("", me())


@dataclass(frozen=True)
class Limits:
    """array: tasks in one array: MaxArraySize, which every index is below. tasks: that a user may have queued at once,
    None where nothing says."""

    array: int = 1001
    tasks: int | None = None


class Slurm:
    """The Slurm of this machine."""

    def __init__(self, timeout: float = TIMEOUT):
        if shutil.which("sbatch") is None:
            raise NoSlurm("no Slurm on this machine: sbatch is not on the PATH (a login node? `module load slurm`?)")
        self.timeout = timeout

    def call(self, *words: str) -> str:
        """A command's stdout. Raises `Refused` with Slurm's own words, or `Busy`."""
        program = shutil.which(words[0])
        if program is None:
            raise NoSlurm(f"no Slurm on this machine: {words[0]} is not on the PATH")
        try:
            done = subprocess.run(
                [program, *words[1:]], capture_output=True, text=True, timeout=self.timeout, env=environment(words[0]),
                stdin=subprocess.DEVNULL, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Busy(f"{words[0]}: no answer in {self.timeout:.0f} s") from None
        if done.returncode == 0:
            return done.stdout
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise (Busy if BUSY.search(said) else Refused)(f"{words[0]}: {said.removeprefix(f'{words[0]}: ')}")

    def submit(self, script: Path) -> str:
        """Job id of the array that a script became."""
        return self.call("sbatch", "--parsable", str(script)).strip().split(";")[0]

    def queue(self, users: Iterable[str] = ()) -> list[Task]:
        """Tasks that are waiting or running, this user's and those of `users`: one squeue."""
        whose = f"--user={','.join(sorted({me(), *users}))}"
        text = self.call("squeue", whose, "--all", "--array", "--noheader", "--format=%j|%F|%K|%T|%r|%N|%u|%V|%S")
        tasks = []
        for name, job, index, state, reason, node, user, submitted, started in _rows(text, 9):
            if index.isdigit():
                times = (_seconds(submitted), _seconds(started))
                tasks.append(Task(name, job, int(index), state, reason, "", node, *times, user=user))
        return tasks

    def history(self, names: Sequence[str], since: float, jobs: Sequence[str] = ()) -> list[Task] | None:
        """What accounting knows of arrays of these names, the oldest first: one sacct. None: there is no accounting.

        jobs: their ids, where all are known. Asked by name, sacct leaves out what has never been eligible to run.
        """
        begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))  # clocks differ
        fields = "JobName,JobID,State,ExitCode,NodeList,Submit,Start,End"
        which = f"--jobs={','.join(jobs)}" if jobs else f"--name={','.join(names)}"
        options = ("--allocations", "--allusers", "--parsable2", "--noheader", "--duplicates", which)
        try:
            text = self.call("sacct", *options, f"--starttime={begin}", f"--format={fields}")
        except Refused as error:
            if "storage" in str(error).lower() or "disabled" in str(error).lower():
                return None
            raise
        tasks = []
        for name, identity, state, code, node, *times in _rows(text, 8):
            if name not in names:  # an id that Slurm has used again
                continue
            for job, index in _array_tasks(identity):
                when = [_seconds(time) for time in times]
                tasks.append(Task(name, job, index, state.split()[0], state, code, node, when[0], when[1], when[2]))
        return sorted(tasks, key=lambda task: (task.submitted, task.started, task.ended or float("inf")))

    def cancel(self, ids: Iterable[str]) -> None:
        """Ends tasks (`123_4`) or whole arrays (`123`); those that have ended already do not matter."""
        waiting = sorted(set(ids))
        for start in range(0, len(waiting), AT_ONCE):
            self.call("scancel", "--quiet", *waiting[start : start + AT_ONCE])

    def release(self, ids: Iterable[str]) -> None:
        """Lets tasks go on that are held."""
        for identity in ids:
            self.call("scontrol", "release", identity)

    def config(self) -> dict[str, str]:
        """`scontrol show config`."""
        lines = (line.partition("=") for line in self.call("scontrol", "show", "config").splitlines())
        return {key.strip(): value.strip() for key, _, value in lines}

    def limits(self) -> Limits:
        """How large an array and how long a queue may be, from the controller and, where there is one, accounting."""
        config = self.config()
        counts = [int(config["MaxJobCount"])] if config.get("MaxJobCount", "").isdigit() else []
        try:
            who = (f"user={me()}", f"cluster={config.get('ClusterName', '')}")
            text = self.call("sacctmgr", "--noheader", "--parsable2", "show", "assoc", *who, "format=MaxSubmitJobs")
            told = [line.strip() for line in text.splitlines()]  # of each account: a number, or nothing for no limit
            closed = all(most == "0" for most in told)  # else one of them takes what another refuses
            counts += [int(most) for most in told if most.isdigit() and (closed or int(most))]
        except (Refused, Busy, NoSlurm):
            pass  # no accounting; sbatch says so where it minds
        size = config.get("MaxArraySize", "")
        return Limits(max(1, int(size)) if size.isdigit() else Limits.array, min(counts, default=None))


def me() -> str:
    """This user's name, as Slurm has it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def environment(program: str) -> dict[str, str]:
    """Ours, without what a surrounding job says of itself, and what stands for options that are not given: an inner
    sbatch would take the one for options, and with the other squeue would show a part, and scancel ask."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OPTIONS) or k in CLIENT}
    return kept | ({"SLURM_TIME_FORMAT": "%s"} if program in ("squeue", "sacct") else {})


OPTIONS = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SACCT_")
CLIENT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF_SERVER")


def _rows(text: str, columns: int) -> Iterable[list[str]]:
    """Lines of exactly so many columns; others are warnings, or of a Slurm that we do not know."""
    return (row for line in text.splitlines() if len(row := [c.strip() for c in line.split("|")]) == columns)


def _array_tasks(identity: str) -> list[tuple[str, int]]:
    """`123_4`, or the tasks of `123_[0-2,5%3]`, which have waited together to their end; none of what is no array."""
    from submitit.slurm.slurm import read_job_id

    try:
        found = [(job, int(first), int(last[0] if last else first)) for job, first, *last in read_job_id(identity)]
    except ValueError:  # a single job, or a list that Slurm has cut short
        return []
    return [(job, index) for job, first, last in found for index in range(first, last + 1)]


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0
