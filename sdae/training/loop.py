"""The one training loop. Stages bring a `Task`; data order, augmentation and every random draw are functions of
(seed, epoch, step), so a state is weights, optimizer and a step number, and a resumed run repeats and skips nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdae.config import run_id
from sdae.data import Batch, Loader
from sdae.errors import Interrupted, RunFailed
from sdae.store import RunFolder
from sdae.training import attention, checkpoints, telemetry
from sdae.training.distributed import World
from sdae.training.optimizers import schedule
from sdae.training.parallel import (
    Trained,
    begins_step,
    exchanges_bf16,
    is_sharded,
    round_to_bf16,
    synchronized,
    wrapped,
)
from sdae.training.sharding import like, whole, whole_state


class Task(Protocol):
    """What a stage brings to the loop. What most stages do alike they may inherit."""

    module: nn.Module  # all that is saved; its forward takes what `inputs` returns and gives a scalar loss first
    optimizer: torch.optim.Optimizer
    gflop_per_image: float

    def inputs(self, batch: Any, step: int, first: int, total: int) -> tuple[Any, ...]:
        """This rank's part of the global batch (pictures first .. of total), its share of the step's draws included."""

    def part(self, inputs: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
        """A micro-batch of the inputs: here pictures, what goes with each, and stochastic-depth factors."""
        images, beside, drop = inputs
        return images[start:stop], beside[start:stop], None if drop is None else drop[:, :, start:stop]

    def after_step(self, step: int, epoch: int) -> None:
        """Once per optimizer step."""
        return

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Once per completed epoch (counted from 1); what it returns is logged."""
        return {}

    def watch(self, output: Any) -> dict[str, float]:
        """Science metrics of the last forward pass, asked for when a row is logged."""
        return {}


def fit(
    task: Task, config: Trained, run: RunFolder, loader: Loader, world: World, pulse: telemetry.Pulse, stop: Stop
) -> None:
    """Trains to the last epoch, or raises Interrupted with the state saved, or RunFailed on a non-finite loss."""
    optim, efficiency = config.optim, config.efficiency
    device, per_epoch = world.device, loader.steps_per_epoch
    plan = schedule(optim, per_epoch)
    steps = plan.steps
    epochs = round(steps / per_epoch, 3) if steps % per_epoch else steps // per_epoch
    local = optim.batch_size // world.size
    first = world.rank * local
    micro = min(efficiency.micro_batch or local, local)

    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss x steps, steps: since the last row
    step, metadata = resume(task, run, world, sums)
    model = wrapped(task.module, config, world)
    kernel = attention.kept(config, metadata, device) or attention.fastest(config, micro, world)
    pulse.status["attention"] = kernel or efficiency.attention
    attention.compile_with(kernel or efficiency.attention, alone=True)
    rounds = exchanges_bf16(config) and world.size == 1
    peak = telemetry.peak_flops(device.type, config.precision)
    if peak and device.type == "cuda":  # ranks on CPUs share one machine's
        peak *= world.size
    meter = telemetry.Meter(device, task.gflop_per_image, peak)
    guard, saved = LossGuard(world), time.monotonic()
    board = telemetry.Board(run, efficiency.tensorboard and world.first)
    telemetry.reset_peak_memory(device)
    task.module.train()

    while step < steps:
        epoch, within = divmod(step, per_epoch)
        for batch in timed(loader.epoch(epoch, within), meter):
            lr = plan.rate(step)
            for group in task.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            inputs = task.inputs(batch, step, first, optim.batch_size)
            loss = torch.zeros((), device=device)
            output: Any = None
            task.optimizer.zero_grad(set_to_none=True)
            begins_step(config)
            for start in range(0, local, micro):
                end = min(start + micro, local)
                with (
                    synchronized(model, last=end == local),
                    attention.using(kernel),
                    autocast(config.precision, device),
                ):
                    output = model(*task.part(inputs, start, end))
                    share = (end - start) / local
                    (output[0] * share).backward()
                loss += output[0].detach() * share
            if rounds:
                round_to_bf16(task.module)
            if optim.clip is not None:
                nn.utils.clip_grad_norm_(task.module.parameters(), optim.clip)
            guard.note(loss, step)
            if device.type == "cpu":  # costs nothing here, and the weights stay as they were
                guard.check(task, config, run, loader)
            task.optimizer.step()
            task.after_step(step, epoch)
            step += 1
            sums += torch.stack([loss.double() / world.size, torch.ones_like(loss).double()])
            meter.images += optim.batch_size

            ends_epoch = step % per_epoch == 0
            if step % efficiency.log_every == 0 or ends_epoch or step == steps:
                guard.check(task, config, run, loader)
                loss = world.sum(sums.clone())[0] / sums[1]  # mean over all ranks and the steps since the last row
                row: dict[str, Any] = {"step": step, "epoch": round(step / per_epoch, 4), "loss": float(loss), "lr": lr}
                row |= task.watch(output) | meter.row()
                if ends_epoch:
                    row |= task.after_epoch(step // per_epoch)
                    task.module.train()
                    meter.reset()  # what an epoch's end saves and evaluates is no training
                sums.zero_()
                if world.first:
                    run.append_metrics(row)
                    board.add(row)
                pulse.tell(**row)
            pulse.tell(step=step, steps=steps, epoch=round(step / per_epoch, 3), epochs=epochs)

            halt = stop.agreed(world, step)
            overdue = step % 10 == 0 and world.any(time.monotonic() - saved > 60 * efficiency.checkpoint_minutes)
            if (halt or overdue) and step < steps:
                guard.check(task, config, run, loader)
                save(task, run, step, sums, world, kernel)
                saved = time.monotonic()
            if halt and step < steps:
                raise Interrupted(
                    f"{run.id}: stopped at step {step} of {steps}; its state is saved, run it again to go on",
                    stop.signals,
                )
            if ends_epoch or step == steps:
                break


def resume(task: Task, run: RunFolder, world: World, sums: Tensor) -> tuple[int, dict[str, Any]]:
    """Loads the latest whole state, if any; returns the number of steps already taken and the state's metadata. Raises
    RunFailed where it is another run's."""
    state = checkpoints.load_state(run.checkpoints)
    step, metadata = 0, dict[str, Any]()
    if state is not None:
        tensors, metadata = state
        step = int(metadata["step"])
        if metadata.get("id") != run.id:
            raise RunFailed(f"{run.checkpoints}: holds the state of {metadata.get('id')}, not of {run.id}")
        load_task(task, tensors)
        sums.copy_(tensors["loop.sums"].to(sums.device))
        sums[0] /= world.size  # saved for all ranks together
    if world.first:
        run.truncate_metrics(step)
    world.wait()
    return step, metadata


def task_state(task: Task) -> dict[str, Tensor]:
    """Weights and optimizer state as one flat mapping of whole tensors; ranks that share them must ask together."""
    state = {f"model.{name}": tensor for name, tensor in whole_state(task.module.state_dict()).items()}
    names = {id(p): name for name, p in task.module.named_parameters()}
    for parameter, values in task.optimizer.state.items():
        for key, value in values.items():
            if value is not None:
                state[f"optimizer.{names[id(parameter)]}|{key}"] = torch.as_tensor(whole(value))
    return state


def load_task(task: Task, tensors: dict[str, Tensor]) -> None:
    """Puts back what `task_state` took: weights (`model.NAME`) and the optimizer's state (`optimizer.NAME|FIELD`)."""
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    if is_sharded(task.module):
        weights = {name: like(weights[name], part) for name, part in task.module.state_dict().items()}
    task.module.load_state_dict(weights)
    parameters = dict(task.module.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, field = key.removeprefix("optimizer.").rpartition("|")
            parameter = parameters[name]
            task.optimizer.state[parameter][field] = like(value, parameter)


def save(task: Task, run: RunFolder, step: int, sums: Tensor, world: World, kernel: str | None) -> None:
    """Saves the state after `step` steps, by the first process; the others help to gather it, and wait."""
    total = world.sum(sums.clone())
    if world.first or is_sharded(task.module):
        state = task_state(task) | {"loop.sums": torch.stack([total[0], sums[1]])}
    if world.first:
        metadata = {"id": run.id, **attention.remembered(kernel, world.device)}
        checkpoints.save_state(run.checkpoints, step, state, metadata)
    world.wait()


class LossGuard:
    """Remembers the first step whose loss was not finite, on the device; asking costs a wait for the device."""

    NEVER = 2**62

    def __init__(self, world: World):
        self.world = world
        self.step = torch.full((), self.NEVER, dtype=torch.int64, device=world.device)

    def note(self, loss: Tensor, step: int) -> None:
        """Takes a loss (a scalar on the device) without waiting for it."""
        self.step = torch.where(loss.isfinite(), self.step, self.step.clamp_max(step))

    def check(self, task: Task, config: Trained, run: RunFolder, loader: Loader) -> None:
        """Ends the run where a loss was not finite on some rank: step, the batch's pictures and the state are kept."""
        step = int(self.world.least(self.step))
        if step == self.NEVER:
            return
        name = f"nonfinite-{step:08d}.safetensors"
        state = task_state(task) if self.world.first or is_sharded(task.module) else {}
        if self.world.first:
            checkpoints.save_weights(run.checkpoints / name, state, {"id": run.id, "step": step})
        epoch, within = divmod(step, loader.steps_per_epoch)
        pictures = next(replace(loader.order, rank=0, world=1).parts(epoch, within)).tolist()
        listed = ", ".join(map(str, pictures[:16])) + (", .." if len(pictures) > 16 else "")
        raise RunFailed(
            f"non-finite loss at step {step} ({config.stage} {run_id(config)}); the batch's pictures: {listed}; "
            f"state kept in checkpoints/{name}"
        )


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 products where the precision asks for them; a context manager."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def timed(batches: Iterator[Batch], meter: telemetry.Meter) -> Iterator[Batch]:
    """Counts the time that the loop waits for pictures."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        meter.waited += time.perf_counter() - began
        if batch is None:
            return
        yield batch


class Stop:
    """SIGTERM, SIGUSR2 and Ctrl-C ask the loop to save and end; a second Ctrl-C ends at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.signals: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signals.add(number)

    @property
    def asked(self) -> bool:
        """Whether the loop is to save and end."""
        return bool(self.signals)

    def agreed(self, world: World, step: int) -> bool:
        """Ranks must stop at the same step, so several ask one another at every tenth."""
        if world.size == 1:
            return self.asked
        return step % 10 == 0 and world.any(self.asked)
