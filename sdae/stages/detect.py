"""Object detection with Mask R-CNN (paper section 3.3, Table 4): AP of boxes and masks by COCO's rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdae import drawing
from sdae.config import Detect
from sdae.data.dense import DenseBatch, colours
from sdae.data.loader import statistics
from sdae.data.objects import ObjectSet, Size, encoded, fitted, open_objects, resize, seen
from sdae.data.transfer import sent
from sdae.errors import UserError
from sdae.models.maskrcnn import PARTS, MaskRCNN
from sdae.stages import dense
from sdae.stages.session import SAMPLE, Session, seed_of
from sdae.store import RunFolder
from sdae.training.loop import autocast

SURE = 0.3  # the least score of what a run's own pictures show
Found = dict[str, NDArray[Any]]
KINDS = {"bbox": "apb", "segm": "apm"}
THRESHOLDS = {"0.5": slice(0, 1), "0.75": slice(5, 6), "mean": slice(None)}  # of COCO's ten, 0.5 to 0.95


def run(config: Detect, session: Session) -> dict[str, Any]:
    """Trains to the last step and tests every validation picture once: AP in percent, apb of boxes, apm of masks.

    `evaluation.json` in the run's folder holds AP class by class, precision at 101 recalls, and how many objects were
    left out (degenerate ones in training, broken ones everywhere), which `skipped` tells too.
    """
    if (config.model.patch_size or 16) % 4:
        raise UserError(f"model.patch_size: {config.model.patch_size} is not a multiple of 4 (maps start at a quarter)")
    sets = open_objects(config.data, "train", config.seed), open_objects(config.data, "val", config.seed)
    eager = config.efficiency.model_copy(update={"compile": False})  # every batch has its own shapes
    config = config.model_copy(update={"efficiency": eager})
    task = partial(DetectTask, left_out={"train": sets[0].left_out, "val": sets[1].left_out})
    return dense.run(config, session, sets, partial(network, config), task)  # type: ignore[arg-type]


def network(config: Detect, classes: int) -> MaskRCNN:
    return MaskRCNN(
        config.model, config.data.image_size, config.backbone, config.head, config.test, classes,
        config.efficiency.checkpointing,
    )  # fmt: skip


class DetectTask(dense.DenseTask):
    config: Detect
    module: MaskRCNN
    val_set: ObjectSet

    def __init__(
        self, config: Detect, session: Session, module: MaskRCNN, val_set: ObjectSet, left_out: dict[str, int]
    ):
        super().__init__(config, session, module, val_set)  # type: ignore[arg-type]
        self.left_out = left_out
        said = {split: f"{split}: {n} objects without a usable box or mask" for split, n in left_out.items() if n}
        self.skipped.update({-1 - k: line for k, line in enumerate(said.values())})

    def inputs(self, batch: DenseBatch, step: int, first: int, total: int) -> tuple[Any, ...]:
        """Pictures, their sizes, targets, stochastic depth and a key to sample from for each picture."""
        images, count = self.filled(batch.images), len(batch.images)
        targets = [{k: sent(t, self.device) for k, t in answer.items()} for answer in batch.answers]
        keys = [seed_of(self.config.seed, SAMPLE, step, first + i) for i in range(count)]
        return images, batch.sizes, targets, self.drop(step, first, count, total), keys

    def filled(self, images: Tensor) -> Tensor:
        """Pictures filled up to the largest of all ranks: positions are interpolated to the filled grid."""
        world = self.session.world
        if world.size == 1:
            return images
        height, width = (-world.least(-torch.tensor(images.shape[2:], device=images.device))).tolist()
        return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))

    def watch(self, output: Any) -> dict[str, float]:
        parts = self.session.world.sum(output[1].clone()) / self.session.world.size
        return {f"loss_{name}": float(part) for name, part in zip(PARTS, parts, strict=True)}

    def evaluate(self) -> dict[str, float]:
        self.module.eval()
        world = self.session.world
        detections: list[dict[str, Any]] = []
        pictures = self.loader(self.val_set, 0, False, world.size)  # one a rank: what is beside it cannot matter
        for batch in pictures.epoch(0):
            (answer,) = batch.answers
            found = detected(self.module, self.config, batch.images, batch.sizes[0], answer["size"])
            detections += as_results(found, answer["image_id"], answer["size"])
        # In an order that does not depend on the number of ranks
        every = sorted(world.together(detections), key=lambda one: int(one["image_id"]))
        scores, record = world.told(score(self.val_set.ground_truth(), every) if world.first else ({}, {}))
        if world.first:
            record = {"classes": self.val_set.classes, **record, "left_out": self.left_out}
            self.session.folder.write("evaluation.json", record)
        return scores

    def picture(self, i: int) -> tuple[Image.Image, Image.Image]:
        image, scene = self.val_set.read(i)
        size, names = (image.shape[1], image.shape[2]), self.val_set.classes
        truth = {name: t.numpy() for name, t in seen(scene, (0, 0, *size), size, False).items()}
        truth["labels"] = truth["labels"] - 1
        return drawn(image, truth, names), drawn(image, surest(predict(self.module, self.config, image), SURE), names)


@torch.no_grad()
def detected(module: MaskRCNN, config: Detect, images: Tensor, size: Size, original: Size) -> Found:
    """The objects of one normalized picture (1, C, H, W) of `size` without filling, in pixels of its `original` size:

    boxes float32 (n, 4) x0 y0 x1 y1, labels int64 (n,) from 0, scores (n,) falling, cells (n, 28, 28): each mask's
    probabilities over its box.
    """
    with autocast(config.precision, images.device):
        found = {k: v.cpu() for k, v in module.detect(images, [size])[0].items()}
    scale = torch.tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
    boxes = (found["boxes"] * scale).numpy()
    return {
        "boxes": boxes, "labels": found["labels"].numpy() - 1, "scores": found["scores"].numpy(),
        "cells": found["masks"][:, 0].numpy(),
    }  # fmt: skip


def pasted(cells: NDArray[np.float32], box: NDArray[np.float32], size: Size) -> NDArray[np.bool_]:
    """A mask of `size`: the probabilities (28, 28) over a box, interpolated at each pixel's centre, above a half."""
    x0, y0, x1, y1 = (float(v) for v in box)
    left, top = max(0, int(x0)), max(0, int(y0))
    right, bottom = min(size[1], int(np.ceil(x1))), min(size[0], int(np.ceil(y1)))
    out = np.zeros(size, bool)
    if right <= left or bottom <= top:
        return out
    x = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    there = F.grid_sample(torch.from_numpy(cells)[None, None], grid[None], align_corners=False)
    out[top:bottom, left:right] = (there[0, 0] > 0.5).numpy()
    return out


def as_results(found: Found, image_id: int, size: Size) -> list[dict[str, Any]]:
    """Detections as COCO's results, boxes as x y w h, masks as run lengths; labels from 1."""
    results = []
    for box, label, chance, cells in zip(*(found[k] for k in ("boxes", "labels", "scores", "cells")), strict=True):
        x0, y0, x1, y1 = (float(v) for v in box)
        results.append({
            "image_id": image_id, "category_id": int(label) + 1, "score": float(chance),
            "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": encoded(pasted(cells, box, size)),
        })  # fmt: skip
    return results


def score(truth: dict[str, Any], detections: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """COCO's metrics in percent, and what `evaluation.json` holds of them, for a json and results on it.

    A class, or a range of sizes, of which there is no object has no AP: null, or absent.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    scores: dict[str, float] = {}
    record: dict[str, Any] = {"precision": {}}
    for kind, name in KINDS.items():
        coco = COCO(truth)
        without = "segmentation" if kind == "bbox" else "bbox"  # what is absent COCO derives, the area too
        results = [{k: v for k, v in one.items() if k != without} for one in detections]
        evaluation = COCOeval_faster(coco, coco.loadRes(results), kind)  # type: ignore[arg-type]
        evaluation.run()
        ranges = ("", "50", "75", "_small", "_medium", "_large")
        values = dict(zip(ranges, (100 * float(v) for v in evaluation.stats[:6]), strict=True))
        scores |= {name + part: value for part, value in values.items() if value >= 0}
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (thresholds, recalls, classes)
        there = precision[0, 0] > -1
        classes = 100 * precision.mean((0, 1))
        record["ap_box" if kind == "bbox" else "ap_mask"] = [
            float(ap) if some else None for ap, some in zip(classes, there, strict=True)
        ]
        record["precision"][kind] = {
            threshold: precision[part][:, :, there].mean((0, 2)).tolist() for threshold, part in THRESHOLDS.items()
        }
    return scores, record


def predict(module: MaskRCNN, config: Detect, image: Tensor) -> Found:
    """The objects of a picture, uint8 (3, H, W): boxes float32 (n, 4) x0 y0 x1 y1, labels (n,) from 0, scores (n,)

    falling, masks bool (n, H, W).
    """
    module.eval()
    original = image.shape[1], image.shape[2]
    size = fitted(original, config.data.image_size, config.data.longest)
    mean, std = (255 * t for t in statistics(config.model.channels))
    picture = (colours(resize(image, size), config.model.channels) - mean) / std
    multiple = 2 * (config.model.patch_size or 16)
    filled = F.pad(picture, (0, -size[1] % multiple, 0, -size[0] % multiple))[None]
    found = detected(module, config, filled.to(next(module.parameters()).device), size, original)
    cells = found.pop("cells")
    masks = [pasted(c, box, original) for c, box in zip(cells, found["boxes"], strict=True)]
    return {**found, "masks": np.stack(masks) if masks else np.zeros((0, *original), bool)}


def surest(found: Found, least: float) -> Found:
    """The objects of at least this score."""
    return {name: values[found["scores"] >= least] for name, values in found.items()}


def drawn(image: Tensor, found: Found, classes: list[str]) -> Image.Image:
    """What `predict` found, over its picture; without scores: the truth."""
    boxes, labels, masks = (found[name] for name in ("boxes", "labels", "masks"))
    return drawing.objects(drawing.pixels(image), boxes, labels, classes, found.get("scores"), masks.astype(bool))


def load_trained(folder: RunFolder) -> tuple[Detect, MaskRCNN, list[str]]:
    """The network of a finished run, on the CPU, with its config and the names of its classes. Raises `UserError`."""
    return dense.load_trained(folder, "detect", network)
