"""Semantic segmentation with UperNet (paper section 3.2, Table 3): slide and whole inference, mIoU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from sdae import drawing
from sdae.config import Segment
from sdae.data.dense import DenseBatch, colours
from sdae.data.loader import statistics
from sdae.data.scenes import scaled
from sdae.data.segmentation import IGNORE, open_segmentation
from sdae.data.transfer import sent
from sdae.drawing import regions
from sdae.errors import BrokenInput
from sdae.models.upernet import UperNet, resize
from sdae.stages import dense
from sdae.stages.session import DROPOUT, Session, uniform
from sdae.store import RunFolder
from sdae.training.loop import autocast

WINDOWS = 8  # of a picture, through the network at once


def run(config: Segment, session: Session) -> dict[str, Any]:
    """Trains to the last step and tests every validation picture once: mIoU, mAcc, aAcc in percent.

    `evaluation.json` in the run's folder holds the confusion matrix (rows: truth) and the scores of each class.
    """
    sets = open_segmentation(config.data, "train", config.seed), open_segmentation(config.data, "val", config.seed)
    return dense.run(config, session, sets, partial(network, config), SegmentTask)  # type: ignore[arg-type]


def network(config: Segment, classes: int) -> UperNet:
    checkpointing = config.efficiency.checkpointing
    return UperNet(config.model, config.data.image_size, config.backbone, config.head, classes, checkpointing)


class SegmentTask(dense.DenseTask):
    config: Segment
    module: UperNet

    def inputs(self, batch: DenseBatch, step: int, first: int, total: int) -> tuple[Any, ...]:
        """Pictures, labels, stochastic depth and the dropout of channels: factors (b, dropped), 0 or 1 / (1 - p)."""
        size, rate = self.config.data.image_size, self.config.head.dropout
        count = len(batch.images)
        labels = sent(torch.stack(batch.answers), self.device)
        dropout = None
        if rate:
            draws = uniform((total, self.module.dropped), self.config.seed, DROPOUT, step)[first : first + count]
            dropout = sent((draws >= rate).float() / (1 - rate), self.device)
        return batch.images[:, :, :size, :size], labels, self.drop(step, first, count, total), dropout

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.module.eval()
        classes, world = len(self.val_set.classes), self.session.world
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        for batch in self.loader(self.val_set, 0, False, world.size).epoch(0):  # one picture a rank: sizes differ
            for image, (height, width), labels in zip(batch.images, batch.sizes, batch.answers, strict=True):
                size = (labels.shape[0], labels.shape[1])
                found = probabilities(self.module, self.config, image[:, :height, :width], size).argmax(0)
                counts += confusion(found, labels.to(self.device), classes)
        table = world.sum(counts).cpu().numpy()
        if not table.any():
            raise BrokenInput(f"data: no validation picture of {self.config.data.name} has a labelled pixel")
        result = scores(table)
        if world.first:
            kept = {k: result[k] for k in ("iou", "accuracy")}
            record = {"classes": self.val_set.classes, **kept, "confusion": table.tolist()}
            self.session.folder.write("evaluation.json", record)
        return {name: result[name] for name in ("miou", "macc", "aacc")}

    def picture(self, i: int) -> tuple[Image, Image]:
        image, labels = self.val_set.read(i)
        names, photograph = self.val_set.classes, drawing.pixels(image)
        found = predict(self.module, self.config, image).cpu()
        return regions(photograph, labels.numpy(), names), regions(photograph, found.numpy(), names)


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels by truth (rows) and prediction: int64 (classes, classes); those without a label are left out."""
    at = labels != IGNORE
    return torch.bincount(classes * labels[at] + found[at], minlength=classes**2).view(classes, classes)


def scores(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Scores in percent of a confusion matrix (rows: truth).

    iou and accuracy of each class (null: it occurs in neither truth nor prediction, or not in truth), their means over
    the classes that have one, and aacc, the part of all labelled pixels that is right.
    """
    right, truth, found = np.diag(counts), counts.sum(1), counts.sum(0)
    iou, accuracy = _percent(right, truth + found - right), _percent(right, truth)
    means = [float(np.mean([x for x in values if x is not None])) for values in (iou, accuracy)]
    aacc = 100 * int(right.sum()) / int(truth.sum())
    return {"miou": means[0], "macc": means[1], "aacc": aacc, "iou": iou, "accuracy": accuracy}


def _percent(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
    return [100 * p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def probabilities(module: UperNet, config: Segment, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Class probabilities (classes, *size) of one normalized picture (C, h, w), averaged over scales and flips."""
    test, data = config.test, config.data
    total, views = torch.zeros((), device=image.device), len(test.scales) * (1 + test.flip)
    for scale in test.scales:
        wanted = scaled(image.shape[1], image.shape[2], data.image_size * scale, data.augment.longest)
        resized = resize(image[None], wanted)[0]
        for flipped in (False, True)[: 1 + test.flip]:
            view = resized.flip(2) if flipped else resized
            with autocast(config.precision, image.device):
                logits = slide(module, config, view) if test.mode == "slide" else whole(module, view)
            found = resize(logits[None], size)[0].softmax(0)
            total = total + (found.flip(2) if flipped else found)
    return total / views


def whole(module: UperNet, image: Tensor) -> Tensor:
    """Logits (classes, h, w), float32, of a picture (C, h, w) at once, filled up to whole patches."""
    height, width = image.shape[1:]
    patch = module.backbone.patch
    filled = F.pad(image, (0, -width % patch, 0, -height % patch))
    return resize(module.logits(filled[None]).float(), filled.shape[1:])[0, :, :height, :width]


def slide(module: UperNet, config: Segment, image: Tensor) -> Tensor:
    """Logits (classes, h, w), float32: the mean over the windows upon a pixel; a smaller picture is filled up."""
    side = config.data.image_size
    stride = config.test.stride or round(side * 2 / 3)
    height, width = image.shape[1:]
    filled = F.pad(image, (0, max(0, side - width), 0, max(0, side - height)))
    places = [(y, x) for y in starts(height, side, stride) for x in starts(width, side, stride)]
    total, count = None, image.new_zeros(filled.shape[1:])
    for k in range(0, len(places), WINDOWS):
        part = places[k : k + WINDOWS]
        windows = torch.stack([filled[:, y : y + side, x : x + side] for y, x in part])
        logits = resize(module.logits(windows).float(), (side, side))
        if total is None:
            total = logits.new_zeros(logits.shape[1], *filled.shape[1:])
        for (y, x), found in zip(part, logits, strict=True):
            total[:, y : y + side, x : x + side] += found
            count[y : y + side, x : x + side] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin: `stride` apart, the last one flush with the border."""
    last = max(length - side, 0)
    return [min(i * stride, last) for i in range(-(-last // stride) + 1)]


@torch.no_grad()
def predict(module: UperNet, config: Segment, image: Tensor) -> Tensor:
    """The class 0..C-1 of every pixel of a picture, uint8 (3, H, W): int64 (H, W), on the module's device."""
    module.eval()
    device = next(module.parameters()).device
    mean, std = (255 * t for t in statistics(config.model.channels))
    picture = (colours(image.float(), config.model.channels) - mean) / std
    return probabilities(module, config, picture.to(device), (image.shape[1], image.shape[2])).argmax(0)


def load_trained(folder: RunFolder) -> tuple[Segment, UperNet, list[str]]:
    """The network of a finished run, on the CPU, with its config and the names of its classes. Raises `UserError`."""
    return dense.load_trained(folder, "segment", network)
