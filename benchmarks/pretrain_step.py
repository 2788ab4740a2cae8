"""Images per second of one pre-training step: teacher views, eager and compiled, precisions, batch sizes.

    python benchmarks/pretrain_step.py                     # 32 px, patch 4, width 192, depth 6, decoder 2 x 128
    python benchmarks/pretrain_step.py --size vit_small    # ViT-S/16 at 224 px
    python benchmarks/pretrain_step.py --size vit_base --modes eager,compiled,graphs --batch 96,256 --parts

All variants take turns in one process, repeat by repeat; medians and spreads are over the repeats, after a warm-up.
--parts also tells what encoder, decoder, teacher and optimizer take of the step of the folds, else of the last view.
Compiled code on a CPU is measured where it is asked for; runs there are eager.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts import measure_parts

from sdae.config import CostRun, parse
from sdae.files import write_atomically
from sdae.models.flops import per_image
from sdae.provenance import origin
from sdae.stages.cost import Bench, measured
from sdae.stages.session import Session
from sdae.store import Store
from sdae.training import parallel
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
    "nano": merge(MICRO, {"cost": {"batch_size": 8}, "model": {"width": 24, "depth": 2, "decoder_depth": 1}}),
    "micro": MICRO,
    "vit_small": {
        "data": {"image_size": 224}, "cost": {"batch_size": 8, "steps": 1},
        "model": {"arch": "vit_small_patch16", "drop_path": 0.0},
    },
    "vit_base": {"data": {"image_size": 224}, "cost": {"batch_size": 96, "steps": 3}, "model": {"drop_path": 0.0}},
    "vit_large": {
        "data": {"image_size": 224}, "cost": {"batch_size": 96, "steps": 3},
        "model": {"arch": "vit_large_patch16", "drop_path": 0.0},
    },
}  # fmt: skip
VIEWS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae"},
    "full": {"teacher": {"view": "full"}},
    "masked": {"teacher": {"view": "masked"}},
    "crop": {"teacher": {"view": "crop"}},
    "folds": {"teacher": {"view": "folds", "folds": 3}},
}
MODES = ("eager", "compiled", "graphs")
PRECISIONS = ("fp32", "bf16")


class Variant(NamedTuple):
    view: str
    mode: str
    precision: str
    batch: int


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    session = session_of(options)
    device = session.world.device
    if set(options.modes) != {"eager"}:
        parallel.COMPILED_ON.add(device.type)
    setting = {k: v for k, v in vars(options).items() if k != "json"}
    head, tail = {"benchmark": "pretrain_step", "device": device.type, "options": setting}, origin()

    def save(found: dict[str, Any]) -> None:
        if options.json:
            write_atomically(Path(options.json), json.dumps({**head, **found, **tail}, indent=1) + "\n")

    report(measure(options, session, save), options, device)


def session_of(options: argparse.Namespace) -> Session:
    """One process on the GPU, or without one, or with --cpu, on the CPU; its store is never written."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    store = Store("unused")
    return Session(store, store.run("unused"), World(0, 1, device), Pulse(store.run("unused"), None), Stop())


def measure(options: argparse.Namespace, session: Session, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """rows: one a variant, with every repeat; parts: of the folds, else the last view, one table for each mode,
    precision and batch. What is known is saved after every turn and table: who is killed has not worked in vain."""
    batches = options.batch or [SIZES[options.size]["cost"]["batch_size"]]
    grid = itertools.product(options.precision, batches, options.modes, options.views)
    variants = [Variant(v, m, p, b) for p, b, m, v in grid]
    first = config_of(variants[0], options)
    measured(first, first.method, session)  # warms the libraries up
    benches: dict[Variant, Bench] = {}
    memory: dict[Variant, int | None] = {}
    seconds: dict[Variant, list[float]] = {}
    found: dict[str, Any] = {"rows": []}
    for variant in variants:
        config = config_of(variant, options)
        try:
            benches[variant], memory[variant] = measured(config, config.method, session)
            seconds[variant] = [benches[variant].repeat()]  # told at once: compiling the next may take too long
            found["rows"] = [row(v, seconds, benches[v], memory[v]) for v in benches]
            save(found)
        except torch.OutOfMemoryError:
            print(f"{variant.view} {variant.mode} {variant.precision} {variant.batch}: out of memory", file=sys.stderr)
    seconds = {variant: [] for variant in benches}
    for _ in range(options.repeats):
        for variant, times in seconds.items():
            times.append(benches[variant].repeat())
        rows = [row(variant, seconds, benches[variant], memory[variant]) for variant in benches]
        found["rows"] = rows
        save(found)
    if not options.parts:
        return found
    view = "folds" if "folds" in options.views else options.views[-1]
    wanted = [v for v in benches if v.view == view]
    configs = {v: benches[v].config for v in wanted}
    benches.clear()  # one at a time: the parts of a large batch want the memory
    found["parts"] = []
    for variant in wanted:
        gc.collect()
        bench = measured(configs[variant], configs[variant].method, session)[0]
        found["parts"].append({**variant._asdict(), "parts": measure_parts(bench, options.repeats)})
        del bench
        save(found)
    return found


def config_of(variant: Variant, options: argparse.Namespace) -> CostRun:
    method, precision = VIEWS[variant.view], variant.precision
    values = merge(SIZES[options.size], {"stage": "cost", "precision": precision, "method": method})
    fast = {"compile": variant.mode != "eager", "cuda_graphs": variant.mode == "graphs"}
    values = merge(values, {"efficiency": fast, "cost": {"batch_size": variant.batch}})
    if options.steps:
        values = merge(values, {"cost": {"steps": options.steps}})
    if variant.view == "crop":
        side = values["data"]["image_size"] // values["model"].get("patch_size", 16)
        values = merge(values, {"method": {"teacher": {"tokens": side**2 // 4}}})
    config = parse(values)
    assert isinstance(config, CostRun)
    return config


def row(variant: Variant, seconds: dict[Variant, list[float]], bench: Bench, memory: int | None) -> dict[str, Any]:
    """overhead: over MAE's step in the same turn; speedup: eager's time over this one's; medians over the repeats."""
    config, mine = bench.config, seconds[variant]
    images = config.cost.batch_size * config.cost.steps
    rates = sorted(images / s for s in mine)
    flop = per_image(config)
    overheads = ratios(mine, seconds.get(variant._replace(view="mae")))
    speedups = ratios(seconds.get(variant._replace(mode="eager")), mine)
    return {
        **variant._asdict(), "arch": config.model.arch, "image_size": config.data.image_size,
        "folds": config.method.teacher.folds if config.method.teacher else None,
        "attention": bench.kernel or config.efficiency.attention,
        "images_per_s": round(statistics.median(rates), 2), "low": round(rates[0], 2), "high": round(rates[-1], 2),
        "overhead_percent": None if not overheads or variant.view == "mae"
        else round(100 * (statistics.median(overheads) - 1), 2),
        "speedup": round(statistics.median(speedups), 3) if speedups and variant.mode != "eager" else None,
        "memory_mb": None if memory is None else round(memory / 1e6, 1),
        "mfu": round(statistics.median(rates) * flop / peak_flops(bench.device.type, config.precision), 4),
        "gflop_per_image": round(flop / 1e9, 4), "steps": config.cost.steps, "seconds": mine,
    }  # fmt: skip


def ratios(above: list[float] | None, below: list[float] | None) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)] if above and below else []


def report(found: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
    print(f"{options.size}, {device}, {torch.get_num_threads()} threads, {options.repeats} repeats")
    print(
        f"{'view':8} {'mode':9} {'prec':5} {'batch':>5} {'images/s':>10} {'low':>9} {'high':>9} "
        f"{'over MAE':>9} {'x eager':>8} {'memory':>10} {'MFU':>6}"
    )
    for r in found["rows"]:
        over = "" if r["overhead_percent"] is None else f"{r['overhead_percent']:+.1f} %"
        faster = "" if r["speedup"] is None else f"{r['speedup']:.2f}"
        memory = "" if r["memory_mb"] is None else f"{r['memory_mb']:.0f} MB"
        print(
            f"{r['view']:8} {r['mode']:9} {r['precision']:5} {r['batch']:5} {r['images_per_s']:10.1f} "
            f"{r['low']:9.1f} {r['high']:9.1f} {over:>9} {faster:>8} {memory:>10} {r['mfu']:6.3f}"
        )
    for table in found.get("parts", []):
        print(f"\n{table['view']}, {table['mode']}, {table['precision']}, batch {table['batch']}")
        for p in table["parts"]:
            mfu = "" if p["mfu"] is None else f"MFU {p['mfu']:.3f}"
            moved = f"{p['gb_per_s']:.1f} GB/s" if "gb_per_s" in p else ""
            print(f"  {p['part']:10} {1e3 * p['seconds']:9.2f} ms {100 * p['share']:6.1f} %  {mfu} {moved}")


def words(allowed: Any) -> Any:
    def read(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [word for word in found if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown (allowed: {', '.join(allowed)})")
        return found

    return read


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--views", type=words(VIEWS), default=list(VIEWS))
    parser.add_argument("--modes", type=words(MODES), default=["eager"], help=f"of {', '.join(MODES)}")
    parser.add_argument("--precision", type=words(PRECISIONS), default=["fp32"], help="fp32, bf16 or both")
    parser.add_argument("--batch", type=lambda text: [int(b) for b in text.split(",")], help="e.g. 96,128,256")
    parser.add_argument("--steps", type=int, help="steps of a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", help="also write the rows, versions and hardware to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
