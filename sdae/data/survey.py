"""What a folder in ImageNet's layout holds at one moment, file by file: packing sees by it that its source changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from sdae.data.fingerprint import SPLITS, pictures_of
from sdae.errors import UserError


class Picture(NamedTuple):
    """A file, `name` relative to the split's folder; bytes and mtime as `look` finds them."""

    name: str
    label: int
    bytes: int
    mtime_ns: int


Source = dict[str, list[Picture]]
UNSEEN = (-1, -1)


def survey(source: Path, classes: tuple[str, ...]) -> Source:
    """Every picture of both splits, class by class. Raises `UserError` for a class folder that is gone."""
    found: Source = {split: [] for split in SPLITS}
    for split in SPLITS:
        for label, name in enumerate(classes):
            folder = source / split / name
            try:
                files = pictures_of(folder)
            except OSError as error:
                raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
            for file in files:
                found[split].append(Picture(f"{name}/{file}", label, *look(folder / file)))
    return found


def look(file: Path) -> tuple[int, int]:
    """Bytes and mtime, in ns; `UNSEEN` of what cannot be looked at, as a link to nowhere."""
    try:
        facts = os.stat(file)
    except OSError:
        return UNSEEN
    return facts.st_size, facts.st_mtime_ns


def difference(before: Source, after: Source) -> str | None:
    """The first file that is not what it was, and how many there are."""
    changes = []
    for split in SPLITS:
        old, new = ({picture.name: picture for picture in source[split]} for source in (before, after))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                how = "is new" if name not in old else "is gone" if name not in new else "has changed"
                changes.append(f"{split}/{name} {how}")
    return f"{changes[0]}{f' and {len(changes) - 1} more' if changes[1:] else ''}" if changes else None


def digests(classes: tuple[str, ...], source: Source, times: bool) -> dict[str, str]:
    """Of each class folder, over names and bytes, and with `times` over mtimes too."""
    sums = {f"{split}/{name}": hashlib.sha256() for split in SPLITS for name in classes}
    for split in SPLITS:
        for picture in source[split]:
            seen = picture if times else picture._replace(mtime_ns=0)
            sums[f"{split}/{classes[picture.label]}"].update(f"{seen}\n".encode(errors="surrogateescape"))
    return {name: found.hexdigest()[:16] for name, found in sums.items()}


def odd_class(before: dict[str, str], after: dict[str, str]) -> str | None:
    """The first class folder, as SPLIT/CLASS, whose digests differ, and how."""
    for name in sorted(before | after):
        if before.get(name) != after.get(name):
            how = "is new" if name not in before else "is gone" if name not in after else "has changed"
            return f"{name} {how}"
    return None
