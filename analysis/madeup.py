"""The folder of one made-up run: the files that a real run leaves, with numbers that were drawn (`analysis.universe`).

Speed and memory are those of a device of 312 TFLOP/s used to 43 %, about what Table 1's seconds come to. Weights have
hashes and no files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from ablations.artifact import METRICS
from ablations.planner import PlannedRun
from ablations.scale import DENSE, SNAPSHOTS
from analysis.paper import printed
from sdae import provenance
from sdae.config import dump
from sdae.files import to_json
from sdae.models.flops import per_image
from sdae.store import FORMAT

NOISE = {"finetune": 0.10, "linprobe": 0.15, "segment": 0.30, "detect": 0.20}  # points, between seeds
TIME_NOISE, MEMORY_NOISE = 0.01, 0.0005  # shares
ABOUT = {"finetune": 83.3, "linprobe": 62.0, "segment": 47.0, "detect": 45.0, "cost": 700.0, "pretrain": 1.0}
TRAINING = {"ade20k": 20_210, "coco": 117_266, "segmentation-folder": 367, "coco-json": 292}  # pictures
VALIDATION = {  # pictures, classes; else as asked
    "imagefolder": (50_000, 1000), "packed": (50_000, 1000), "tiny-imagenet": (10_000, 200),
    "ade20k": (2000, 150), "coco": (5000, 80), "segmentation-folder": (101, 11), "coco-json": (188, 80),
}  # fmt: skip
PEAK, MFU, FASTEST = 312e12, 0.43, 2500.0  # of a device: FLOP/s, share of them, pictures per second
ROWS, DEVICES, SINCE = 20, 8, datetime(2026, 1, 1, tzinfo=UTC).timestamp()
NOWHERE = "synthetic"  # host, device and versions
MESSAGES = {
    "NonFiniteLoss": "the loss is nan at step {step}, pictures 17, 23, 42, ..",
    "TimedOut": "its state is saved, but job 4242_7 could not be requeued: the time limit was reached",
    "OutOfMemory": "CUDA out of memory. Tried to allocate 2.25 GiB",
    "WorkerDied": "the worker process ended with signal SIGKILL (often: out of memory)",
    "NodeFailure": "the node went down while job 4242_7 ran on it",
}
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def random_of(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


class MadeUp:
    """The files of a run, as `sdae.run` and its stage leave them."""

    def __init__(self, run: PlannedRun, seed: int, means: Mapping[str, float], pictures: int):
        self.run, self.config, self.means = run, run.config, means
        self.stage = str(run.config.stage)
        self.optim: Any = getattr(run.config, "optim", None)
        self.method: Any = getattr(run.config, "method", None)
        self.random = random_of(seed, run.id)
        self.weights = f"{seed} {run.id}"
        self.pictures = run.config.data.train_pictures or TRAINING.get(run.config.data.name, pictures)
        self.devices = 1 if self.stage == "cost" else DEVICES
        self.flop = per_image(run.config)
        self.speed = min(MFU * PEAK / self.flop, FASTEST) * self.devices * (1 + TIME_NOISE * self.random.normal())
        self.began = SINCE + int(self.random.integers(30 * 86400))
        self.seconds = 120.0
        if self.optim:
            dense = self.stage in DENSE
            taken = self.steps * self.optim.batch_size if dense else self.epochs * self.pictures
            self.seconds = round(taken / self.speed + 20, 3)

    def files(self, fate: str) -> dict[str, str]:
        """Name and content of each file, the one that says how the run stands last."""
        over = fate in ("done", "stale", "torn")
        metrics, rows = self.metrics()
        rows = rows if over else rows[: max(1, len(rows) * 3 // 5)]
        step = rows[-1]["step"] if rows else 0
        now = time.time() if fate == "running" else self.began + self.seconds
        log = f"{_utc(self.began)} {self.run.id} starts on {NOWHERE}, {self.devices} process(es)\n"
        if over:
            log += f"{_utc(now)} done in {self.seconds:.1f} s: {metrics}\n"
        message = MESSAGES.get(fate, "").format(step=step)
        if message:
            log += f"{_utc(now)} failed: {fate}: {message}\n"
        config = dump(self.config)
        beat: dict[str, Any] = {"time": now, "host": NOWHERE, "pid": 1, "id": self.run.id}
        if rows:
            beat |= {"steps": self.steps, "epochs": self.epochs} | rows[-1]
        files = {
            "config.yaml": yaml.dump(config, Dumper=_DUMPER, sort_keys=False),
            "provenance.json": to_json(_provenance() | {"substance": self.substance(fate)}),
            "log.txt": log,
            "heartbeat.json": to_json(beat),
        }
        if rows:
            files["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        if over:
            text = to_json(self.result(config, metrics, now, self.substance(fate)))
            files["result.json"] = text[: len(text) // 2] if fate == "torn" else text
        elif fate == "running":
            claim = {"host": NOWHERE, "pid": 1, "started": None, "time": now, "token": self.run.id}
            files["claim.json"] = to_json(claim)
        else:
            trace = f"Traceback (most recent call last):\n  made up\n{fate}: {message}\n"
            failure = {"class": fate, "message": message, "traceback": trace, "attempt": 1, "time": now}
            files["failure.json"] = to_json(failure | {"submission": None})
        return files

    def substance(self, fate: str) -> str:
        return "0" * 16 if fate == "stale" else provenance.substance(self.stage)

    def result(self, config: dict[str, Any], metrics: dict[str, Any], ended: float, substance: str) -> dict[str, Any]:
        data, model = self.config.data, self.config.model
        val, classes = VALIDATION.get(data.name, (data.val_pictures or 1000, 10))
        dataset: dict[str, Any] = {"name": data.name, "fingerprint": data.fingerprint, "train": self.pictures}
        dataset |= {"val": data.val_pictures or val, "classes": data.classes or classes}
        if self.stage == "cost":
            dataset = {"name": "random", "fingerprint": None}
        code = provenance.code()
        return {
            "format": FORMAT, "id": self.run.id, "stage": self.stage, "seed": self.config.seed,
            "scale": self.config.scale, "dataset": dataset,
            "model": f"{model.arch} ({model.width}x{model.depth}, patch {model.patch_size})",
            "image_size": data.image_size, "metrics": metrics,
            "weights": {name: hashlib.sha256(f"{self.weights} {name}".encode()).hexdigest() for name in self.kept()},
            "time": {"started": _utc(self.began), "ended": _utc(ended), "seconds": self.seconds},
            "device": NOWHERE, "world_size": self.devices, "synthetic": True, "config": config,
            "provenance": {"commit": code["commit"], "dirty": code["dirty"], "substance": substance}, "skipped": [],
        }  # fmt: skip

    def kept(self) -> list[str]:
        """Names of the weights that a run keeps; their hashes are made up, there is no file."""
        if self.stage != "pretrain":
            return ["model.safetensors"] if self.optim else []
        epochs = sorted({max(1, round(n * self.optim.epochs / SNAPSHOTS)) for n in range(1, SNAPSHOTS + 1)})
        which = ["student", "teacher"] if self.method.teacher else ["student"]
        return ["model.safetensors", *(f"{w}-epoch-{epoch:05d}.safetensors" for w in which for epoch in epochs)]

    # Its numbers
    def metrics(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is under `metrics` of the result, and the rows of metrics.jsonl."""
        if self.stage == "cost":
            return self.cost(), []
        rows = self.rows()
        last = {k: v for k, v in rows[-1].items() if k in METRICS["pretrain"] or k == "loss"}
        if self.stage == "pretrain":
            return last | {"epochs": self.optim.epochs}, rows
        spread = NOISE.get(self.stage, 0.1)
        found: dict[str, Any] = {k: round(v + spread * self.random.normal(), 4) for k, v in self.means.items()}
        if "top1" in found:
            found["top5"] = round(100 - 0.28 * (100 - found["top1"]), 4)
        length = {"steps": self.steps} if self.stage in DENSE else {"epochs": self.epochs}
        return found | {"loss": last["loss"]} | length, rows

    @property
    def steps(self) -> int:
        if self.stage in DENSE:
            return int(self.optim.steps)
        return self.epochs * max(1, self.pictures // self.optim.batch_size) if self.optim else 0

    @property
    def epochs(self) -> int:
        """Whole epochs; those that the steps of a dense task come to."""
        if self.stage in DENSE:
            return max(1, int(self.steps * self.optim.batch_size // self.pictures))
        return int(self.optim.epochs) if self.optim else 0

    def rows(self) -> list[dict[str, Any]]:
        """Some twenty rows of a loss that falls, with the keys of a real run's."""
        optim, total = self.optim, self.epochs
        epochs = sorted({max(1, round(n * total / ROWS)) for n in range(1, ROWS + 1)})
        draws = self.random.normal(size=(len(epochs), 4))
        first, final = (1.0, 0.48) if self.method else (6.5, 2.6)
        dense = self.stage in DENSE
        peak, rows = optim.lr if dense else optim.base_lr * optim.batch_size / 256, []
        floor, warmup = (0.0, optim.warmup_steps / self.steps * total) if dense else (optim.min_lr, optim.warmup_epochs)
        for epoch, (a, b, c, d) in zip(epochs, draws.tolist(), strict=True):
            part = epoch / total
            warm = min(1.0, epoch / warmup) if warmup else 1.0
            wave = 0.5 * (1 + math.cos(math.pi * part))
            row: dict[str, Any] = {
                "step": self.steps * epoch // total, "epoch": float(epoch),
                "loss": final + (first - final) * math.exp(-4 * part) * (1 + 0.02 * a),
                "lr": warm * (floor + (peak - floor) * wave),
            }  # fmt: skip
            if self.method and self.method.teacher:
                ema = self.method.ema
                end = ema.momentum if ema.momentum_end is None else ema.momentum_end
                row |= {
                    "target_std": 0.85 + 0.02 * b, "target_rank": 20 + 180 * part + 2 * c,
                    "teacher_distance": 0.02 + 0.9 * math.exp(-5 * part),
                    "momentum": end + (ema.momentum - end) * wave,
                }  # fmt: skip
            if self.stage == "pretrain":
                row["knn_top1"] = 45 * (1 - math.exp(-3 * part)) + 0.3 * d
            rate = self.speed * (1 + TIME_NOISE * d)
            row |= {"images_per_s": round(rate, 2), "mfu": round(rate * self.flop / (self.devices * PEAK), 4)}
            rows.append(row | {"data_wait": round(0.02 + 0.004 * abs(a), 4), "peak_memory": 16_000_000_000})
        return rows

    def cost(self) -> dict[str, Any]:
        """Repeats of the method and of MAE in turn: what slows the machine slows both."""
        cost, method, teacher = self.config.cost, self.method, self.method.teacher  # type: ignore[union-attr]
        drift, jitter = 1 + TIME_NOISE * self.random.normal(), 0.3 * TIME_NOISE
        mine, base = drift * (1 + jitter * self.random.normal(size=(2, cost.repeats)))
        mine, base = mine * self.means.get("time", ABOUT["cost"]), base * printed()["table1.mae.time"].value
        rates = cost.pictures / mine
        rate = float(np.median(rates))
        overheads = (100 * (mine / base - 1)).tolist() if teacher else []
        return {
            "images_per_s": rate, "time": cost.pictures / rate,
            "overhead": statistics.median(overheads) if overheads else None,
            "memory": round(self.means.get("memory", 16.0) * (1 + MEMORY_NOISE * self.random.normal()), 6),
            "mfu": rate * self.flop / PEAK, "gflop_per_image": self.flop / 1e9, "flop_counter_gflop": self.flop / 1e9,
            "peak_tflops": PEAK / 1e12, "arch": self.config.model.arch,
            "view": teacher.view if teacher else method.name, "folds": teacher.folds if teacher else None,
            "tokens": teacher.tokens if teacher else None, "batch_size": cost.batch_size, "pictures": cost.pictures,
            "time_repeats": mine.tolist(), "images_per_s_repeats": rates.tolist(), "overhead_repeats": overheads,
        }  # fmt: skip


@functools.cache
def _provenance() -> dict[str, Any]:
    """This code's commit; all else is nowhere, so that the files are the same on every machine."""
    record = {**provenance.code(), "diff": None, "command": ["sdae-cli", "reproduce", "--synthetic"], "python": NOWHERE}
    record |= {"packages": dict.fromkeys(provenance.PACKAGES, NOWHERE), "platform": NOWHERE, "cpu": NOWHERE}
    return record | {"cores": 0, "gpus": [NOWHERE] * DEVICES, "cuda": None, "host": NOWHERE, "slurm": {}}


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
