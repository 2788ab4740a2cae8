"""What every stage is given, and the random draws that stages share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdae.config import Finetune, Linprobe, Pretrain
from sdae.data import Dataset, Loader
from sdae.data.randomness import hashed
from sdae.models.encoder import drop_path_rates
from sdae.store import RunFolder, Store
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
    if rate == 0:
        return None
    keep = 1 - torch.tensor(drop_path_rates(rate, depth))[:, None, None]
    draws = uniform((depth, 2, total), seed, DROP, step)[:, :, first : first + count]
    return ((draws < keep).float() / keep).to(device, non_blocking=True)


def loader(
    session: Session, config: Pretrain | Finetune | Linprobe, dataset: Dataset, seed: int, batch_size: int, train: bool
) -> Loader:
    world = session.world
    return Loader(
        dataset, config.data, seed=seed, batch_size=batch_size, train=train, rank=world.rank, world=world.size,
        device=world.device, workers=config.efficiency.workers, channels=config.model.channels,
    )  # fmt: skip
