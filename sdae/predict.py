"""What a finished run says of a picture, drawn over it: classes, regions or objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdae import drawing
from sdae.config import Detect, Finetune, Linprobe, Segment
from sdae.data import crop
from sdae.data.datasets import UnreadableError, read
from sdae.data.dense import colours
from sdae.data.loader import statistics
from sdae.errors import UserError
from sdae.models.classifier import Classifier
from sdae.stages import detect, segment
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import load_model, must_fit

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
    answer = _Predictor(folder, score)
    found = []
    for picture, target, image in zip(pictures, targets, images, strict=True):
        drawn, said = answer(image)
        try:
            out.mkdir(parents=True, exist_ok=True)
            drawn.save(target)
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        found.append({"picture": str(picture), "drawn": str(target), **said})
    return found


class _Predictor:
    """A finished run's network: uint8 (3, H, W) to a drawing and to what it says."""

    def __init__(self, folder: RunFolder, score: float):
        stage, self.score = folder.outcome().get("stage"), score
        if stage not in ("segment", "detect", "finetune", "linprobe"):
            raise UserError(f"{folder.id}: {stage} predicts nothing (allowed: segment, detect, finetune, linprobe)")
        self.config: Any
        self.module: Any
        load = {"segment": segment.load_trained, "detect": detect.load_trained}.get(stage, load_classifier)
        self.config, self.module, self.classes = load(folder)

    def __call__(self, image: Tensor) -> tuple[Image.Image, dict[str, Any]]:
        if isinstance(self.config, Segment):
            labels = segment.predict(self.module, self.config, image).cpu().numpy()
            names, counts = np.unique(labels, return_counts=True)
            shares = {self.classes[n]: round(float(c) / labels.size, 4) for n, c in zip(names, counts, strict=True)}
            return drawing.regions(drawing.pixels(image), labels, self.classes), {"shares": shares}
        if isinstance(self.config, Detect):
            found = detect.surest(detect.predict(self.module, self.config, image), self.score)
            values = (found[key].tolist() for key in ("labels", "scores", "boxes"))
            objects = [
                {"class": self.classes[label], "score": round(score, 4), "box": [round(side, 2) for side in box]}
                for label, score, box in zip(*values, strict=True)
            ]
            return detect.drawn(image, found, self.classes), {"objects": objects}
        chances = probabilities(self.module, self.config, image)
        best = [
            (self.classes[int(i)], round(float(chances[i]), 4)) for i in chances.argsort(descending=True)[:LIKELIEST]
        ]
        lines = [(drawing.colour(n), f"{name} {100 * chance:.1f} %") for n, (name, chance) in enumerate(best)]
        return drawing.captioned(Image.fromarray(drawing.pixels(image)), lines), {"classes": dict(best)}


def load_classifier(folder: RunFolder) -> tuple[Finetune | Linprobe, Classifier, list[str]]:
    """Config, network (in evaluation mode) and class names of a finished classification run. Raises UserError."""
    config = folder.config()
    if not isinstance(config, Finetune | Linprobe):
        raise UserError(f"{folder.path / 'config.yaml'}: not that of a finetune or linprobe")
    tensors, classes = load_model(folder, folder.outcome())

    def network() -> Classifier:
        return Classifier(config.model, config.data.image_size, config.head, len(classes))

    must_fit(tensors, network, str(folder.path))
    module = network()
    module.load_state_dict(tensors)
    return config, module.eval(), classes


@torch.no_grad()
def probabilities(module: Classifier, config: Finetune | Linprobe, image: Tensor) -> Tensor:
    """Class probabilities (C,) of uint8 (3, H, W), cut as in this data set's evaluation."""
    size = config.data.image_size
    if config.data.name in ("imagefolder", "packed"):
        whole = F.resize(image, [round(size * 256 / 224)], F.InterpolationMode.BICUBIC, antialias=True)
        picture = F.center_crop(whole, [size, size])[None].float()
    else:
        picture = crop.resize(image[None], size)
    mean, std = (255 * t for t in statistics(config.model.channels))
    ready = (colours(picture[0], config.model.channels) - mean) / std
    return module(ready[None]).float().softmax(1)[0]  # type: ignore[no-any-return]
