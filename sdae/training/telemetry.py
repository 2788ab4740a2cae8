"""What a run tells of itself while it runs: throughput, MFU, waiting, memory, heartbeat, alarms of collapse."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdae.errors import RESUME_ME, UserError
from sdae.store import RunFolder


@lru_cache(maxsize=8)
def peak_flops(device_type: str, precision: str) -> float:
    """Measured peak of this device in FLOP/s: the best of some dense square products, on random data."""
    device = torch.device(device_type)
    size, rounds = (8192, 10) if device_type == "cuda" else (1024, 4)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best, warm = float("inf"), time.perf_counter() + (0.5 if device.type == "cuda" else 0.0)
    while time.perf_counter() < warm:  # until the clocks have risen
        a @ b
        synchronize(device)
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU has been given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since `reset_peak_memory`: what the GPU's allocator held; on CPU the resident set, on Linux only."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory` counts from here on, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set


@torch.no_grad()
def alarms(features: Tensor) -> dict[str, float]:
    """Collapse alarms over the first 4 D tokens of teacher features (rows, tokens, D).

    target_std: standard deviation over tokens, averaged over channels; 0 means that all tokens have one target.
    target_rank: effective rank, exp of the entropy of the normalized singular values of centered features.
    """
    flat = features.detach().float().flatten(0, -2)
    flat = flat[: 4 * flat.shape[1]]
    centered = flat - flat.mean(0)
    values = torch.linalg.eigvalsh(centered.T @ centered).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"target_std": float(centered.std(0).mean()), "target_rank": float(entropy.exp())}


class Meter:
    """Wall time, images and waiting since the last row."""

    def __init__(self, device: torch.device, gflop_per_image: float | None, peak: float | None):
        self.device, self.gflop, self.peak = device, gflop_per_image, peak
        self.reset()

    def reset(self) -> None:
        """The next row begins here."""
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()

    def row(self) -> dict[str, float | int | None]:
        """images/s, MFU (0 to 1), share of the time that waited, peak memory in bytes, of all since the last row."""
        synchronize(self.device)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rate = self.images / seconds
        row: dict[str, float | int | None] = {
            "images_per_s": round(rate, 2),
            "mfu": round(rate * self.gflop * 1e9 / self.peak, 4) if self.gflop and self.peak else None,
            "data_wait": round(self.waited / seconds, 4),
            "peak_memory": peak_memory(self.device),
        }
        self.reset()
        return row


class Board:
    """The rows of metrics.jsonl as TensorBoard events in RUN/tensorboard, where asked for (extra `.[tensorboard]`)."""

    def __init__(self, run: RunFolder, wanted: bool):
        self.writer: Any = None
        if wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "efficiency.tensorboard: true, but TensorBoard is not installed (pip install -e '.[tensorboard]')"
                ) from None
            self.writer = SummaryWriter(str(run.path / "tensorboard"))

    def add(self, row: dict[str, Any]) -> None:
        """Writes the numbers of a row at its `step`."""
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()


class Pulse:
    """Writes heartbeat.json every few seconds from a thread of its own, and calls `progress` about once a second."""

    def __init__(self, run: RunFolder, progress: Callable[[dict[str, Any]], None] | None, every: float = 10.0):
        self.run, self.progress, self.every = run, progress, every
        self.status: dict[str, Any] = {"id": run.id}
        self._told = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Pulse:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._write()

    def tell(self, **status: Any) -> None:
        """Takes what is known of the run now; it is written with the next beat."""
        self.status.update(status)
        if self.progress and time.monotonic() - self._told > 1.0:
            self._told = time.monotonic()
            self.progress(dict(self.status))

    def _beat(self) -> None:
        while not self._end.wait(self.every):
            if self.run.dispossessed:  # we slept for longer than a claim holds: its new owner must not be disturbed
                os._exit(RESUME_ME)
            self._write()

    def _write(self) -> None:
        place = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(UserError):  # a full disk must not stop a run here: the next checkpoint says so aloud
            self.run.write("heartbeat.json", {**place, **self.status})
