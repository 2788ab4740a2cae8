"""What a sweep costs: FLOP by formula, GPU-hours from an assumed or a measured speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from math import fsum
from typing import Any

from ablations.planner import PlannedRun, Sweep
from ablations.scale import PAPER_PICTURES
from sdae.config import Config, dump, parse
from sdae.models.flops import per_image
from sdae.store import Store

PEAK = 790e12  # FLOP/s, dense bf16, measured on an H200
MFU = (0.25, 0.5)  # of the peak, the range that well-made ViT training reaches
SPREAD = (0.85, 1.15)  # of a measured speed: other stages and views than the measured one

Calibration = dict[tuple[Any, ...], float]


def flop(config: Config, pictures: int = PAPER_PICTURES) -> float:
    """FLOP of a whole run on `pictures` training pictures; validation and start-up left out."""
    if config.stage == "cost":
        steps = config.cost.repeats * config.cost.steps
        return 2 * steps * config.cost.batch_size * per_image(config)  # MAE is measured in between
    if config.stage == "segment" or config.stage == "detect":
        return config.optim.steps * config.optim.batch_size * per_image(config)
    count = config.data.train_pictures or pictures
    return config.optim.epochs * count * per_image(config)


def calibrate(store: Store) -> Calibration:
    """FLOP/s reached per network, from the finished cost runs of a store; the slowest counts."""
    speeds: Calibration = {}
    for identity in store.ids():
        if identity.startswith("cost-"):
            folder = store.run(identity)
            result = folder.result() or {}
            speed, values = (result.get("metrics") or {}).get("images_per_s"), result.get("config")
            config = parse(values, f"{identity}/result.json") if values else folder.config() if speed else None
            if speed and config is not None:
                key = network(config)
                speeds[key] = min(speeds.get(key, float("inf")), speed * per_image(config))
    return speeds


def network(config: Config) -> tuple[Any, ...]:
    model = config.model
    return (model.arch, model.width, model.depth, config.tokens, config.precision)


def gpu_hours(
    run: PlannedRun, calibration: Calibration | None = None, pictures: int = PAPER_PICTURES
) -> tuple[float, float]:
    """Low and high GPU-hours of one run: at 25-50 % of an H200's peak, or at the speed that a cost run measured."""
    work = flop(run.config, pictures) / 3600
    measured = (calibration or {}).get(network(run.config))
    if measured:
        return work / (measured * SPREAD[1]), work / (measured * SPREAD[0])
    return work / (PEAK * MFU[1]), work / (PEAK * MFU[0])


def done_runs(sweep: Sweep, store: Store) -> set[str]:
    """The runs that are done, of a sweep and of what it needs from elsewhere; each is looked at once."""
    needs = {need for run in sweep.runs.values() for need in run.needs}
    return {identity for identity in needs.union(sweep.runs) if store.run(identity).done}


def hours_left(sweep: Sweep, store: Store, done: Container[str]) -> dict[str, tuple[float, float]]:
    """Low and high GPU-hours of each run of a sweep that is not done; what it needs from elsewhere is left out."""
    calibration, pictures = calibrate(store), sweep.scale.pictures
    return {i: gpu_hours(run, calibration, pictures) for i, run in sweep.runs.items() if i not in done}


def total_gpu_hours(sweep: Sweep, store: Store) -> tuple[float, float]:
    """Low and high GPU-hours of the runs that are not done yet, each counted once."""
    hours = _sum([*hours_left(sweep, store, done_runs(sweep, store)).values()])
    return hours["low"], hours["high"]


def forecast(sweep: Sweep, store: Store) -> list[dict[str, Any]]:
    """What each artifact still takes: one row per artifact, in the sweep's order.

    `runs`: those that feed it, needs included; `shared`: how many of them another artifact of the sweep needs too;
    `left`: those not done; `gpu_hours`: low and high of what is left. A run of several artifacts counts in each row, so
    the rows' sum may pass `total_gpu_hours`, which counts it once.
    """
    return _by_artifact(sweep, hours_left(sweep, store, done_runs(sweep, store)))


def _by_artifact(sweep: Sweep, left: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    runs, shared = Counter[str](), Counter[str]()
    hours: dict[str, list[tuple[float, float]]] = {artifact.name: [] for artifact in sweep.artifacts}
    for run in sweep.runs.values():
        fed = {cell.partition(".")[0] for cell in run.feeds}
        runs.update(fed)
        shared.update(fed if len(fed) > 1 else ())
        if run.id in left:
            for artifact in fed:
                hours[artifact].append(left[run.id])
    return [
        {"artifact": a, "runs": runs[a], "left": len(mine), "gpu_hours": _sum(mine), "shared": shared[a]}
        for a, mine in hours.items()
    ]


def _sum(hours: list[tuple[float, float]]) -> dict[str, float]:
    return {"low": fsum(low for low, _ in hours), "high": fsum(high for _, high in hours)}


def plan_document(sweep: Sweep, store: Store) -> dict[str, Any]:
    """`sweep plan --json`. `paper` of a run: the paper's values of the numbers that the scale changed.

    `artifacts`: the rows of `forecast`; `gpu_hours` counts each run once.
    """
    states = {identity: store.run(identity).state() for identity in sweep.runs}
    done = {identity for identity, state in states.items() if state == "done"}
    left = hours_left(sweep, store, done)
    runs = [
        {
            "id": run.id, "stage": run.config.stage, "config": dump(run.config), "needs": list(run.needs),
            "feeds": run.feeds, "state": states[run.id], "paper": run.paper,
        }
        for run in sweep.runs.values()
    ]  # fmt: skip
    return {
        "scale": sweep.scale.name, "runs": runs, "requested": sweep.requested, "unique": sweep.unique,
        "done": len(done), "gpu_hours": _sum([*left.values()]), "artifacts": _by_artifact(sweep, left),
        "blocked": [{"cell": cell, "reason": reason} for cell, reason in sweep.blocked.items()],
    }  # fmt: skip
