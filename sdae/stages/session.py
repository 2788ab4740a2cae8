"""What every stage is given, and the random draws that stages share."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdae.config import CostRun, Detect, Finetune, Linprobe, Pretrain, Segment
from sdae.data import Dataset, Loader
from sdae.data.randomness import hashed
from sdae.data.transfer import pinned, sent
from sdae.models.encoder import drop_path_rates
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import save_weights
from sdae.training.distributed import World
from sdae.training.loop import Stop
from sdae.training.telemetry import Pulse

# Streams of random numbers of the stages; those of the data are numbered below 64.
NOISE, DROP, INIT, INIT_TEACHER, DROPOUT, SAMPLE = 64, 65, 66, 67, 68, 69


@dataclass
class Session:
    """One run on one rank."""

    store: Store
    folder: RunFolder
    world: World
    pulse: Pulse
    stop: Stop


def seed_of(*keys: int) -> int:
    return int(hashed(*keys)[0] >> 1)


def uniform(shape: tuple[int, ...], *keys: int) -> Tensor:
    """Uniform draws in [0, 1) that depend on the keys alone; made on the CPU so that every machine has the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed_of(*keys)))


def drop_factors(
    rate: float, depth: int, seed: int, step: int, first: int, count: int, total: int, device: torch.device
) -> Tensor | None:
    """Stochastic-depth factors (depth, 2, count), 0 or 1 / (1 - p), of pictures first .. of a batch of `total`."""
    factors = drawn_factors(rate, depth, seed, step, first, count, total)
    return None if factors is None else sent(factors, device)


def drawn_factors(rate: float, depth: int, seed: int, step: int, first: int, count: int, total: int) -> Tensor | None:
    """`drop_factors`, on the CPU."""
    if rate == 0:
        return None
    keep = 1 - torch.tensor(drop_path_rates(rate, depth))[:, None, None]
    draws = uniform((depth, 2, total), seed, DROP, step)[:, :, first : first + count]
    return (draws < keep).float() / keep


Draws = tuple[Tensor, Tensor | None]  # mask noise (count, L) and stochastic-depth factors (depth, 2, count)


class Masking:
    """The draws of a pre-training step. For a GPU they are made one step ahead, by a thread, so that it never waits.

    They are functions of (seed, step) alone, so whoever asks gets the same ones, in whatever order.
    """

    def __init__(self, seed: int, tokens: int, drop_path: float, depth: int, device: torch.device, ahead: bool):
        self.seed, self.tokens, self.drop_path, self.depth, self.device = seed, tokens, drop_path, depth, device
        self._thread = ThreadPoolExecutor(1, "draws") if ahead else None
        self._coming: tuple[tuple[int, ...], Future[Draws]] | None = None

    def at(self, step: int, first: int, count: int, total: int) -> Draws:
        """On the device, for pictures first .. first + count of a batch of `total`."""
        asked = (step, first, count, total)
        if self._coming is not None and self._coming[0] == asked:
            noise, factors = self._coming[1].result()
        else:
            noise, factors = self._draw(*asked)
        if self._thread is not None:
            following = (step + 1, first, count, total)
            self._coming = following, self._thread.submit(self._draw, *following)
        return sent(noise, self.device), None if factors is None else sent(factors, self.device)

    def _draw(self, step: int, first: int, count: int, total: int) -> Draws:
        noise = uniform((total, self.tokens), self.seed, NOISE, step)[first : first + count]
        factors = drawn_factors(self.drop_path, self.depth, self.seed, step, first, count, total)
        return pinned(noise, self.device), None if factors is None else pinned(factors, self.device)


def masking(config: Pretrain | CostRun, device: torch.device) -> Masking:
    model = config.model
    return Masking(config.seed, config.tokens, model.drop_path, model.depth or 0, device, device.type == "cuda")


def outcome(
    session: Session, config: Finetune | Linprobe | Segment | Detect, module: nn.Module, classes: list[str],
    scores: dict[str, float], skipped: Iterable[str], **length: int,
) -> dict[str, Any]:  # fmt: skip
    """What a run with labels gives: its network is saved, and the last loss stands beside its scores."""
    weights = {}
    if session.world.first:
        path = session.folder.checkpoints / "model.safetensors"
        metadata = {"run": session.folder.id, "stage": config.stage, "classes": classes}
        weights[path.name] = save_weights(path, module.state_dict(), metadata)
    loss = session.folder.metrics()[-1]["loss"]
    return {"metrics": {**scores, "loss": loss, **length}, "weights": weights, "skipped": session.world.union(skipped)}


def loader(
    session: Session, config: Pretrain | Finetune | Linprobe, dataset: Dataset, seed: int, batch_size: int, train: bool
) -> Loader:
    world = session.world
    return Loader(
        dataset, config.data, seed=seed, batch_size=batch_size, train=train, rank=world.rank, world=world.size,
        device=world.device, workers=config.efficiency.workers, channels=config.model.channels,
    )  # fmt: skip
