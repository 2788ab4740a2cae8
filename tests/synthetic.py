"""Stores with made-up results, for testing tables and figures. Every run in them says that it is synthetic."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ablations.planner import PlannedRun, Sweep
from sdae.config import Config, dump
from sdae.store import MARK, Store


def fill(
    store: Store,
    sweep: Sweep,
    means: Mapping[str, float] | None = None,
    noise: float = 0.1,
    *,
    default: float = 80.0,
    skip: tuple[str, ...] = (),
    synthetic: bool = True,
) -> None:
    """Done run folders for every run of `sweep`, as `sdae.run` would leave them.

    means: planted mean by cell name; other cells get `default`. Each run's value is its cell's mean plus normal noise,
    a function of the run's id. Runs that feed a cell of `skip` (or a row, `table5.masked`) directly are left out.
    """
    metrics: dict[str, dict[str, Any]] = {identity: {} for identity in sweep.runs}
    left_out: set[str] = set()
    cells = {name: cell for artifact in sweep.artifacts for name, cell in artifact.cells.items()}
    for name, runs in sweep.cells.items():
        mean = (means or {}).get(name)
        for _, identity in runs:
            if any(name == s or name.startswith(s + ".") for s in skip):
                left_out.add(identity)
            if mean is not None or cells[name].metric not in metrics[identity]:
                draw = np.random.default_rng(zlib.crc32(f"{identity} {cells[name].metric}".encode())).normal()
                metrics[identity][str(cells[name].metric)] = (default if mean is None else mean) + noise * float(draw)
    for identity, run in sweep.runs.items():
        if identity not in left_out:
            write(store, run.config, identity, metrics[identity], synthetic=synthetic)


def result(config: Config, identity: str, metrics: Mapping[str, Any], *, synthetic: bool = True) -> dict[str, Any]:
    values: dict[str, Any] = dict(metrics)
    if config.stage == "pretrain":
        values |= {"loss": 0.5, "target_std": 1.0, "target_rank": 12.0, "teacher_distance": 0.1, "images_per_s": 100.0}
    elif config.stage != "cost":
        values |= {"top5": 95.0, "loss": 1.0}
    if config.stage == "cost" and config.method.name == "mae":
        values["overhead"] = None
    data, model = config.data, config.model
    return {
        "format": 1, "id": identity, "stage": config.stage, "seed": config.seed, "scale": config.scale,
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, "train": 256, "val": 128, "classes": 10},
        "model": f"{model.arch} ({model.width}x{model.depth})", "image_size": data.image_size, "metrics": values,
        "time": {"started": 1.7e9, "ended": 1.7e9 + 60, "seconds": 60.0}, "device": "cpu", "synthetic": synthetic,
        "weights": {}, "config": dump(config), "provenance": {"commit": "c0ffee" * 6 + "c0ff", "dirty": False},
    }  # fmt: skip


def write(store: Store, config: Config, identity: str, metrics: Mapping[str, Any], *, synthetic: bool = True) -> None:
    folder = store.run(identity).path
    folder.mkdir(parents=True, exist_ok=True)
    if synthetic:
        (store.root / MARK).touch()
    (folder / "result.json").write_text(json.dumps(result(config, identity, metrics, synthetic=synthetic), indent=1))


def run_of(sweep: Sweep, cell: str, index: int = 0) -> PlannedRun:
    return sweep.runs[sweep.cells[cell][index][1]]
