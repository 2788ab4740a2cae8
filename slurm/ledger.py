"""What was handed to Slurm: files in STORE/.slurm, written before sbatch is called.

    runs/ID.N -> TOKEN   the N-th reservation of a run, a symbolic link
    jobs/TOKEN/          one array: submission.json, runs.json, and submitit's script, pickles and logs
    code/HASH/           the code that the array runs

Invariant: a run belongs to the token of its highest reservation. Making a link fails where it exists, on NFS too, so of
two submitters one gets the run; a job whose token is not its run's any more does not run it. The token is in the job's
name, so an array that Slurm took without saying so is found again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdae.errors import UserError
from sdae.store import Store, process_start, read_json, to_json, write_atomically

CANCELLED = "cancelled"  # the token of a reservation that takes a run away from its job


@dataclass(frozen=True)
class Reservation:
    """`number` counts from 1; number 0 is that of a run which nobody has reserved yet."""

    number: int = 0
    token: str = ""
    time: float = 0.0


@dataclass
class Submission:
    """One array. `runs`: ids by array index. `job`: the array's job id, None until sbatch has told it."""

    token: str
    runs: dict[int, str]
    time: float
    minutes: int
    warn_seconds: int
    processes: int
    code: str
    target: str
    scale: str
    job: str | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str | None = field(default_factory=lambda: process_start(os.getpid()))

    @property
    def name(self) -> str:
        return job_name(self.token)

    @property
    def submitter_lives(self) -> bool:
        """Whether the process that is to call sbatch is still there, as far as it can be told from here."""
        return self.host == socket.gethostname() and process_start(self.pid) == self.started


def job_name(token: str) -> str:
    return f"sdae-{token}"


def new_token() -> str:
    return uuid.uuid4().hex[:12]


class Ledger:
    def __init__(self, store: Store):
        self.root = store.root / ".slurm"
        self.links = self.root / "runs"
        self.codes = self.root / "code"

    def exists(self) -> bool:
        return self.links.is_dir()

    def open(self) -> None:
        for folder in (self.links, self.root / "jobs", self.codes):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error

    # Who has a run
    def reservations(self) -> dict[str, Reservation]:
        """The highest reservation of each run."""
        highest: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.links) as entries:
            for entry in entries:
                identity, _, digits = entry.name.rpartition(".")
                highest[identity] = max(highest.get(identity, 0), int(digits))
        found = {}
        for identity, number in highest.items():
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                link = self.links / f"{identity}.{number}"
                found[identity] = Reservation(number, os.readlink(link), link.lstat().st_mtime)
        return found

    def holder(self, identity: str) -> Reservation:
        """The highest reservation of one run."""
        numbers = [int(link.name.rpartition(".")[2]) for link in self.links.glob(f"{identity}.*")]
        number = max(numbers, default=0)
        return Reservation(number, os.readlink(self.links / f"{identity}.{number}")) if number else Reservation()

    def reserve(self, identity: str, after: Reservation, token: str) -> bool:
        """Whether the run is now `token`'s; not, where another has taken it since `after` was read."""
        try:
            os.symlink(token, self.links / f"{identity}.{after.number + 1}")
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.links}: cannot be written: {error.strerror or error}") from error
        return True

    def forget(self, token: str, taken: Iterable[tuple[str, Reservation]]) -> None:
        """Takes back the reservations that an array did not use (each given with the one before it), and its folder."""
        for identity, after in taken:
            (self.links / f"{identity}.{after.number + 1}").unlink(missing_ok=True)
        shutil.rmtree(self.folder(token), ignore_errors=True)

    # What is in an array
    def tokens(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.root / "jobs")
        return []

    def folder(self, token: str) -> Path:
        return self.root / "jobs" / token

    def write(self, submission: Submission) -> None:
        write_atomically(self.folder(submission.token) / "submission.json", to_json(asdict(submission)))

    def read(self, token: str) -> Submission | None:
        values = read_json(self.folder(token) / "submission.json")
        if values is None:
            return None
        return Submission(**{**values, "runs": {int(index): i for index, i in values["runs"].items()}})

    def write_runs(self, token: str, runs: dict[str, Any]) -> None:
        """By id: config, needs and feeds of the runs of an array."""
        write_atomically(self.folder(token) / "runs.json", json.dumps(runs))

    def runs(self, token: str) -> dict[str, Any]:
        return read_json(self.folder(token) / "runs.json") or {}
