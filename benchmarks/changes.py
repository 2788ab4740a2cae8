"""What each change that makes the step fast is worth: the step without it over the step with it, in turns.

    python benchmarks/changes.py                                        # micro size, fp32 and bf16
    python benchmarks/changes.py --size vit_base --precision bf16       # on a GPU, with what is for GPUs alone

Eager steps of SdAE with three folds, the teacher's update in each. Every change is undone alone, the others stay.
Beside the ratio stands how far the losses of 200 steps lie apart with the change and without it, at a small size: the
largest relative difference, 0 where all bits are the same. What compiling and CUDA graphs are worth is told by
pretrain_step.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from parts import in_turns, seconds_of
from pretrain_step import PRECISIONS, SIZES, Variant, config_of, session_of, words
from torch import Tensor

from sdae.config import CostRun
from sdae.files import write_atomically
from sdae.methods.sdae import SdAE
from sdae.models import encoder
from sdae.models.linear import plain
from sdae.provenance import origin
from sdae.stages import cost
from sdae.stages.cost import Bench
from sdae.stages.session import Session
from sdae.training.optimizers import parameter_groups

MOMENTUM = 0.99
Undo = Callable[[], contextlib.AbstractContextManager[Any]]


class Change(NamedTuple):
    """name: what is undone. undo: a context in which it is. here: whether it does anything on this device."""

    name: str
    undo: Undo
    here: Callable[[torch.device, str], bool] = lambda device, precision: True


class Step:
    """One side: its own weights and optimizer, every step of it with the change or without."""

    def __init__(self, config: CostRun, session: Session, undo: Undo):
        self.undo = undo
        with undo():
            self.bench = Bench(config, config.method, session)

    def seconds(self) -> float:
        """Of a step, mean over those of a repeat."""
        with self.undo():
            return seconds_of(self.once, self.bench.config.cost.steps, self.bench.device)

    def once(self) -> Tensor:
        """The loss, on the device."""
        loss = self.bench.train_step()
        assert isinstance(self.bench.module, SdAE)
        self.bench.module.update_teacher(MOMENTUM)
        return loss


# Undone


def all_tokens() -> contextlib.AbstractContextManager[Any]:
    """The last block's MLP runs over all tokens; then the unwanted ones are let go."""
    ours = encoder.run_block

    def whole(
        block: Any, x: Tensor, drop: Tensor | None = None, keep: Any = None, bias: Tensor | None = None
    ) -> Tensor:
        x = ours(block, x, drop, None, bias)
        return x if keep is None else x[:, keep] if isinstance(keep, slice) else encoder.gather(x, keep)

    return mock.patch.object(encoder, "run_block", whole)


def all_patches() -> contextlib.AbstractContextManager[Any]:
    """All patches are embedded, then the wanted ones are picked."""
    ours = encoder.Encoder.embed

    def whole(self: encoder.Encoder, patches: Tensor, ids: Tensor | None = None) -> Tensor:
        embedded = ours(self, patches)
        return embedded if ids is None else encoder.gather(embedded, ids)

    return mock.patch.object(encoder.Encoder, "embed", whole)


def default_adamw() -> contextlib.AbstractContextManager[Any]:
    def adamw(model: Any, lr: float, weight_decay: float, betas: Any, eps: float = 1e-8) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)

    return mock.patch("sdae.stages.cost.adamw", adamw)


@torch.no_grad()
def _one_by_one(self: SdAE, momentum: float) -> None:
    student = dict(self.student.named_parameters())
    for name, parameter in self.teacher.named_parameters():
        parameter.mul_(momentum).add_(student[name], alpha=1 - momentum)


def on_time(draws: Callable[..., Any]) -> Callable[..., Any]:
    def masking(*args: Any) -> Any:
        found = draws(*args)
        found._thread = None
        return found

    return masking


def torchs_choice() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("sdae.training.attention.fastest", return_value=None)


def on_gpu(device: torch.device, precision: str) -> bool:
    return device.type == "cuda"


def on_cpu(device: torch.device, precision: str) -> bool:
    return device.type == "cpu"


CHANGES = [
    Change("oneDNN's product with its bias inside", plain, lambda d, p: on_cpu(d, p) and p == "fp32"),
    Change("two plain products for short rows", lambda: mock.patch.dict(encoder.SHORT, fp32=0, bf16=0), on_cpu),
    Change("the attention kernel that is the fastest", torchs_choice, on_gpu),
    Change("the last block's MLP for the wanted tokens", all_tokens),
    Change("the wanted patches embedded", all_patches),
    Change("fused AdamW", default_adamw),
    Change("the teacher's update in two calls", lambda: mock.patch.object(SdAE, "update_teacher", _one_by_one)),
    Change("draws made a step ahead", lambda: mock.patch.object(cost, "masking", on_time(cost.masking)), on_gpu),
]


LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # of the losses' relative difference on a CPU: rounding, grown over 200 steps


def main() -> None:
    options = arguments()
    session = session_of(options)
    device = session.world.device
    head, tail = {"benchmark": "changes", "device": device.type, "size": options.size}, origin()
    rows: list[dict[str, Any]] = []
    for precision in options.precision:
        wanted = trained(contextlib.nullcontext, precision, session, options.steps)
        for change in [change for change in CHANGES if change.here(device, precision)]:
            found = trained(change.undo, precision, session, options.steps)
            apart = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
            row = compared(change, precision, options, session) | {"losses": apart, "steps": options.steps}
            spread = f"x {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            print(f"{precision:5} {change.name:42} {spread}  losses {apart:.1e}", flush=True)
            rows.append(row)
            if options.json:  # what is known so far: a program that is killed has not worked in vain
                write_atomically(options.json, json.dumps({**head, "rows": rows, **tail}, indent=1) + "\n")
    far = [row for row in rows if not row["losses"] <= LIMITS[row["precision"]]]
    if far and device.type == "cpu":
        sys.exit(f"error: losses lie further apart than {LIMITS}: {', '.join(row['change'] for row in far)}")


def trained(undo: Undo, precision: str, session: Session, steps: int) -> list[float]:
    """Losses of so many steps at a small size."""
    step = Step(sized("nano", precision, 8), session, undo)
    with undo():
        return torch.stack([step.once() for _ in range(steps)]).tolist()


def compared(change: Change, precision: str, options: argparse.Namespace, session: Session) -> dict[str, Any]:
    config = sized(options.size, precision, options.batch or SIZES[options.size]["cost"]["batch_size"])
    undos = {"without": change.undo, "with": contextlib.nullcontext}
    seconds = in_turns({name: Step(config, session, undo).seconds for name, undo in undos.items()}, options.repeats)
    ratios = [a / b for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    return {
        "change": change.name, "precision": precision, "batch": config.cost.batch_size,
        "ratio": round(statistics.median(ratios), 4), "low": round(min(ratios), 4), "high": round(max(ratios), 4),
        **{f"{name}_ms": [1e3 * s for s in times] for name, times in seconds.items()},
    }  # fmt: skip


def sized(size: str, precision: str, batch: int) -> CostRun:
    return config_of(Variant("folds", "eager", precision, batch), argparse.Namespace(size=size, steps=None))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--precision", type=words(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200, help="over which losses are compared")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows, versions and hardware to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
