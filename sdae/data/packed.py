"""Reads what `sdae.data.packing` wrote: slices of memory maps, nothing to parse.

`Shards` are JPEGs whose short side is small, decoded and cropped by the workers as files are. `Mapped` are pictures
squashed to a square: a batch is gathered from the map by threads and cropped on the device, in the geometry that each
picture had before it was squashed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdae.data import crop
from sdae.data.datasets import Dataset, Files, Split, decode
from sdae.data.fingerprint import Listing, folder_of, manifest
from sdae.errors import UserError
from sdae.files import plain_file
from sdae.sections import Data


def boxes_in(
    sizes: NDArray[np.int64], seed: int, epoch: int, at: NDArray[np.int64], scale: tuple[float, float]
) -> NDArray[np.int64]:
    """`crop.boxes` of pictures with different heights and widths, sizes (n, 2): one call for each size."""
    boxes = np.empty((len(at), 4), np.int64)
    kinds, kind = np.unique(sizes, axis=0, return_inverse=True)
    for k, (height, width) in enumerate(kinds.tolist()):
        same = kind.reshape(-1) == k
        boxes[same] = crop.boxes(seed, epoch, at[same], height, width, scale)
    return boxes


class Packed:
    """The parts of one split: `rows` are those of the index, an array of (part, offset, length, height, width, label,
    name). Every process maps the files when it first reads them; only names travel to it."""

    def __init__(self, root: Path, index: str, parts: list[str], rows: NDArray[np.int64]) -> None:
        self.root, self.index_name, self.parts, self.rows = str(root), index, parts, rows
        self._opened()

    def _opened(self) -> None:
        index = np.load(Path(self.root) / self.index_name, mmap_mode="r")
        self.index = index
        self.part, self.offset, self.length = (index[key][self.rows] for key in ("part", "offset", "length"))
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("root", "index_name", "parts", "rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened()

    def bytes_of(self, i: int) -> NDArray[np.uint8]:
        """A picture's bytes, a slice of the map. The map is private: torch wants it writable, and nobody writes."""
        part, offset = int(self.part[i]), int(self.offset[i])
        if part not in self._maps:
            self._maps[part] = np.memmap(Path(self.root) / self.parts[part], np.uint8, mode="c")
        return self._maps[part][offset : offset + int(self.length[i])]

    def name(self, i: int) -> str:
        """Folder and file of picture i, for messages."""
        return f"{self.root}: {self.index['name'][self.rows[i]].decode(errors='surrogateescape')}"

    def take(self, chosen: NDArray[np.int64]) -> Packed:
        """The same for some of the pictures."""
        return Packed(Path(self.root), self.index_name, self.parts, self.rows[chosen])


class Shards(Files):
    """Small JPEGs in large files. To the loader they are files that are read in another way."""

    def __init__(self, packed: Packed, labels: Tensor, classes: list[str]) -> None:
        Dataset.__init__(self, labels, classes)
        self.root, self.packed = packed.root, packed

    def path_of(self, i: int) -> str:
        return self.packed.name(i)

    def read(self, i: int) -> Tensor:
        """Picture i, uint8 (3, H, W). Raises `UnreadableError`."""
        return decode(self.packed.bytes_of(i), self.path_of(i))

    def take(self, chosen: NDArray[np.int64]) -> Shards:
        return Shards(self.packed.take(chosen), self.labels[torch.from_numpy(chosen)], self.classes)


class Mapped(Dataset):
    """uint8 (N, 3, side, side) in memory maps. sizes (N, 2): height and width before the pictures were squashed."""

    def __init__(self, packed: Packed, labels: Tensor, classes: list[str], side: int) -> None:
        super().__init__(labels, classes)
        self.packed, self.side = packed, side
        self.sizes = np.stack([packed.index[key][packed.rows] for key in ("height", "width")], 1).astype(np.int64)

    def path_of(self, i: int) -> str:
        return self.packed.name(i)

    def gather(self, at: NDArray[np.int64], pin: bool = False) -> Tensor:
        """uint8 (len(at), 3, side, side), copied out of the map; `pin`: into page-locked memory."""
        out = torch.empty(len(at), 3, self.side, self.side, dtype=torch.uint8, pin_memory=pin)
        rows = out.view(len(at), -1).numpy()
        for row, i in zip(rows, at.tolist(), strict=True):
            row[:] = self.packed.bytes_of(i)
        return out

    def boxes(self, seed: int, epoch: int, at: NDArray[np.int64], scale: tuple[float, float]) -> Tensor:
        """Random crops int64 (n, 4) of the square: top, left, height, width. Drawn as `crop.boxes` draws them from the
        pictures as they were, so that a crop shows the same part of the scene as from the file."""
        sizes = self.sizes[at]
        return self._squashed(boxes_in(sizes, seed, epoch, at, scale), sizes)

    def middles(self, at: NDArray[np.int64], size: int) -> Tensor:
        """The crops of an evaluation: the middle `size` pixels where the short side has 256/224 of them."""
        sizes = self.sizes[at]
        cut = sizes.min(1, keepdims=True) * (size / round(size * 256 / 224))
        return self._squashed(np.concatenate([(sizes - cut) / 2, cut, cut], 1), sizes)

    def _squashed(self, boxes: NDArray[Any], sizes: NDArray[np.int64]) -> Tensor:
        """Boxes in pictures -> in the square, to whole pixels of it."""
        factor = self.side / sizes
        start = np.rint(boxes[:, :2] * factor).clip(0, self.side - 1)
        end = np.rint((boxes[:, :2] + boxes[:, 2:]) * factor).clip(start + 1, self.side)
        return torch.from_numpy(np.concatenate([start, end - start], 1).astype(np.int64))

    def take(self, chosen: NDArray[np.int64]) -> Mapped:
        labels = self.labels[torch.from_numpy(chosen)]
        return Mapped(self.packed.take(chosen), labels, self.classes, self.side)


def index_of(root: Path, split: str, facts: dict[str, Any]) -> str:
    """The name of a split's index, proved to be one of the manifest's files and pictures. Raises `UserError`."""
    name, parts = f"{split}.npy", facts["parts"][split]
    try:
        os.close(plain_file(str(root / name), os.O_RDONLY))  # numpy would wait for a pipe
        index = np.load(root / name, mmap_mode="r", allow_pickle=False)
        ends = np.array([facts["files"][part]["bytes"] for part in parts], np.int64)
        part, offset, length = (index[key].astype(np.int64) for key in ("part", "offset", "length"))
        whole = index.shape == (sum(facts["counts"][split]),) and index["name"].dtype.kind == "S"
        whole = whole and bool(((part >= 0) & (part < len(parts))).all())
        whole = whole and bool(((offset >= 0) & (length > 0) & (length <= ends[part] - offset)).all())
        whole = whole and bool(((index["height"] > 0) & (index["width"] > 0)).all())
        if facts["form"] == "raw":
            whole = whole and bool((length == 3 * facts["side"] ** 2).all())
    except Exception:  # whatever the text of an array's head leads to
        whole = False
    if not whole:
        raise UserError(f"data.path: {root / name}: not the index of the files beside it (pack the pictures again)")
    return name


def open_packed(data: Data, split: Split, found: Listing) -> Shards | Mapped:
    """The pictures of one split in a packed folder, class by class as `found` counts them. Raises `UserError`."""
    root = folder_of(data)
    facts = manifest(root)
    index = index_of(root, split, facts)  # first: it proves the counts, which the rest makes arrays of
    starts = np.cumsum([0, *facts["counts"][split]])
    counts = found.counts[split]
    rows = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=False)])
    labels = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    packed = Packed(root, index, facts["parts"][split], rows)
    if facts["form"] == "raw":
        return Mapped(packed, labels, list(found.classes), facts["side"])
    return Shards(packed, labels, list(found.classes))
