"""Records tests/reference_losses.json: what training computes today, to be asserted from then on (test_reference.py).

`python tests/make_reference_losses.py` writes it anew, which a change of the numbers on purpose wants (and a line in
CHANGELOG.md); `--compare FILE` tells how far this machine, torch and CPU are from a recording, case by case.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import tiny
from torch import Tensor, nn

from sdae.config import Config
from sdae.run import execute
from sdae.store import Store

FILE = Path(__file__).with_name("reference_losses.json")
WATCHED = ("loss", "lr", "teacher_distance", "target_std", "momentum", "top1", "top5")
VIEWS = {"full": {}, "masked": {}, "crop": {"tokens": 5}, "folds": {"folds": 3}}
LOOSE = {"checkpoint_minutes": 60, "log_every": 1}


def pretrain(**method: Any) -> Config:
    """50 steps: 80 pictures, 8 a batch, 5 epochs. A peak of the learning rate that moves the loss in so few."""
    optim = {"epochs": 5, "base_lr": 0.03, "min_lr": 1e-5}
    return tiny("pretrain", data={"train_pictures": 80}, optim=optim, efficiency=LOOSE, method=method)


def tune(stage: str, base_lr: float) -> Config:
    """20 steps: 40 pictures, 8 a batch, 4 epochs, with the recipe's own augmentation."""
    data = {"train_pictures": 40, "val_pictures": 20}
    return tiny(stage, data=data, optim={"epochs": 4, "base_lr": base_lr}, efficiency=LOOSE)


def cases() -> dict[str, Config]:
    """By name: every method and view, each with both ways to move the teacher, and the two ways to use it."""
    found = {"mae": pretrain(name="mae")}
    for every, momenta in (("epoch", (0.8, 0.95)), ("iteration", (0.95, None))):
        ema = {"every": every, "momentum": momenta[0], "momentum_end": momenta[1]}
        for view, keys in VIEWS.items():
            found[f"{view}-{every}"] = pretrain(teacher={"view": view, **keys}, ema=ema)
    return found | {"finetune": tune("finetune", 0.3), "linprobe": tune("linprobe", 1.0)}


@torch.no_grad()
def truncated(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """torch's `trunc_normal_` as it was up to 2.11 at least; 2.14 draws other weights from the same seed."""
    low, high = (math.erf((end - mean) / std / math.sqrt(2)) for end in (a, b))
    return tensor.uniform_(low, high).erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


def losses(config: Config, root: Path) -> dict[str, list[float]]:
    """Of a run from its start: each watched number of each row that has it, and of the result."""
    with mock.patch.object(nn.init, "trunc_normal_", truncated):
        result = execute(config, Store(root))
    rows = [*Store(root).run(result["id"]).metrics(), result["metrics"]]
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in WATCHED}
    return {key: values for key, values in found.items() if values}


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative distance."""
    gaps = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True) if a != b]
    return max(gaps, default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--out", type=Path, default=FILE)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(config, Path(folder)) for name, config in cases().items()}
    if words.compare:
        before = json.loads(words.compare.read_text())
        for name, series in found.items():
            gaps = {key: apart(values, before[name][key]) for key, values in series.items()}
            print(f"{name:18}", " ".join(f"{key} {gap:.1e}" for key, gap in gaps.items()))
        return 0
    half = words.out.with_suffix(".half")
    lines = [f"{json.dumps(name)}: {json.dumps(series)}" for name, series in found.items()]
    half.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    half.rename(words.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
