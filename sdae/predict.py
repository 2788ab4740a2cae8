"""What a finished run says of a picture, drawn over it: classes, regions or objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdae import drawing
from sdae.config import Detect, Finetune, Linprobe, Segment
from sdae.data import crop
from sdae.data.datasets import UnreadableError, read
from sdae.data.loader import middle, statistics, with_channels
from sdae.errors import UserError
from sdae.models.classifier import Classifier
from sdae.stages import detect, segment
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import load_model

LIKELIEST = 5  # classes told of a picture


def predict(store: Store, run: str, pictures: Sequence[Path], out: Path, score: float) -> list[dict[str, Any]]:
    """Draws each picture with its prediction to OUT/NAME.png; what was found, as JSON values.

    score: objects with less are not shown. Raises UserError for a run that predicts nothing, an unreadable picture, or
    two pictures of one name.
    """
    targets = [out / f"{picture.stem}.png" for picture in pictures]
    if len(set(targets)) < len(targets):
        raise UserError("pictures: two of them have the same name, and so would their predictions")
    folder = store.find(run)
    images = []
    for picture in pictures:
        try:
            images.append(read(str(picture)))
        except UnreadableError as error:
            raise UserError(str(error)) from None
    stage = folder.outcome().get("stage")
    if stage not in tuple(LOADERS):
        raise UserError(f"{folder.id}: {stage} predicts nothing (allowed: {', '.join(LOADERS)})")
    loaded = LOADERS[stage](folder)
    found = []
    for picture, target, image in zip(pictures, targets, images, strict=True):
        drawn, said = _answer(*loaded, image, score)
        try:
            out.mkdir(parents=True, exist_ok=True)
            drawn.save(target)
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        found.append({"picture": str(picture), "drawn": str(target), **said})
    return found


def _answer(
    config: Any, module: Any, classes: list[str], image: Tensor, score: float
) -> tuple[Image.Image, dict[str, Any]]:
    """What a network says of uint8 (3, H, W): a drawing, and JSON values."""
    if isinstance(config, Segment):
        labels = segment.predict(module, config, image).cpu().numpy()
        names, counts = np.unique(labels, return_counts=True)
        shares = {classes[n]: round(float(c) / labels.size, 4) for n, c in zip(names, counts, strict=True)}
        return drawing.regions(drawing.pixels(image), labels, classes), {"shares": shares}
    if isinstance(config, Detect):
        found = detect.surest(detect.predict(module, config, image), score)
        values = (found[key].tolist() for key in ("labels", "scores", "boxes"))
        objects = [
            {"class": classes[label], "score": round(chance, 4), "box": [round(side, 2) for side in box]}
            for label, chance, box in zip(*values, strict=True)
        ]
        return detect.drawn(image, found, classes), {"objects": objects}
    chances = probabilities(module, config, image)
    best = [(classes[int(i)], round(float(chances[i]), 4)) for i in chances.argsort(descending=True)[:LIKELIEST]]
    lines = [(drawing.colour(n), f"{name} {100 * chance:.1f} %") for n, (name, chance) in enumerate(best)]
    return drawing.captioned(Image.fromarray(drawing.pixels(image)), lines), {"classes": dict(best)}


def load_classifier(folder: RunFolder) -> tuple[Finetune | Linprobe, Classifier, list[str]]:
    """Config, network (in evaluation mode) and class names of a finished classification run. Raises UserError."""
    config = folder.config()
    if not isinstance(config, Finetune | Linprobe):
        raise UserError(f"{folder.path / 'config.yaml'}: not that of a finetune or linprobe")
    return config, *load_model(folder, partial(Classifier, config.model, config.data.image_size, config.head))


LOADERS: dict[str, Callable[[RunFolder], tuple[Any, Any, list[str]]]] = {
    "segment": segment.load_trained, "detect": detect.load_trained,
    "finetune": load_classifier, "linprobe": load_classifier,
}  # fmt: skip


@torch.no_grad()
def probabilities(module: Classifier, config: Finetune | Linprobe, image: Tensor) -> Tensor:
    """Class probabilities (C,) of uint8 (3, H, W), cut as in this data set's evaluation."""
    size, channels = config.data.image_size, config.model.channels
    if config.data.name in ("imagefolder", "packed"):
        picture = middle(image, size)[None].float()
    else:
        picture = crop.resize(image[None], size)
    mean, std = (255 * t for t in statistics(channels))
    ready = with_channels(picture, channels).sub(mean).div_(std)
    return module(ready).float().softmax(1)[0]  # type: ignore[no-any-return]
