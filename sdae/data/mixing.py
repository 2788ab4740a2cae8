"""Mixup, CutMix and label smoothing of a global batch, and random erasing, with timm's semantics (Apache-2.0)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdae.data.randomness import ERASING, PIXELS, hashed, normal_like, uniform
from sdae.data.transfer import sent
from sdae.errors import UserError
from sdae.sections import Augment

AREA = (0.02, 1 / 3)
LOG_ASPECT = (math.log(0.3), -math.log(0.3))
TRIES = 10


def mix(
    images: Tensor, labels: Tensor, augment: Augment, classes: int, seed: int, step: int, first: int, total: int
) -> tuple[Tensor, Tensor]:
    """Images (b, C, H, W) and soft targets (b, classes) of pictures first..first+b of the `total` of a global batch.

    One lambda for the global batch; the partner of picture i is i ^ 1, so that any slice with even bounds gives the
    numbers of the whole (timm pairs i with b - 1 - i, which no slice could). Raises `UserError` for odd bounds.
    """
    targets = torch.full((len(labels), classes), augment.label_smoothing / classes, device=images.device)
    targets.scatter_(1, labels[:, None], 1 - augment.label_smoothing + augment.label_smoothing / classes)
    if not (augment.mixup or augment.cutmix):
        return images, targets
    if first % 2 or len(images) % 2 or total % 2:
        raise UserError(
            f"optim.batch_size: mixup and cutmix mix pairs, so batches must be even "
            f"(pictures {first} to {first + len(images)} of {total} were given)"
        )
    draw = np.random.default_rng([seed, step])
    cut = bool(augment.cutmix) and (not augment.mixup or draw.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(draw.beta(alpha, alpha))
    if cut:
        height, width = images.shape[2:]
        top, bottom, left, right = _patch(draw, height, width, share)
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the border leaves of the patch
        other = _partners(images)
        images = images.clone()
        images[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    else:
        images = images * share + _partners(images) * (1 - share)
    return images, targets * share + _partners(targets) * (1 - share)


def _partners(x: Tensor) -> Tensor:
    return x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x)


def _patch(draw: np.random.Generator, height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """CutMix's box with area (1 - share) before the border clips it: top, bottom, left, right."""
    ratio = math.sqrt(1 - share)
    h, w = int(height * ratio), int(width * ratio)
    y, x = int(draw.integers(height)), int(draw.integers(width))
    return (
        max(y - h // 2, 0), min(y + (h + 1) // 2, height),
        max(x - w // 2, 0), min(x + (w + 1) // 2, width),
    )  # fmt: skip


def erase(images: Tensor, probability: float, seed: int, epoch: int, indices: NDArray[np.int64]) -> Tensor:
    """Random erasing of normalized pictures (b, C, H, W): one box of N(0, 1) noise with the given probability."""
    _, channels, height, width = images.shape
    box = np.zeros((len(indices), 4), np.int64)  # top, bottom, left, right
    open_ = np.flatnonzero(uniform(seed, ERASING, epoch, indices, 0) < probability)
    for trial in range(TRIES):
        u = uniform(seed, ERASING, epoch, indices[open_, None], np.arange(4 * trial + 1, 4 * trial + 5))
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 0])
        aspect = np.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * u[:, 1])
        h, w = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
        fits = (h < height) & (w < width)
        top, left = (u[:, 2] * (height - h + 1)).astype(int), (u[:, 3] * (width - w + 1)).astype(int)
        box[open_[fits]] = np.stack([top, top + h, left, left + w], 1)[fits]
        open_ = open_[~fits]
    hit = np.flatnonzero(box[:, 1])
    if not len(hit):
        return images
    where = sent(torch.from_numpy(hit), images.device)
    top, bottom, left, right = sent(torch.from_numpy(box[hit]), images.device)[:, :, None].unbind(1)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    noise = normal_like(hashed(seed, PIXELS, epoch, indices[hit]), (channels, height, width), images.device)
    images = images.clone()
    images[where] = torch.where(inside[:, None], noise, images[where])
    return images
