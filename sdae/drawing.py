"""Predictions drawn over photographs: regions, objects, and the names of classes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

IGNORED = 255
GOLDEN = 0.6180339887  # turns of the colour circle between neighbouring classes
LEAST = 240  # pixels of the longer side, about, that a drawing has
LINE = 14  # pixels of a line of text in Pillow's own font

Pixels = NDArray[np.uint8]


def pixels(image: Tensor) -> Pixels:
    """uint8 (3, H, W) as (H, W, 3)."""
    out: Pixels = image.permute(1, 2, 0).contiguous().numpy()
    return out


def enlargement(picture: Pixels) -> int:
    """How often each pixel of a small picture is repeated, so that there is room for a name on it."""
    return max(1, LEAST // int(max(picture.shape[:2])))


def colour(index: int) -> tuple[int, int, int]:
    """The colour of a class: neighbours in number are far apart on the circle, and differ in lightness."""
    red, green, blue = colorsys.hls_to_rgb(index * GOLDEN % 1, (0.45, 0.6, 0.32)[index % 3], 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def regions(picture: Pixels, labels: NDArray[np.int64], classes: Sequence[str], most: int = 12) -> Image.Image:
    """A label map (H, W) laid over its picture (H, W, 3), with the names of the `most` largest classes below."""
    times = enlargement(picture)
    picture = picture.repeat(times, 0).repeat(times, 1)
    labels = labels.repeat(times, 0).repeat(times, 1)
    names, counts = np.unique(labels[labels != IGNORED], return_counts=True)
    paint = picture.copy()
    for name in names:
        paint[labels == name] = colour(int(name))
    mixed = Image.fromarray((0.4 * picture + 0.6 * paint).astype(np.uint8))
    largest = names[np.argsort(-counts, kind="stable")][:most]
    total = max(1, int(counts.sum()))
    share = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return captioned(
        mixed, [(colour(int(n)), f"{classes[int(n)]} {100 * share[int(n)] / total:.0f} %") for n in largest]
    )


def objects(
    picture: Pixels,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    scores: NDArray[np.float32] | None = None,
    masks: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """Objects over their picture (H, W, 3): boxes (n, 4) as x0 y0 x1 y1, labels (n,) of `classes`, masks (n, H, W)."""
    times = enlargement(picture)
    paint, boxes = picture.repeat(times, 0).repeat(times, 1).astype(np.float32), boxes * times
    if masks is not None:
        masks = masks.repeat(times, 1).repeat(times, 2)
    for n in reversed(range(len(boxes))):  # the surest, first, lies on top
        if masks is not None:
            paint[masks[n]] = 0.5 * paint[masks[n]] + 0.5 * np.array(colour(n))
    image = Image.fromarray(paint.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for n in reversed(range(len(boxes))):
        x0, y0, x1, y1 = (float(v) for v in boxes[n])
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour(n), width=2)
        text = classes[int(labels[n])] + ("" if scores is None else f" {scores[n]:.2f}")
        place = (x0 + 2, max(0.0, y0 - LINE))
        draw.rectangle(draw.textbbox(place, text), fill=(0, 0, 0))
        draw.text(place, text, fill=(255, 255, 255))
    return image


def captioned(image: Image.Image, lines: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    """The image with a legend below it: a colour and a text on each line, in as many columns as fit."""
    if not lines:
        return image
    columns = max(1, image.width // 170)
    rows = -(-len(lines) // columns)
    out = Image.new("RGB", (max(image.width, 170), image.height + rows * LINE + 4), (255, 255, 255))
    out.paste(image)
    draw = ImageDraw.Draw(out)
    for n, (fill, text) in enumerate(lines):
        x, y = 4 + n % columns * (out.width // columns), image.height + 2 + n // columns * LINE
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=fill)
        draw.text((x + 15, y), text, fill=(0, 0, 0))
    return out


def beside(left: Image.Image, right: Image.Image, most: int = 320) -> Image.Image:
    """Two images side by side, each at most `most` pixels wide."""
    images = [fitted(image, most) for image in (left, right)]
    out = Image.new("RGB", (sum(i.width for i in images) + 4, max(i.height for i in images)), (255, 255, 255))
    out.paste(images[0])
    out.paste(images[1], (images[0].width + 4, 0))
    return out


def fitted(image: Image.Image, most: int) -> Image.Image:
    if image.width <= most:
        return image
    return image.resize((most, max(1, round(image.height * most / image.width))))
