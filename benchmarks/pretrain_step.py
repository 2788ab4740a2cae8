"""Images per second of one pre-training step, per teacher view, and its overhead over MAE.

    python benchmarks/pretrain_step.py                     # 32 px, patch 4, width 192, depth 6, decoder 2 x 128
    python benchmarks/pretrain_step.py --size vit_small    # ViT-S/16 at 224 px
    python benchmarks/pretrain_step.py --linear            # the CPU's fast linear layers against nn.Linear

All variants take turns in one process, repeat by repeat; medians and spreads are over the repeats, after a warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from sdae import provenance
from sdae.config import CostRun, parse
from sdae.models.flops import per_image
from sdae.models.linear import plain
from sdae.stages.cost import Bench, measured
from sdae.stages.session import Session
from sdae.store import Store
from sdae.training.distributed import World
from sdae.training.loop import Stop
from sdae.training.telemetry import Pulse, peak_flops
from sdae.yamls import merge

MICRO = {
    "data": {"image_size": 32}, "cost": {"batch_size": 128, "steps": 1},
    "model": {"arch": "vit_tiny_patch16", "patch_size": 4, "width": 192, "depth": 6, "heads": 3,
              "decoder_depth": 2, "decoder_dim": 128, "decoder_heads": 4, "drop_path": 0.0},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "micro": MICRO,
    "vit_small": {
        "data": {"image_size": 224}, "cost": {"batch_size": 8, "steps": 1},
        "model": {"arch": "vit_small_patch16", "drop_path": 0.0},
    },
    "vit_base": {"data": {"image_size": 224}, "cost": {"batch_size": 96, "steps": 3}, "model": {"drop_path": 0.0}},
}  # fmt: skip
VIEWS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae"},
    "full": {"teacher": {"view": "full"}},
    "masked": {"teacher": {"view": "masked"}},
    "crop": {"teacher": {"view": "crop"}},
    "folds": {"teacher": {"view": "folds", "folds": 3}},
}


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    store = Store("unused")
    session = Session(store, store.run("unused"), World(0, 1, device), Pulse(store.run("unused"), None), Stop())
    configs = {view: config_of(view, options) for view in options.views}
    measured(configs[options.views[0]], configs[options.views[0]].method, session)  # warms the libraries up
    benches: dict[str, Bench] = {}
    memory: dict[str, int | None] = {}
    for view, config in configs.items():
        benches[view], memory[view] = measured(config, config.method, session)
    variants = {(view, fast) for view in benches for fast in ([True, False] if options.linear else [True])}
    seconds: dict[tuple[str, bool], list[float]] = {variant: [] for variant in sorted(variants)}
    for _ in range(options.repeats):
        for (view, fast), times in seconds.items():
            with contextlib.nullcontext() if fast else plain():
                times.append(benches[view].repeat())
    rows = [row(view, fast, seconds, configs[view], memory[view], device) for view, fast in seconds]
    report(rows, options, device)


def config_of(view: str, options: argparse.Namespace) -> CostRun:
    values = merge(SIZES[options.size], {"stage": "cost", "precision": options.precision, "method": VIEWS[view]})
    values = merge(values, {"efficiency": {"compile": options.compile}})
    if view == "crop":
        side = values["data"]["image_size"] // values["model"].get("patch_size", 16)
        values = merge(values, {"method": {"teacher": {"tokens": side**2 // 4}}})
    if options.batch:
        values = merge(values, {"cost": {"batch_size": options.batch}})
    config = parse(values)
    assert isinstance(config, CostRun)
    return config


def row(
    view: str, fast: bool, seconds: dict[tuple[str, bool], list[float]], config: CostRun, memory: int | None,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    images = config.cost.batch_size * config.cost.steps
    rates = sorted(images / s for s in seconds[view, fast])
    base = seconds.get(("mae", fast))
    overheads = [100 * (a / b - 1) for a, b in zip(seconds[view, fast], base, strict=True)] if base else []
    flop = per_image(config)
    return {
        "view": view, "linear": "fast" if fast else "nn.Linear", "arch": config.model.arch,
        "images_per_s": round(statistics.median(rates), 2), "low": round(rates[0], 2), "high": round(rates[-1], 2),
        "overhead_percent": round(statistics.median(overheads), 2) if overheads and view != "mae" else None,
        "memory_mb": None if memory is None else round(memory / 1e6, 1),
        "mfu": round(statistics.median(rates) * flop / peak_flops(device.type, config.precision), 4),
        "gflop_per_image": round(flop / 1e9, 4),
    }  # fmt: skip


def report(rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    print(
        f"{options.size}, {options.precision}, {device}, {torch.get_num_threads()} threads, {options.repeats} repeats"
    )
    print(f"{'view':8} {'linear':10} {'images/s':>10} {'low':>9} {'high':>9} {'over MAE':>9} {'memory':>10} {'MFU':>6}")
    for r in rows:
        over = "" if r["overhead_percent"] is None else f"{r['overhead_percent']:+.1f} %"
        memory = "" if r["memory_mb"] is None else f"{r['memory_mb']:.0f} MB"
        print(
            f"{r['view']:8} {r['linear']:10} {r['images_per_s']:10.1f} {r['low']:9.1f} {r['high']:9.1f} {over:>9} "
            f"{memory:>10} {r['mfu']:6.3f}"
        )
    if options.json:
        origin = {k: v for k, v in provenance.record().items() if k not in ("diff", "host", "slurm")}
        Path(options.json).write_text(json.dumps({"rows": rows, **origin}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--views", type=lambda text: text.split(","), default=list(VIEWS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", help="also write the rows, versions and hardware to this file")
    options = parser.parse_args()
    if unknown := [view for view in options.views if view not in VIEWS]:
        sys.exit(f"--views: {', '.join(unknown)} unknown (allowed: {', '.join(VIEWS)})")
    return options


if __name__ == "__main__":
    main()
