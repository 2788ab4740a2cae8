"""How a sweep stands, for people and programs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ablations.planner import PlannedRun, available, plan
from ablations.scale import Scale
from sdae.store import RunFolder, Store
from slurm.local import tail
from slurm.look import Survey, log_of


def status(runs: Iterable[PlannedRun], found: Survey) -> dict[str, Any]:
    """{"counts": {state: n}, "runs": [..], "synthetic": whether they are made up, "trouble": why Slurm told nothing}.

    A state is waiting (for a need) | queued | running | done | failed | lost | started (stopped, resumable) | new |
    unknown.
    """
    rows = []
    for run in runs:
        folder, standing = found.store.run(run.id), found.standings[run.id]
        row: dict[str, Any] = {"id": run.id, "stage": run.config.stage, "state": standing.state, "feeds": run.feeds}
        if standing.task is not None:
            task = standing.task
            row["slurm"] = {"job": task.id, "state": task.state, "reason": task.reason, "node": task.node}
        if standing.detail:
            row["detail"] = standing.detail
        if standing.state == "running":
            row |= progress(folder, run)
        if standing.state in ("failed", "lost"):
            failure = folder.failure() or dict(zip(("class", "message"), standing.verdict or (), strict=False))
            row["failure"] = {key: failure.get(key) for key in ("class", "message", "attempt")}
            row["last_lines"] = tail(log_of(found.store, run.id), 5)
        rows.append(row)
    counts = Counter(row["state"] for row in rows)
    synthetic = found.store.synthetic
    return {"counts": dict(counts), "runs": rows, "synthetic": synthetic, "trouble": found.trouble}


def progress(folder: RunFolder, run: PlannedRun) -> dict[str, Any]:
    """Where a running run is, from its heartbeat: epoch, epochs, step, steps, images_per_s, eta_s (seconds to its end),
    heard_s (seconds since it was heard of)."""
    beat = folder.heartbeat() or {}
    beat = {key: value for key, value in beat.items() if isinstance(value, (int, float)) and abs(value) < 1e15}
    heard, rate, step, steps = (beat.get(key) for key in ("time", "images_per_s", "step", "steps"))
    left = (steps - step) * run.config.optim.batch_size if run.config.stage != "cost" and steps and step else None
    eta = left / rate if left is not None and rate else math.inf
    return {
        **{key: beat.get(key) for key in ("epoch", "epochs", "step", "steps", "images_per_s")},
        "eta_s": round(eta) if math.isfinite(eta) else None,
        "heard_s": round(time.time() - heard, 1) if heard else None,
    }


def overview(scale: Scale, seeds: Sequence[int], store: Store) -> list[dict[str, Any]]:
    """The suite's artifacts at a scale: how many cells and runs each has, and how many of these are done."""
    rows = []
    for name in available():
        sweep = plan([name], scale, seeds, content=store.fingerprint)
        artifact = sweep.artifacts[0]
        rows.append(
            {
                "artifact": name, "kind": artifact.kind, "title": artifact.title, "cells": len(artifact.cells),
                "filled": len(sweep.cells), "runs": sweep.unique,
                "done": sum(store.run(identity).done for identity in sweep.runs),
            }
        )  # fmt: skip
    return rows
