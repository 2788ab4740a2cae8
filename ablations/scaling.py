"""What more GPUs buy: a step's time on 1 to 64 of them, and hours for the whole paper. Formulas, no measurement.

The global batch is the run's, so n GPUs have batch / n pictures each. A step takes the arithmetic of its part, and of
the gradients' exchange what the backward pass does not hide: all of the last bucket, and what is longer than the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from ablations.cost import gpu_hours
from ablations.planner import Sweep
from sdae.config import Pretrain
from sdae.models.flops import per_image, teacher

BUCKET = 25 * 2**20  # bytes that DDP exchanges at a time
BACKWARD = 2 / 3  # of the student's arithmetic
COUNTS = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cluster:
    """Bytes a second that rings move within a node of `per_node` GPUs, and through each of its network `cards` between
    nodes (each card has a ring of its own); seconds that each of their 2 (n - 1) messages waits. Assumed values."""

    within: float = 300e9
    card: float = 40e9
    cards: int = 1
    latency: float = 5e-6
    per_node: int = 8

    def bandwidth(self, gpus: int) -> float:
        return self.within if gpus <= self.per_node else min(self.within, self.card * self.cards)

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds for `size` bytes: every GPU sends and receives 2 (n - 1) / n of them."""
        if gpus == 1:
            return 0.0
        return 2 * (gpus - 1) / gpus * size / self.bandwidth(gpus) + 2 * (gpus - 1) * self.latency


@dataclass(frozen=True)
class Step:
    """Seconds of one step on `gpus` GPUs, and what share of them is arithmetic."""

    gpus: int
    batch: float
    compute: float
    exchange: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def trained_weights(config: Pretrain) -> int:
    """The student's parameters that have a gradient: encoder, decoder, mask token; the positions are fixed."""
    model = config.model
    width, dim, patch = _whole(model.width), _whole(model.decoder_dim), _whole(model.patch_size)
    pixels = patch**2 * model.channels
    outputs = width if config.method.name == "sdae" else pixels
    encoder = pixels * width + width + width + _blocks(width, _whole(model.depth), model.mlp_ratio or 4.0) + 2 * width
    decoder = width * dim + dim + dim + _blocks(dim, model.decoder_depth or 0, 4.0) + 2 * dim + dim * outputs + outputs
    return encoder + decoder


def _blocks(width: int, depth: int, ratio: float) -> int:
    hidden = int(width * ratio)
    return depth * (4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width)


def step(config: Pretrain, gpus: int, speed: float, cluster: Cluster) -> Step:
    """speed: FLOP/s that one GPU reaches; assumed to hold for any number of pictures."""
    batch = config.optim.batch_size / gpus
    compute = batch * per_image(config) / speed
    size = trained_weights(config) * (2 if config.optim.bf16_gradients else 4)
    exchange = cluster.all_reduce(size, gpus)
    frozen = teacher(config.model, config.method, config.tokens, config.masked)
    hidden = BACKWARD * batch * (per_image(config) - frozen) / speed
    last = min(cluster.all_reduce(min(BUCKET, size), gpus), exchange)
    return Step(gpus, batch, compute, exchange, max(exchange - hidden, last))


def paper_hours(sweep: Sweep) -> dict[str, tuple[float, float]]:
    """Low and high GPU-hours of a sweep's runs by stage, on one GPU each: no exchange is counted."""
    hours: dict[str, list[tuple[float, float]]] = {}
    for run in sweep.runs.values():
        hours.setdefault(run.config.stage, []).append(gpu_hours(run, pictures=sweep.scale.pictures))
    return {stage: (fsum(low for low, _ in v), fsum(high for _, high in v)) for stage, v in hours.items()}


def _whole(value: int | None) -> int:
    assert value is not None  # filled in when the config was parsed
    return value
