"""What each part of a pre-training step takes: encoder, decoder, teacher, optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sdae.config import CostRun
from sdae.methods.sdae import SdAE
from sdae.models import flops
from sdae.models.encoder import patchify
from sdae.stages.cost import Bench
from sdae.training import attention, telemetry
from sdae.training.loop import autocast
from sdae.training.parallel import begins_step, compiled
from sdae.views import split

MOMENTUM = 0.99


def parts_gflop(config: CostRun) -> dict[str, float]:
    """GFLOP of a picture by part; they add up to the whole step's (`sdae.models.flops`)."""
    model, method = config.model, config.method
    whole = flops.pretraining(model, method, config.tokens, config.masked)
    teacher = flops.teacher(model, method, config.tokens, config.masked)
    encoder = 3 * flops.encoder(model, config.tokens - config.masked) + 2 * flops.embedding(model, config.tokens)
    parts = {"encoder": encoder, "decoder": whole - teacher - encoder, "teacher": teacher, "optimizer": 0.0}
    return {name: flop / 1e9 for name, flop in parts.items()}


def measure_parts(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """One row for each part: its seconds in a step (medians over repeats in turns), MFU, and the bytes AdamW moves.

    Encoder and decoder run forward and backward; the teacher forward; the optimizer updates weights and teacher.
    `step` is the whole one, in turns with its parts; what it takes beyond them are loss, masks and gaps.
    """
    config, device, count = bench.config, bench.device, len(bench.images)
    works = {"step": bench.train_step, **_works(bench)}
    sides = {name: partial(seconds_of, work, config.cost.steps, device) for name, work in works.items()}
    seconds = in_turns(sides, repeats)
    peak = telemetry.peak_flops(device.type, config.precision)
    gflop = parts_gflop(config)
    gflop["step"] = sum(gflop.values())
    whole = statistics.median(seconds["step"])
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        row: dict[str, Any] = {
            "part": name, "seconds": middle, "repeats": times, "share": middle / whole,
            "gflop_per_image": gflop[name], "mfu": gflop[name] * 1e9 * count / middle / peak if gflop[name] else None,
        }  # fmt: skip
        if name == "optimizer":
            row["gb_per_s"] = moved(bench) / middle / 1e9
        rows.append(row)
    return rows


def seconds_of(work: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Of one step, mean over so many."""
    telemetry.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        work()
    telemetry.synchronize(device)
    return (time.perf_counter() - began) / steps


def in_turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each side tells, repeat by repeat; a first turn of all warms up and is left out."""
    turns = [{name: side() for name, side in sides.items()} for _ in range(1 + repeats)]
    return {name: [turn[name] for turn in turns[1:]] for name in sides}


def moved(bench: Bench) -> float:
    """The fewest bytes that an update moves: AdamW reads four float32 per weight and writes three; the teacher's
    average reads two and writes one, twice."""
    trained = sum(p.numel() for p in bench.module.student.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in bench.module.teacher.parameters()) if isinstance(bench.module, SdAE) else 0
    return 28.0 * trained + 20.0 * averaged


def _works(bench: Bench) -> dict[str, Callable[[], Any]]:
    config, module, student = bench.config, bench.module, bench.module.student
    noise, drop = bench.masking.at(0, 0, len(bench.images), len(bench.images))
    visible, masked = split(noise, config.tokens - config.masked)
    patches = patchify(bench.images, student.patch)
    used = module.view.used if isinstance(module, SdAE) else config.masked

    class Encode(torch.nn.Module):
        def forward(self) -> torch.Tensor:
            return student.encode(student.embed(patches, visible), drop)

    class Decode(torch.nn.Module):
        def forward(self, encoded: torch.Tensor) -> torch.Tensor:
            return student.decode(encoded, visible, masked, used)

    class Teach(torch.nn.Module):
        def forward(self) -> torch.Tensor:
            assert isinstance(module, SdAE)
            return module.features(patches, masked)

    fast = {
        name: compiled(part, config.efficiency, bench.device)
        for name, part in (("encoder", Encode()), ("decoder", Decode()), ("teacher", Teach()))
    }
    with autocast(config.precision, bench.device), torch.no_grad():
        encoded = student.encode(student.embed(patches, visible), drop)
    gradients: dict[str, torch.Tensor] = {}
    own: dict[torch.nn.Parameter, torch.Tensor] = {}  # a CUDA graph's gradients are in memory that the next one takes

    def forward(name: str, *inputs: torch.Tensor) -> torch.Tensor:
        begins_step(config)
        with attention.using(bench.kernel), autocast(config.precision, bench.device):
            return fast[name](*inputs)  # type: ignore[no-any-return]

    def trained(name: str, *inputs: torch.Tensor) -> None:
        bench.optimizer.zero_grad(set_to_none=True)
        out = forward(name, *inputs)
        if name not in gradients:  # random: a kernel can be faster on zeros
            gradients[name] = torch.randn_like(out)
        out.backward(gradients[name])  # type: ignore[no-untyped-call]

    def optimize() -> None:
        own.update({p: torch.randn_like(p) for p in student.parameters() if p.requires_grad and p not in own})
        for parameter, gradient in own.items():
            parameter.grad = gradient
        bench.optimizer.step()
        if isinstance(module, SdAE):
            module.update_teacher(MOMENTUM)

    bench.optimizer.zero_grad(set_to_none=True)
    works: dict[str, Callable[[], Any]] = {
        "encoder": lambda: trained("encoder"),
        "decoder": lambda: trained("decoder", encoded.detach().requires_grad_()),
    }
    if isinstance(module, SdAE):
        works["teacher"] = lambda: forward("teacher")
    return {**works, "optimizer": optimize}
