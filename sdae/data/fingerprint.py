"""Which pictures a `data` section means, told without torch: classes, pictures per class and split, a hash of both.

Folders are laid out as ImageFolder wants them: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg. Counting ImageNet's
pictures takes seconds on a network disk, so counts are kept in the user's cache folder, per class folder and its mtime.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdae.data import builtin
from sdae.errors import UserError
from sdae.files import read_json, read_record, write_atomically
from sdae.sections import Data, DetectData, Pictures, SegmentData

AnyPictures = TypeVar("AnyPictures", bound=Pictures)
SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FOLDERS = ("imagefolder", "tiny-imagenet")
MANIFEST, PACKED_FORMAT = "manifest.json", 1  # of a folder of packed pictures (sdae.data.packing)
KNOWN = {"cifar10": (10, 5000, 1000), "cifar100": (100, 500, 100), "stl10": (10, 500, 800)}  # classes, pictures of each
SETTLED_SECONDS = 2.0  # a folder changed less long ago may change again within its mtime's resolution: not cached


@dataclass(frozen=True)
class Listing:
    """Class names in label order and, per split, how many pictures of each class are taken (its first ones)."""

    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdae"


def folder_of(data: Pictures) -> Path:
    """`data.path` with variables and ~ filled in; `UserError` where it is null or names a variable that is not set."""
    if data.path is None:
        if data.name in KNOWN:
            return cache_folder() / data.name
        layout = f" with {expected('PATH')}" if data.name in FOLDERS else ""
        layout = " that `sdae-cli data prepare` has written" if data.name == "packed" else layout
        raise UserError(f"data.path: {data.name} needs a folder{layout}")
    path = os.path.expanduser(os.path.expandvars(data.path))
    if unset := re.search(r"\$\{?\w+\}?", path):
        raise UserError(
            f"data.path: {data.path}: the variable {unset[0]} is not set: export it, or say where the pictures are "
            "with --data or data.path"
        )
    return Path(path)


def expected(path: Path | str) -> str:
    return f"{path}/train/CLASS/*.jpg and {path}/val/CLASS/*.jpg"


def listing(data: Pictures) -> Listing:
    """The pictures that `data` means, after `classes`, `train_pictures` and `val_pictures`. Raises `UserError`.

    Of dense tasks there is one number for each split: their pictures have no class.
    """
    if isinstance(data, SegmentData):
        from sdae.data.segmentation import listing_of

        return listing_of(data)
    if isinstance(data, DetectData):
        from sdae.data.objects import listing_of as objects_of

        return objects_of(data)
    if data.name == "builtin":
        if (data.classes or 10) > builtin.MAX_CLASSES:
            raise UserError(f"data.classes: builtin has {builtin.MAX_CLASSES} classes, {data.classes} were asked for")
        classes = builtin.class_names(data.classes or 10)
        wanted = {"train": data.train_pictures or 2048, "val": data.val_pictures or 512}
        return Listing(classes, {s: balanced([n] * len(classes), n) for s, n in wanted.items()})
    if data.name in KNOWN:
        n, train, val = KNOWN[data.name]
        classes, counts = tuple(f"{data.name}-{i:02d}" for i in range(n)), {"train": [train] * n, "val": [val] * n}
    elif data.name == "packed":
        found = manifest(folder_of(data))
        classes, counts = tuple(found["classes"]), found["counts"]
    else:
        classes, counts = scan(folder_of(data), data.classes)
    if data.classes is not None and data.classes > len(classes):
        raise UserError(f"data.classes: {data.classes} were asked for, {data.name} has {len(classes)}")
    have = {split: counts[split][: data.classes] for split in SPLITS}
    taken = asked(data, {split: sum(of) for split, of in have.items()})
    return Listing(classes[: data.classes], {split: balanced(have[split], n) for split, n in taken.items()})


def asked(data: Pictures, have: Mapping[str, int]) -> dict[str, int]:
    """How many of each split's pictures are taken: `train_pictures`, `val_pictures`, or all. Raises `UserError`."""
    taken = {}
    for split, wish in (("train", data.train_pictures), ("val", data.val_pictures)):
        if wish is not None and wish > have[split]:
            raise UserError(f"data.{split}_pictures: {wish} were asked for, there are {have[split]}")
        taken[split] = have[split] if wish is None else wish
    return taken


def balanced(counts: list[int], n: int) -> tuple[int, ...]:
    """How many pictures of each class the first `n` are, taken in turns: one of each class, then a second of each."""
    rounds = bisect.bisect_right(range(max(counts, default=0) + 1), n, key=lambda r: sum(min(c, r) for c in counts)) - 1
    taken = [min(c, rounds) for c in counts]
    for i, count in enumerate(counts):
        if count > rounds and sum(taken) < n:
            taken[i] += 1
    return tuple(taken)


def pictures_of(folder: Path | str) -> list[str]:
    """Sorted names of the pictures in one class folder."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith("."))


def scan(root: Path, first: int | None = None) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Classes of PATH/train and the number of pictures per class in both splits, from the cache where still true."""
    if not root.is_dir():
        raise UserError(f"data.path: {root}: no such folder (expected {expected(root)})")
    file = cache_folder() / "folders" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        known = read_record(file) or {}
    classes = _classes(root, "train")[:first]
    now, seen = time.time(), dict(known)
    counts: dict[str, list[int]] = {}
    for split in SPLITS:
        found = classes if split == "train" else _classes(root, split)
        if odd := sorted(set(classes) - set(found)) or (first is None and sorted(set(found) - set(classes))):
            lacks = "val lacks the class" if odd[0] in classes else "train lacks val's class"
            raise UserError(f"data.path: {root}: {lacks} {odd[0]} (expected {expected(root)})")
        counts[split] = []
        for name in classes:
            folder = f"{root}/{split}/{name}"
            mtime = os.stat(folder).st_mtime_ns
            entry = known.get(f"{split}/{name}")
            if not (isinstance(entry, list) and [*map(type, entry)] == [int, int] and entry[0] == mtime):
                entry = [mtime, len(pictures_of(folder))]
                if now - mtime / 1e9 > SETTLED_SECONDS:
                    seen[f"{split}/{name}"] = entry
            if entry[1] == 0:
                raise UserError(f"data.path: {folder}: a class without pictures (expected {folder}/*.jpg)")
            counts[split].append(entry[1])
    if seen != known:
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written is no cache
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(seen))
    return tuple(classes), counts


def _classes(root: Path, split: str) -> list[str]:
    try:
        with os.scandir(root / split) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        raise UserError(f"data.path: {root}: no folder {split} in it (expected {expected(root)})") from None
    if not names:
        raise UserError(f"data.path: {root / split}: no class folders in it (expected {root}/{split}/CLASS/*.jpg)")
    return names


def manifest(root: Path, sizes: bool = True) -> dict[str, Any]:
    """What is in a folder of packed pictures: `classes`, `counts` by split, `form`, `side`, `files` with bytes and
    sha256. Raises `UserError` where the folder is not whole; `sizes`: whether each file has the manifest's size."""
    file = root / MANIFEST
    if not root.is_dir():
        raise UserError(f"data.path: {root}: no such folder (expected one that `sdae-cli data prepare` has written)")
    if not file.exists():
        raise UserError(f"data.path: {root}: no {MANIFEST}: not packed to the end (`sdae-cli data prepare` goes on)")
    found = read_json(file)
    if not isinstance(found, dict) or found.get("digest") != manifest_digest(found):
        raise UserError(f"data.path: {file}: damaged (pack the pictures again)")
    if found.get("format") != PACKED_FORMAT:
        raise UserError(f"data.path: {file}: format {found.get('format')} is unknown (allowed: {PACKED_FORMAT})")
    if not _is_manifest(found):
        raise UserError(f"data.path: {file}: does not tell of packed pictures (pack the pictures again)")
    for name, facts in found["files"].items() if sizes else ():
        try:
            there = os.stat(root / name)
        except OSError as error:
            raise UserError(f"data.path: {root / name}: {error.strerror} (pack the pictures again)") from None
        if not stat.S_ISREG(there.st_mode):
            raise UserError(f"data.path: {root / name}: not a plain file (pack the pictures again)")
        if (size := there.st_size) != facts["bytes"]:
            raise UserError(f"data.path: {root / name}: {size:,} bytes, the manifest says {facts['bytes']:,}")
    return found


def _is_manifest(found: dict[str, Any]) -> bool:
    """Whether all is there and of its type, and every file lies in the folder itself: the digest proves no origin."""
    try:
        classes, files = found["classes"], found["files"]
        whole = bool(classes) and all(isinstance(name, str) for name in classes) and isinstance(classes, list)
        whole &= found["form"] in ("shards", "raw") and isinstance(found["side"], int) and 0 < found["side"] <= 4096
        whole &= isinstance(found["skipped"], list)
        for split in SPLITS:
            counts, parts = found["counts"][split], found["parts"][split]
            whole &= len(counts) == len(classes) and all(type(n) is int and 0 < n < 2**40 for n in counts)
            whole &= isinstance(parts, list) and all(part in files for part in [*parts, f"{split}.npy"])
        for name, facts in files.items():
            whole &= os.path.basename(name) == name and name not in ("", ".", "..") and "\0" not in name
            whole &= type(facts["bytes"]) is int and isinstance(facts["sha256"], str)
        return whole
    except (KeyError, TypeError, AttributeError):
        return False


def manifest_digest(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fingerprint(data: Pictures) -> str | None:
    """16 hex digits over the class list and the number of pictures per class and split; of packed ones also over form
    and side.

    None where the folder is not there (or not said); a folder that is there and wrong raises `UserError`.
    """
    if data.name != "builtin" and data.name not in KNOWN:
        try:
            if not folder_of(data).is_dir():
                return None
        except UserError:
            return None
    found = listing(data)
    kind = {"builtin": f"builtin {builtin.VERSION}", **dict.fromkeys(FOLDERS, "folder")}.get(data.name, data.name)
    if data.name == "packed":
        facts = manifest(folder_of(data), sizes=False)
        kind = f"packed {facts['form']} {facts['side']}"
    if not isinstance(data, Data):  # the same pictures with other answers are another set
        kind = f"{'segment' if isinstance(data, SegmentData) else 'detect'} {kind}"
    parts = [kind, found.classes, *(found.counts[s] for s in SPLITS)]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:16]


def resolve(data: AnyPictures) -> AnyPictures:
    """`data` with its fingerprint. Raises `UserError` when it states another one than that of the pictures found."""
    found = fingerprint(data)
    if found is None or found == data.fingerprint:
        return data
    if data.fingerprint is not None:
        raise UserError(
            f"data.fingerprint: {data.fingerprint} is asked for, but {data.path or data.name} has {found}: "
            "other classes or numbers of pictures"
        )
    return data.model_copy(update={"fingerprint": found})
