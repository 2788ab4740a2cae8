"""Fine-tuning and linear probing: one encoder with a head, one loop, two recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.config import Finetune, Linprobe
from sdae.data import Batch, Dataset, mix, open_dataset
from sdae.errors import UserError
from sdae.models.classifier import Classifier
from sdae.models.flops import per_image
from sdae.stages.session import INIT, Session, drop_factors, loader, outcome, seed_of
from sdae.training.loop import Task, autocast, fit
from sdae.training.optimizers import lars, parameter_groups
from sdae.weights import load_init


def run(config: Finetune | Linprobe, session: Session) -> dict[str, Any]:
    """Trains to the end and evaluates every validation picture once: top-1 and top-5 in percent."""
    train_set, val_set = open_dataset(config.data, "train"), open_dataset(config.data, "val")
    if val_set.classes != train_set.classes:
        raise UserError("data: train and val have different classes")
    train = loader(session, config, train_set, config.seed, config.optim.batch_size, train=True)
    module = build(config, session, len(train_set.classes))
    task = ClassifyTask(config, session, module, len(train_set.classes), val_set)
    if config.head.norm == "batch":  # its statistics are those of the global batch, so nothing is accumulated
        whole = config.efficiency.model_copy(update={"micro_batch": None})
        config = config.model_copy(update={"efficiency": whole})
    fit(task, config, session.folder, train, session.world, session.pulse, session.stop)
    scores = task.evaluate()
    if config.optim.weight_ema:  # what was scored is what is kept
        task.use_averages()
    skipped = [*train.skipped.values(), *task.skipped.values()]
    return outcome(session, config, module, train_set.classes, scores, skipped, epochs=config.optim.epochs)


def build(config: Finetune | Linprobe, session: Session, classes: int) -> Classifier:
    """The network with its first weights: the encoder of `init`, a fresh head."""
    module = Classifier(config.model, config.data.image_size, config.head, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, INIT))
        module.init_weights(0.01 if config.stage == "linprobe" else 2e-5)
    weights = load_init(config.init, session.store, config.model, config.data.image_size)
    if weights is not None:
        if config.head.pool == "mean":  # the encoder's last norm is dropped
            weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}
        missing, unexpected = module.load_state_dict(weights, strict=False)
        assert not unexpected and all(k.startswith(("head.", "fc_norm.")) for k in missing), (missing, unexpected)
    return module.to(session.world.device)


class _Frozen(nn.Module):
    """The linear probe as the loop trains it: encoder without gradient and in eval mode, head in training mode."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        for name, parameter in classifier.named_parameters():
            parameter.requires_grad_(name.startswith("head."))

    def train(self, mode: bool = True) -> _Frozen:
        super().train(False)
        self.classifier.fc_norm.train(mode)
        self.classifier.head.train(mode)
        return self

    def forward(self, images: Tensor, target: Tensor, drop: Tensor | None) -> tuple[Tensor]:
        with torch.no_grad():
            features = self.classifier.features(images)
        logits = self.classifier.head(self.classifier.fc_norm(features))
        return (soft_cross_entropy(logits, target),)


class _Tuned(nn.Module):
    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor, target: Tensor, drop: Tensor | None) -> tuple[Tensor]:
        return (soft_cross_entropy(self.classifier(images, drop), target),)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over pictures of -sum target log softmax, in float32. target: (B, classes) probabilities."""
    return -(target * F.log_softmax(logits.float(), dim=1)).sum(1).mean()


class ClassifyTask(Task):
    def __init__(
        self, config: Finetune | Linprobe, session: Session, classifier: Classifier, classes: int, val_set: Dataset
    ):
        self.config, self.session, self.classes, self.val_set = config, session, classes, val_set
        self.classifier, self.device = classifier, session.world.device
        self.skipped: dict[int, str] = {}
        frozen = config.stage == "linprobe"
        self.module: nn.Module = (_Frozen if frozen else _Tuned)(classifier)
        self.gflop_per_image = per_image(config) / 1e9
        optim = config.optim
        if optim.name == "lars":
            self.optimizer: torch.optim.Optimizer = lars(self.module, optim.base_lr, optim.weight_decay)
        else:
            depth, plain = config.model.depth or 0, ("cls_token", "pos_embed", "relative_position_bias_table")
            groups = parameter_groups(classifier, optim.weight_decay, optim.layer_decay, depth, plain)
            self.optimizer = torch.optim.AdamW(groups, lr=optim.base_lr, betas=optim.betas, fused=True)
        if optim.weight_ema:
            for name, parameter in list(classifier.named_parameters()):
                self.module.register_buffer(f"ema_{name.replace('.', '_')}", parameter.detach().clone())

    def inputs(self, batch: Batch, step: int, first: int, total: int) -> tuple[Any, ...]:
        config = self.config
        images, target = mix(
            batch.images, batch.labels, config.data.augment, self.classes, config.seed, step, first, total
        )
        drop = drop_factors(
            config.model.drop_path, config.model.depth or 0, config.seed, step, first, len(images), total, self.device
        )
        return images, target, drop

    def _averages(self) -> list[Tensor]:
        named = self.classifier.named_parameters()
        return [getattr(self.module, f"ema_{name.replace('.', '_')}") for name, _ in named]

    @torch.no_grad()
    def after_step(self, step: int, epoch: int) -> None:
        if decay := self.config.optim.weight_ema:
            torch._foreach_lerp_(self._averages(), list(self.classifier.parameters()), 1 - decay)

    @torch.no_grad()
    def use_averages(self) -> None:
        torch._foreach_copy_(list(self.classifier.parameters()), self._averages())

    def after_epoch(self, epoch: int) -> dict[str, float]:
        every = self.config.probe.eval_every
        return self.evaluate() if every and epoch % every == 0 and epoch < self.config.optim.epochs else {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Every validation picture once, over all ranks."""
        trained = None
        if self.config.optim.weight_ema:
            trained = [p.detach().clone() for p in self.classifier.parameters()]
            self.use_averages()
        self.module.eval()
        counts = torch.zeros(3, dtype=torch.float64, device=self.device)
        pictures = loader(self.session, self.config, self.val_set, 0, self.config.optim.batch_size, train=False)
        for batch in pictures.epoch(0):
            with autocast(self.config.precision, self.device):
                logits = self.classifier(batch.images)
            best = logits.float().topk(min(5, self.classes), dim=1).indices == batch.labels[:, None]
            counts += torch.stack([best[:, 0].sum(), best.sum(), best.new_tensor(len(best), dtype=torch.float64)])
        self.skipped.update(pictures.skipped)
        counts = self.session.world.sum(counts)
        if trained is not None:
            torch._foreach_copy_(list(self.classifier.parameters()), trained)
        return {"top1": 100 * float(counts[0] / counts[2]), "top5": 100 * float(counts[1] / counts[2])}
