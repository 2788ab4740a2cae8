"""Batches of pictures whose answer is more than a label: a label map, or objects with boxes and masks.

As in `sdae.data.loader`, order and augmentation of a picture are functions of (seed, epoch, index). Reading
and cutting are a data set's own (`read`, `cut`, `whole`) and run in the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sdae.data.datasets import UnreadableError
from sdae.data.loader import Order, make_reader, statistics
from sdae.data.transfer import sent
from sdae.errors import BrokenInput, UserError


class DenseSet(Protocol):
    """The pictures of one split with their answers. `read` and `cut` run in worker processes: no open files in it."""

    classes: list[str]

    def __len__(self) -> int: ...

    def path_of(self, i: int) -> str: ...

    def read(self, i: int) -> tuple[Tensor, Any]:
        """uint8 (3, H, W) and the answer. Raises `UnreadableError`, which names the file and what is wrong."""

    def cut(self, image: Tensor, answer: Any, epoch: int, index: int) -> tuple[Tensor, Any]:
        """Training augmentation, as a function of (seed, epoch, index): float32 (3, h, w) in 0..255, and the answer."""

    def whole(self, image: Tensor, answer: Any) -> tuple[Tensor, Any]:
        """The picture as it is tested: float32 (3, h, w) in 0..255, and the answer."""


class DenseBatch(NamedTuple):
    """images float32 (b, C, h, w) normalized, smaller ones filled up with 0 below and at the right; on the device.

    sizes: height and width of each without the filling. answers: one for each picture, on the CPU. indices (b,).
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    answers: list[Any]
    indices: Tensor


class DenseLoader:
    """Batches of one rank; sides are filled up to a multiple of `multiple`. `skipped`: as `Loader`'s."""

    def __init__(
        self, dataset: DenseSet, *, seed: int, batch_size: int, train: bool, rank: int, world: int,
        device: torch.device, workers: int, channels: int, on_error: str, multiple: int,
    ) -> None:  # fmt: skip
        if train and len(dataset) < batch_size:
            raise UserError(f"optim.batch_size: {batch_size} is more than the {len(dataset)} training pictures")
        self.dataset, self.device, self.multiple = dataset, device, multiple
        self.order = Order(len(dataset), seed, batch_size, train, rank, world)
        self.steps_per_epoch = len(self.order)
        self.skipped: dict[int, str] = {}
        self._reader = make_reader(_Reader(dataset, train, on_error), self.order, workers, list, ahead=2)
        self._channels = channels
        self._mean, self._std = (255 * t.to(device) for t in statistics(channels))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[DenseBatch]:
        """The batches of an epoch from `first_step` on. Raises `BrokenInput` for a broken picture (on_error: raise)."""
        self.order.epoch, self.order.first_step = epoch, first_step
        for items in self._reader:
            for picture, _, _, skipped in items:
                if isinstance(picture, str):
                    raise BrokenInput(picture)
                self.skipped.update(skipped)
            sizes = [tuple(picture.shape[1:]) for picture, *_ in items]
            height, width = (-(-max(size[k] for size in sizes) // self.multiple) * self.multiple for k in (0, 1))
            images = torch.zeros(len(items), self._channels, height, width, device=self.device)
            for image, (picture, *_) in zip(images, items, strict=True):
                there = sent(picture, self.device)
                image[:, : picture.shape[1], : picture.shape[2]] = (
                    colours(there, self._channels) - self._mean
                ) / self._std
            answers, indices = [item[1] for item in items], torch.tensor([item[2] for item in items])
            yield DenseBatch(images, sizes, answers, indices)


def colours(picture: Tensor, channels: int) -> Tensor:
    """A picture (3, h, w) with the number of channels that a network takes."""
    return picture.mean(0, keepdim=True) if channels == 1 else picture[[c % 3 for c in range(channels)]]


class _Reader:
    """(epoch, index) -> picture or what is wrong with it, answer, index, skipped files. Runs in the workers."""

    def __init__(self, dataset: DenseSet, train: bool, on_error: str) -> None:
        self.dataset, self.train, self.on_error = dataset, train, on_error

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | str, Any, int, list[tuple[int, str]]]:
        epoch, index = key
        skipped: list[tuple[int, str]] = []
        for k in range(len(self.dataset)):
            i = (index + k) % len(self.dataset)
            try:
                image, answer = self.dataset.read(i)
            except UnreadableError as error:
                if self.on_error == "raise" or not self.train:  # a test counts every picture
                    return str(error), None, index, []
                skipped.append((i, self.dataset.path_of(i)))
                continue
            cut = self.dataset.cut(image, answer, epoch, index) if self.train else self.dataset.whole(image, answer)
            return *cut, index, skipped
        return "no readable picture", None, index, []
