"""Packs a folder in ImageNet's layout into few large files, which `sdae.data.packed` reads without parsing.

    OUT/manifest.json               classes, counts, form, side, bytes and sha256 of every file; written last
    OUT/train.npy, val.npy          the index: one row for each picture, class by class
    OUT/train-00000-SHA.shard, ..   shards: JPEG after JPEG; raw: squashed pictures (3, side, side) uint8
    OUT/unfinished/                 while it is packed: the plan, a note for each part that is whole, the lock

What goes into which part follows from the source alone, so that an interrupted packing ends with the same bytes
whoever goes on with it. A part gets its name when it is on the disk; without the manifest nothing of it can be read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdae.data.fingerprint import MANIFEST, PACKED_FORMAT, SPLITS, manifest, manifest_digest, scan
from sdae.data.randomness import permutation
from sdae.data.survey import UNSEEN, Picture, Source, difference, digests, look, odd_class, survey
from sdae.errors import UserError
from sdae.files import OURS, checksum, encodable, flush, make_folder, read_record, to_json, write_atomically

Form = Literal["shards", "raw"]
OnError = Literal["raise", "skip"]
Progress = Callable[[int, int], None]
Announce = Callable[[int, int, int], None]
SUFFIX = {"shards": "shard", "raw": "raw"}
PART_BYTES = 256_000_000
PARTS = 16  # at least, of a set that has the pictures: several processes share them, a resume goes on with whole ones
SAMPLE = 64  # pictures that tell how large the packed ones become
QUALITY = 95
MARGIN = 1.05  # of the estimate: a sample is not the whole
UNFINISHED = "unfinished"
SIDES = (32, 4096)
OWN = re.compile(r"(train|val)(\.npy|-\d{5,}-[0-9a-f]+\.(shard|raw))|\.(train|val)-\d{5,}\.\d+\.tmp")  # files in OUT


@dataclass(frozen=True)
class Job:
    """What is asked for: the same job at the same source gives the same bytes, interrupted or not."""

    source: Path
    out: Path
    form: Form
    side: int
    on_error: OnError

    def asked(self) -> dict[str, Any]:
        """What another call must ask for to go on with this one."""
        return {"source": encodable(self.source), "form": self.form, "side": self.side}


@dataclass(frozen=True)
class Part:
    """The pictures that go into one file."""

    job: Job
    split: str
    number: int
    pictures: list[Picture]

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def note(self) -> Path:
        return self.job.out / UNFINISHED / f"{self.stem}.json"

    def done(self) -> dict[str, Any] | None:
        """The note of a part that is whole: file, bytes, sha256, rows, skipped."""
        found = read_record(self.note) or {}
        name, skipped, rows = str(found.get("file")), found.get("skipped"), found.get("rows")
        if not (OWN.fullmatch(name) and isinstance(skipped, list) and isinstance(rows, list)):
            return None
        if (skipped and self.job.on_error == "raise") or not self._has(rows, len(skipped), found.get("bytes")):
            return None
        file, said = self.job.out / name, (found.get("bytes"), found.get("sha256"))
        return found if file.is_file() and (file.stat().st_size, checksum(file)) == said else None

    def _has(self, rows: list[Any], skipped: int, total: Any) -> bool:
        """Whether rows tell of this part's pictures, each once and in order, and of all bytes."""
        if not all(isinstance(row, list) and [*map(type, row)] == [int] * 4 and min(row) >= 0 for row in rows):
            return False
        numbers = [-1, *(row[0] for row in rows), len(self.pictures)]
        rising = all(before < after for before, after in itertools.pairwise(numbers))
        return rising and len(rows) + skipped == len(self.pictures) and sum(row[1] for row in rows) == total


def prepare(
    source: Path, out: Path, form: Form, side: int = 256, workers: int = 1, on_error: OnError = "raise",
    progress: Progress = lambda done, total: None, part_bytes: int = PART_BYTES,
    announce: Announce = lambda pictures, estimate, free: None,
) -> dict[str, Any]:  # fmt: skip
    """Packs `source` into `out`, or goes on with it; returns what the manifest says, with `folder`, `bytes` and
    `estimate`. `announce(pictures, bytes estimated, bytes to be had)` comes first, `progress(pictures done, pictures in
    all)` all along. Raises `UserError`: bad arguments, no room, a source that changes, an unreadable picture (on_error:
    raise), a disk that takes no more, a process that was killed."""
    if not SIDES[0] <= side <= SIDES[1]:
        raise UserError(f"--side {side}: allowed are {SIDES[0]} to {SIDES[1]} pixels")
    if workers < 1:
        raise UserError(f"--workers {workers}: allowed are 1 and more")
    job = Job(source.resolve(), out, form, side, on_error)
    if out.resolve().is_relative_to(job.source):
        raise UserError(f"--out {out}: lies in the folder that is packed (allowed: one outside {source})")
    if (out / MANIFEST).exists():
        return _finished(job)
    classes, _ = scan(source)
    if odd := [name for name in classes if name != encodable(name)]:
        raise UserError(f"{source}: a class folder with a name that is not UTF-8: {encodable(odd[0])} (rename it)")
    before = survey(job.source, classes)
    plan, fresh = _plan(job, classes, before, part_bytes)
    pictures = sum(map(len, before.values()))
    free = _must_fit(job, pictures, plan["estimate"])
    with _locked(job, plan if fresh else None):
        if (out / MANIFEST).exists():  # another packer was first
            return _finished(job)
        announce(pictures, plan["estimate"], free)
        parts = [
            Part(job, split, n, before[split][start : start + plan["per_part"]])
            for split in SPLITS
            for n, start in enumerate(range(0, len(before[split]), plan["per_part"]))
        ]
        _clear(job, parts)
        notes = _pack(parts, workers, progress)
        if (now := scan(job.source)[0]) != classes:
            name = sorted(set(now) ^ set(classes))[0]
            raise _changed(job, f"class {encodable(name)} is {'new' if name in now else 'gone'}")
        if change := difference(before, survey(job.source, classes)):
            raise _changed(job, change)
        return _finish(job, classes, before, parts, notes) | {"estimate": plan["estimate"]}


def verify(folder: Path, threads: int = 4, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """{"folder", "form", "files", "bytes", "damaged": [{"file", "problem"}]} after reading everything. Raises
    `UserError` where the folder has no whole manifest. progress: bytes done, bytes in all."""
    facts = manifest(folder, sizes=False)
    files = facts["files"]
    total, done, damaged = sum(f["bytes"] for f in files.values()), 0, []
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: _problem(folder / name, files[name]), files)
        for name, problem in zip(files, found, strict=True):
            done += files[name]["bytes"]
            progress(done, total)
            if problem:
                damaged.append({"file": name, "problem": problem})
    return {"folder": str(folder), "form": facts["form"], "files": len(files), "bytes": total, "damaged": damaged}


def _problem(file: Path, facts: dict[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{size:,} bytes in place of {facts['bytes']:,}"
        return None if checksum(file) == facts["sha256"] else "other bits than were written (sha256 differs)"
    except OSError as error:
        return str(error.strerror or error)


def _changed(job: Job, what: str) -> UserError:
    return UserError(f"{job.source}: {what} since it began to be packed: delete {job.out} and pack again")


# The plan


def _plan(job: Job, classes: tuple[str, ...], source: Source, part_bytes: int) -> tuple[dict[str, Any], bool]:
    """The plan of the packing that was begun in `out`, or a new one, and whether it is new. Writes nothing."""
    plan = read_record(job.out / UNFINISHED / "plan.json")
    seen = digests(classes, source, times=True)
    if plan is not None:
        _same_job(job, plan)
        if not isinstance(plan.get("digests"), dict) or not isinstance(plan.get("per_part"), int):
            raise _changed(job, "what was begun cannot be read: something has changed")
        if odd := odd_class(plan["digests"], seen):
            raise _changed(job, odd)
        return plan, False
    if job.out.exists() and (not job.out.is_dir() or {p.name for p in job.out.iterdir()} - {UNFINISHED}):
        raise UserError(f"--out {job.out}: holds something else (allowed: a new folder, or one that packing began)")
    each = _bytes_of_one(job, source)
    pictures = sum(map(len, source.values()))
    estimate = round(pictures * each * (1 if job.form == "raw" else MARGIN))
    per_part = max(1, min(round(part_bytes / each), max(SAMPLE, math.ceil(pictures / PARTS))))
    plan = {"format": PACKED_FORMAT, **job.asked(), "per_part": per_part, "estimate": estimate, "digests": seen}
    return plan, True


def _must_fit(job: Job, pictures: int, estimate: int) -> int:
    """How many bytes there are to be had, those that are packed already among them. Raises `UserError` for too few."""
    above = next(folder for folder in (job.out.absolute(), *job.out.absolute().parents) if folder.exists())
    there = sum(file.stat().st_size for file in job.out.glob(f"*.{SUFFIX[job.form]}"))
    free = shutil.disk_usage(above).free
    if estimate - there > free:
        raise UserError(
            f"--out {job.out}: {pictures:,} pictures take about {estimate / 1e9:,.3f} GB, there are "
            f"{(free + there) / 1e9:,.3f} GB to be had (allowed: another disk, a smaller --side, or --form shards)"
        )
    return free + there


def _same_job(job: Job, begun: dict[str, Any]) -> None:
    asked = job.asked()
    if odd := [key for key in asked if asked[key] != begun.get(key)]:
        raise UserError(f"--out {job.out}: holds a packing with {odd[0]} {begun.get(odd[0])}, not {asked[odd[0]]}")


def _bytes_of_one(job: Job, source: Source) -> float:
    """Mean bytes of a packed picture, from a fixed sample; unreadable ones are passed over, the packing names them."""
    if job.form == "raw":
        return 3.0 * job.side**2
    from sdae.data.datasets import UnreadableError

    files = [f"{split}/{picture.name}" for split in SPLITS for picture in source[split]]
    sizes = []
    for i in permutation(0, 0, len(files))[:SAMPLE]:
        with contextlib.suppress(UnreadableError):
            sizes.append(len(_packed_bytes(job, str(job.source / files[i]))[0]))
    return sum(sizes) / len(sizes) if sizes else 1.0


def _finished(job: Job) -> dict[str, Any]:
    """What a folder that is packed already holds; the command may be called again."""
    facts = manifest(job.out)
    _same_job(job, facts)
    if facts["skipped"] and job.on_error == "raise":
        raise UserError(f"--out {job.out}: was packed with --on-error skip, without {', '.join(facts['skipped'])}")
    packed = facts.get("digests")
    if isinstance(packed, dict) and job.source.is_dir():  # what is packed may outlive its source
        classes, _ = scan(job.source)
        if odd := odd_class(packed, digests(classes, survey(job.source, classes), times=False)):
            raise _changed(job, odd)
    shutil.rmtree(job.out / UNFINISHED, ignore_errors=True)
    return _report(job, facts) | {"estimate": None}


@contextlib.contextmanager
def _locked(job: Job, plan: dict[str, Any] | None) -> Iterator[None]:
    """One packer at a time; the lock goes with its process. plan: written where it is new."""
    folder = job.out / UNFINISHED
    make_folder(folder)
    try:
        lock = open(folder / "lock", "ab")  # noqa: SIM115 (it lives as long as the packing)
    except OSError as error:
        raise UserError(f"--out {job.out}: cannot be written: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {job.out}: another process is packing into it") from None
        except OSError:  # a file system without locks
            pass
        if plan is not None:
            write_atomically(folder / "plan.json", to_json(plan))
        yield


def _clear(job: Job, parts: list[Part]) -> None:
    """Removes what a killed packer left: files without a note, half files."""
    noted = {str((read_record(part.note) or {}).get("file")) for part in parts}
    for file in job.out.iterdir():
        ours = OWN.fullmatch(file.name) or OURS.fullmatch(file.name)
        if ours and file.is_file() and file.name not in noted:
            file.unlink(missing_ok=True)


class _StoppedError(Exception):
    """This worker is to end: another one failed."""


_pictures: Any = None  # in a worker: the count of all workers' pictures, and whether to stop
_stop: Any = None


def _begin(pictures: Any, stop: Any) -> None:
    global _pictures, _stop
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the packer tells its workers itself
    torch.set_num_threads(1)
    _pictures, _stop = pictures, stop
    packer: Any = multiprocessing.parent_process()  # without it a worker would wait for its next part for ever
    threading.Thread(target=lambda: (connection.wait([packer.sentinel]), os._exit(1)), daemon=True).start()


def _tell(pictures: int) -> None:
    if _pictures is not None:
        with _pictures.get_lock():
            _pictures.value += pictures
        if _stop.is_set():
            raise _StoppedError


def _pack(parts: list[Part], workers: int, progress: Progress) -> list[dict[str, Any]]:
    """The notes of all parts, in order; those that are not whole yet are made. Errors leave the whole ones."""
    total = sum(len(part.pictures) for part in parts)
    if workers == 1:
        notes, done = [], 0
        for part in parts:
            notes.append(make_part(part, lambda n, done=done: progress(done + n, total)))  # type: ignore[misc]
            done += len(part.pictures)
            progress(done, total)
        return notes
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload(["sdae.data.datasets"])  # torch is imported once for all of them
    resource_tracker.ensure_running()  # it would take the mask off again
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a Ctrl-C is the packer's alone
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    pictures, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _begin, (pictures, stop)) as pool:
        try:
            futures: list[Future[dict[str, Any]]] = [pool.submit(make_part, part) for part in parts]
            waiting: set[Future[dict[str, Any]]] = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                progress(pictures.value, total)
            return [future.result() for future in futures]
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if not isinstance(error, BrokenProcessPool):
                raise
            job = parts[0].job
            _clear(job, parts)
            killed = "a packing process was killed, as for want of memory; the same command goes on, with fewer"
            raise UserError(f"--out {job.out}: {killed} --workers than {workers} perhaps") from None


def make_part(part: Part, told: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Writes a part and then its note, unless both are there. Runs in the workers."""
    if note := part.done():
        _tell(len(part.pictures))
        return note
    job, half = part.job, part.job.out / f".{part.stem}.{os.getpid()}.tmp"
    try:
        with open(half, "wb") as file:
            note = _fill(part, file, told)
            file.flush()
            os.fsync(file.fileno())
        note["file"] = f"{part.stem}-{note['sha256'][:16]}.{SUFFIX[job.form]}"
        os.replace(half, job.out / note["file"])
        flush(job.out)
    except OSError as error:
        raise UserError(
            f"{job.out}: cannot be written: {error.strerror or error}; the same command goes on when it can"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
    write_atomically(part.note, json.dumps(note))
    return note


def _fill(part: Part, file: IO[bytes], told: Callable[[int], None] | None) -> dict[str, Any]:
    from sdae.data.datasets import UnreadableError

    job, digest, total = part.job, hashlib.sha256(), 0
    rows: list[tuple[int, int, int, int]] = []  # which picture of the part, bytes, height, width
    skipped: list[str] = []
    for n, picture in enumerate(part.pictures):
        path = job.source / part.split / picture.name
        if (seen := look(path)) != (picture.bytes, picture.mtime_ns):
            raise _changed(job, f"{part.split}/{picture.name} {'is gone' if seen == UNSEEN else 'has changed'}")
        try:
            content, height, width = _packed_bytes(job, str(path))
        except UnreadableError as error:
            if job.on_error == "raise":
                raise UserError(f"{error} (--on-error skip leaves it out)") from None
            skipped.append(encodable(f"{part.split}/{picture.name}"))
        else:
            file.write(content)
            digest.update(content)
            rows.append((n, len(content), height, width))
            total += len(content)
        _tell(1)
        if told is not None:
            told(n + 1)
    return {"bytes": total, "sha256": digest.hexdigest(), "rows": rows, "skipped": skipped}


def _packed_bytes(job: Job, path: str) -> tuple[bytes, int, int]:
    """What is stored of a picture, and the height and width that crops are drawn for. Raises `UnreadableError`.

    shards: the file's own bytes where its short side is small enough, else a JPEG; raw: its pixels, squashed.
    """
    from torchvision.transforms.v2 import functional as F

    from sdae.data.datasets import content_of, decode

    content = content_of(path)
    image = decode(content, path)
    height, width = image.shape[1:]
    if job.form == "shards" and min(height, width) <= job.side:
        return content.tobytes(), height, width
    size = [job.side] if job.form == "shards" else [job.side, job.side]
    small = F.resize(image, size, F.InterpolationMode.BICUBIC, antialias=True)
    if job.form == "raw":
        return small.contiguous().numpy().tobytes(), height, width
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(small.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue(), small.shape[1], small.shape[2]


# The end


def _finish(
    job: Job, classes: tuple[str, ...], source: Source, parts: list[Part], notes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Indices, then the manifest, then the notes go."""
    files: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    counts, names = {}, {}
    for split in SPLITS:
        mine = [(part, note) for part, note in zip(parts, notes, strict=True) if part.split == split]
        index = _index(mine)
        counts[split] = np.bincount(index["label"], minlength=len(classes)).tolist()
        if 0 in counts[split]:
            raise UserError(f"{job.source}/{split}/{classes[counts[split].index(0)]}: no readable picture in it")
        buffer = io.BytesIO()
        np.save(buffer, index)
        write_atomically(job.out / f"{split}.npy", buffer.getvalue())
        names[split] = [note["file"] for _, note in mine]
        files |= {note["file"]: {"bytes": note["bytes"], "sha256": note["sha256"]} for _, note in mine}
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        files[f"{split}.npy"] = {"bytes": len(buffer.getvalue()), "sha256": digest}
        skipped += [name for _, note in mine for name in note["skipped"]]
    facts = {"format": PACKED_FORMAT, **job.asked(), "classes": classes, "counts": counts, "skipped": skipped}
    facts |= {"parts": names, "files": files, "digests": digests(classes, source, times=False)}
    facts["digest"] = manifest_digest(facts)
    write_atomically(job.out / MANIFEST, to_json(facts))
    shutil.rmtree(job.out / UNFINISHED, ignore_errors=True)
    return _report(job, facts)


def _index(parts: list[tuple[Part, dict[str, Any]]]) -> NDArray[Any]:
    rows = []
    for number, (part, note) in enumerate(parts):
        offset = 0
        for n, length, height, width in note["rows"]:
            picture = part.pictures[n]
            rows.append((number, offset, length, height, width, picture.label, os.fsencode(picture.name)))
            offset += length
    longest = max((len(row[6]) for row in rows), default=1)
    kinds = [("part", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4")]
    return np.array(rows, [*kinds, ("label", "<i4"), ("name", f"S{longest}")])


def _report(job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "folder": str(job.out), "form": facts["form"], "side": facts["side"], "classes": len(facts["classes"]),
        **{split: sum(facts["counts"][split]) for split in SPLITS}, "files": len(facts["files"]),
        "bytes": sum(file["bytes"] for file in facts["files"].values()), "skipped": facts["skipped"],
    }  # fmt: skip
