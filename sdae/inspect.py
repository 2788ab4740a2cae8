"""Looks into pre-trainings: what a teacher view sees, how well masked patches are predicted, whose features are near.

Nothing of the method is written again: views, networks, weights, data and the probe's features are the trainer's.
Pictures go in as paths or uint8 arrays (H, W, 3), of any size: their middle square is cut out and resized. What comes
out are numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import center_crop

from sdae.config import Pretrain, canonical_teacher, parse
from sdae.data import Dataset, Loader, open_dataset, resolve
from sdae.data.crop import resize
from sdae.data.datasets import Resident, Split, UnreadableError, read, subset
from sdae.data.packed import Mapped, Shards
from sdae.errors import UserError
from sdae.methods.mae import MAE
from sdae.methods.sdae import SdAE
from sdae.models.encoder import Encoder
from sdae.objective import normalize
from sdae.sections import Teacher
from sdae.stages.pretrain import build
from sdae.stages.session import NOISE, uniform
from sdae.store import RunFolder
from sdae.training.checkpoints import load_weights
from sdae.views import View, as_rows, split
from sdae.weights import encoder_of_run

Picture = str | Path | NDArray[np.uint8]
Ids = NDArray[np.int64]
Pixels = NDArray[np.uint8]
BATCH = 256


class Sight(NamedTuple):
    """`sees`: the patches of each sequence that the teacher gets, (folds, length). `predicted`: those of the loss."""

    sees: Ids
    predicted: Ids


class Views(NamedTuple):
    """One picture (S, S, 3), the patches that the student sees, and what the teacher sees under each view."""

    picture: Pixels
    patch: int
    student: Ids
    teachers: dict[str, Sight]


class Maps(NamedTuple):
    """`values` (n, side, side): a number for every predicted patch, NaN for the others. `what`: which number.

    `visible` (n, side, side): what the student saw.
    """

    pictures: Pixels
    values: NDArray[np.float32]
    visible: NDArray[np.bool_]
    what: str


class Neighbours(NamedTuple):
    """Queries (q, S, S, 3), their nearest pictures (q, k, S, S, 3), nearest first; cosines (q, k); classes by name."""

    queries: Pixels
    pictures: Pixels
    similarity: NDArray[np.float32]
    labels: list[list[str]]
    query_labels: list[str | None]


def paper_views(config: Pretrain) -> dict[str, Teacher]:
    """The teacher views of the paper's Figure 3; the crop has as many patches as the student sees."""
    visible, masked = config.tokens - config.masked, config.masked
    return {
        "full picture": Teacher(view="full"),
        "all masked patches": Teacher(view="masked"),
        "crop": Teacher(view="crop", tokens=min(visible, masked)),
        "fold": Teacher(view="folds", folds=min(3, masked)),
    }


def teacher_views(
    picture: Picture, config: Pretrain | None = None, teachers: Mapping[str, Teacher] | None = None, seed: int = 0
) -> Views:
    """What student and teacher see of a picture, cut by the trainer's own code.

    config: gives picture size, patch size and mask ratio (default: the paper's). teachers: views by name (default:
    those of Figure 3). Raises UserError for a view that so many masked patches do not allow.
    """
    config = config or Pretrain()
    assert config.model.patch_size
    visible, masked = split(uniform((1, config.tokens), seed, NOISE, 0), config.tokens - config.masked)
    sights = {}
    for name, teacher in (paper_views(config) if teachers is None else teachers).items():
        try:
            view = View.of(canonical_teacher(teacher, config.tokens, config.masked), config.masked)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        used = masked[:, : view.used]
        sees = torch.arange(config.tokens)[None] if view.full else as_rows(used[:, :, None], view.folds)[:, :, 0]
        sights[name] = Sight(sees.numpy(), used[0].numpy())
    whole = _stack([_pixels(picture)], config)
    return Views(_shown(whole)[0], config.model.patch_size, visible[0].numpy(), sights)


@torch.no_grad()
def similarity_map(run: RunFolder, pictures: Sequence[Picture], seed: int = 0) -> Maps:
    """How well a finished pre-training predicts each masked patch of some pictures, with its last weights.

    SdAE: cosine of the student's prediction and the teacher's target over the channels of a patch, 1 being perfect,
    whichever axis its loss ran over. MAE: squared error per patch, whose mean is its loss. Stochastic depth is off.
    """
    config, method, device = _trained(run)
    whole = _stack([_pixels(picture) for picture in pictures], config)
    noise = uniform((len(whole), config.tokens), seed, NOISE, 0)
    visible, masked = split(noise, config.tokens - config.masked)
    parts = []
    for batch in _batches(Resident(whole, torch.zeros(len(whole)), [], str), config, device):
        out = method(batch.images, noise[batch.indices].to(device))
        prediction, target = out.prediction.float(), out.target.float()
        if isinstance(method, SdAE):
            value = F.cosine_similarity(prediction, target, dim=2)
        else:
            value = (prediction - (normalize(target) if method.normalize else target)).square().mean(2)
        parts.append(value.reshape(len(batch.indices), -1).cpu())
    values = torch.cat(parts)
    grid = torch.full_like(noise, float("nan")).scatter(1, masked[:, : values.shape[1]], values)
    seen = torch.zeros_like(noise, dtype=torch.bool).scatter(1, visible, True)
    what = "cosine similarity" if isinstance(method, SdAE) else "squared error of the pixels"
    side = method.student.side
    return Maps(_shown(whole), grid.view(-1, side, side).numpy(), seen.view(-1, side, side).numpy(), what)


@torch.no_grad()
def neighbours(
    run: RunFolder, queries: int | Sequence[Picture] = 6, k: int = 5, weights: str = "student",
    epoch: int | str = "last", bank: int | None = None,
) -> Neighbours:  # fmt: skip
    """The k pictures of the run's training set with the nearest features, by cosine, as the online kNN probe has it.

    queries: pictures, or how many of the validation set. bank: how many training pictures are searched (default: as
    many as the probe takes). The set must be where the run found it.
    """
    config = finished(run)
    device = _device(config)
    encoder = Encoder(config.model, config.data.image_size)
    encoder.load_state_dict(encoder_of_run(run, weights, epoch)[0])
    encoder.to(device).eval()
    train = subset(open_dataset(resolve(config.data), "train"), bank or config.probe.pictures)
    if not 1 <= k <= len(train):
        raise UserError(f"k: {k} neighbours of {len(train)} pictures (allowed: 1 to {len(train)})")
    if isinstance(queries, int):
        asked = subset(open_dataset(resolve(config.data), "val"), queries)
        shown = _stack([_pixels_of(asked, i) for i in range(len(asked))], config)
    else:
        shown = _stack([_pixels(picture) for picture in queries], config)
        asked = Resident(shown, torch.zeros(len(shown)), [], str)
    wanted, known = (_features(encoder, data, config, device) for data in (asked, train))
    similarity, found = (wanted @ known.T).topk(k, dim=1)
    near = _stack([_pixels_of(train, int(i)) for i in found.flatten()], config)
    return Neighbours(
        _shown(shown), _shown(near.view(-1, k, *near.shape[1:])), similarity.numpy(),
        [[train.classes[int(train.labels[i])] for i in row] for row in found],
        [asked.classes[int(label)] if asked.classes else None for label in asked.labels],
    )  # fmt: skip


def samples(run: RunFolder, count: int, which: Split = "val") -> list[Pixels]:
    """Some pictures of the set that a run was trained on, uint8 (H, W, 3)."""
    data = subset(open_dataset(resolve(finished(run).data), which), count)
    return [_pixels_of(data, i).permute(1, 2, 0).numpy() for i in range(len(data))]


def finished(run: RunFolder) -> Pretrain:
    """The config of a finished pre-training whose weights are still there; else UserError."""
    result = run.outcome()
    config = parse(result.get("config"), run.id)
    if not isinstance(config, Pretrain):
        raise UserError(f"{run.id}: is a {config.stage} run (allowed: a pre-training)")
    if result.get("synthetic"):
        raise UserError(f"{run.id}: is synthetic: its result was made up, and there are no weights")
    if not any(run.checkpoints.glob("*.safetensors")):
        raise UserError(f"{run.id}: no checkpoint is left in {run.checkpoints} (remove {run.path} and run it again)")
    return config


def _trained(run: RunFolder) -> tuple[Pretrain, SdAE | MAE, torch.device]:
    """Student with decoder and teacher as they were at the end, in evaluation mode."""
    config, name = finished(run), "model.safetensors"
    method, device = build(config), _device(config)
    method.load_state_dict(load_weights(run.checkpoints / name, run.outcome()["weights"].get(name))[0])
    return config, method.to(device).eval(), device


def _device(config: Pretrain) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and config.efficiency.device != "cpu" else "cpu")


def _features(encoder: Encoder, data: Dataset, config: Pretrain, device: torch.device) -> Tensor:
    """Mean patch features of length one, (n, D), on the CPU: what `sdae.stages.pretrain.knn_top1` compares."""
    means = [encoder(batch.images)[:, 1:].mean(1).float() for batch in _batches(data, config, device)]
    return F.normalize(torch.cat(means), dim=1).cpu()


def _batches(data: Dataset, config: Pretrain, device: torch.device) -> Iterator[Any]:
    return Loader(
        data, config.data, seed=0, batch_size=BATCH, train=False, device=device, workers=config.efficiency.workers,
        channels=config.model.channels,
    ).epoch(0)  # fmt: skip


# Pictures, as uint8 tensors (3, H, W)
def _pixels(picture: Picture) -> Tensor:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"picture: {picture.dtype} {picture.shape} (allowed: uint8 of shape (height, width, 3))")
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    try:
        return read(str(picture))
    except UnreadableError as error:
        raise UserError(str(error)) from None


def _pixels_of(data: Dataset, i: int) -> Tensor:
    if isinstance(data, Resident):
        return data.images[i]
    if isinstance(data, Mapped):
        return data.gather(np.array([i]))[0]
    return data.read(i) if isinstance(data, Shards) else _pixels(data.path_of(i))


def _stack(pictures: Sequence[Tensor], config: Pretrain) -> Tensor:
    if not pictures:
        raise UserError("pictures: none was given")
    middles = (center_crop(picture, [min(picture.shape[1:])] * 2) for picture in pictures)
    return torch.cat([resize(middle[None], config.data.image_size).round().to(torch.uint8) for middle in middles])


def _shown(pictures: Tensor) -> Pixels:
    return pictures.movedim(-3, -1).contiguous().numpy()
