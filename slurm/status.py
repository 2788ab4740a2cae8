"""How a sweep stands, from the store alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ablations.planner import Sweep, available, plan
from ablations.scale import Scale
from sdae.store import RunFolder, Store
from slurm.local import tail


def status(sweep: Sweep, store: Store) -> dict[str, Any]:
    """{"scale", "counts": {state: n}, "runs": [..]}; a run whose need failed is `waiting`, one not begun is `new`."""
    states: dict[str, str] = {}
    rows = []
    for run in sweep.runs.values():
        folder = store.run(run.id)
        state = folder.state()
        if state == "new" and any(states.get(need) in ("failed", "waiting") for need in run.needs):
            state = "waiting"
        states[run.id] = state
        row: dict[str, Any] = {"id": run.id, "stage": run.config.stage, "state": state, "feeds": run.feeds}
        if state == "running":
            row |= progress(folder)
        if state == "failed":
            failure = folder.failure() or {}
            row["failure"] = {key: failure.get(key) for key in ("class", "message", "attempt")}
            row["last_lines"] = tail(folder.log, 5)
        rows.append(row)
    return {"scale": sweep.scale.name, "counts": dict(Counter(states.values())), "runs": rows}


def progress(folder: RunFolder) -> dict[str, Any]:
    """Where a running run is, from its heartbeat: epoch, epochs, images_per_s, seconds since it was heard of."""
    beat = folder.heartbeat() or {}
    heard = beat.get("time")
    return {
        **{key: beat.get(key) for key in ("epoch", "epochs", "step", "steps", "images_per_s")},
        "heard_s": round(time.time() - heard, 1) if heard else None,
    }


def overview(scale: Scale, seeds: Sequence[int], store: Store) -> list[dict[str, Any]]:
    """The suite's artifacts at a scale: how many cells and runs each has, and how many of these are done."""
    rows = []
    for name in available():
        sweep = plan([name], scale, seeds)
        artifact = sweep.artifacts[0]
        rows.append(
            {
                "artifact": name, "kind": artifact.kind, "title": artifact.title, "cells": len(artifact.cells),
                "filled": len(artifact.specs), "runs": sweep.unique,
                "done": sum(store.run(identity).done for identity in sweep.runs),
            }
        )  # fmt: skip
    return rows
