"""What is wrong in a store, each with a line that says what to do next: torn, orphaned, duplicate, stale.

Everything is read anew, the index is not believed, and nothing is written; `mend` does the part that is safe: the
index is made again, temporary files of dead processes go, torn files are set aside so that their runs are done again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis import frame as frames
from analysis.export import flat
from analysis.table import stale
from sdae.config import NEUTRAL, dump
from sdae.errors import UserError
from sdae.files import OURS, abandoned, checksum, parse_json, plain_file, read_json, read_plain, read_record
from sdae.store import FORMAT, GRACE_SECONDS, LONGEST, RunFolder, Store
from sdae.upkeep import DISCARDED, encoder, forget_discarded, pruned, remove, set_aside
from sdae.yamls import LARGEST, parse_own, read_yaml

MANY = 10  # findings alike, of which no more are printed one by one
KINDS = ("torn", "orphaned", "duplicate", "stale")
NAME = re.compile(r"[a-z]+-[0-9a-f]{16}")
PROBE = re.compile(r"\.probe\.[0-9a-f]{8}")  # of the first version
CLAIM = re.compile(r"\.claim\.(after\..*|.*\.(dead|tmp))")
AGAIN = "then the same command runs it again"
REPAIR = "`sdae-cli results check --repair`"
JSON_FILES = ("failure.json", "failure.previous.json", "provenance.json", "heartbeat.json", "pruned.json")
LINES = ("metrics.jsonl", "attempts.jsonl")


@dataclass
class Finding:
    """`where`: the file or folder, beginning with the store. `cure`: what to do next. `repair`: does that, if safe."""

    kind: str
    where: str
    problem: str
    cure: str
    run: str | None = None
    repair: Callable[[], bool | None] | None = field(default=None, repr=False)  # False: it is another file by now
    repaired: bool = False

    def to_dict(self) -> dict[str, Any]:
        keys = ("kind", "where", "run", "problem")
        return {key: getattr(self, key) for key in keys} | {"next": self.cure, "repaired": self.repaired}


def check(store: Store, deep: bool = False, astray: Iterable[tuple[Path, str]] = ()) -> dict[str, Any]:
    """{"store", "format", "synthetic", "runs", "counts", "findings"}; these by kind, then by name.

    deep: every checkpoint against its checksum, every line of the logs. astray: what is wrong below .slurm.
    """
    frame, problem = frames.examine(store)
    found = [*_Runs(store, frame, deep).findings()]
    for path, why in astray:
        cure = "`sdae-cli sweep heal` hands its run over again" if path.is_symlink() else f"remove the folder {path}"
        found.append(Finding("orphaned", str(path), why, cure))
    found += _leftovers(store)
    if problem:
        cure = "`sdae-cli results collect` makes it again"
        path = store.root / frames.INDEX
        kind = "stale" if "older" in problem else "torn"
        found.append(Finding(kind, str(path), problem, cure, None, functools.partial(_reindex, store)))
    found.sort(key=lambda finding: (KINDS.index(finding.kind), finding.where))
    counts = Counter(finding.kind for finding in found)
    return {
        "store": str(store.root), "format": store.format, "synthetic": store.synthetic, "runs": len(frame),
        "counts": {kind: counts[kind] for kind in KINDS}, "findings": found,
    }  # fmt: skip


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """One line for each; where many have the same said of them, one for all of these."""
    same: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        cure = finding.cure.replace(finding.run or "\0", "ID")
        same.setdefault((finding.kind, finding.problem, cure, finding.repaired), []).append(finding)
    for (kind, problem, cure, repaired), members in same.items():
        end = "repaired" if repaired else f"next: {cure}"
        if len(members) > MANY:
            where = ", ".join(finding.where for finding in members[:3])
            yield f"{kind}: {len(members)} times: {problem}; {end}; --json names all: {where}, .."
            continue
        for finding in members:
            yield f"{kind}: {finding.where}: {problem}; {'repaired' if repaired else f'next: {finding.cure}'}"


def mend(findings: Iterable[Finding]) -> None:
    """Does what is safe; the index last, as it tells of the rest."""
    for finding in sorted(findings, key=lambda f: f.where.endswith(frames.INDEX)):
        if finding.repair is not None:
            finding.repaired = finding.repair() is not False


def _reindex(store: Store) -> None:
    (store.root / frames.INDEX).unlink(missing_ok=True)
    frames.collect(store)


class _Runs:
    """The run folders."""

    def __init__(self, store: Store, frame: Any, deep: bool):
        self.store, self.deep, self.now = store, deep, time.time()
        self.ids = set(store.ids())
        frame = frame.set_index("id")
        rows = frame[["state", "message", "need", "weights", "init_epoch"]].astype(object)
        self.rows: dict[str, dict[str, Any]] = rows.where(rows.notna(), None).to_dict("index")
        self.stale = stale(frame)

    def findings(self) -> Iterator[Finding]:
        for identity in sorted(self.ids):
            yield from self.folder(self.store.run(identity), self.rows.get(identity))
        for identity in sorted(self.stale):
            why = "the code that makes its numbers has changed in substance since, or that of the run it started from"
            cure = "keep it, if the change does not matter (tables say so); else remove the folder and run it again"
            yield Finding("stale", str(self.store.run(identity).path), why, cure, identity)

    def folder(self, run: RunFolder, row: dict[str, Any] | None) -> Iterator[Finding]:
        names = _names(run.path)
        running = row is not None and row["state"] == "running"
        if not running:
            yield from _dead(run.path, names)
        if row is None:
            if self.old(run.path):
                yield self.empty(run, names)
            return
        state = row["state"]
        if state == "torn":
            yield self.torn(run, str(row["message"]))
            return
        other = self.identity_of(run, names)
        if other is None or (other != run.id and _cut_off(run)):
            yield self.aside(run, "config.yaml", "not a run's whole config", "its run writes it again")
        elif other != run.id:
            yield self.misnamed(run, other, "config.yaml")
            return
        for name in () if running else JSON_FILES:
            if name in names and read_json(run.path / name) is None:
                yield self.aside(run, name, "not whole JSON", "nothing else reads it")
        for name in LINES if state == "done" else ():  # of others, the next start cuts off what is torn
            if name in names and (line := _torn_line(run.path / name, self.deep)):
                yield self.aside(run, name, f"line {line} is not whole JSON", "the result stays")
        if row["need"]:
            yield from self.need(run, row)
        if not self.store.synthetic and not running and "checkpoints" in names:
            yield from self.checkpoints(run, state == "done")

    def old(self, path: Path) -> bool:
        """Not just being written."""
        try:
            return self.now - path.lstat().st_mtime > GRACE_SECONDS
        except OSError:
            return False

    def empty(self, run: RunFolder, names: set[str]) -> Finding:
        if _is_empty(run, names):
            problem, cure = "an empty run folder: what made it ended at once", f"{REPAIR} removes it"
            return Finding("orphaned", str(run.path), problem, cure, run.id, functools.partial(_remove_empty, run))
        problem = "no run's folder: neither config.yaml nor result.json"
        return Finding("orphaned", str(run.path), problem, "move it out of the store", run.id)

    def torn(self, run: RunFolder, message: str) -> Finding:
        """What the frame could not use, and why."""
        where = str(run.path / "result.json")
        try:
            read_plain(run.path / "result.json")
        except ValueError:  # too large
            pass
        except OSError as error:
            cure = "see to the disk or to the file's mode, or remove what stands there; then check again"
            return Finding("torn", where, f"cannot be read: {error.strerror or error}", cure, run.id)
        if (result := read_json(run.path / "result.json")) is None:
            return self.aside(run, "result.json", "not a whole JSON document", AGAIN)
        if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
            if result.get("format", FORMAT) != FORMAT:
                return Finding("torn", where, message, "update the suite: a newer version wrote it", run.id)
            if (other := result.get("id", run.id)) != run.id:
                return self.misnamed(run, str(other), "result.json")
            if bool(result.get("synthetic", False)) != self.store.synthetic:
                cure = f"move the folder {run.id} to a store of its kind, or remove it"
                return Finding("orphaned", where, message.removeprefix("result.json "), cure, run.id)
            other = _identity(result.get("config"))
            if other not in (None, run.id):
                return self.misnamed(run, str(other), "the config in result.json")
        return self.aside(run, "result.json", message.removeprefix("result.json "), AGAIN)

    def aside(self, run: RunFolder, name: str, problem: str, then: str) -> Finding:
        return Finding(
            "torn", str(run.path / name), problem, f"{REPAIR} sets it aside, {then}", run.id,
            _unchanged(run, functools.partial(set_aside, run, name), run.path / name),
        )  # fmt: skip

    def misnamed(self, run: RunFolder, other: str, what: str) -> Finding:
        if other in self.ids:
            cure = f"remove {run.path}, which nothing counts"
            return Finding("duplicate", str(run.path), f"a copy of {other} under another name ({what})", cure, run.id)
        cure = f"rename it to {other}, or remove it" if NAME.fullmatch(other) else "remove it"
        return Finding("orphaned", str(run.path), f"holds the run {other} ({what})", cure, run.id)

    def identity_of(self, run: RunFolder, names: set[str]) -> str | None:
        """The id that config.yaml gives; the folder's own where there is none, None where it is no config."""
        if "config.yaml" not in names:
            return run.id
        try:
            return _identity_of_text(read_plain(run.path / "config.yaml", LARGEST).decode())
        except (OSError, ValueError):
            return None

    def need(self, run: RunFolder, row: dict[str, Any]) -> Iterator[Finding]:
        need = row["need"]
        if need not in self.ids:
            cure = f"bring the folder {need} back, or plan its artifact and run it again (`sdae-cli sweep submit`)"
            yield Finding("orphaned", str(run.path), f"starts from {need}, which is not in this store", cure, run.id)
        elif self.store.synthetic or row["state"] in ("done", "running"):
            return
        elif self.rows.get(need, {}).get("state") == "done":
            pretrained = self.store.run(need)
            names = _weights(pretrained).keys()
            wanted = encoder(names, row["weights"], row["init_epoch"])
            if wanted and not (pretrained.checkpoints / wanted).exists():
                gone = "pruned" if wanted in pruned(pretrained) else "gone"
                cure = f"remove the folder {need}: it is run again, and keeps them"
                yield Finding("orphaned", str(run.path), f"its weights, {wanted} of {need}, are {gone}", cure, run.id)

    def checkpoints(self, run: RunFolder, done: bool) -> Iterator[Finding]:
        if linked := [path for path in (run.path, run.checkpoints) if path.is_symlink()]:
            problem, cure = "a link: what it leads to is none of this store's", "put the files themselves in its place"
            yield Finding("orphaned", str(linked[0]), problem, cure, run.id)
            return
        names = _names(run.checkpoints)
        yield from _dead(run.checkpoints, names)
        listed = _weights(run) if done and names else {}
        removed = pruned(run) if listed.keys() - names else {}
        again = f"remove the folder {run.id} and run it again, if they are wanted"
        for name, digest in listed.items():
            path = run.checkpoints / name
            if name not in names:
                if name not in removed:
                    yield Finding("torn", str(path), "listed in result.json, and gone", again, run.id)
            elif not (_stamp(path) or (0,))[0] or (self.deep and _sha256(path) != digest):
                yield Finding("torn", str(path), "not what result.json says (its sha256 differs)", again, run.id)
        for name in sorted(n for n in names - listed.keys() if n.endswith(".safetensors") and n[0] != "."):
            path = run.checkpoints / name
            if name.startswith("state-"):
                record = path.with_suffix(".sha256.json")
                sides = [path, *([record] if record.name in names else [])]
                if done:
                    cure = f"{REPAIR} removes it"
                    problem = "a state to go on from, of a run that is done"
                    repair = _unchanged(run, functools.partial(remove, *sides), *sides)
                    yield Finding("orphaned", str(path), problem, cure, run.id, repair)
                elif self.deep and record.name in names and _sha256(path) != (read_record(record) or {}).get("sha256"):
                    cure = f"{REPAIR} removes it: the run goes on from the state before, or begins again"
                    repair = _unchanged(run, functools.partial(remove, *sides), *sides)
                    yield Finding("torn", str(path), "its sha256 differs", cure, run.id, repair)
            elif done and not name.startswith("nonfinite-"):
                yield Finding("orphaned", str(path), "nobody lists it", "remove it if you do not know it", run.id)


def _weights(run: RunFolder) -> dict[str, Any]:
    """The files that a result lists, and their sha256."""
    found = (run.result() or {}).get("weights")
    return found if isinstance(found, dict) else {}


def _is_empty(run: RunFolder, names: set[str]) -> bool:
    return not names - {"checkpoints", "log.txt"} and not _names(run.checkpoints)


def _remove_empty(run: RunFolder) -> bool:
    """Where no run has begun in it since."""
    if still := _is_empty(run, _names(run.path)):
        remove(run.path)
    return still


def _unchanged(run: RunFolder, repair: Callable[[], None], *paths: Path) -> Callable[[], bool]:
    """A repair of files of a run that nobody has, where they are still those that were looked at: a deep check takes
    hours. It takes no claim of its own, which would be left behind if it were killed."""
    seen = [*map(_stamp, paths)]

    def repaired() -> bool:
        if still := run.claimed() is None and [*map(_stamp, paths)] == seen:
            repair()
        return still

    return repaired


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Size, time and place of a file, or None where there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return None


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _identity_of_text(text: str) -> str | None:
    """The id of a config file. Most differ in the seed's and the need's line alone: those are parsed once."""
    seed = re.search(r"^seed: (\d{1,18})$", text, re.M)
    need = re.search(r"^  run: ([a-z]+-[0-9a-f]{16})$", text, re.M)
    if seed is None:
        return None
    config = _parsed(text.replace(seed[0], "seed: 0", 1).replace(need[0] if need else "\0", "  run: NEED", 1))
    if config is None:
        return None
    values = json.loads(config) | {"seed": int(seed[1])}
    if need and isinstance(values.get("init"), dict) and values["init"].get("run") == "NEED":
        values["init"]["run"] = need[1]
    return _identity(values)


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> str | None:
    try:
        values = parse_own(text.encode())
        return json.dumps(values) if isinstance(values, dict) else None
    except (TypeError, ValueError, RecursionError):
        return None


def _identity(config: Any) -> str | None:
    """The id that a config stands for, None where it is none."""
    try:
        return f"{config['stage']}-{frames.config_hash(config)[0]}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _cut_off(run: RunFolder) -> bool:
    """Whether config.yaml lacks what a complete config has; a config that is whole is another run's."""
    try:
        whole, values = run.config(), read_yaml(run.path / "config.yaml", plain=True)
    except UserError:
        return True
    return whole is None or bool({k for k, _ in flat(dump(whole))} - {k for k, _ in flat(values)} - NEUTRAL.keys())


def _torn_line(path: Path, deep: bool) -> int | None:
    """The number of a line that is not JSON: any of them, or, unless deep, the last one, by its end."""
    number = 0
    with contextlib.suppress(OSError), open(path, "rb", opener=plain_file) as file:
        while line := file.readline(LONGEST):
            number += 1
            if not line.endswith(b"\n"):
                return number
            try:
                if deep:
                    parse_json(line)
            except (ValueError, RecursionError):
                return number
    return None


def _sha256(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:
        return None


def _forsaken(path: Path) -> bool:
    """Whether it is a temporary file of a process that is gone; claims of the living are younger than their grace."""
    try:
        if CLAIM.fullmatch(path.name):
            return time.time() - path.lstat().st_mtime > GRACE_SECONDS
        return bool(OURS.fullmatch(path.name) or PROBE.fullmatch(path.name)) and abandoned(path)
    except OSError:
        return False


def _dead(folder: Path, names: Iterable[str]) -> Iterator[Finding]:
    problem, cure = "a temporary file of a process that is gone", f"{REPAIR} removes it"
    for path in (folder / name for name in sorted(names)):
        if _forsaken(path):
            yield Finding("orphaned", str(path), problem, cure, None, functools.partial(remove, path))


def _leftovers(store: Store) -> Iterator[Finding]:
    """Temporary files beside the run folders and below .slurm, folders of no run, what an interrupted prune left."""
    for folder in (store.root, store.root / ".slurm/code", *sorted((store.root / ".slurm/jobs").glob("*"))):
        yield from _dead(folder, _names(folder))
    for name in sorted(_names(store.root)):
        if "-" in name and not name.isprintable() and (store.root / name).is_dir():
            problem = "no run's folder: its name has characters that cannot be shown"
            yield Finding("orphaned", str(store.root / name), problem, "move it out of the store")
    path = store.root / DISCARDED
    if path.is_dir():
        cure = "`sdae-cli results prune` goes on with it"
        repair = functools.partial(forget_discarded, store)
        yield Finding("orphaned", str(path), "run folders that a prune was removing", cure, None, repair)
