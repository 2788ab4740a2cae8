"""What one pre-training step costs beside MAE's: throughput, time per epoch, peak memory (paper Table 1).

The method and MAE at the same shapes take turns, repeat by repeat, so that a machine whose speed drifts slows both.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdae.config import CostRun, Pretrain, parse
from sdae.errors import Interrupted
from sdae.models.flops import per_image
from sdae.models.linear import plain
from sdae.sections import Method
from sdae.stages.pretrain import build
from sdae.stages.session import Session, masking
from sdae.training import attention, telemetry
from sdae.training.loop import autocast
from sdae.training.optimizers import adamw
from sdae.training.parallel import begins_step, compiled, set_checkpointing


def run(config: CostRun, session: Session) -> dict[str, Any]:
    """Medians over the repeats; the first repeat of each side warms up and is left out. Raises Interrupted between two
    of them where the run is told to stop."""
    peak = telemetry.peak_flops(session.world.device.type, config.precision)
    mae = Method(name="mae")
    measured(config, mae, session)  # a first one, let go: what libraries set aside once is nobody's memory
    _listen(session)
    mine, memory = measured(config, config.method, session)
    _listen(session)
    baseline = mine if config.method.name == "mae" else measured(config, mae, session)[0]
    counted = mine.count_flop()
    sides = [mine] if baseline is mine else [mine, baseline]
    repeats: dict[int, list[float]] = {id(side): [] for side in sides}
    for turn in range(config.cost.repeats):
        _listen(session)
        for side in sides:
            repeats[id(side)].append(side.repeat())
        session.pulse.tell(epoch=turn + 1, epochs=config.cost.repeats)
    rates = [config.cost.batch_size * config.cost.steps / s for s in repeats[id(mine)]]
    rate = statistics.median(rates)
    pairs = zip(repeats[id(mine)], repeats[id(baseline)], strict=True)
    overheads = [100 * (a / b - 1) for a, b in pairs] if baseline is not mine else []
    flop = per_image(config)
    method, teacher = config.method, config.method.teacher
    metrics = {
        "images_per_s": rate,
        "time": config.cost.pictures / rate,
        "overhead": statistics.median(overheads) if overheads else None,
        "memory": None if memory is None else memory / 1e9,
        "mfu": rate * flop / peak,
        "gflop_per_image": flop / 1e9,
        "flop_counter_gflop": counted / config.cost.batch_size / 1e9,
        "peak_tflops": peak / 1e12,
        "arch": config.model.arch, "view": teacher.view if teacher else method.name,
        "folds": teacher.folds if teacher else None, "tokens": teacher.tokens if teacher else None,
        "batch_size": config.cost.batch_size, "pictures": config.cost.pictures,
        "attention": mine.kernel or config.efficiency.attention,
        "time_repeats": [config.cost.pictures / r for r in rates],
        "images_per_s_repeats": rates, "overhead_repeats": overheads,
    }  # fmt: skip
    return {"metrics": metrics}


def _listen(session: Session) -> None:
    if session.world.any(session.stop.asked):
        raise Interrupted(f"{session.folder.id}: stopped; a cost run begins anew", session.stop.signals)


def measured(config: CostRun, method: Method, session: Session) -> tuple[Bench, int | None]:
    """A method after its warm-up, and the peak memory in bytes that it took (null where that is not told)."""
    device = session.world.device
    release_memory()
    telemetry.reset_peak_memory(device)
    before = telemetry.peak_memory(device)
    bench = Bench(config, method, session)
    bench.repeat()
    # What compiling took aside is not the step's; but a graph takes its memory when it is recorded, in the second step
    if device.type == "cuda":
        if not config.efficiency.cuda_graphs:
            telemetry.reset_peak_memory(device)
        bench.repeat()
    after = telemetry.peak_memory(device)
    return bench, None if before is None or after is None else max(after - before, 0)


class Bench:
    """One method with its optimizer on random pictures."""

    def __init__(self, config: CostRun, method: Method, session: Session):
        self.config, self.device, self.step = config, session.world.device, 0
        values = {
            "method": method.model_dump(),
            "model": config.model.model_dump(),
            "data": {"image_size": config.data.image_size},
        }
        pretrain = parse({"stage": "pretrain", "precision": config.precision, **values})
        assert isinstance(pretrain, Pretrain)
        self.module = build(pretrain).to(self.device)
        self.optimizer = adamw(self.module.student, 1e-4, 0.05, (0.9, 0.95))
        size, channels = config.data.image_size, config.model.channels
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(config.cost.batch_size, channels, size, size, generator=generator).to(self.device)
        self.masking = masking(config, self.device)
        set_checkpointing(self.module, config.efficiency.checkpointing)
        self.model = compiled(self.module, config.efficiency, self.device)
        mine = config.model_copy(update={"method": pretrain.method})
        self.kernel = attention.fastest(mine, config.cost.batch_size, session.world)
        attention.compile_with(self.kernel or config.efficiency.attention, alone=False)

    def repeat(self) -> float:
        """Seconds that `cost.steps` training steps take; not the teacher's update, which comes once an epoch."""
        telemetry.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(self.config.cost.steps):
            self.train_step()
        telemetry.synchronize(self.device)
        return time.perf_counter() - began

    def train_step(self) -> Tensor:
        """Returns the loss, on the device."""
        batch = len(self.images)
        noise, drop = self.masking.at(self.step, 0, batch, batch)
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        begins_step(self.config)
        with attention.using(self.kernel), autocast(self.config.precision, self.device):
            output = self.model(self.images, noise, drop)
            output.loss.backward()
        self.optimizer.step()
        return output.loss.detach().clone()  # type: ignore[no-any-return]  # a CUDA graph's is that of the next step

    def count_flop(self) -> float:
        """FLOP of one step of the batch as torch's counter sees them."""
        from torch.utils.flop_counter import FlopCounterMode

        model, kernel = self.model, self.kernel
        self.model, self.kernel = self.module, None  # the counter knows eager products only
        with plain(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.train_step()
        self.model, self.kernel = model, kernel
        return float(counter.get_total_flops())


def release_memory() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library: the resident set stays a little higher
        ctypes.CDLL("libc.so.6").malloc_trim(0)
