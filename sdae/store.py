"""Run folders: where their files lie, and how they are written and read.

Invariant: a reader never sees half a file. Every file but those that are appended to (`metrics.jsonl`, `log.txt`,
`attempts.jsonl`, TensorBoard's events) is written to a temporary name in the same folder, flushed to the disk and
renamed. `result.json` is written last: its presence means that a run is done.
A run is claimed by one process at a time through `claim.json`; a claim of a dead process is taken over, so a killed job
holds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sdae.config import Config, dump, parse, run_id
from sdae.errors import UserError
from sdae.files import (
    LARGEST,
    flush,
    forget_dead,
    make_folder,
    no_link,
    parse_json,
    plain_file,
    process_start,
    read_json,
    read_plain,
    read_record,
    temporary_of,
    to_json,
    why,
    write_atomically,
)
from sdae.yamls import read_yaml

FORMAT = 1  # of result.json
STORE_FORMAT = 2  # of the folder, in its file FORMAT; a store without one is of the first format
FORMAT_FILE = "FORMAT"
SUBMISSION = "SDAE_SUBMISSION"  # environment variable: the array that this process belongs to
MARK = "SYNTHETIC"  # the file that says that a store's results were made up
NO_PICTURES = "synthetic"  # in place of the pictures' fingerprint: a made-up run has another id than a real one
MARK_TEXT = """\
The results in this folder were made up by `sdae-cli reproduce --synthetic`: values of the paper plus noise, with faults
and gaps, to look at tables, figures and pages before anything is run. No model was trained. Real runs refuse this
folder, and results that were measured are not read here. Delete the whole folder when it has served.
"""
LONGEST = 1_000_000  # bytes of a line of a log
STATE = re.compile(r"state-(\d{8,12})\.sha256\.json", re.ASCII)  # says that a state is whole
GRACE_SECONDS = 300.0  # a heartbeat older than this, from another machine, is that of a lost run
AHEAD_SECONDS = 86400.0  # one that comes from a clock further ahead holds nothing, else it would for as long


class RunFolder:
    """`STORE/ID/`. Reading never needs the folder to exist."""

    def __init__(self, path: Path):
        self.path = path
        self.id = path.name
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.txt"
        self.metrics_file = path / "metrics.jsonl"
        self.token = ""  # of this process's claim  # nosec B105

    # What it holds
    def config(self) -> Config | None:
        """config.yaml, or None where there is none. Raises UserError for one that is broken."""
        file = self.path / "config.yaml"
        return parse(read_yaml(file, plain=True), str(file)) if file.exists() else None

    def result(self) -> dict[str, Any] | None:
        """result.json, or None where there is none that is whole."""
        return read_record(self.path / "result.json")

    def outcome(self) -> dict[str, Any]:
        """The result of a finished run. Raises UserError where there is none, or none that can be used."""
        result, where = self.result(), self.path / "result.json"
        if result is None:
            raise UserError(f"{where}: cannot be read" if self.done else f"{self.path}: this run is not done")
        if result.get("format", FORMAT) != FORMAT:
            raise UserError(f"{where}: has format {result['format']}, this version reads {FORMAT}")
        weights = result.get("weights")
        if not isinstance(weights, dict) or not all(isinstance(digest, str) for digest in weights.values()):
            raise UserError(f"{where}: tells of no weights")
        return result

    def failure(self) -> dict[str, Any] | None:
        """failure.json: class, message, traceback, attempt, time, submission."""
        return read_record(self.path / "failure.json")

    def heartbeat(self) -> dict[str, Any] | None:
        """heartbeat.json: time, and how far the run is."""
        return read_record(self.path / "heartbeat.json")

    def provenance(self) -> dict[str, Any] | None:
        """provenance.json: code, command, machine."""
        return read_record(self.path / "provenance.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return _lines(self.metrics_file)

    def notes(self) -> list[dict[str, Any]]:
        """What happened to the run on a cluster, the oldest first: attempts that began and how they ended."""
        return _lines(self.path / "attempts.jsonl")

    @property
    def saved_step(self) -> int:
        """The step from which the run would go on."""
        with contextlib.suppress(OSError):
            return max((int(m[1]) for name in os.listdir(self.checkpoints) if (m := STATE.fullmatch(name))), default=0)
        return 0

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return (self.path / "result.json").exists()

    def state(self) -> str:
        """done | failed | running | started (stopped before its end, resumable) | new."""
        if self.done:
            return "done"
        if self.claimed():
            return "running"
        if (self.path / "failure.json").exists():
            return "failed"
        return "started" if (self.path / "config.yaml").exists() else "new"

    # Writing
    def refuse_links(self) -> None:
        """Raises UserError where something would be written elsewhere than in this folder, or into a pipe."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):  # as a link to nowhere is
            names = []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be looked into: {error.strerror}") from error
        for path in (self.path, *(self.path / name for name in names)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # renamed meanwhile
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    raise UserError(f"{path}: a link; what a run writes must lie in the store itself")
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise UserError(f"{path}: a pipe or a device; what a run writes must be a file")

    def create(self, config: Config) -> None:
        """Makes the folder and writes `config.yaml` once. An existing folder must be of the same run."""
        if run_id(config) != self.id:
            raise UserError(f"{self.path}: this config is {run_id(config)}, not {self.id}")
        self.refuse_links()
        if (there := self.config()) is not None and run_id(there) != self.id:
            raise UserError(f"{self.path / 'config.yaml'}: is the config of {run_id(there)}: remove {self.path}")
        make_folder(self.checkpoints)
        migrate(Store(self.path.parent))
        if not (self.path / "config.yaml").exists():
            write_atomically(self.path / "config.yaml", yaml.safe_dump(dump(config), sort_keys=False))

    def write(self, name: str, value: Any) -> None:
        """A JSON file of the run. Raises UserError."""
        write_atomically(self.path / name, to_json(value))

    def finish(self, result: dict[str, Any]) -> None:
        """The run is done. What it wrote is made durable, then the result; then goes what an earlier failure left."""
        try:
            for path in self.path.rglob("*"):
                flush(path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.write("result.json", result)
        with contextlib.suppress(OSError):  # the result counts all the same
            (self.path / "failure.json").unlink(missing_ok=True)

    def fail(self, kind: str, message: str, traceback: str = "", submission: str | None = None) -> None:
        """submission: the job array that the run failed in; by default that of this process, if any."""
        before = self.failure() or read_record(self.path / "failure.previous.json") or {}
        attempt = int(number(before, "attempt")) + 1
        self.write(
            "failure.json",
            {
                "class": kind,
                "message": message,
                "traceback": traceback,
                "attempt": attempt,
                "time": time.time(),
                "submission": submission or os.environ.get(SUBMISSION),
            },
        )

    def forget_failure(self) -> None:
        """Puts failure.json aside, so that the run counts as not failed. Raises UserError."""
        try:
            (self.path / "failure.json").rename(self.path / "failure.previous.json")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path / 'failure.json'}: cannot be renamed: {error.strerror or error}") from error

    def recall_failure(self) -> None:
        """Unsays `forget_failure`: the run was not begun anew."""
        with contextlib.suppress(OSError):
            if not (self.path / "failure.json").exists():
                (self.path / "failure.previous.json").rename(self.path / "failure.json")

    def note(self, event: str, **facts: Any) -> None:
        """Adds to `notes`. One write of one line: appends of several processes do not mix."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "attempts.jsonl", "ab", buffering=0, opener=no_link) as file:
            file.write(json.dumps({"event": event, "time": time.time(), **facts}).encode() + b"\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl. Raises UserError."""
        text = json.dumps(row, allow_nan=False) + "\n"
        try:
            with open(self.metrics_file, "a", encoding="utf-8", opener=no_link) as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.metrics_file}: cannot be written: {error.strerror or error}") from error

    def sync_metrics(self) -> None:
        """Makes the rows durable: before a state after which they are not written again."""
        try:
            flush(self.metrics_file)
            flush(self.path)
        except OSError as error:
            raise UserError(f"{self.metrics_file}: cannot be written: {error.strerror or error}") from error

    def truncate_metrics(self, step: int) -> None:
        """Forgets rows after `step`, so that a resumed run writes each row once."""
        if self.metrics_file.exists():
            lines = []
            for row in _lines(self.metrics_file, None):  # what is not read here is lost
                with contextlib.suppress(ValueError):  # not finite, so not ours
                    if number(row, "step") <= step:
                        lines.append(json.dumps(row, allow_nan=False) + "\n")
            write_atomically(self.metrics_file, "".join(lines))

    # One process at a time
    def claimed(self) -> dict[str, Any] | None:
        """The living claim on this run, if any."""
        claim = read_record(self.path / "claim.json")
        return claim if claim and self._alive(claim) else None

    def _alive(self, claim: Any) -> bool:
        try:
            if claim.get("host") == socket.gethostname():
                return bool(process_start(int(claim["pid"])) == claim["started"])
            age = time.time() - max(claim["time"], number(self.heartbeat() or {}, "time"))
            return bool(-AHEAD_SECONDS < age < GRACE_SECONDS)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # no claim of ours
            return False

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """True where this process now owns the run; False where another living one does."""
        token = uuid.uuid4().hex
        mine = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid()),
            "time": time.time(), "token": token,
        }  # fmt: skip
        file, fresh = self.path / "claim.json", temporary_of(self.path / "claim")
        owned = False
        try:
            make_folder(self.path)  # whose run was refused has removed it
            try:
                fresh.write_text(to_json(mine))
                owned = self._take(file, fresh)
                fresh.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
            self.token = token if owned else ""
            if owned:
                forget_dead(self.path)
                forget_dead(self.checkpoints)
            yield owned
        finally:
            self.token = ""  # nosec B105
            with contextlib.suppress(OSError):  # a dead claim holds nothing
                fresh.unlink(missing_ok=True)
                if owned and _token(read_json(file)) == token:
                    file.unlink(missing_ok=True)

    @property
    def dispossessed(self) -> bool:
        """Whether another process has taken this one for dead, and the run over: then nothing more may be written.

        Our claim is then another's, or gone with the end of that one.
        """
        try:
            return bool(self.token) and _token(read_json(self.path / "claim.json")) != self.token
        except OSError:  # cannot be told now
            return False

    def _take(self, file: Path, fresh: Path) -> bool:
        """Makes `fresh` the claim where there is none, or where the one that there is belongs to a dead process.

        A dead claim has one successor, the link `.claim.after.TOKEN`: link(2) fails where one exists, on NFS too. A
        successor that has died has a successor itself. The last one takes its place in claim.json and only then
        removes the links, so that whoever comes late finds either a link or another claim than it has read.
        """
        for _ in range(9):
            with contextlib.suppress(FileExistsError):
                os.link(fresh, file)
                return True
            first = last = read_json(file)
            for _ in range(9):
                if last and self._alive(last):
                    return False
                link = self.path / f".claim.after.{_token(last)}"
                try:
                    os.link(fresh, link)
                except FileExistsError:
                    last = read_json(link)
                    continue
                if file.exists() and _token(read_json(file)) == _token(first):
                    os.replace(fresh, file)
                    for link in self.path.glob(".claim.after.*"):
                        link.unlink(missing_ok=True)
                    return True
                link.unlink(missing_ok=True)
                break
        return False


def _lines(file: Path, most: int | None = LARGEST) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, of a larger one those in its last `most` bytes; a torn line is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), open(file, "rb", opener=plain_file) as lines:
        lines.seek(max(0, os.fstat(lines.fileno()).st_size - most) if most else 0)
        while line := lines.readline(LONGEST):
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := parse_json(line), dict):
                    rows.append(row)
    return rows


def number(record: Mapping[str, Any], key: str) -> float:
    """A finite number of a record; 0 where it has none, or something else."""
    value = record.get(key)
    plain = isinstance(value, (int, float)) and abs(value) < 1e15
    return float(value) if plain else 0.0  # type: ignore[arg-type]


def _token(claim: Any) -> str:
    token = str(claim.get("token", "")) if isinstance(claim, dict) else ""
    return token if re.fullmatch(r"[\w.-]*", token) else ""  # it becomes part of a file's name


class Store:
    """The folder of run folders. An absent or empty folder is an empty store."""

    def __init__(self, root: str | Path = "runs"):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root}: the store must be a folder")
        if (found := self.format) > STORE_FORMAT:
            known = f"a store of format {found}, this version of the suite knows 1 to {STORE_FORMAT}"
            raise UserError(f"{self.root}: {known}: update the suite, or take another --store")

    @property
    def format(self) -> int:
        """The version of the folder's format; 1 where nothing says it."""
        try:
            text = read_plain(self.root / FORMAT_FILE, 10_000).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return 1
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{self.root / FORMAT_FILE}: cannot be read: {said}") from error
        if not re.fullmatch(r"[1-9][0-9]{0,8}\s*", text, re.ASCII):
            what = f"expected the store's format, a number from 1 to {STORE_FORMAT}, got {text[:20]!r}"
            raise UserError(f"{self.root / FORMAT_FILE}: {what}: remove the file, it is written again")
        return int(text)

    @property
    def synthetic(self) -> bool:
        """Whether the store is marked as one of made-up results."""
        return (self.root / MARK).exists()

    @property
    def fingerprint(self) -> str | None:
        """What a plan for this store takes for that of its pictures; None: what they have."""
        return NO_PICTURES if self.synthetic else None

    def must_be_real(self) -> None:
        """Raises UserError where a real run would stand among made-up ones."""
        if self.synthetic:
            raise UserError(f"{self.root}: holds synthetic results (its file {MARK}); real runs need another --store")

    def run(self, identity: str) -> RunFolder:
        """The folder of a run, which need not be there. Raises UserError for what cannot be an id."""
        if "/" in identity or identity.startswith("."):
            raise UserError(f"{identity!r} is not a run's id")
        return RunFolder(self.root / identity)

    def ids(self) -> list[str]:
        """Ids of the run folders, sorted: of names that no terminal shows `results check` tells."""
        try:
            with os.scandir(self.root) as entries:
                named = (e for e in entries if not e.name.startswith(".") and "-" in e.name and e.name.isprintable())
                return sorted(e.name for e in named if e.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self) -> None:
        """Creates the store and proves that it can be written, before anything is computed."""
        make_folder(self.root, "the store cannot be made")
        forget_dead(self.root)
        probe = temporary_of(self.root / "probe")
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * 65536)
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except BaseException as error:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(f"{self.root}: the store cannot be written: {why(error)}") from error
            raise

    def find(self, prefix: str) -> RunFolder:
        """A run by its id or by a unique beginning of it."""
        matches = [i for i in self.ids() if i == prefix] or [i for i in self.ids() if i.startswith(prefix)]
        if len(matches) != 1:
            what = "no run" if not matches else f"{len(matches)} runs ({', '.join(matches[:4])}, ..)"
            where = f" (`sdae-cli results list --store {self.root}` lists them)"
            if not self.root.exists():
                where = f": there is no such folder in {Path.cwd()}; --store DIR names another"
            raise UserError(f"{self.root}: {what} named {prefix!r}{where}")
        return self.run(matches[0])

    def remove(self, identity: str) -> None:
        """Out of sight first: who comes meanwhile makes a folder of its own, and loses nothing that it writes there."""
        path = self.run(identity).path
        gone = temporary_of(path)
        os.rename(path, gone)
        shutil.rmtree(gone)


def migrate(store: Store) -> None:
    """Brings a store of the first format to today's; called before a run is written. Readers know both.

    Weights get the mode of their run's config: the first version kept them to their owner, who may be another. Dead
    claims that it had renamed go. Every step may be done twice; the file FORMAT, by rename, comes last.
    """
    if (store.root / FORMAT_FILE).exists():
        return
    for identity in store.ids():
        folder = store.run(identity)
        with contextlib.suppress(OSError):  # another's, who opens it when running the next one
            linked = folder.path.is_symlink() or folder.checkpoints.is_symlink()
            mode = (folder.path / "config.yaml").lstat().st_mode & 0o666
            for file in () if linked else folder.checkpoints.glob("[!.]*.safetensors"):
                if not file.is_symlink():
                    file.chmod(mode)
        for grave in folder.path.glob(".claim.*.dead"):
            with contextlib.suppress(OSError):
                grave.unlink(missing_ok=True)
    write_atomically(store.root / FORMAT_FILE, f"{STORE_FORMAT}\n")


class SyntheticStore(Store):
    """A store of made-up results. Making one marks the folder, and refuses one that has real runs in it."""

    def __init__(self, root: str | Path = "runs-synthetic"):
        super().__init__(root)
        if not self.synthetic:
            if found := self.ids()[:1] or [name for name in (".slurm",) if (self.root / name).exists()]:
                holds = f"holds real runs ({found[0]}), no file {MARK}"
                raise UserError(f"{self.root}: {holds}; synthetic results need another --store")
            self.open()
            write_atomically(self.root / MARK, MARK_TEXT)
            migrate(self)

    def put(self, identity: str, files: Mapping[str, str]) -> None:
        """A run folder with these files, the last one by rename. Nothing is flushed: what is lost is made up again."""
        folder = self.run(identity).path
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        *first, last = files
        for name in first:
            (folder / name).write_text(files[name], encoding="utf-8")
        temporary = folder / f".{last}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.write_text(files[last], encoding="utf-8")
        temporary.replace(folder / last)
