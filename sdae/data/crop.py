"""Random resized crops of pictures held in memory, as two batched matmuls with bicubic weights.

The weights are Pillow's antialiased bicubic (a = -0.5, support widened by the scale), taken from inside the crop only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdae.data.randomness import CROP, FLIP, uniform

RATIO = (3 / 4, 4 / 3)
TRIES = 10
CACHED = 1 << 17  # pixels a processor takes at once, so that what is between the two matmuls stays in its cache
Numbers = NDArray[np.int64]


def boxes(seed: int, epoch: int, indices: Numbers, height: int, width: int, scale: tuple[float, float]) -> Numbers:
    """Crops (n, 4) as top, left, height, width, drawn like torchvision's RandomResizedCrop."""
    out = np.zeros((len(indices), 4), np.int64)
    open_ = np.arange(len(indices))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for trial in range(TRIES):
        u = uniform(seed, CROP, epoch, indices[open_, None], np.arange(4 * trial, 4 * trial + 4))
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, 0])
        ratio = np.exp(low + (high - low) * u[:, 1])
        w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top, left = (u[:, 2] * (height - h + 1)).astype(int), (u[:, 3] * (width - w + 1)).astype(int)
        out[open_[fits]] = np.stack([top, left, h, w], 1)[fits]
        open_ = open_[~fits]
        if not len(open_):
            return out
    most_h, most_w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    out[open_] = ((height - most_h) // 2, (width - most_w) // 2, most_h, most_w)
    return out


def flips(seed: int, epoch: int, indices: Numbers) -> NDArray[np.bool_]:
    return uniform(seed, FLIP, epoch, indices) < 0.5


def weights(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Resampling matrices (n, out, size) from `length` pixels after `start` (both (n,)) to `out` pixels."""
    scale = (length.float() / out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
    k = torch.arange(size, device=start.device)
    x = (k + 0.5 - centre).abs_().mul_(scale.clamp(min=1).reciprocal())
    near, far = ((1.5 * x - 2.5) * x * x).add_(1), (((-0.5 * x + 2.5) * x - 4) * x).add_(2)
    w = torch.where(x < 1, near, far).mul_(x < 2)
    w *= ((k >= start[:, None]) & (k < (start + length)[:, None]))[:, None]
    return w.div_(w.sum(2, keepdim=True))


def resized_crop(images: Tensor, box: Tensor, flip: Tensor, out: int) -> Tensor:
    """uint8 or float (n, c, H, W), boxes (n, 4), flip (n,) bool -> float32 (n, c, out, out) in 0..255."""
    n, c, height, width = images.shape
    if images.device.type == "cpu" and n > (most := max(16, CACHED // (height * width))):
        parts = [slice(i, i + most) for i in range(0, n, most)]
        return torch.cat([resized_crop(images[part], box[part], flip[part], out) for part in parts])
    rows = weights(box[:, 0], box[:, 2], height, out)
    columns = weights(box[:, 1], box[:, 3], width, out)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    lines = images.permute(0, 2, 1, 3).contiguous().float()  # (n, H, c, W): no weight is copied for its channels
    half = torch.bmm(rows, lines.view(n, height, c * width))
    whole = torch.bmm(half.view(n, out * c, width), columns.mT)
    return whole.view(n, out, c, out).permute(0, 2, 1, 3).contiguous().clamp_(0, 255)


def resize(images: Tensor, out: int) -> Tensor:
    """Whole pictures (n, c, H, W) -> float32 (n, c, out, out) in 0..255."""
    height, width = images.shape[2:]
    if (height, width) == (out, out):
        return images.float()
    zero = torch.zeros(1, dtype=torch.int64, device=images.device)
    rows, columns = (weights(zero, zero + size, size, out)[0] for size in (height, width))
    return (rows @ (images.float() @ columns.mT)).clamp_(0, 255)
