"""COCO's json of objects, checked and made compact: 860,000 objects, as many as train2017 has, take 0.4 GiB."""

from __future__ import annotations

import contextlib
import json
import math
import os
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdae.errors import UserError
from sdae.files import read_plain

MOST_CATEGORIES = 2**15 - 1
MOST_JSON = 2**31  # bytes; that of train2017 has 0.45 GB
LONGEST_NAME = 1024  # bytes of a file_name: in memory all take what the longest one takes
THINNEST = 1.0  # pixels; a box with a shorter side is degenerate


class Broken(Exception):
    """An annotation that cannot be used: what is wrong with it."""


@dataclass(frozen=True)
class Annotations:
    """A json file as arrays. Pictures rise by id; the objects of picture i are rows first[i] .. first[i + 1] of

    label int16 (A,) from 0, box float64 (A, 4) x y w h, area float64 (A,), crowd, rle bool (A,), shape int64 (A, 2):
    from which to which of the outlines; outline k is values[outline[k] : outline[k + 1]], a polygon or run lengths.
    """

    classes: tuple[str, ...]
    image_ids: NDArray[np.int64]
    files: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    label: NDArray[np.int16]
    box: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    rle: NDArray[np.bool_]
    shape: NDArray[np.int64]
    outline: NDArray[np.int64]
    values: NDArray[np.float64]
    broken: int

    def outlines(self, row: int) -> list[NDArray[np.float64]]:
        start, stop = self.shape[row]
        return [self.values[self.outline[k] : self.outline[k + 1]] for k in range(start, stop)]

    def corners(self) -> NDArray[np.float64]:
        """Boxes (A, 4) x0 y0 x1 y1, cut off at the picture's edge."""
        size = np.repeat(self.sizes, np.diff(self.first), axis=0)[:, [1, 0, 1, 0]]
        corners: NDArray[np.float64] = np.concatenate([self.box[:, :2], self.box[:, :2] + self.box[:, 2:]], axis=1)
        return corners.clip(0, size)

    def usable(self, classes: int) -> tuple[NDArray[np.bool_], int]:
        """Which rows can be trained on, and how many others there are that are neither crowds nor of other classes."""
        corners = self.corners()
        thick = (corners[:, 2:] - corners[:, :2] >= THINNEST).all(1)
        thick &= self.shape[:, 1] > self.shape[:, 0]
        for row in np.flatnonzero(self.rle).tolist():  # run lengths: of 0, of 1, of 0 ..
            thick[row] &= self.outlines(row)[0][1::2].sum() > 0
        wanted = ~self.crowd & (self.label < classes)
        return wanted & thick, int((wanted & ~thick).sum())


@lru_cache(maxsize=4)
def parsed(file: str, stamp: tuple[int, int], skip: bool) -> Annotations:
    """A json file checked and made compact; `stamp` only keeps a changed file apart in the cache.

    Raises `UserError` for a broken annotation; with `skip` such are left out and counted. A json of train2017's size
    takes half a minute, and 3.2 GiB until it is done.
    """
    where = f"data.path: {file}"
    try:
        content = json.loads(read_plain(file, MOST_JSON))
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not json: {' '.join(str(error).split())}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{where}: not COCO's layout: it has no list {key!r}")
        if not content[key] and key != "annotations":
            raise UserError(f"{where}: its list {key!r} is empty")
    try:
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        facts = ((int(p["id"]), str(p["file_name"]), int(p["height"]), int(p["width"])) for p in content["images"])
        images = sorted(facts)
        _possible(images, len(categories))
    except Broken as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: images want id, file_name, height, width; categories id, name ({error!r})") from None
    for what, ids in (("categories", [c[0] for c in categories]), ("images", [p[0] for p in images])):
        if len(set(ids)) < len(ids):
            raise UserError(f"{where}: two of its {what} have the same id")
    place, label = {p[0]: i for i, p in enumerate(images)}, {c[0]: i for i, c in enumerate(categories)}
    rows: list[tuple[int, int, bool, bool]] = []
    numbers, shapes, ends, values, broken = array("d"), array("q"), array("q", [0]), array("d"), 0
    for i, annotation in enumerate(content["annotations"]):
        try:
            at = _known(annotation, "image_id", place), _known(annotation, "category_id", label)
            box, area = _box(annotation)
            height, width = images[at[0]][2:]
            runs, outlines = _outlines(annotation.get("segmentation") or [], height, width)
        except Broken as error:
            if not skip:
                name = annotation.get("id", f"number {i + 1}") if isinstance(annotation, dict) else f"number {i + 1}"
                raise UserError(f"{where}: annotation {name}: {error}") from None
            broken += 1
            continue
        rows.append((*at, bool(annotation.get("iscrowd", 0)), runs))
        numbers.extend((*box, area))
        shapes.append(len(ends) - 1)
        for outline in outlines:
            values.extend(outline)
            ends.append(len(values))
        shapes.append(len(ends) - 1)
    codes = np.array(rows, np.int64).reshape(-1, 4)
    order = np.argsort(codes[:, 0], kind="stable")
    codes, measures = codes[order], np.array(numbers, np.float64).reshape(-1, 5)[order]
    return Annotations(
        classes=tuple(name for _, name in categories), image_ids=np.array([p[0] for p in images], np.int64),
        files=np.array([p[1].encode() for p in images]), sizes=np.array([p[2:] for p in images], np.int64),
        first=np.searchsorted(codes[:, 0], np.arange(len(images) + 1)), label=codes[:, 1].astype(np.int16),
        box=measures[:, :4].copy(), area=measures[:, 4].copy(), crowd=codes[:, 2].astype(bool),
        rle=codes[:, 3].astype(bool), shape=np.array(shapes, np.int64).reshape(-1, 2)[order],
        outline=np.array(ends, np.int64), values=np.array(values, np.float64), broken=broken,
    )  # fmt: skip


def _possible(images: list[tuple[int, str, int, int]], categories: int) -> None:
    """Raises `Broken` for what no folder of pictures can hold: a name must not lead out of the folder."""
    if categories > MOST_CATEGORIES:
        raise Broken(f"{categories:,} categories (allowed: {MOST_CATEGORIES:,})")
    for identity, name, height, width in images:
        if not name or "\0" in name or os.path.isabs(name) or ".." in name.split("/"):
            raise Broken(f"image {identity}: its file_name {name[:200]!r} is none of a file in the folder")
        if len(name.encode()) > LONGEST_NAME:
            raise Broken(f"image {identity}: a file_name of {len(name.encode()):,} bytes (allowed: {LONGEST_NAME:,})")
        if not (0 < height < 2**31 and 0 < width < 2**31 and abs(identity) < 2**63):
            raise Broken(f"image {identity}: {width} x {height} pixels, or an id above 63 bits")


def _known(annotation: Any, key: str, known: dict[int, int]) -> int:
    if not isinstance(annotation, dict):
        raise Broken("not a mapping of keys")
    identity = annotation.get(key)
    if not isinstance(identity, int) or identity not in known:
        raise Broken(f"{key} {identity!r} is not in the json's list")
    return known[identity]


def _box(annotation: dict[str, Any]) -> tuple[list[float], float]:
    with contextlib.suppress(KeyError, TypeError, ValueError, IndexError, OverflowError):
        box = [float(x) for x in annotation["bbox"]]
        area = float(annotation.get("area", box[2] * box[3]))
        if len(box) == 4 and all(map(math.isfinite, (*box, area))):
            return box, area
    raise Broken("bbox must be four numbers: x, y, width, height")


def _outlines(segmentation: Any, height: int, width: int) -> tuple[bool, list[Any]]:
    """Whether it is run lengths; the run lengths, or the polygons. Raises `Broken`."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise Broken(f"an RLE of size {size}, its picture is {[height, width]} (height, width)")
        runs = run_lengths(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(isinstance(n, int) and n >= 0 for n in runs):
            raise Broken("RLE counts must be a list of numbers, or COCO's string of them")
        if sum(runs) != height * width:
            raise Broken(f"an RLE of {sum(runs)} pixels, its picture has {height * width}")
        return True, [runs]
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise Broken("segmentation must be a list of polygons, or an RLE")
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise Broken(f"a polygon of {len(polygon) / 2:g} points (at least 3)")
        try:
            points = np.asarray(polygon, np.float64)
            numbers = points.ndim == 1 and bool(np.isfinite(points).all())
        except (TypeError, ValueError, OverflowError):
            numbers = False
        if not numbers:
            raise Broken("a polygon must be numbers x, y, x, y ..")
    return False, segmentation


def run_lengths(text: str) -> list[int]:
    """COCO's string of run lengths: six bits a character, five of them digits, the lowest first; from the fourth number
    on, differences to the last but one. Raises `Broken`."""
    codes = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)  # characters of each number
    whole = len(ends) and ends[-1] == len(codes) - 1 and lengths.max() <= 9
    if not whole or ((codes < 0) | (codes > 63)).any():
        raise Broken("RLE counts are no string of COCO's")
    starts = ends - lengths + 1
    digit = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * digit), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * (digit[ends] + 1)), 0)
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values.tolist()  # type: ignore[no-any-return]
