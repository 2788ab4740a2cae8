"""What segmentation and detection share: an encoder with a pyramid and a head, trained, then scored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from sdae.config import Detect, Segment
from sdae.data.dense import DenseLoader, DenseSet
from sdae.drawing import beside
from sdae.errors import UserError
from sdae.models.dense import Pyramid
from sdae.models.flops import per_image
from sdae.stages.session import INIT, Session, drop_factors, outcome, seed_of
from sdae.store import RunFolder
from sdae.training.checkpoints import load_model
from sdae.training.loop import Task, fit
from sdae.training.optimizers import parameter_groups
from sdae.weights import load_init

SHOWN = 4  # validation pictures that a run keeps with its predictions
UNDECAYED = ("cls_token", "pos_embed", "relative_position_bias_table")


class DenseTask(Task):
    """A stage brings `inputs`, `evaluate` and `picture`."""

    def __init__(self, config: Segment | Detect, session: Session, module: nn.Module, val_set: DenseSet):
        self.config, self.session, self.module, self.val_set = config, session, module, val_set
        self.device = session.world.device
        self.skipped: dict[int, str] = {}
        self.gflop_per_image = per_image(config) / 1e9
        optim, depth = config.optim, config.model.depth or 0
        groups = parameter_groups(module, optim.weight_decay, optim.layer_decay, depth, UNDECAYED)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)

    def drop(self, step: int, first: int, count: int, total: int) -> torch.Tensor | None:
        """Stochastic-depth factors of this rank's pictures."""
        model, seed = self.config.model, self.config.seed
        return drop_factors(model.drop_path, model.depth or 0, seed, step, first, count, total, self.device)

    def part(self, inputs: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
        assert start == 0 and stop >= len(inputs[0]), "BatchNorm is over the global batch, so nothing is accumulated"
        return inputs

    def evaluate(self) -> dict[str, float]:
        """Every validation picture once, over all ranks: the scores that the result holds."""
        raise NotImplementedError

    def picture(self, i: int) -> tuple[Image, Image]:
        """A validation picture with its truth, and the same with the prediction."""
        raise NotImplementedError

    def loader(self, dataset: DenseSet, seed: int, train: bool, batch_size: int) -> DenseLoader:
        return dense_loader(self.config, self.session, dataset, seed, train, batch_size)


def dense_loader(
    config: Segment | Detect, session: Session, dataset: DenseSet, seed: int, train: bool, batch_size: int
) -> DenseLoader:
    patch, world = config.model.patch_size or 16, session.world
    return DenseLoader(
        dataset, seed=seed, batch_size=batch_size, train=train, rank=world.rank, world=world.size,
        device=world.device, workers=config.efficiency.workers, channels=config.model.channels,
        on_error=config.data.on_error, multiple=2 * patch,
    )  # fmt: skip


def run(
    config: Segment | Detect,
    session: Session,
    sets: tuple[DenseSet, DenseSet],
    network: Callable[[int], nn.Module],
    task_of: Callable[[Segment | Detect, Session, nn.Module, DenseSet], DenseTask],
) -> dict[str, Any]:
    """Trains to the last step and scores. network: makes the module for so many classes, as yet without weights."""
    train_set, val_set = sets
    whole = config.efficiency.model_copy(update={"micro_batch": None})  # BatchNorm is over the global batch
    config = config.model_copy(update={"efficiency": whole})
    train = dense_loader(config, session, train_set, config.seed, True, config.optim.batch_size)
    module = build(config, session, network(len(train_set.classes)))
    task = task_of(config, session, module, val_set)
    fit(task, config, session.folder, train, session.world, session.pulse, session.stop)  # type: ignore[arg-type]
    scores = task.evaluate()
    if session.world.first:
        illustrate(task)
    skipped = [*train.skipped.values(), *task.skipped.values()]
    return outcome(session, config, module, train_set.classes, scores, skipped, steps=config.optim.steps)


def illustrate(task: DenseTask) -> None:
    """Keeps the first validation pictures in the run's folder: truth at the left, prediction at the right."""
    home = task.session.folder.path / "pictures"
    home.mkdir(exist_ok=True)
    for i in range(min(SHOWN, len(task.val_set))):
        beside(*task.picture(i)).save(home / f"{i}.jpg", quality=80)


def build(config: Segment | Detect, session: Session, module: nn.Module) -> nn.Module:
    """The network with its first weights: the encoder of `init`, all else drawn from the seed."""
    backbone: Pyramid = module.backbone  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, INIT))
        backbone.init_timm()
        module.init_weights()  # type: ignore[operator]
    weights = load_init(config.init, session.store, config.model, config.data.image_size)
    if weights is not None:
        kept = {k: v for k, v in weights.items() if not k.startswith("norm.")}  # taps are taken in front of it
        missing, unexpected = backbone.load_state_dict(kept, strict=False)
        assert not unexpected and all(k.startswith(("up4.", "up2.")) for k in missing), (missing, unexpected)
    return module.to(session.world.device)


def load_trained(folder: RunFolder, stage: str, network: Callable[[Any, int], nn.Module]) -> tuple[Any, Any, list[str]]:
    """Config, network (on the CPU, in eval mode) and class names of a finished run. Raises `UserError`."""
    config = folder.config()
    if config is None or config.stage != stage:
        raise UserError(f"{folder.path}: not a finished run of the stage {stage}")
    return config, *load_model(folder, partial(network, config))
