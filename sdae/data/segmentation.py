"""Pictures with a label map each: which ones, and their classes. Nothing here imports torch until pictures are opened.

Folders are laid out as ADE20K's: PATH/images/{training,validation}/X.jpg, PATH/annotations/{training,validation}/X.png.
In a label map 0 is "not labelled" and 1..C are the classes. Where a part of the pictures is asked for, it is drawn once
for all seeds, since neighbours in a folder may be frames of one film.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sdae.data import builtin
from sdae.data.fingerprint import Listing, asked, folder_of, pictures_of
from sdae.data.randomness import permutation
from sdae.errors import UserError
from sdae.files import read_plain
from sdae.sections import SegmentData

if TYPE_CHECKING:
    from sdae.data.scenes import SegmentSet

Split = Literal["train", "val"]
FOLDERS = {"train": "training", "val": "validation"}
ADE20K_CLASSES = 150
IGNORE = 255  # "not labelled", in tensors
MOST_CLASSES = IGNORE
MOST_BYTES = 1_000_000  # of the file of their names
GROUND = "ground"  # builtin's first class: what no object covers


def listing_of(data: SegmentData) -> Listing:
    """Classes and number of pictures, after `classes`, `train_pictures` and `val_pictures`. Raises `UserError`."""
    if data.name == "builtin":
        classes = (GROUND, *builtin.class_names(builtin.MAX_CLASSES))
        first: int | None = data.classes or 11
        have = {"train": data.train_pictures or 2048, "val": data.val_pictures or 512}
    else:
        root = root_of(data)
        classes, first = classes_of(root, data.name), data.classes
        have = {split: len(_names(root, split)) for split in FOLDERS}
    if first is not None and first > len(classes):
        raise UserError(f"data.classes: {first} were asked for, {data.name} has {len(classes)}")
    return Listing(tuple(classes[:first]), {split: (n,) for split, n in asked(data, have).items()})


def root_of(data: SegmentData) -> Path:
    """The folder of pictures and label maps, laid out as it should be. Raises `UserError`."""
    layout = "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png"
    if data.path is None:
        raise UserError(f"data.path: {data.name} needs a folder with {layout}")
    root = folder_of(data)
    if not root.is_dir():
        raise UserError(f"data.path: {root}: no such folder (expected there: {layout})")
    for folder in (f"{kind}/{split}" for kind in ("images", "annotations") for split in FOLDERS.values()):
        if not (root / folder).is_dir():
            raise UserError(f"data.path: {root}: no folder {folder} in it (expected: {layout})")
    return root


def classes_of(root: Path, name: str) -> tuple[str, ...]:
    """Names of the classes 1..C: of classes.txt, or ADE20K's own objectInfo150.txt, or their numbers (ade20k alone)."""
    file, names = root / "classes.txt", {}
    if name == "ade20k" and not file.exists():
        file = root / "objectInfo150.txt"
        if not file.exists():
            return tuple(f"class {i}" for i in range(1, ADE20K_CLASSES + 1))
    try:
        lines = read_plain(file, MOST_BYTES).decode().splitlines()
    except FileNotFoundError:
        raise UserError(f"data.path: {file}: no such file (expected a line INDEX<TAB>NAME for each class)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {file}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        index, *others = line.split("\t")
        if not line.strip() or index == "Idx":  # objectInfo150.txt has a line of headings, and more columns
            continue
        if not re.fullmatch(r"\d{1,9}", index, re.ASCII) or not others or int(index) in names:
            raise UserError(f"data.path: {file} line {number}: {line[:200]!r} is not INDEX<TAB>NAME of another class")
        names[int(index)] = others[-1].strip()
    names.pop(0, None)  # "not labelled"
    if sorted(names) != list(range(1, len(names) + 1)) or not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(
            f"data.path: {file}: {len(names)} classes, numbered up to {max(names, default=0)} "
            f"(allowed: 1 to C without gaps, 2 to {MOST_CLASSES} classes)"
        )
    if name == "ade20k" and len(names) != ADE20K_CLASSES:
        raise UserError(
            f"data.path: {file}: {len(names)} classes, ade20k has {ADE20K_CLASSES} (segmentation-folder: any)"
        )
    return tuple(names[i] for i in sorted(names))


def _names(root: Path, split: str) -> list[str]:
    folder = root / "images" / FOLDERS[split]
    names = pictures_of(folder)
    if not names:
        raise UserError(f"data.path: {folder}: no pictures in it (expected {folder}/*.jpg)")
    return names


def annotation_of(picture: str) -> str:
    return f"{os.path.splitext(picture)[0]}.png"


def open_segmentation(data: SegmentData, split: Split, seed: int) -> SegmentSet:
    """The pictures of one split; `seed`: of their augmentation. Raises `UserError`, also where label maps are missing.

    In training with `on_error: skip`, pictures without one are left to be skipped like broken ones.
    """
    from sdae.data.scenes import BuiltinScenes, SegmentSet

    found = listing_of(data)
    n = found.counts[split][0]
    if data.name == "builtin":
        return BuiltinScenes(data, split, n, list(found.classes), seed)
    root = root_of(data)
    names = _names(root, split)
    chosen = [names[i] for i in np.sort(permutation(0, 0, len(names))[:n])]
    maps = root / "annotations" / FOLDERS[split]
    with os.scandir(maps) as entries:
        there = {entry.name for entry in entries}
    missing = [name for name in chosen if annotation_of(name) not in there]
    if missing and not (split == "train" and data.on_error == "skip"):
        raise UserError(
            f"data.path: {maps / annotation_of(missing[0])}: no such label map "
            f"(missing for {len(missing)} of {len(chosen)} pictures)"
        )
    return SegmentSet(data, split, root, chosen, list(found.classes), len(classes_of(root, data.name)), seed)
