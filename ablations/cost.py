"""What a sweep costs: FLOP by formula, GPU-hours from an assumed or a measured speed."""

from __future__ import annotations

from typing import Any

from ablations.planner import PlannedRun, Sweep
from ablations.scale import PAPER_PICTURES
from sdae.config import Config, dump
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
    count = config.data.train_pictures or pictures
    return config.optim.epochs * count * per_image(config)


def calibrate(store: Store) -> Calibration:
    """FLOP/s reached per network, from the finished cost runs of a store; the slowest counts."""
    speeds: Calibration = {}
    for identity in store.ids():
        if identity.startswith("cost-"):
            folder = store.run(identity)
            result, config = folder.result(), folder.config()
            speed = ((result or {}).get("metrics") or {}).get("images_per_s")
            if config is not None and speed:
                key = _network(config)
                speeds[key] = min(speeds.get(key, float("inf")), speed * per_image(config))
    return speeds


def _network(config: Config) -> tuple[Any, ...]:
    model = config.model
    return (model.arch, model.width, model.depth, config.tokens, config.precision)


def gpu_hours(
    run: PlannedRun, calibration: Calibration | None = None, pictures: int = PAPER_PICTURES
) -> tuple[float, float]:
    """Low and high GPU-hours of one run: at 25-50 % of an H200's peak, or at the speed that a cost run measured."""
    work = flop(run.config, pictures) / 3600
    measured = (calibration or {}).get(_network(run.config))
    if measured:
        return work / (measured * SPREAD[1]), work / (measured * SPREAD[0])
    return work / (PEAK * MFU[1]), work / (PEAK * MFU[0])


def total_gpu_hours(sweep: Sweep, store: Store) -> tuple[float, float]:
    """Low and high GPU-hours of the runs that are not done yet."""
    calibration = calibrate(store)
    hours = [gpu_hours(r, calibration, sweep.scale.pictures) for r in sweep.runs.values() if not store.run(r.id).done]
    return sum(low for low, _ in hours), sum(high for _, high in hours)


def plan_document(sweep: Sweep, store: Store) -> dict[str, Any]:
    """`sweep plan --json`. `paper` of a run: the paper's values of the numbers that the scale changed."""
    low, high = total_gpu_hours(sweep, store)
    runs = [
        {
            "id": run.id, "stage": run.config.stage, "config": dump(run.config), "needs": list(run.needs),
            "feeds": run.feeds, "state": store.run(run.id).state(), "paper": run.paper,
        }
        for run in sweep.runs.values()
    ]  # fmt: skip
    return {
        "scale": sweep.scale.name, "runs": runs, "requested": sweep.requested, "unique": sweep.unique,
        "done": sum(run["state"] == "done" for run in runs), "gpu_hours": {"low": low, "high": high},
    }  # fmt: skip
