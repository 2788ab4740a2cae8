"""Batches of one rank, ready for the model.

Order and augmentation of a picture are functions of (seed, epoch, index): not of the rank, the worker, the place in the
batch or the step at which an interrupted run goes on. So there is no state to save.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from sdae.data import crop
from sdae.data.datasets import Dataset, Files, Resident, UnreadableError
from sdae.data.mixing import erase
from sdae.data.packed import Mapped, boxes_in
from sdae.data.randaugment import RandAugment
from sdae.data.randomness import permutation
from sdae.data.transfer import sent
from sdae.errors import BrokenInput, UserError
from sdae.sections import Data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.449, 0.226
LUMA = (0.299, 0.587, 0.114)
TOGETHER = 16  # pictures of a batch that a worker cuts after it has read them: they stay in the processor's cache
AHEAD = 4  # batches that threads gather from a memory map before they are wanted, at most

Item = tuple[Tensor | str, int, int, list[tuple[int, str]]]  # picture or what is wrong, label, index, skipped files


class Batch(NamedTuple):
    """images float32 (b, C, S, S) normalized, labels int64 (b,), both on the device; indices int64 (b,) on the CPU."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass
class Order:
    """One rank's picture numbers; as a sampler, those of `epoch` from `first_step` on, as lists of (epoch, index).

    The workers read from here what comes next, so that they outlive an epoch. It must not know its loader: a cycle
    would leave the workers' end to the garbage collector, which takes their queues away first.
    """

    pictures: int
    seed: int
    batch_size: int
    train: bool
    rank: int
    world: int
    epoch: int = 0
    first_step: int = 0

    def __len__(self) -> int:
        return self.pictures // self.batch_size if self.train else -(-self.pictures // self.batch_size)

    def parts(self, epoch: int, first_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """This rank's slice of each global batch; without the empty ones at the end of an evaluation."""
        order = permutation(self.seed, epoch, self.pictures) if self.train else np.arange(self.pictures)
        for step in range(first_step, len(self)):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = whole[self.rank * len(whole) // self.world : (self.rank + 1) * len(whole) // self.world]
            if len(part):
                yield part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, int(i)) for i in part] for part in self.parts(epoch, self.first_step))


class Loader:
    """Batches of `dataset` for one of `world` ranks; `batch_size` counts the pictures of all ranks together.

    Training drops the last incomplete batch. Evaluation takes every picture once; a rank's last batch may be smaller
    than the other ranks', or absent. `skipped`: index -> name of each unreadable picture that was replaced.
    """

    def __init__(
        self, dataset: Dataset, data: Data, *, seed: int, batch_size: int, train: bool, rank: int = 0, world: int = 1,
        device: torch.device | str = "cpu", workers: int = 0, channels: int = 3,
    ) -> None:  # fmt: skip
        if train and batch_size % world:
            raise UserError(f"optim.batch_size: {batch_size} cannot be shared evenly by {world} ranks")
        if train and len(dataset) < batch_size:
            raise UserError(f"optim.batch_size: {batch_size} is more than the {len(dataset)} training pictures")
        self.dataset, self.data, self.seed, self.train = dataset, data, seed, train
        self.device, self.channels, self.workers = torch.device(device), channels, workers
        self.order = Order(len(dataset), seed, batch_size, train, rank, world)
        self.steps_per_epoch = len(self.order)
        self.skipped: dict[int, str] = dict(dataset.skipped) if isinstance(dataset, Resident) else {}
        text = data.augment.randaugment
        self._randaugment = RandAugment(text) if train and text else None
        self._mean, self._std = (255 * t.to(self.device) for t in statistics(channels))
        self._reader = None
        if isinstance(dataset, Files):
            reads, pin = _Reader(dataset, data, seed, train), self.device.type == "cuda"
            self._reader = make_reader(reads, self.order, workers, _collate, ahead=4, pin=pin)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` on. Raises `BrokenInput` for a broken picture (on_error: raise)."""
        for images, labels, at in self.fetch(epoch, first_step):
            part = at.numpy()
            cut = images.float() if self._reader is not None else self._cut(images, epoch, part)
            yield Batch(self._finish(cut, epoch, part), labels, at)

    def fetch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the processor has to do for each batch: uint8 pictures and labels on the device (files cut and flipped
        already, the others whole), indices on the CPU."""
        if self._reader is not None:
            self.order.epoch, self.order.first_step = epoch, first_step
            for pictures, targets, at, skipped in self._reader:
                if isinstance(pictures, str):
                    raise BrokenInput(pictures)
                self.skipped.update(skipped)
                yield sent(pictures, self.device), sent(targets, self.device), at
            return
        assert isinstance(self.dataset, Resident | Mapped)
        parts, labels = self.order.parts(epoch, first_step), self.dataset.labels.to(self.device)
        if isinstance(self.dataset, Mapped):
            for at, images in self._gathered(self.dataset, parts):
                yield sent(images, self.device), labels[sent(at, self.device)], at
            return
        images, labels = self.dataset.on(self.device)
        for part in parts:
            at = torch.from_numpy(part)
            there = sent(at, self.device)
            yield images[there], labels[there], at

    def _gathered(self, dataset: Mapped, parts: Iterator[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and pictures of each batch. Copying holds no lock of Python's, so that threads do for workers."""
        pin = self.device.type == "cuda"
        if not self.workers:
            yield from ((torch.from_numpy(part), dataset.gather(part, pin)) for part in parts)
            return
        ahead: deque[tuple[Tensor, Future[Tensor]]] = deque()
        threads = min(self.workers, AHEAD)
        with ThreadPoolExecutor(threads) as pool:
            for part in parts:
                ahead.append((torch.from_numpy(part), pool.submit(dataset.gather, part, pin)))
                if len(ahead) == threads:
                    at, images = ahead.popleft()
                    yield at, images.result()
            for at, images in ahead:
                yield at, images.result()

    def _cut(self, images: Tensor, epoch: int, part: NDArray[np.int64]) -> Tensor:
        """Crop and flip of pictures in memory: uint8 (b, 3, H, W) -> float32 (b, 3, S, S) in 0..255."""
        size, augment, dataset = self.data.image_size, self.data.augment, self.dataset
        flip = torch.from_numpy(crop.flips(self.seed, epoch, part) & (augment.flip and self.train))
        if isinstance(dataset, Mapped):
            drawn = self.train
            box = dataset.boxes(self.seed, epoch, part, augment.scale) if drawn else dataset.middles(part, size)
            if self.device.type == "cpu":  # the processor's uint8 kernel is many times as fast as the matmuls
                each = zip(images, box.tolist(), flip.tolist(), strict=True)
                return torch.stack([_crop(image, place, flipped, size) for image, place, flipped in each]).float()
        elif not self.train:
            return crop.resize(images, size)
        else:
            height, width = images.shape[2:]
            box = torch.from_numpy(crop.boxes(self.seed, epoch, part, height, width, augment.scale))
        return crop.resized_crop(images, sent(box, self.device), sent(flip, self.device), size)

    def _finish(self, images: Tensor, epoch: int, part: NDArray[np.int64]) -> Tensor:
        """RandAugment, channels, normalization, erasing: what all sets share, batched on the device."""
        if self._randaugment is not None:
            images = self._randaugment(images, self.seed, epoch, part)
        images = with_channels(images, self.channels).sub(self._mean).div_(self._std)
        if self.train and self.data.augment.erasing:
            images = erase(images, self.data.augment.erasing, self.seed, epoch, part)
        return images


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Pictures (b, 3, h, w) with the number of channels that a network takes: luma, RGB, or RGB again and again."""
    if channels == 1:
        return (images * sent(torch.tensor(LUMA), images.device)[:, None, None]).sum(1, keepdim=True)
    return images if channels == 3 else images[:, [c % 3 for c in range(channels)]]


def statistics(channels: int) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation (C, 1, 1) in 0..1; one channel: of luma; other numbers repeat RGB's."""
    if channels == 1:
        return torch.full((1, 1, 1), GREY_MEAN), torch.full((1, 1, 1), GREY_STD)
    mean, std = (torch.tensor([x[c % 3] for c in range(channels)])[:, None, None] for x in (MEAN, STD))
    return mean, std


def _deaf(_worker: int) -> None:
    """Slurm signals every process of a job step; only the one that trains is to heed it (and it ends its workers)."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_readers: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()


def make_reader(
    reads: Any, order: Order, workers: int, collate: Callable[[list[Any]], Any], ahead: int, pin: bool = False
) -> DataLoader[Any]:
    """Batches of what `reads` makes of the keys of `order`, in workers; each has so many batches ahead."""
    reader: DataLoader[Any] = DataLoader(
        reads, batch_sampler=order, num_workers=workers, collate_fn=collate,  # type: ignore[arg-type]
        persistent_workers=workers > 0, prefetch_factor=ahead if workers else None, worker_init_fn=_deaf,
        pin_memory=pin, generator=torch.Generator(),  # its own, else torch's global one is drawn from
    )  # fmt: skip
    _readers.add(reader)
    return reader


def _end_workers() -> None:
    """Where an error ends the program, frames keep the readers alive; Python would ask their deaf workers to end, and
    wait for ever."""
    for reader in list(_readers):
        if (iterator := getattr(reader, "_iterator", None)) is not None:
            iterator._shutdown_workers()


atexit.register(_end_workers)  # after torch's and multiprocessing's: the last one registered runs first


class _Reader:
    """Reads, cuts and flips one file: (epoch, index) -> `Item`. Runs in the workers."""

    def __init__(self, dataset: Files, data: Data, seed: int, train: bool) -> None:
        self.dataset, self.data, self.seed, self.train = dataset, data, seed, train

    def __getitem__(self, key: tuple[int, int]) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Item]:
        """Keys of one epoch. Some pictures at a time: what is drawn for them costs little more than for one."""
        return [item for i in range(0, len(keys), TOGETHER) for item in self._items(keys[i : i + TOGETHER])]

    def _items(self, keys: list[tuple[int, int]]) -> list[Item]:
        items = [self._read(index) for _, index in keys]
        there = [k for k, item in enumerate(items) if isinstance(item[0], Tensor)]
        images = [item[0] for item in items if isinstance(item[0], Tensor)]
        for k, cut in zip(there, self._cut(images, keys[0][0], np.array([keys[k][1] for k in there])), strict=True):
            items[k] = (cut, *items[k][1:])
        return items

    def _read(self, index: int) -> Item:
        """The whole picture, or the next one that can be read."""
        skipped: list[tuple[int, str]] = []
        for i in ((index + k) % len(self.dataset) for k in range(len(self.dataset))):
            try:
                return self.dataset.read(i), int(self.dataset.labels[i]), index, skipped
            except UnreadableError as error:
                if self.data.on_error == "raise":
                    return str(error), 0, index, []
                skipped.append((i, self.dataset.path_of(i)))
        return f"{self.dataset.root}: no readable picture in it", 0, index, []

    def _cut(self, images: list[Tensor], epoch: int, at: NDArray[np.int64]) -> list[Tensor]:
        """uint8 (3, H, W) each -> uint8 (3, S, S) each."""
        size, augment = self.data.image_size, self.data.augment
        if not self.train:
            return [middle(image, size) for image in images]
        sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)
        boxes = boxes_in(sizes, self.seed, epoch, at, augment.scale).tolist()
        flips = (crop.flips(self.seed, epoch, at) & augment.flip).tolist()
        return [_crop(*each, size) for each in zip(images, boxes, flips, strict=True)]


def middle(image: Tensor, size: int) -> Tensor:
    """What an evaluation sees of a file: uint8 (3, H, W) -> uint8 (3, size, size)."""
    image = _resample(image, [round(size * 256 / 224)])
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]


def _crop(image: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size)."""
    top, left, height, width = box
    part = _resample(image[:, top : top + height, left : left + width], [size, size])
    return part.flip(2) if flip else part


def _resample(image: Tensor, size: list[int]) -> Tensor:
    return F.resize(image, size, interpolation=F.InterpolationMode.BICUBIC, antialias=True)  # type: ignore[no-any-return]


def _collate(items: list[Item]) -> tuple[Tensor | str, Tensor, Tensor, list[tuple[int, str]]]:
    """Stacks a batch; a picture that is wrong takes the batch's place."""
    pictures = [item[0] for item in items]
    wrong = next((p for p in pictures if isinstance(p, str)), None)
    labels, indices = (torch.tensor([item[k] for item in items]) for k in (1, 2))
    skipped = [pair for item in items for pair in item[3]]
    return wrong or torch.stack([p for p in pictures if isinstance(p, Tensor)]), labels, indices, skipped
