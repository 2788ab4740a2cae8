"""The built-in dataset: textured, overlapping shapes upon textured ground, drawn from (split, index) alone.

The class is the pair (texture, shape) of the object in front, which is also the largest one. Hues, contrast, ground and
smaller objects behind are random, so that colour tells nothing and neither texture nor shape alone tells the class.
Neighbouring classes differ in both (4 and 5 have no common factor), so that a network can learn them by halves. Integer
arithmetic and integer tables only, with randomness from splitmix64: the same bytes on every machine. A change of the
pictures needs a new `VERSION`, which enters the fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdae.data.randomness import BUILTIN, hashed

VERSION = 1
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("stripes", "checks", "dots", "zigzag")
MAX_CLASSES = len(SHAPES) * len(TEXTURES)
OBJECTS = 4  # at most three behind, one in front
UNIT = 4096  # fixed-point length of a picture's side
LATTICE = 5  # knots of the slow light field
CHUNK = 64  # pictures drawn at once: the working set stays in the processor's cache

# sin(k pi / 32) x 4096
_QUARTER = (0, 401, 799, 1189, 1567, 1931, 2276, 2598, 2896, 3166, 3406, 3612, 3784, 3920, 4017, 4076, 4096)
_HALF = _QUARTER + _QUARTER[-2:0:-1]
SINE = np.array(_HALF + tuple(-x for x in _HALF), np.int32)  # 64 angles

Ints = Any  # NDArray[np.int32]: numpy's stubs lose the width of such expressions


@dataclass(frozen=True)
class Instances:
    """A picture's visible objects, back to front: bool masks (k, s, s), boxes (k, 4) x0 y0 x1 y1, labels (k,)."""

    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """uint8 images (n, 3, s, s), int64 labels (n,) and, where asked for, the instances of each picture."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    instances: list[Instances] = field(default_factory=list)


def class_names(classes: int) -> tuple[str, ...]:
    """A texture and a shape for each class."""
    return tuple(f"{TEXTURES[k % len(TEXTURES)]}-{SHAPES[k % len(SHAPES)]}" for k in range(classes))


def render(indices: Sequence[int], split: str, size: int, classes: int = 10, *, instances: bool = True) -> Pictures:
    """Draws pictures `indices` of `split` ("train" | "val") at `size` pixels."""
    every = np.asarray(indices, np.int64)
    labels = every % classes  # classes take turns, so that the first n pictures are balanced for every n
    out = Pictures(np.empty((len(every), 3, size, size), np.uint8), labels)
    for start in range(0, len(every), CHUNK):
        part = slice(start, start + CHUNK)
        scene = _draw(every[part], labels[part], split, classes)
        image, masks = _paint(scene, size)
        out.images[part] = image
        if instances:
            out.instances.extend(_visible(masks[:, i], scene["label"][:, i]) for i in range(len(image)))
    return out


def _draw(indices: NDArray[np.int64], labels: NDArray[np.int64], split: str, classes: int) -> dict[str, Any]:
    """The scenes' numbers: arrays (OBJECTS + 1, n), the last row being the ground, or (OBJECTS, n)."""
    counter = 0
    keys = hashed(BUILTIN, VERSION, {"train": 0, "val": 1}[split], indices)

    def ints(low: Any, high: Any, *shape: int) -> Ints:
        """Integers in [low, high), shape (*shape, n)."""
        nonlocal counter
        size = int(np.prod(shape, dtype=int))
        bits = hashed(keys, np.arange(counter, counter + size)[:, None]).reshape(*shape, len(indices))
        counter += size
        span = np.asarray(high - low).astype(np.uint64)
        return (low + ((bits >> np.uint64(32)) * span >> np.uint64(32)).astype(np.int64)).astype(np.int32)

    rows = OBJECTS + 1
    label = ints(0, classes, OBJECTS)
    label[-1] = labels
    texture = np.concatenate([label % len(TEXTURES), ints(0, len(TEXTURES), 1)])
    radius = ints(320, 680, OBJECTS)
    radius[-1] = ints(1150, 1750)
    place = ints(0, UNIT, 2, OBJECTS)
    place[:, -1] = UNIT // 2 + ints(-700, 701, 2)
    angle = ints(0, 64, rows)
    angle[-2] = ints(-6, 7) & 63  # the object in front stands about upright
    first = ints(160, 252, 3, rows)  # objects are light with dark marks, the ground is dark and calm: any hue
    step = -ints(60, 130, 3, rows)
    first[:, -1], step[:, -1] = ints(8, 120, 3), ints(-32, 33, 3)
    return {
        "label": label,
        "shape": label % len(SHAPES),
        "texture": texture,
        "radius": radius,
        "there": np.concatenate([ints(0, 2, OBJECTS - 1) > 0, np.ones((1, len(indices)), bool)]),
        "place": np.concatenate([place, np.full((2, 1, len(indices)), UNIT // 2, np.int32)], axis=1),
        "angle": angle,
        "stretch": ints(205, 320, OBJECTS),
        "period": ints(640, 1100, rows),
        "phase": ints(0, 1024, 2, rows),
        "first": first,
        "step": step,
        "light": ints(-32, 33, 3, LATTICE, LATTICE),
        "contrast": ints(36, 64),
        "brightness": ints(-36, 37),
        "noise": keys,
    }


def _paint(scene: dict[str, Any], size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Images (n, 3, s, s) and the objects' silhouettes (OBJECTS, n, s, s), hidden parts included."""
    n = scene["angle"].shape[1]
    pixel = UNIT // size
    grid = ((2 * np.arange(size) + 1) * UNIT // (2 * size)).astype(np.int32)
    dx, dy = grid - wide(scene["place"][0]), grid[:, None] - wide(scene["place"][1])
    sine, cosine = wide(SINE[scene["angle"]]), wide(SINE[(scene["angle"] + 16) & 63])
    u, v = (dx * cosine + dy * sine) >> 12, (dy * cosine - dx * sine) >> 12

    rate = (1 << 20) // scene["period"]
    sharp = (256 * 32) // np.maximum(pixel * rate >> 10, 1)
    paint = np.empty(u.shape, np.int16)
    for kind in range(len(TEXTURES)):
        at = scene["texture"] == kind
        t = ((u[at] * wide(rate[at])) >> 10) + wide(scene["phase"][0][at])
        w = ((v[at] * wide(rate[at])) >> 10) + wide(scene["phase"][1][at])
        paint[at] = _texture(kind, t, w, wide(sharp[at]))

    rate = (1 << 18) // scene["radius"]
    sharp = (256 * 64) // np.maximum(pixel * rate >> 10, 1)
    cover = np.empty(u[:-1].shape, np.int16)
    for kind in range(len(SHAPES)):
        at = scene["shape"] == kind
        t = (u[:-1][at] * wide(rate[at])) >> 10
        w = (((v[:-1][at] * wide(rate[at])) >> 10) * wide(scene["stretch"][at])) >> 8
        cover[at] = np.clip(32 + (_inside(kind, t, w) * wide(sharp[at]) >> 8), 0, 64)
    cover *= wide(scene["there"]).astype(np.int16)

    first, step = (wide(scene[k].astype(np.int16)) for k in ("first", "step"))
    image = np.empty((n, 3, size, size), np.int16)
    for c in range(3):
        layer = image[:, c]
        layer[:] = first[c, -1] + (step[c, -1] * paint[-1] >> 6)
        for k in range(OBJECTS):
            layer += (first[c, k] + (step[c, k] * paint[k] >> 6) - layer) * cover[k] >> 6
    image -= 128
    image *= wide(scene["contrast"].astype(np.int16))[:, None]
    image >>= 6
    image += wide((128 + scene["brightness"]).astype(np.int16))[:, None]
    image += _light(scene["light"], size)
    image += _noise(scene["noise"], size)
    return np.clip(image, 0, 255).astype(np.uint8), cover >= 32


def wide(x: Any) -> Any:
    """Room for the two axes of a picture."""
    return x[..., None, None]


def _texture(kind: int, t: Ints, w: Ints, sharp: Ints) -> Ints:
    """Mixing weight 0..64 of the second colour; one period is 1024, the edges are one pixel soft."""

    def wave(x: Ints) -> Ints:
        return np.abs(2 * (x & 1023) - 1024) - 512  # triangle wave, -512..512

    if kind == 0:
        edge = wave(t)
    elif kind == 1:
        one, other = wave(t), wave(w)
        edge = np.where(one > 0, 1, -1) * np.where(other > 0, 1, -1) * np.minimum(np.abs(one), np.abs(other))
    elif kind == 2:
        one, other = (t & 1023) - 512, (w & 1023) - 512
        edge = (360 * 360 - one * one - other * other) // 360
    else:
        edge = wave(t + (np.abs((w & 1023) - 512) << 1))
    return np.clip(32 + (edge * sharp >> 8), 0, 64)


def _inside(kind: int, t: Ints, w: Ints) -> Ints:
    """Distance to the outline, positive inside; the radius is 256."""
    a, b = np.abs(t), np.abs(w)
    if kind == 0:
        return (256 * 256 - t * t - w * w) >> 9
    if kind == 1:
        return 215 - np.maximum(a, b)
    if kind == 2:
        return 150 - np.maximum(w, (222 * a - 128 * w) >> 8)
    if kind == 3:
        square = t * t + w * w
        return np.minimum((256 * 256 - square) >> 9, (square - 128 * 128) >> 8)
    return np.minimum(256 - np.maximum(a, b), 88 - np.minimum(a, b))


def _light(knots: Ints, size: int) -> NDArray[np.int16]:
    """Slow light field (n, 3, s, s), -32..32: knots (3, L, L, n) interpolated linearly with weights of 1/16.

    The products are whole numbers below 2^24, so the float32 matmul is exact in whatever order it adds.
    """
    place = (2 * np.arange(size) + 1) * (LATTICE - 1) * 16 // (2 * size)
    weights = np.clip(16 - np.abs(place[:, None] - 16 * np.arange(LATTICE)), 0, 16).astype(np.float32)
    light: Ints = weights @ knots.transpose(3, 0, 1, 2).astype(np.float32) @ weights.T
    out: NDArray[np.int16] = (light.astype(np.int32) >> 8).astype(np.int16)
    return out


def _noise(keys: NDArray[np.uint64], size: int) -> NDArray[np.int16]:
    """Pixel noise (n, 3, s, s), -8..7: one byte of hash for each value."""
    words = -(-3 * size * size // 8)
    bytes_ = hashed(keys[:, None], 1 << 32, np.arange(words)).astype("<u8").view(np.uint8)
    values: NDArray[np.int16] = (bytes_[:, : 3 * size * size] >> 4).astype(np.int16) - 8
    return values.reshape(-1, 3, size, size)


def _visible(masks: NDArray[np.bool_], labels: Ints) -> Instances:
    """Of masks (OBJECTS, s, s), back to front, what nothing lies upon; objects hidden wholly are left out."""
    upon = np.zeros(masks.shape[1:], bool)
    seen: list[NDArray[np.bool_]] = []
    for mask in masks[::-1]:
        seen.append(mask & ~upon)
        upon |= mask
    kept = [(m, int(y)) for m, y in zip(seen[::-1], labels, strict=True) if m.any()]
    boxes = []
    for mask, _ in kept:
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        boxes.append((x[0], y[0], x[-1] + 1, y[-1] + 1))
    found = np.array([y for _, y in kept], np.int64)
    return Instances(np.stack([m for m, _ in kept]), np.array(boxes, np.int64), found)
