"""RandAugment on batches of float pictures with whole values 0..255, on the pictures' device.

Semantics are those of timm's `rand_augment_transform` with bicubic interpolation and ImageNet's mean as fill
(Apache-2.0, `timm/data/auto_augment.py`) and of the Pillow operations beneath, down to their rounding. Here an
operation takes all pictures of the batch that drew it at once: (images (m, 3, H, W), value (m, 1, 1, 1)) -> images.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdae.data.randomness import RANDAUGMENT, normal, uniform
from sdae.data.transfer import sent

FILL = (124.0, 116.0, 104.0)
Floats = NDArray[np.float64]
Operation = Callable[[Tensor, Tensor], Tensor]
ToValue = Callable[[Floats, Floats, bool], Floats]


def luma(images: Tensor) -> Tensor:
    """Pillow's grey value (m, 1, H, W)."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()


def blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (images - base)).clamp_(0, 255).floor_()


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    scale = 255.0 / (high - low).double()
    stretched = (images * scale - low * scale).clamp(0, 255).floor().float()
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    m, c, height, width = images.shape
    values = images.long().view(m * c, -1)
    counts = torch.zeros(m * c, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    below = counts.cumsum(1) - counts
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (height * width - last) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, values).view(images.shape).to(images.dtype)


def invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - bits)
    return (images / step).floor() * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: Tensor, add: Tensor) -> Tensor:
    return torch.where(images < 128, (images + add).clamp(max=255), images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    return blend((luma(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * images[:, :, 1:-1, 1:-1]
    smooth = images.clone()  # Pillow leaves the border as it is
    smooth[:, :, 1:-1, 1:-1] = (around / 13 + 0.5).floor()
    return blend(smooth, images, factor)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Pictures seen through (m, 6) matrices that lead from the output's pixel centres to the input's; Pillow's bicubic.

    Pixels from outside are `FILL`. (grid_sample's bicubic has another kernel, a = -0.75 instead of -1.)
    """
    m, _, height, width = images.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]
    (x0, wx), (y0, wy) = _taps(x), _taps(y)
    flat, out = images.flatten(2), torch.zeros_like(images)
    for j in range(4):
        row = (y0 + (j - 1)).clamp(0, height - 1) * width
        for i in range(4):
            at = (row + (x0 + (i - 1)).clamp(0, width - 1)).view(m, 1, -1).expand(-1, 3, -1)
            out += flat.gather(2, at).view_as(images) * (wx[i] * wy[j])[:, None]
    fill = sent(torch.tensor(FILL), images.device)[:, None, None]
    return torch.where(inside, out.add_(1e-4).clamp_(0, 255).floor_(), fill)  # 1e-4: a whole number stays itself


def _taps(at: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The second of the four pixels around a coordinate, and their weights."""
    first = (at - 0.5).floor()
    t = at - 0.5 - first
    square, cube = t * t, t * t * t
    return first.long(), [2 * square - cube - t, 1 - 2 * square + cube, t + square - cube, cube - square]


def matrices(name: str, values: Floats, height: int, width: int) -> Floats:
    """The (m, 6) matrices of one geometric operation; values are degrees, shear factors or parts of a side."""
    out = np.tile([1.0, 0, 0, 0, 1, 0], (len(values), 1))
    if name == "Rotate":
        sine, cosine, x, y = np.sin(-np.radians(values)), np.cos(np.radians(values)), width / 2, height / 2
        columns = [cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y]
        return np.stack(columns, 1)
    place, unit = {"ShearX": (1, 1), "ShearY": (3, 1), "TranslateXRel": (2, width), "TranslateYRel": (5, height)}[name]
    out[:, place] = values * unit
    return out


def _enhance(level: Floats, sign: Floats, increasing: bool) -> Floats:
    return np.maximum(0.1, 1 + sign * level * 0.9) if increasing else level * 1.8 + 0.1


def _posterize(level: Floats, sign: Floats, increasing: bool) -> Floats:
    bits = np.floor(level * 4)
    return 4 - bits if increasing else bits


def _solarize(level: Floats, sign: Floats, increasing: bool) -> Floats:
    threshold = np.minimum(256, np.floor(level * 256))
    return 256 - threshold if increasing else threshold


def _signed(most: float) -> ToValue:
    return lambda level, sign, increasing: level * most * sign


def _nothing(level: Floats, sign: Floats, increasing: bool) -> Floats:
    return level


# (name, operation on pixel values, (level in 0..1, random sign, `inc`) -> value), then the same for the geometric ones
PIXELWISE: tuple[tuple[str, Operation, ToValue], ...] = (
    ("AutoContrast", auto_contrast, _nothing),
    ("Equalize", equalize, _nothing),
    ("Invert", invert, _nothing),
    ("Posterize", posterize, _posterize),
    ("Solarize", solarize, _solarize),
    ("SolarizeAdd", solarize_add, lambda level, sign, increasing: np.minimum(128, np.floor(level * 110))),
    ("Color", color, _enhance),
    ("Contrast", contrast, _enhance),
    ("Brightness", brightness, _enhance),
    ("Sharpness", sharpness, _enhance),
)
GEOMETRIC: tuple[tuple[str, ToValue], ...] = (
    ("Rotate", _signed(30)),
    ("ShearX", _signed(0.3)),
    ("ShearY", _signed(0.3)),
    ("TranslateXRel", _signed(0.45)),
    ("TranslateYRel", _signed(0.45)),
)
TO_VALUE = [entry[2] for entry in PIXELWISE] + [entry[1] for entry in GEOMETRIC]


class RandAugment:
    """`rand-m9-mstd0.5-inc1` and its like: n layers (2), each one operation, applied with probability 0.5."""

    def __init__(self, text: str) -> None:
        given = dict(re.findall(r"-([a-z]+)([\d.]+)", text))
        self.layers, self.magnitude = int(given.get("n", 2)), float(given.get("m", 10))
        self.deviation, self.increasing = float(given.get("mstd", 0)), given.get("inc") == "1"

    def draw(self, seed: int, epoch: int, indices: NDArray[np.int64], layer: int) -> tuple[NDArray[np.int64], Floats]:
        """Each picture's operation (-1: none) and value."""
        keys = (seed, RANDAUGMENT, epoch, indices, layer)
        choice = (uniform(*keys, 0) * len(TO_VALUE)).astype(np.int64)
        sign = np.where(uniform(*keys, 1) < 0.5, -1.0, 1.0)
        if self.deviation > 100:  # timm: uniform below the magnitude
            magnitude = self.magnitude * uniform(*keys, 2)
        else:
            magnitude = self.magnitude + self.deviation * normal(*keys, 2)
        level = magnitude.clip(0, 10) / 10
        values = np.zeros(len(indices))
        for k, to_value in enumerate(TO_VALUE):
            values = np.where(choice == k, to_value(level, sign, self.increasing), values)
        return np.where(uniform(*keys, 3) < 0.5, choice, -1), values

    def __call__(self, images: Tensor, seed: int, epoch: int, indices: NDArray[np.int64]) -> Tensor:
        """float32 (b, 3, H, W) in 0..255 -> the same, whole numbers."""
        images = images.round()
        for layer in range(self.layers):
            choice, values = self.draw(seed, epoch, indices, layer)
            order = np.argsort(choice, kind="stable")
            bounds = np.searchsorted(choice[order], np.arange(len(TO_VALUE) + 1))
            there = sent(torch.from_numpy(order), images.device)
            value = sent(torch.from_numpy(values[order].astype(np.float32)), images.device)[:, None, None, None]
            parts = [slice(*pair) for pair in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)]
            for (_, operation, _), part in zip(PIXELWISE, parts, strict=False):
                if part.start < part.stop:
                    images[there[part]] = operation(images[there[part]], value[part])
            if (first := parts[len(PIXELWISE)].start) < len(order):
                moves = [
                    matrices(name, values[order[part]], images.shape[2], images.shape[3])
                    for (name, _), part in zip(GEOMETRIC, parts[len(PIXELWISE) :], strict=True)
                ]
                matrix = sent(torch.from_numpy(np.concatenate(moves).astype(np.float32)), images.device)
                images[there[first:]] = affine(images[there[first:]], matrix)
        return images
