"""Which share of a training step waits for pictures, in real runs of 64 px, patch 8 (the scale `small`), here.

    python benchmarks/data_wait.py                       # ViT-S and ViT-Ti; pictures from memory, files, shards, raw
    python benchmarks/data_wait.py --archs vit_small_patch8 --forms memory --steps 60 --json data_wait.json

Each row is a pre-training (SdAE, three folds) in a store of its own; `data_wait` is what the run's own metrics say,
median, least and most over their rows but the first, which holds the start of the workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from sdae.config import parse
from sdae.data.feed import make_pictures
from sdae.data.packing import prepare
from sdae.provenance import origin
from sdae.run import execute
from sdae.store import Store

ARCHS = ("vit_small_patch8", "vit_tiny_patch8")
FORMS = ("memory", "files", "shards", "raw")
BATCH, LOG_EVERY = 64, 5
GOAL = 0.03


def main() -> None:
    options = arguments()
    rows = []
    with tempfile.TemporaryDirectory(prefix="sdae-wait-") as scratch:
        sections = pictures(Path(scratch), options)
        for arch in options.archs:
            for form in options.forms:
                rows.append(waited(arch, form, sections[form], options, Store(Path(scratch) / f"{arch}-{form}")))
                print("{arch:18} {form:7} {images_per_s:8.1f} images/s  waits {data_wait:7.2%}".format(**rows[-1]))
    if options.json:
        device = options.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        found = {"benchmark": "data_wait", "device": device, "goal": GOAL, "rows": rows, **origin()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def pictures(scratch: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The `data` section of each form; what lies in files was made at a usual size, 500 x 375."""
    count, files = BATCH * max(4, options.steps // 4), scratch / "files"  # 16 steps log the three rows that it takes
    sections: dict[str, dict[str, Any]] = {
        "memory": {"name": "builtin", "train_pictures": count, "val_pictures": 10},
        "files": {"name": "imagefolder", "path": str(files)},
    }
    if set(options.forms) - {"memory"}:
        make_pictures(files, count)
    for form in ("shards", "raw"):
        if form in options.forms:
            prepare(files, scratch / form, form, side=options.side)  # type: ignore[arg-type]
            sections[form] = {"name": "packed", "path": str(scratch / form)}
    return sections


def waited(arch: str, form: str, data: dict[str, Any], options: argparse.Namespace, store: Store) -> dict[str, Any]:
    config = parse({
        "stage": "pretrain", "data": data | {"image_size": 64},
        "model": {"arch": arch, "decoder_depth": 2, "decoder_dim": 128, "decoder_heads": 4, "drop_path": 0.0},
        "optim": {"batch_size": BATCH, "epochs": 4, "warmup_epochs": 1},
        "precision": options.precision, "scale": "small",
        "efficiency": {"device": options.device, "workers": options.workers, "log_every": LOG_EVERY, "threads": 2},
    })  # fmt: skip
    result = execute(config, store)
    found = [row for row in store.run(result["id"]).metrics() if "data_wait" in row][1:]
    waits = [row["data_wait"] for row in found]
    return {
        "arch": arch, "form": form, "images_per_s": round(statistics.median(r["images_per_s"] for r in found), 1),
        "data_wait": statistics.median(waits), "low": min(waits), "high": max(waits), "repeats": waits,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=lambda text: text.split(","), default=list(ARCHS))
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--steps", type=int, default=24, help="of each run, about")
    parser.add_argument(
        "--side", type=int, default=72, help="of the packed pictures: that of 64 px and a crop's margin"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path, help="also write the rows, versions and hardware to this file")
    options = parser.parse_args()
    if unknown := [name for name in options.forms if name not in FORMS]:
        parser.error(f"--forms: {', '.join(unknown)} unknown (allowed: {', '.join(FORMS)})")
    return options


if __name__ == "__main__":
    main()
