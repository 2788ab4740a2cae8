"""Opens the pictures that a `data` section means: small sets as one uint8 tensor in memory, large ones as files."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdae.data import builtin
from sdae.data.fingerprint import KNOWN, Listing, folder_of, listing, pictures_of
from sdae.data.randomness import permutation
from sdae.errors import BrokenInput, UserError
from sdae.files import read_plain
from sdae.sections import Data

if TYPE_CHECKING:
    from PIL import Image

try:  # twice as fast as Pillow, deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

Split = Literal["train", "val"]
TINY = 64  # side of Tiny-ImageNet's pictures
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")  # for others Pillow starts programs, as for PostScript
MOST_BYTES = 2**28  # of a picture's file
MOST_PIXELS = 2**26  # of a picture: 64 megapixels take some 0.8 GiB while they are decoded
PARTS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "stl10": "stl10_binary"}


class UnreadableError(Exception):
    """A picture that cannot be decoded: names the file and the reason in one line."""


class Dataset:
    """Pictures with labels: in memory, in files, or packed."""

    def __init__(self, labels: Tensor, classes: list[str]) -> None:
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def path_of(self, i: int) -> str:
        """Where picture i comes from, for messages."""
        raise NotImplementedError

    def take(self, chosen: NDArray[np.int64]) -> Dataset:
        """The set of these pictures, in this order."""
        raise NotImplementedError


class Resident(Dataset):
    """images uint8 (N, 3, H, W). `skipped`: index -> file that was replaced because it cannot be read."""

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], name: Callable[[int], str]) -> None:
        super().__init__(labels, classes)
        self.images, self._name = images, name
        self.skipped: dict[int, str] = {}
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}

    def path_of(self, i: int) -> str:
        return self._name(i)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on a device: copied there once, whoever asks."""
        if str(device) not in self._copies:
            self._copies[str(device)] = (self.images.to(device), self.labels.to(device))
        return self._copies[str(device)]

    def take(self, chosen: NDArray[np.int64]) -> Resident:
        at = torch.from_numpy(chosen)
        return Resident(self.images[at], self.labels[at], self.classes, lambda i: self.path_of(int(chosen[i])))


class Files(Dataset):
    """One file for each picture; `paths` relative to `root`, as bytes in one array (a million str are slow to fork)."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, classes: list[str]) -> None:
        super().__init__(labels, classes)
        self.root, self.paths = str(root), np.array([os.fsencode(p) for p in paths])

    def path_of(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def read(self, i: int) -> Tensor:
        return read(self.path_of(i))

    def take(self, chosen: NDArray[np.int64]) -> Files:
        paths = [os.fsdecode(p) for p in self.paths[chosen]]
        return Files(Path(self.root), paths, self.labels[torch.from_numpy(chosen)], self.classes)


def read(path: str) -> Tensor:
    """A file as uint8 RGB (3, H, W). Raises `UnreadableError`."""
    return decode(content_of(path), path)


def content_of(path: str) -> NDArray[np.uint8]:
    """A file's bytes. Raises `UnreadableError`."""
    try:
        return np.frombuffer(bytearray(read_plain(path, MOST_BYTES)), np.uint8)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UnreadableError(f"{path}: broken picture: {error}") from None


def decode(content: NDArray[np.uint8], name: str) -> Tensor:
    """The bytes of a picture file (a writable array, which is only read) as uint8 RGB (3, H, W). The one place where
    pictures are decoded. Raises `UnreadableError`, which names `name`."""
    size = jpeg_size(content)
    if decode_image is not None and size is not None and size[0] * size[1] <= MOST_PIXELS:
        with contextlib.suppress(RuntimeError):
            image: Tensor = decode_image(torch.from_numpy(content), ImageReadMode.RGB)
            if image.dtype == torch.uint8 and image.shape[0] == 3:
                return image
    try:  # the other formats; torchvision's decoder of PNG ends the process at a damaged one
        with opened(io.BytesIO(content.tobytes())) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:
        raise UnreadableError(f"{name}: broken picture: {reason_of(error)}") from None


def jpeg_size(content: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Width and height as a JPEG's frame says them, before anything is decoded; None: no JPEG, or an odd one."""
    head, at = memoryview(content.data), 2
    if bytes(head[:2]) != b"\xff\xd8":
        return None
    while at + 9 <= len(head) and head[at] == 0xFF:
        kind = head[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return (width, height) if width and height else None
        at += 1 if kind == 0xFF else 2 + (head[at + 2] << 8 | head[at + 3])
    return None


@lru_cache
def _pillow() -> Any:
    """Pillow's `Image`: its own limit of pixels is off, as ours is lower; what it warns of goes nowhere."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image


def opened(source: io.BytesIO) -> Image.Image:
    """A picture that Pillow opens, no pixel of it read yet. ValueError where there are too many."""
    picture = _pillow().open(source, formats=FORMATS)
    if picture.width * picture.height > MOST_PIXELS:
        picture.close()
        raise ValueError(f"{picture.width:,} x {picture.height:,} pixels (allowed: {MOST_PIXELS:,})")
    return picture  # type: ignore[no-any-return]


def reason_of(error: Exception) -> str:
    """What Pillow, or one of its decoders, did not like, in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "not a picture" if "cannot identify" in said else said


def open_dataset(data: Data, split: Split) -> Dataset:
    """The pictures of one split. Raises `UserError`, or `BrokenInput` for a broken picture of a set held in memory."""
    found = listing(data)
    if data.name == "builtin":
        return _builtin(split, sum(found.counts[split]), data.image_size, len(found.classes))
    if data.name == "imagefolder":
        return _files(data, split, found)
    if data.name == "packed":
        from sdae.data.packed import open_packed

        return open_packed(data, split, found)
    if data.name == "tiny-imagenet":
        files = _files(data, split, found)
        stamp = max(os.stat(f"{files.root}/{name}").st_mtime_ns for name in found.classes)
        return _decoded(files.root, tuple(map(os.fsdecode, files.paths)), found.classes, data.on_error, stamp)
    return _known(data.name, str(folder_of(data)), split, found.counts[split])


@lru_cache(maxsize=8)
def _builtin(split: str, n: int, size: int, classes: int) -> Resident:
    pictures = builtin.render(range(n), split, size, classes, instances=False)
    images, labels = torch.from_numpy(pictures.images), torch.from_numpy(pictures.labels)
    return Resident(images, labels, list(builtin.class_names(classes)), lambda i: f"builtin/{split}/{i}")


def subset(dataset: Dataset, n: int) -> Dataset:
    """At most `n` pictures, always the same ones, drawn from all classes alike (files lie class by class)."""
    if n >= len(dataset):
        return dataset
    return dataset.take(np.sort(permutation(0, 0, len(dataset))[:n]))


def _files(data: Data, split: str, found: Listing) -> Files:
    root = folder_of(data) / split
    paths = []
    for name, count in zip(found.classes, found.counts[split], strict=True):
        names = pictures_of(root / name)[:count]
        if len(names) < count:
            raise UserError(f"data.path: {root / name}: pictures have gone while it was read")
        paths += [f"{name}/{file}" for file in names]
    labels = torch.from_numpy(np.repeat(np.arange(len(found.classes)), found.counts[split]))
    return Files(root, paths, labels, list(found.classes))


@lru_cache(maxsize=4)
def _decoded(root: str, paths: tuple[str, ...], classes: tuple[str, ...], on_error: str, stamp: int) -> Resident:
    """All files decoded once; `stamp` only keeps a changed folder apart in the cache."""
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[p.partition("/")[0]] for p in paths])
    files = Files(Path(root), paths, labels, list(classes))
    images = torch.empty(len(paths), 3, TINY, TINY, dtype=torch.uint8)
    broken: dict[int, str] = {}

    def decode(start: int) -> None:
        for i in range(start, min(start + 256, len(paths))):
            try:
                image = files.read(i)
            except UnreadableError as error:
                broken[i] = str(error)
                continue
            if image.shape[1:] != (TINY, TINY):
                image = F.resize(image, [TINY, TINY], F.InterpolationMode.BICUBIC, antialias=True)
            images[i] = image

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(paths), 256)))
    if broken and on_error == "raise":
        raise BrokenInput(broken[min(broken)])
    for i in broken:
        j = next((k % len(paths) for k in range(i + 1, i + len(paths)) if k % len(paths) not in broken), None)
        if j is None:
            raise BrokenInput(f"{root}: no readable picture in it")
        images[i], labels[i] = images[j], labels[j]
    out = Resident(images, labels, list(classes), files.path_of)
    out.skipped = {i: files.path_of(i) for i in sorted(broken)}
    return out


@lru_cache(maxsize=4)
def _known(name: str, root: str, split: str, counts: tuple[int, ...]) -> Resident:
    """CIFAR-10, CIFAR-100, STL-10 (its labelled pictures) through torchvision, downloaded where absent."""
    source: Any
    absent = not (Path(root) / PARTS[name]).is_dir()
    try:
        if name == "stl10":
            source = torchvision.datasets.STL10(root, split="train" if split == "train" else "test", download=absent)
            images, labels = torch.from_numpy(source.data), np.array(source.labels)
        else:
            make: Any = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
            source = make(root, train=split == "train", download=absent)
            images, labels = torch.from_numpy(source.data).permute(0, 3, 1, 2), np.array(source.targets)
    except (OSError, RuntimeError) as error:
        archive = {"cifar10": "cifar-10-python", "cifar100": "cifar-100-python", "stl10": "stl10_binary"}[name]
        raise UserError(
            f"data.path: {name} is not complete in {root} and cannot be downloaded ({' '.join(str(error).split())}): "
            f"unpack {archive}.tar.gz there, so that {root}/{PARTS[name]} is a folder"
        ) from None
    index = np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(counts)])
    classes = list(source.classes[: len(counts)])
    chosen, kept = torch.from_numpy(labels[index].astype(np.int64)), images[torch.from_numpy(index)].contiguous()
    return Resident(kept, chosen, classes, lambda i: f"{name}/{split}/{index[i]}")


assert set(PARTS) == set(KNOWN)
