"""Pictures with a label map each: how they are read, and the augmentation of ADE20K's recipe (mmsegmentation's).

Every draw is a function of (seed, epoch, index). A crop is looked for on the label map alone, and only its own pixels
of the resized picture are computed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdae.data import builtin
from sdae.data.datasets import MOST_BYTES, UnreadableError, opened, read, reason_of
from sdae.data.loader import statistics
from sdae.data.randomness import SCENE, uniform
from sdae.data.segmentation import FOLDERS, IGNORE, Split, annotation_of
from sdae.files import read_plain
from sdae.sections import SegmentData

TRIES = 10  # crops looked at for one without too much of one class; then the next one is taken
MODES = ("L", "P", "I;16", "I")  # Pillow's names of one channel of 8 or 16 bits


class SegmentSet:
    """The pictures of one split of a folder. `stored`: C of the label maps, of which `classes` are the first ones.

    Label maps are int64 (H, W): 0..C-1, and `IGNORE` for what has no label and for classes that are not taken.
    """

    def __init__(
        self, data: SegmentData, split: Split, root: Path, names: Sequence[str],
        classes: list[str], stored: int, seed: int,
    ) -> None:  # fmt: skip
        self.data, self.split, self.root, self.seed = data, split, str(root), seed
        self.names = np.array([os.fsencode(name) for name in names])  # many str are slow to fork
        self.classes, self.stored = classes, stored

    def __len__(self) -> int:
        return len(self.names)

    def path_of(self, i: int) -> str:
        return os.path.join(self.root, "images", FOLDERS[self.split], os.fsdecode(self.names[i]))

    def annotation_of(self, i: int) -> str:
        return os.path.join(self.root, "annotations", FOLDERS[self.split], annotation_of(os.fsdecode(self.names[i])))

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and the label map int64 (H, W). Raises `UnreadableError`."""
        image, path = read(self.path_of(i)), self.annotation_of(i)
        stored = read_labels(path, self.stored)
        (height, width), (high, wide) = stored.shape, image.shape[1:]
        if (height, width) != (high, wide):
            raise UnreadableError(
                f"{path}: the label map has {width} x {height} pixels, its picture {self.path_of(i)} {wide} x {high}"
            )
        return image, torch.where((stored > 0) & (stored <= len(self.classes)), stored - 1, IGNORE)

    def cut(self, image: Tensor, answer: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """A training crop, float32 (3, S, S) in 0..255, and its labels (S, S), where S is `image_size`.

        The shorter side becomes S times a draw from `augment.scale`, the longer one at most `longest` times as much;
        what is smaller than S is filled up with the mean colour, and without labels.
        """
        size, augment = self.data.image_size, self.data.augment
        draws = uniform(self.seed, SCENE, epoch, index, np.arange(32)).tolist()
        low, high = augment.scale
        whole = scaled(image.shape[1], image.shape[2], size * (low + (high - low) * draws[0]), augment.longest)
        for u, v in zip(draws[10 : 10 + 2 * TRIES + 2 : 2], draws[11 : 11 + 2 * TRIES + 2 : 2], strict=True):
            top, left = int(u * (max(whole[0] - size, 0) + 1)), int(v * (max(whole[1] - size, 0) + 1))
            box = top, left, min(size, whole[0]), min(size, whole[1])
            labels = nearest(answer, whole, box)
            if augment.most_of_one_class >= 1 or varied(labels, augment.most_of_one_class):
                break
        picture = bilinear(image, whole, box)
        if augment.flip and draws[1] < 0.5:
            picture, labels = picture.flip(2), labels.flip(1)
        if augment.distort:
            picture = distort(picture, draws[2:10])
        height, width = labels.shape
        filled = (255 * statistics(3)[0]).repeat(1, size, size)
        filled[:, :height, :width] = picture
        target = labels.new_full((size, size), IGNORE)
        target[:height, :width] = labels
        return filled, target

    def whole(self, image: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """The picture and its label map as they are: a test resizes the picture itself, to each of its scales."""
        return image.float(), answer


class BuiltinScenes(SegmentSet):
    """The built-in pictures; what no object covers is the first class, and every pixel has one."""

    def __init__(self, data: SegmentData, split: Split, pictures: int, classes: list[str], seed: int) -> None:
        super().__init__(data, split, Path(), [str(i) for i in range(pictures)], classes, len(classes), seed)

    def path_of(self, i: int) -> str:
        return f"builtin/{self.split}/{i}"

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        drawn = builtin.render([i], self.split, self.data.image_size, len(self.classes) - 1)
        labels = np.zeros(drawn.images.shape[2:], np.int64)
        for mask, label in zip(drawn.instances[0].masks, drawn.instances[0].labels, strict=True):
            labels[mask] = 1 + label
        return torch.from_numpy(drawn.images[0]), torch.from_numpy(labels)


def read_labels(path: str, classes: int) -> Tensor:
    """A label map file as it is stored: int64 (H, W), 0..classes. Raises `UnreadableError`."""
    try:
        # all of it: Pillow would allot as many bytes as a damaged file says it has
        with opened(io.BytesIO(read_plain(path, MOST_BYTES))) as picture:
            mode, stored = picture.mode, np.array(picture) if picture.mode in MODES else None
    except FileNotFoundError:
        raise UnreadableError(f"{path}: no such label map") from None
    except Exception as error:  # Pillow raises what its decoders lead to
        raise UnreadableError(f"{path}: broken label map: {reason_of(error)}") from None
    if stored is None:
        raise UnreadableError(f"{path}: a label map has one channel of 8 or 16 bits, this one is {mode}")
    highest = int(stored.max(initial=0))
    if highest > classes:
        raise UnreadableError(f"{path}: holds the label {highest} (allowed: 0 for none, 1 to {classes})")
    return torch.from_numpy(stored.astype(np.int64))


def scaled(height: int, width: int, shorter: float, longest: float) -> tuple[int, int]:
    """Height and width with the shorter side `shorter`, or less where the longer one would exceed longest x shorter."""
    factor = min(shorter / min(height, width), longest * shorter / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


Box = tuple[int, int, int, int]  # top, left, height, width


def nearest(labels: Tensor, whole: tuple[int, int], box: Box) -> Tensor:
    """`box` of the label map resized to `whole`: each pixel has the label that lies under its centre."""
    rows, columns = (
        (2 * torch.arange(start, start + count) + 1) * there // (2 * wanted)
        for start, count, there, wanted in zip(box[:2], box[2:], labels.shape, whole, strict=True)
    )
    return labels[rows[:, None], columns]


def bilinear(image: Tensor, whole: tuple[int, int], box: Box) -> Tensor:
    """`box` of the picture (3, H, W) resized to `whole`, float32: without antialiasing, as in the recipe."""
    out = image
    for axis, (start, count, wanted) in enumerate(zip(box[:2], box[2:], whole, strict=True), 1):
        there = image.shape[axis]
        place = ((torch.arange(start, start + count) + 0.5) * (there / wanted) - 0.5).clamp(0, there - 1)
        first = place.long()
        weight = (place - first).view((-1, 1) if axis == 1 else (-1,))
        second = (first + 1).clamp_max(there - 1)
        out = torch.lerp(out.index_select(axis, first).float(), out.index_select(axis, second).float(), weight)
    return out


def varied(labels: Tensor, most: float) -> bool:
    """Whether there are two classes or more, and none has `most` of the labelled pixels."""
    counts = torch.bincount(labels.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return int((counts > 0).sum()) > 1 and float(counts.max()) < most * float(counts.sum())


def distort(image: Tensor, draws: Sequence[float]) -> Tensor:
    """Photometric distortion of float32 (3, h, w) in 0..255, by eight uniform draws.

    Each with probability 1/2: brightness +-32; contrast x 0.5-1.5, before or behind the two that follow; saturation
    x 0.5-1.5; hue +-36 degrees (the recipe's 18 of 180).
    """
    brighter, contrast_first, contrast, saturation, hue, strength, turn, amount = draws
    if brighter < 0.5:
        image = (image + 32 * (4 * brighter - 1)).clamp(0, 255)
    factor = 0.5 + strength
    if contrast < 0.5 and contrast_first < 0.5:
        image = (image * factor).clamp(0, 255)
    if saturation < 0.5:
        image = saturate(image, 0.5 + amount)
    if hue < 0.5:
        image = F.adjust_hue(image / 255, (2 * turn - 1) * 18 / 180) * 255
    if contrast < 0.5 and contrast_first >= 0.5:
        image = (image * factor).clamp(0, 255)
    return image


def saturate(image: Tensor, factor: float) -> Tensor:
    """The saturation of HSV, 1 - min / max, times `factor` and 1 at most; hue and value stay."""
    value = image.amax(0)
    factors = torch.clamp(value / (value - image.amin(0)).clamp_min(1e-6), max=factor)
    return value - (value - image) * factors
