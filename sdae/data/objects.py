"""Pictures with objects (boxes, classes, masks): COCO's json files, or the built-in pictures.

A folder is laid out as COCO's: PATH/train2017, PATH/val2017, PATH/annotations/instances_{train,val}2017.json. Objects
with a box thinner than a pixel, or without a mask, are left out of training and counted; so are crowds and pictures in
which nothing is left. The test takes every picture and every object as the json has them. Nothing here imports torch
before a picture is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdae.data import builtin
from sdae.data.coco import THINNEST, Annotations, parsed
from sdae.data.fingerprint import Listing, asked, cache_folder, folder_of
from sdae.data.randomness import OBJECTS, uniform
from sdae.errors import UserError
from sdae.files import read_record, write_atomically
from sdae.sections import DetectData

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "val"]
Size = tuple[int, int]  # height, width
Shape = NDArray[np.bool_] | list[NDArray[np.float64]]
BUILTIN_PICTURES = {"train": 2048, "val": 512}
CACHED = {"classes": list, "train": int, "val": int}  # what is kept of COCO's json


class Scene(NamedTuple):
    """The objects of one picture, in its own pixels: boxes float64 (n, 4) x0 y0 x1 y1, labels int64 (n,) from 1.

    shapes: for each a bool mask (H, W), or its polygons, each x y x y ...
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    shapes: list[Shape]
    image_id: int
    size: Size


def expected(path: Path | str) -> str:
    return f"{path}/train2017, {path}/val2017 and {path}/annotations/instances_{{train,val}}2017.json"


def _root(data: DetectData) -> Path:
    if data.path is None:
        raise UserError(f"data.path: {data.name} needs a folder with {expected('PATH')}")
    root = folder_of(data)  # type: ignore[arg-type]
    for part in (root, *(root / f"{split}2017" for split in BUILTIN_PICTURES)):
        if not part.is_dir():
            raise UserError(f"data.path: {part}: no such folder (expected {expected(root)})")
    return root


def _annotations(data: DetectData, split: Split) -> Annotations:
    file = _root(data) / "annotations" / f"instances_{split}2017.json"
    return parsed(str(file), _stamp(file), data.on_error == "skip")


def _stamp(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError as error:
        raise UserError(f"data.path: {file}: cannot be read: {error.strerror}") from None
    return about.st_mtime_ns, about.st_size


def listing_of(data: DetectData) -> Listing:
    """Classes in label order; how many pictures are trained on and tested. Raises `UserError`.

    COCO's json takes half a minute, so what was found is kept in the user's cache folder, with the files' mtimes.
    """
    if data.name == "builtin":
        if (data.classes or 10) > builtin.MAX_CLASSES:
            raise UserError(f"data.classes: builtin has {builtin.MAX_CLASSES} classes, {data.classes} were asked for")
        train, val = data.train_pictures or BUILTIN_PICTURES["train"], data.val_pictures or BUILTIN_PICTURES["val"]
        return Listing(builtin.class_names(data.classes or 10), {"train": (train,), "val": (val,)})
    root = _root(data)
    files = [root / "annotations" / f"instances_{split}2017.json" for split in BUILTIN_PICTURES]
    key = [[str(f), *_stamp(f)] for f in files] + [data.classes, data.on_error]
    cached = cache_folder() / "objects" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    found = None
    with contextlib.suppress(OSError):
        found = read_record(cached)
    if found is None or {key: type(value) for key, value in found.items()} != CACHED:
        found = _found(data)
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written is no cache
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, json.dumps(found))
    return Listing(tuple(found["classes"]), {split: (n,) for split, n in asked(data, found).items()})


def _found(data: DetectData) -> dict[str, Any]:
    train, val = _annotations(data, "train"), _annotations(data, "val")
    if train.classes != val.classes:
        raise UserError(f"data.path: {data.path}: the categories of train and val differ")
    if data.classes is not None and data.classes > len(train.classes):
        raise UserError(f"data.classes: {data.classes} were asked for, {data.name} has {len(train.classes)}")
    classes = train.classes[: data.classes]
    if not (~val.crowd & (val.label < len(classes))).any():
        raise UserError(f"data.path: {data.path}: no object to test on in instances_val2017.json")
    n = len(_with_objects(train, train.usable(len(classes))[0]))
    if n == 0:
        raise UserError(f"data.path: {data.path}: no object to train on in instances_train2017.json")
    return {"classes": classes, "train": n, "val": len(val.image_ids)}


def _with_objects(found: Annotations, usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    before = np.concatenate([[0], np.cumsum(usable)])
    return np.flatnonzero(before[found.first[1:]] > before[found.first[:-1]])


def open_objects(data: DetectData, split: Split, seed: int) -> ObjectSet:
    """The pictures of one split with their objects; `seed`: of the training augmentation. Raises `UserError`."""
    found = listing_of(data)
    kind = BuiltinObjects if data.name == "builtin" else JsonObjects
    return kind(data, split, seed, list(found.classes), found.counts[split][0])


class ObjectSet:
    """A `sdae.data.dense.DenseSet`. `left_out`: how many objects are not trained on, or, being broken, nowhere used."""

    left_out = 0

    def __init__(self, data: DetectData, split: Split, seed: int, classes: list[str], pictures: int) -> None:
        self.data, self.split, self.seed, self.classes, self.pictures = data, split, seed, classes, pictures

    def __len__(self) -> int:
        return self.pictures

    def path_of(self, i: int) -> str:
        raise NotImplementedError

    def read(self, i: int) -> tuple[Tensor, Scene]:
        """uint8 (3, H, W) and its objects. Raises `UnreadableError`."""
        raise NotImplementedError

    def ground_truth(self) -> dict[str, Any]:
        """The split as COCO's json, with this set's labels as category ids: what detections are scored against."""
        raise NotImplementedError

    def cut(self, image: Tensor, scene: Scene, epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """DETR's augmentation: float32 (3, h, w), and what is still to be seen of the objects (`seen`).

        A crop is taken from the original, so that pixels are resampled once.
        """
        augment, height, width = self.data.augment, *image.shape[1:]
        draw = uniform(self.seed, OBJECTS, epoch, index, np.arange(8)).tolist()
        top, left, bottom, right = 0, 0, height, width
        if augment.crop and draw[0] < 0.5:
            resized = fitted((height, width), pick(augment.crop_sides, draw[1]), self.data.longest)
            top, bottom = crop(height, resized[0], augment.crop, draw[2], draw[3])
            left, right = crop(width, resized[1], augment.crop, draw[4], draw[5])
        size = fitted((bottom - top, right - left), pick(augment.sides, draw[6]), self.data.longest)
        flip = augment.flip and draw[7] < 0.5
        picture = resize(image[:, top:bottom, left:right], size)
        return picture.flip(2) if flip else picture, seen(scene, (top, left, bottom, right), size, flip)

    def whole(self, image: Tensor, scene: Scene) -> tuple[Tensor, dict[str, Any]]:
        """The picture at the size it is tested at, and which one it is: `image_id`, its own `size`."""
        size = fitted((image.shape[1], image.shape[2]), self.data.image_size, self.data.longest)
        return resize(image, size), {"image_id": scene.image_id, "size": scene.size}


class JsonObjects(ObjectSet):
    def __init__(self, data: DetectData, split: Split, seed: int, classes: list[str], pictures: int) -> None:
        super().__init__(data, split, seed, classes, pictures)
        self.found, self.folder = _annotations(data, split), str(_root(data) / f"{split}2017")
        self.usable, thin = self.found.usable(len(classes))
        self.left_out = self.found.broken + (thin if split == "train" else 0)
        every = _with_objects(self.found, self.usable) if split == "train" else np.arange(len(self.found.image_ids))
        self.places = every[:pictures]

    def path_of(self, i: int) -> str:
        return f"{self.folder}/{self.found.files[self.places[i]].decode()}"

    def read(self, i: int) -> tuple[Tensor, Scene]:
        from sdae.data.datasets import UnreadableError, read

        image, place = read(self.path_of(i)), self.places[i]
        size = int(self.found.sizes[place, 0]), int(self.found.sizes[place, 1])
        if tuple(image.shape[1:]) != size:
            there, said = (f"{w} x {h} pixels" for h, w in (image.shape[1:], size))
            raise UnreadableError(f"{self.path_of(i)}: has {there}, its json says {said}")
        rows = np.arange(self.found.first[place], self.found.first[place + 1])
        rows = rows[self.usable[rows]]
        box, labels = self.found.box[rows], self.found.label[rows].astype(np.int64) + 1
        corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)
        shapes = [self._shape(row, size) for row in rows.tolist()]
        return image, Scene(corners, labels, shapes, int(self.found.image_ids[place]), size)

    def _shape(self, row: int, size: Size) -> Shape:
        outlines = self.found.outlines(row)
        return bitmap(outlines[0], size) if self.found.rle[row] else outlines

    def ground_truth(self) -> dict[str, Any]:
        found = self.found
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for place in self.places:
            identity, (height, width) = int(found.image_ids[place]), found.sizes[place].tolist()
            images.append({"id": identity, "height": height, "width": width})
            for row in range(found.first[place], found.first[place + 1]):
                outlines = [outline.tolist() for outline in found.outlines(row)]
                if not outlines or found.label[row] >= len(self.classes):
                    continue
                run_lengths = {"size": [height, width], "counts": [int(n) for n in outlines[0]]}
                annotations.append({
                    "id": len(annotations) + 1, "image_id": identity, "category_id": int(found.label[row]) + 1,
                    "bbox": found.box[row].tolist(), "area": float(found.area[row]), "iscrowd": int(found.crowd[row]),
                    "segmentation": run_lengths if found.rle[row] else outlines,
                })  # fmt: skip
        return {"images": images, "annotations": annotations, "categories": _categories(self.classes)}


class BuiltinObjects(ObjectSet):
    def path_of(self, i: int) -> str:
        return f"builtin/{self.split}/{i}"

    def _drawn(self, i: int) -> builtin.Pictures:
        return builtin.render([i], self.split, self.data.image_size, len(self.classes))

    def read(self, i: int) -> tuple[Tensor, Scene]:
        import torch

        drawn, size = self._drawn(i), (self.data.image_size, self.data.image_size)
        seen = drawn.instances[0]
        scene = Scene(seen.boxes.astype(np.float64), seen.labels + 1, list(seen.masks), i, size)
        return torch.from_numpy(drawn.images[0]), scene

    def ground_truth(self) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(len(self)):
            images.append({"id": i, "height": self.data.image_size, "width": self.data.image_size})
            seen = self._drawn(i).instances[0]
            for mask, (x0, y0, x1, y1), label in zip(seen.masks, seen.boxes.tolist(), seen.labels, strict=True):
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": int(label) + 1, "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(mask.sum()), "segmentation": encoded(mask),
                })  # fmt: skip
        return {"images": images, "annotations": annotations, "categories": _categories(self.classes)}


def _categories(classes: list[str]) -> list[dict[str, Any]]:
    return [{"id": label, "name": name} for label, name in enumerate(classes, 1)]


# Geometry


def pick(choices: tuple[int, ...], draw: float) -> int:
    return choices[int(draw * len(choices))]


def fitted(size: Size, side: int, longest: int) -> Size:
    """Height and width with the shorter one at `side`, or less where the longer one would be above `longest`."""
    scale = min(side / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def crop(original: int, resized: int, bounds: tuple[int, int], side: float, place: float) -> tuple[int, int]:
    """From where to where, in the original's pixels, a random part of the resized picture, `bounds` long, reaches."""
    least, most = (min(bound, resized) for bound in bounds)
    length = least + int(side * (most - least + 1))
    start = int(place * (resized - length + 1))
    begin = min(round(start * original / resized), original - 1)
    return begin, max(begin + 1, round((start + length) * original / resized))


def resize(image: Tensor, size: Size) -> Tensor:
    """uint8 (3, H, W) -> float32 (3, h, w) in 0..255."""
    from torchvision.transforms.v2 import functional as F

    return F.resize(image, list(size), F.InterpolationMode.BILINEAR, antialias=True).float()  # type: ignore[no-any-return]


def seen(scene: Scene, window: tuple[int, int, int, int], size: Size, flip: bool) -> dict[str, Tensor]:
    """The objects of a window (top, left, bottom, right) that is resized to `size` and perhaps flipped.

    boxes float32 (n, 4) x0 y0 x1 y1, labels int64 (n,), masks bool (n, h, w). Those of which less than a pixel is left
    are dropped.
    """
    import torch

    top, left, bottom, right = window
    height, width = size
    scale = np.array([width / (right - left), height / (bottom - top)])
    sign, offset = (np.array([-1.0, 1.0]), np.array([width, 0.0])) if flip else (np.ones(2), np.zeros(2))

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = (points.reshape(-1, 2) - (left, top)) * scale * sign + offset
        return out.reshape(points.shape)

    boxes = moved(scene.boxes)
    if flip:
        boxes = boxes[:, [2, 1, 0, 3]]
    boxes = np.clip(boxes, 0, (width, height, width, height))
    kept, masks = [], []
    for i in np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= THINNEST).all(1)):
        shape = scene.shapes[i]
        if isinstance(shape, list):
            mask = filled([moved(polygon) for polygon in shape], size)
        else:
            part = shape[top:bottom, left:right]
            mask = _resized(part[:, ::-1] if flip else part, size)
        if mask.any():
            kept.append(i)
            masks.append(mask)
    return {
        "boxes": torch.from_numpy(boxes[kept].astype(np.float32)), "labels": torch.from_numpy(scene.labels[kept]),
        "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), bool)),
    }  # fmt: skip


def filled(polygons: list[NDArray[np.float64]], size: Size) -> NDArray[np.bool_]:
    """The union of polygons as a mask, by COCO's rule for the pixels at the edge."""
    from faster_coco_eval import mask

    runs = mask.frPyObjects([polygon.tolist() for polygon in polygons], *size)
    out: NDArray[np.bool_] = np.asarray(mask.decode(mask.merge(runs))).astype(bool)
    return out


def encoded(pixels: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run lengths."""
    from faster_coco_eval import mask

    runs: dict[str, Any] = mask.encode(np.asfortranarray(pixels, np.uint8))
    return runs


def bitmap(runs: NDArray[np.float64], size: Size) -> NDArray[np.bool_]:
    """Run lengths, column by column, of zeros and ones in turns."""
    ones = (np.arange(len(runs)) % 2).astype(bool)
    return np.repeat(ones, runs.astype(np.int64)).reshape(size[1], size[0]).T


def _resized(pixels: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    import torch
    from torch.nn import functional as F

    there = torch.from_numpy(np.ascontiguousarray(pixels, np.float32))[None, None]
    out: NDArray[np.bool_] = (F.interpolate(there, size, mode="bilinear", antialias=True)[0, 0] >= 0.5).numpy()
    return out
