"""Optimizers, parameter groups and schedules (paper section 3, recipes of MAE and of the authors' release)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sdae.sections import Optim, StepOptim


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: Sequence[float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over what is trained; no decay on parameters of one dimension."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True
    )


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    depth: int = 0,
    undecayed: Sequence[str] = (),
) -> list[dict[str, object]]:
    """Groups by weight decay and, in fine-tuning, by layer.

    Layer i's learning rate is scaled by layer_decay^(depth + 1 - i): patch, cls and position are layer 0, block b is
    layer b + 1, what comes behind the blocks layer depth + 1. `undecayed`: parameters without weight decay beside the
    one-dimensional ones.
    """
    groups: dict[tuple[float, float], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.dim() <= 1 or name.endswith(tuple(undecayed))
        decay = 0.0 if plain else weight_decay
        scale = layer_decay ** (depth + 1 - layer_of(name, depth)) if layer_decay is not None else 1.0
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)  # type: ignore[attr-defined]
    return list(groups.values())


def lars(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """LARS (You et al. 2017), momentum 0.9, trust 0.001; the trust ratio adapts tensors of more than one dimension.

    timm adapts nothing at weight decay 0 unless told to (`always_adapt`).
    """
    from timm.optim.lars import Lars

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars([g for g in groups if g["params"]], lr=lr, momentum=0.9, trust_coeff=0.001)  # type: ignore[no-any-return]


def layer_of(name: str, depth: int) -> int:
    """The layer whose decay a parameter has: 0 the embeddings, 1 to depth the blocks, depth + 1 the rest."""
    name = name.removeprefix("backbone.")
    if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def learning_rate(t: float, *, peak: float, epochs: float, warmup: float, minimum: float) -> float:
    """At t = epoch + step / steps_per_epoch: linear from 0 to `peak` over the warm-up, then a cosine to `minimum`."""
    if t < warmup:
        return peak * t / warmup
    if epochs <= warmup:
        return peak
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (epochs - warmup)))


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run and the learning rate of each."""

    steps: int
    rate: Callable[[int], float]


def schedule(optim: Optim | StepOptim, per_epoch: int) -> Schedule:
    """per_epoch: steps of an epoch, for recipes that count in epochs."""
    if isinstance(optim, StepOptim):
        return Schedule(optim.steps, lambda step: rate_at(optim, step))
    peak = optim.base_lr * optim.batch_size / 256
    shape = {"peak": peak, "epochs": optim.epochs, "warmup": optim.warmup_epochs, "minimum": optim.min_lr}
    return Schedule(
        optim.epochs * per_epoch,
        lambda step: learning_rate(step // per_epoch + (step % per_epoch) / per_epoch, **shape),
    )


def rate_at(optim: StepOptim, step: int) -> float:
    """Linear from 0 over the warm-up; then poly: lr (1 - t)^power, or steps: lr times 0.1 at each milestone passed.

    t counts from the first step, as in the recipe's own framework, so the warm-up's end meets the falling line.
    """
    if optim.schedule == "poly":
        whole: float = optim.lr * (1 - step / optim.steps) ** optim.power
    else:
        whole = optim.lr * 0.1 ** sum(step >= milestone for milestone in optim.milestones)
    return whole * step / optim.warmup_steps if step < optim.warmup_steps else whole


def ema_momentum(epoch: int, *, start: float, end: float | None, epochs: int) -> float:
    """The teacher's momentum in an epoch: a cosine over the epochs from `start` towards `end`, never reached."""
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
