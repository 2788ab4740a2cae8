"""Which of torch's attention kernels is the fastest for the sequences of a run: measured, not guessed."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdae.config import CostRun, Finetune, Linprobe, Pretrain
from sdae.training import telemetry
from sdae.training.distributed import World

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
REPEATS, CALLS = 7, 3
AHEAD = 20_000_000  # cycles, some 10 ms, in which the program hands over what a GPU is to do
CUDNN = 91500  # up to this version cuDNN's attention is wrong for lengths that are no multiple of 128 (torch #169849)


class Sequences(NamedTuple):
    """What one part of a network attends over: rows of so many tokens, in `depth` blocks, with a gradient or not."""

    part: str
    rows: int
    tokens: int
    heads: int
    head_dim: int
    depth: int
    trained: bool


def sequences(config: Any, rows: int) -> list[Sequences]:
    """Those of a run whose micro-batch has `rows` pictures; none where shapes change from batch to batch
    or positions are a bias."""
    model = config.model
    if model.positions != "absolute":  # which not every kernel takes
        return []
    head_dim = (model.width or 0) // (model.heads or 1)
    encoder = (model.heads, head_dim, model.depth)
    if isinstance(config, Finetune | Linprobe):
        return [Sequences("encoder", rows, 1 + config.tokens, *encoder, isinstance(config, Finetune))]
    if not isinstance(config, Pretrain | CostRun):
        return []
    decoder_dim = model.decoder_dim // model.decoder_heads  # type: ignore[operator]
    decoder = (model.decoder_heads, decoder_dim, model.decoder_depth)
    found = [
        Sequences("encoder", rows, 1 + config.tokens - config.masked, *encoder, True),
        Sequences("decoder", rows, 1 + config.tokens, *decoder, True),
    ]
    if (teacher := config.method.teacher) is not None:
        folds = teacher.folds or 1  # a view's unused keys are null
        length = config.tokens if teacher.view == "full" else (teacher.tokens or config.masked) // folds
        found.append(Sequences("teacher", rows * folds, 1 + length, *encoder, False))
    return [part for part in found if part.depth]


def measure(
    parts: Iterable[Sequences], device: torch.device, dtype: torch.dtype, repeats: int = REPEATS
) -> dict[str, float]:
    """Seconds that all attention of a micro-batch takes, by kernel, medians; those that cannot do all of it are absent.

    The kernels take turns, repeat by repeat, after one that warms up.
    """
    sound = (torch.backends.cudnn.version() or 0) > CUDNN  # type: ignore[no-untyped-call]
    times: dict[str, list[float]] = {name: [] for name in BACKENDS if sound or name != "cudnn"}
    for part in parts:
        shape = (part.rows, part.tokens, 3, part.heads, part.head_dim)  # in memory as the blocks have it
        generator = torch.Generator(device).manual_seed(0)
        together = torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_(part.trained)
        inputs = together.permute(2, 0, 3, 1, 4).unbind(0)
        taken: dict[str, list[float]] = {name: [] for name in times}
        for _ in range(1 + repeats):
            for name in taken:
                with contextlib.suppress(RuntimeError), warnings.catch_warnings():  # this kernel does not do it here
                    warnings.simplefilter("ignore")
                    taken[name].append(_once(inputs, BACKENDS[name], part.trained, device))
        for name in list(times):
            if len(taken[name]) == 1 + repeats:
                times[name].append(part.depth * statistics.median(taken[name][1:]))
            else:
                del times[name]
    return {name: sum(seconds) for name, seconds in times.items() if seconds}


def _once(inputs: tuple[torch.Tensor, ...], backend: SDPBackend, trained: bool, device: torch.device) -> float:
    query, key, value = inputs
    telemetry.synchronize(device)
    gpu = device.type == "cuda"
    if gpu:  # its own clock: what launching costs is nothing to compiled code, and more than a short row takes
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
        start.record()  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    with sdpa_kernel(backend), torch.set_grad_enabled(trained):
        for _ in range(CALLS):
            out = F.scaled_dot_product_attention(query, key, value)
            if trained:
                torch.autograd.grad(out, inputs, out)
    if gpu:
        end.record()  # type: ignore[no-untyped-call]
    telemetry.synchronize(device)
    seconds = start.elapsed_time(end) / 1e3 if gpu else time.perf_counter() - began  # type: ignore[no-untyped-call]
    return float(seconds) / CALLS


def fastest(config: Any, rows: int, world: World) -> str | None:
    """The name of the kernel that this run should use, the same on all ranks; None: as torch chooses."""
    if config.efficiency.attention != "auto" or world.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return world.told(_chosen(tuple(sequences(config, rows)), world.device, dtype) if world.first else None)


@lru_cache(maxsize=64)
def _chosen(parts: tuple[Sequences, ...], device: torch.device, dtype: torch.dtype) -> str | None:
    """Once for the same shapes in a process, since compiled code is made once for them."""
    seconds = measure(parts, device, dtype)
    return min(seconds, key=seconds.__getitem__) if seconds else None


def compile_with(kernel: str, alone: bool) -> None:
    """Lets what is compiled from now on be told from what was compiled with another kernel: PyTorch's caches know of
    none (its issue 185449). alone: no other compiled network of this process is in use."""
    tag = f"attention={kernel}"
    if alone and torch.compiler.config.cache_key_tag not in ("", tag):
        torch._dynamo.reset()
    torch.compiler.config.cache_key_tag = tag


def remembered(kernel: str | None, device: torch.device) -> dict[str, str]:
    """What a state says of the kernel that its steps took."""
    return {"attention": kernel, "device": torch.cuda.get_device_name(device)} if kernel else {}


def kept(config: Any, metadata: dict[str, Any], device: torch.device) -> str | None:
    """The kernel of the steps before, where it was chosen for a GPU of this kind: a run that goes on keeps it."""
    if device.type != "cuda" or config.efficiency.attention != "auto":
        return None
    return metadata.get("attention") if metadata.get("device") == torch.cuda.get_device_name(device) else None


def using(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """The kernel of this name, if any, for all attention inside; a context manager."""
    return contextlib.nullcontext() if name is None else sdpa_kernel(BACKENDS[name])
