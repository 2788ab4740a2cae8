"""Pre-training with SdAE or MAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.config import Pretrain
from sdae.data import Batch, open_dataset
from sdae.data.datasets import subset
from sdae.files import checksum
from sdae.methods.mae import MAE
from sdae.methods.sdae import Output, SdAE
from sdae.models.encoder import Encoder, patchify
from sdae.models.flops import per_image
from sdae.stages.session import INIT, Session, loader, masking, seed_of
from sdae.training import checkpoints, telemetry
from sdae.training.loop import fit
from sdae.training.optimizers import adamw, ema_momentum
from sdae.training.parallel import gathered, refuse, shard
from sdae.training.sharding import whole_state
from sdae.weights import epoch_file

SAVED_ENCODERS = 15


def run(config: Pretrain, session: Session) -> dict[str, Any]:
    """Trains to the end; returns metrics and the saved weights' checksums."""
    dataset = open_dataset(config.data, "train")
    train = loader(session, config, dataset, config.seed, config.optim.batch_size, train=True)
    task = PretrainTask(config, session)
    fit(task, config, session.folder, train, session.world, session.pulse, session.stop)
    weights = task.finish()
    rows = [row for row in session.folder.metrics() if "loss" in row]
    names = ("loss", "target_std", "target_rank", "teacher_distance", "knn_top1", "images_per_s")
    metrics = {name: rows[-1][name] for name in names if rows and name in rows[-1]}
    if probed := [row["knn_top1"] for row in rows if "knn_top1" in row]:
        metrics["knn_top1"] = probed[-1]
    return {
        "metrics": metrics | {"epochs": config.optim.epochs},
        "weights": weights,
        "skipped": session.world.union(train.skipped.values()),
    }


def saved_epochs(epochs: int) -> set[int]:
    """After which completed epochs both encoders are kept: every E / 15, and always the last (Fig. 4c)."""
    return {max(1, round(i * epochs / SAVED_ENCODERS)) for i in range(1, SAVED_ENCODERS + 1)}


def build(config: Pretrain) -> SdAE | MAE:
    """The method with its initial weights, which depend on the seed alone."""
    module: SdAE | MAE = SdAE(config) if config.method.name == "sdae" else MAE(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, INIT))
        module.init_weights()
    return module


class PretrainTask:
    def __init__(self, config: Pretrain, session: Session):
        self.config, self.session = config, session
        self.device = session.world.device
        self.module: nn.Module = build(config).to(self.device)
        refuse(config, session.world)
        if config.efficiency.fsdp and session.world.size > 1:
            shard(self.module, config, session.world)
        self.masking = masking(config, self.device)
        optim = config.optim
        self.optimizer: torch.optim.Optimizer = adamw(
            self.method.student, optim.base_lr, optim.weight_decay, optim.betas
        )
        self.gflop_per_image = per_image(config) / 1e9
        self.kept = saved_epochs(optim.epochs)

    @property
    def method(self) -> SdAE | MAE:
        return self.module  # type: ignore[return-value]

    def momentum(self, epoch: int) -> float:
        ema = self.config.method.ema
        assert ema is not None
        return ema_momentum(epoch, start=ema.momentum, end=ema.momentum_end, epochs=self.config.optim.epochs)

    def inputs(self, batch: Batch, step: int, first: int, total: int) -> tuple[Any, ...]:
        return batch.images, *self.masking.at(step, first, len(batch.labels), total)

    def part(self, inputs: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
        images, noise, drop = inputs
        return images[start:stop], noise[start:stop], None if drop is None else drop[:, :, start:stop]

    def after_step(self, step: int, epoch: int) -> None:
        if isinstance(self.method, SdAE) and self.config.method.ema.every == "iteration":  # type: ignore[union-attr]
            self.method.update_teacher(self.momentum(epoch))

    def after_epoch(self, epoch: int) -> dict[str, float]:
        out: dict[str, float] = {}
        if isinstance(self.method, SdAE):
            if self.config.method.ema.every == "epoch":  # type: ignore[union-attr]
                self.method.update_teacher(self.momentum(epoch - 1))
            out["momentum"] = self.momentum(epoch - 1)
        if epoch in self.kept:
            for which, state in self.encoders().items():
                if not self.session.world.first:
                    continue
                metadata = {
                    "run": self.session.folder.id,
                    "weights": which,
                    "epoch": epoch,
                    "arch": self.config.model.arch,
                }
                checkpoints.save_weights(self.session.folder.checkpoints / epoch_file(which, epoch), state, metadata)
        every = self.config.probe.knn_every
        if every and (epoch % every == 0 or epoch == self.config.optim.epochs):
            with gathered(self.module):
                out["knn_top1"] = knn_top1(self.method.student, self.config, self.session)
        return out

    def watch(self, output: Output) -> dict[str, float]:
        if not isinstance(self.method, SdAE):
            return {}
        return {**telemetry.alarms(output.features), "teacher_distance": self.method.teacher_distance()}

    def encoders(self) -> dict[str, dict[str, Tensor]]:
        method = self.method
        out = {"student": whole_state(method.student.encoder_state())}
        if isinstance(method, SdAE):
            out["teacher"] = whole_state(method.teacher.state_dict())
        return out

    def finish(self) -> dict[str, str]:
        """Keeps the final weights, decoder and teacher included, and drops the state that only a resume needs."""
        folder = self.session.folder
        state = whole_state(self.module.state_dict())
        if not self.session.world.first:
            return {}
        checkpoints.save_weights(
            folder.checkpoints / "model.safetensors", state, {"run": folder.id, "stage": "pretrain"}
        )
        files = sorted(
            p for p in folder.checkpoints.glob("*.safetensors") if not p.name.startswith(("state-", "nonfinite-"))
        )
        return {path.name: checksum(path) for path in files}


@torch.no_grad()
def knn_top1(encoder: Encoder, config: Pretrain, session: Session) -> float:
    """Weighted kNN on mean patch features of unaugmented pictures (Wu et al. 2018): top-1 in percent.

    Each rank does all of it: the bank must be the whole one, and it is small.
    """
    alone = replace(session, world=replace(session.world, rank=0, size=1))
    banks = []
    for split in ("train", "val"):
        dataset = subset(open_dataset(config.data, split), config.probe.pictures)  # type: ignore[arg-type]
        features, labels = [], []
        for batch in loader(alone, config, dataset, config.seed, 256, train=False).epoch(0):
            tokens = encoder.encode(encoder.embed(patchify(batch.images, encoder.patch)))
            features.append(F.normalize(tokens[:, 1:].mean(1).float(), dim=1))
            labels.append(batch.labels)
        banks.append((torch.cat(features), torch.cat(labels)))
    (bank, bank_labels), (queries, answers) = banks
    similarity, neighbours = (queries @ bank.T).topk(min(config.probe.k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=bank.device)
    votes.scatter_add_(1, bank_labels[neighbours], (similarity / config.probe.temperature).exp())
    return round(100 * float((votes.argmax(1) == answers).double().mean()), 4)
