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
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from sdae.errors import UserError
from sdae.files import flush, forget_dead, make_folder, process_start, read_record, to_json, write_atomically
from sdae.store import Store
from slurm.cluster import me

TOKEN = re.compile(r"[\w-]*", re.ASCII)  # an array's name in the store
SUBMITTING = 600.0  # seconds that a submitter on another machine may take to call sbatch
# Tokens of reservations that take a run away from its job: by a user, or because its need failed (`heal` hands it over
# again as soon as that is done)
CANCELLED, WITHDRAWN = "cancelled", "withdrawn"
FREE = ("", CANCELLED, WITHDRAWN)  # whose runs nobody has


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
    user: str = field(default_factory=me)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str | None = field(default_factory=lambda: process_start(os.getpid()))

    @property
    def name(self) -> str:
        return job_name(self.token)

    @property
    def here(self) -> bool:
        """Whether it was handed over on this machine, so that one can tell whether its submitter lives."""
        return self.host == socket.gethostname()

    @property
    def submitter_lives(self) -> bool:
        """Whether the process that is to call sbatch is still there, as far as it can be told from here."""
        return self.here and process_start(self.pid) == self.started

    @property
    def awaited(self) -> bool:
        """Whether a submitter may yet write the job id: nothing is known of those on other machines."""
        if self.here:
            return self.submitter_lives
        return time.time() - self.time < SUBMITTING


def job_name(token: str) -> str:
    return f"sdae-{token}"


MADE = re.compile(r"[0-9a-f]{12}", re.ASCII)


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
        """Raises UserError where it would write, or clear up, elsewhere than in the store."""
        places = (self.links, self.root / "jobs", self.codes)
        for folder in (self.root, *places):
            if folder.is_symlink():
                raise UserError(f"{folder}: a link; remove it: what is handed to Slurm must lie in the store itself")
        for folder in places:
            make_folder(folder)
        forget_dead(self.codes)
        for path, _ in self.astray():
            if MADE.fullmatch(path.name) and not path.is_symlink():  # of a submitter that died before it handed over
                shutil.rmtree(path, ignore_errors=True)

    # Who has a run
    def reservations(self) -> dict[str, Reservation]:
        """The highest reservation of each run."""
        highest: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.links) as entries:
            for entry in entries:
                identity, _, digits = entry.name.rpartition(".")
                if not re.fullmatch(r"\d{1,9}", digits, re.ASCII):  # not one of ours
                    continue
                highest[identity] = max(highest.get(identity, 0), int(digits))
        found = {}
        for identity, number in highest.items():
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                link = self.links / f"{identity}.{number}"
                found[identity] = Reservation(number, os.readlink(link), link.lstat().st_mtime)
        return found

    def holder(self, identity: str) -> Reservation:
        """The highest reservation of one run."""
        tokens = self._tokens(identity)
        number = max(tokens, default=0)
        return Reservation(number, tokens[number]) if number else Reservation()

    def lost(self, identity: str, token: str) -> bool:
        """Whether a run was this token's and is not any more; what a late file system does not show yet is no proof."""
        tokens = list(self._tokens(identity).values())
        return token in tokens and tokens[-1] != token

    def orderer(self, identity: str, reservation: Reservation) -> str:
        """The token of the array from which a run was taken."""
        for number in range(reservation.number, 0, -1):
            with contextlib.suppress(FileNotFoundError):  # taken back
                if (token := os.readlink(self.links / f"{identity}.{number}")) not in FREE:
                    return token
        return ""

    def _tokens(self, identity: str) -> dict[int, str]:
        """By number, in order; without those that are taken back meanwhile."""
        found = {}
        ends = [link.name.rpartition(".")[2] for link in self.links.glob(f"{identity}.*")]
        for number in sorted(int(digits) for digits in ends if re.fullmatch(r"\d{1,9}", digits, re.ASCII)):
            with contextlib.suppress(FileNotFoundError):
                found[number] = os.readlink(self.links / f"{identity}.{number}")
        return found

    def waiting(self, store: Store) -> set[str]:
        """The runs that are reserved and not done: Slurm may start them at any time."""
        held = self.reservations().items()
        return {i for i, reservation in held if reservation.token not in FREE and not store.run(i).done}

    def astray(self) -> list[tuple[Path, str]]:
        """Reservations whose array is not there, arrays that tell of no run; none that may just be on their way."""
        found, late = [], time.time() - SUBMITTING
        for identity, held in self.reservations().items():
            if held.token not in FREE and held.time < late and not self.folder(held.token).is_dir():
                found.append(
                    (self.links / f"{identity}.{held.number}", f"points to the array {held.token}, which is not there")
                )
        for token in self.tokens():
            if not (self.folder(token) / "submission.json").exists() and self.folder(token).stat().st_mtime < late:
                found.append((self.folder(token), "an array that was never handed over"))
        return found

    def reserve(self, identity: str, after: Reservation, token: str) -> bool:
        """Whether the run is now `token`'s; not, where another has taken it since `after` was read."""
        try:
            os.symlink(token, self.links / f"{identity}.{after.number + 1}")
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.links}: cannot be written: {error.strerror or error}") from error
        return True

    def keep(self) -> None:
        """Makes the reservations durable: an array that Slurm has must not be handed over again after a power cut."""
        try:
            flush(self.links)
        except OSError as error:
            raise UserError(f"{self.links}: cannot be written: {error.strerror or error}") from error

    def forget(self, token: str, taken: Iterable[tuple[str, Reservation]]) -> None:
        """Takes back the reservations that an array did not use (each given with the one before it), and its folder."""
        for identity, after in taken:
            (self.links / f"{identity}.{after.number + 1}").unlink(missing_ok=True)
        shutil.rmtree(self.folder(token), ignore_errors=True)

    # What is in an array
    def tokens(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self.root / "jobs") if TOKEN.fullmatch(name)]
        return []

    def folder(self, token: str) -> Path:
        if not TOKEN.fullmatch(token):
            raise UserError(f"{self.links}: {token!r} is not an array's token")
        return self.root / "jobs" / token

    def write(self, submission: Submission) -> None:
        write_atomically(self.folder(submission.token) / "submission.json", to_json(asdict(submission)))

    def read(self, token: str) -> Submission | None:
        """None where there is no record, or none that can be used; keys of a later version are left out."""
        values = read_record(self.folder(token) / "submission.json")
        try:
            if values is None:
                return None
            known = {key.name: values[key.name] for key in fields(Submission) if key.name in values}
            found = Submission(**known | {"runs": {int(n): i for n, i in known["runs"].items()}})
            plain = all(isinstance(text, str) for text in (found.user, found.scale, *found.runs.values()))
            plain &= isinstance(found.job, (str, NoneType)) and isinstance(found.time, (int, float))
            plain &= found.token == token
            return found if plain and abs(found.time) < 1e15 else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def write_runs(self, token: str, runs: dict[str, Any]) -> None:
        """By id: config, needs and feeds of the runs of an array."""
        write_atomically(self.folder(token) / "runs.json", json.dumps(runs))

    def runs(self, token: str) -> dict[str, Any]:
        return read_record(self.folder(token) / "runs.json") or {}
