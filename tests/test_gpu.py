"""What only a GPU can show: the golden steps, precision, compiled code, CUDA graphs and resuming there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from sdae.config import Config, run_id
from sdae.data import Loader, open_dataset
from sdae.data.feed import make_pictures
from sdae.data.packing import prepare
from sdae.errors import Interrupted
from sdae.run import execute
from sdae.sections import Data
from sdae.stages.pretrain import build
from sdae.stages.session import drop_factors, masking
from sdae.store import Store
from sdae.training import attention
from sdae.training.checkpoints import load_weights
from sdae.training.distributed import World
from sdae.training.loop import Stop, autocast
from sdae.training.optimizers import adamw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
METHODS: list[dict[str, Any]] = [{"name": "mae"}, {}, {"teacher": {"view": "full"}}]
STEPS = 50


def steps(
    config: Config, device: torch.device, count: int = STEPS, **compiler: Any
) -> tuple[list[float], torch.Tensor]:
    """Losses of so many steps on pictures that are the same everywhere, and the weights after them as one vector."""
    module = build(config).to(device)  # type: ignore[arg-type]
    optimizer = adamw(module.student, 1e-3, 0.05, (0.9, 0.95))
    model = torch.compile(module, dynamic=False, **compiler) if compiler else module
    draws = masking(config, device)  # type: ignore[arg-type]
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(count):
        images = torch.randn(8, 3, 32, 32, generator=generator).to(device)
        noise, drop = draws.at(step, 0, 8, 8)
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(config.precision, device):
            output = model(images, noise, drop)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
        optimizer.step()
        if hasattr(module, "update_teacher"):
            module.update_teacher(0.99)
    weights = torch.cat([p.detach().flatten().cpu() for p in module.student.parameters()])
    torch._dynamo.reset()
    return losses, weights


@pytest.fixture(autouse=True)
def _whole_float32() -> Any:
    """No TF32: float32 is to be float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", METHODS, ids=["mae", "folds", "full"])
def test_float32_steps_are_those_of_the_cpu(method: dict[str, Any]) -> None:
    """The CPU's are held against the golden steps by `sdae-cli parity`."""
    config = tiny("pretrain", method=method)
    (here, weights), (there, wanted) = steps(config, CUDA), steps(config, CPU)
    assert here[:3] == pytest.approx(there[:3], rel=1e-5)
    assert here == pytest.approx(there, rel=1e-3)
    assert float((weights - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("method", METHODS, ids=["mae", "folds", "full"])
def test_bf16_steps_are_near_float32(method: dict[str, Any]) -> None:
    exact, _ = steps(tiny("pretrain", method=method), CUDA)
    rounded, _ = steps(tiny("pretrain", method=method, precision="bf16"), CUDA)
    assert rounded == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["compiled", "cuda_graphs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_are_the_eager_ones(precision: str, mode: str | None) -> None:
    config = tiny("pretrain", precision=precision)
    eager, _ = steps(config, CUDA)
    compiled, _ = steps(config, CUDA, mode=mode)
    assert compiled == pytest.approx(eager, rel=1e-4 if precision == "fp32" else 2e-2)


def losses(store: Store, config: Config) -> list[float]:
    return [row["loss"] for row in store.run(run_id(config)).metrics()]


@pytest.mark.parametrize(
    "efficiency",
    [{}, {"compile": True, "cuda_graphs": True}, {"compile": True, "cuda_graphs": True, "micro_batch": 4}],
    ids=["eager", "cuda_graphs", "cuda_graphs-micro"],
)
def test_a_run_goes_on_where_it_stopped(
    efficiency: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("pretrain", efficiency={**efficiency, "device": "cuda", "log_every": 1})
    whole, stopped = Store(tmp_path / "a"), Store(tmp_path / "b")
    execute(config, whole)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, world, step: step == 12)
        with pytest.raises(Interrupted):
            execute(config, stopped)
    execute(config, stopped)
    assert losses(stopped, config) == pytest.approx(losses(whole, config), rel=1e-4)
    name = "model.safetensors"
    one, other = (load_weights(s.run(run_id(config)).checkpoints / name)[0] for s in (whole, stopped))
    assert set(one) == set(other)
    alone = Store(tmp_path / "c")
    execute(tiny("pretrain", efficiency={"device": "cpu", "log_every": 1}), alone)
    assert losses(alone, config) == pytest.approx(losses(whole, config), rel=1e-3)
    torch._dynamo.reset()


def test_every_attention_kernel_gives_the_same_numbers() -> None:
    """cuDNN's and flash attention are for bf16; the fastest of what is here is chosen."""
    model = {"width": 64, "heads": 2, "decoder_dim": 64}  # heads of 32: some kernels want multiples of 8
    config = tiny("pretrain", precision="bf16", efficiency={"device": "cuda"}, model=model)
    seconds = attention.measure(attention.sequences(config, 64), CUDA, torch.bfloat16)
    assert "math" in seconds and len(seconds) > 1
    name = attention.fastest(config, 64, World(0, 1, CUDA))
    assert name in seconds
    found = {}
    for kernel in seconds:
        attention.compile_with(kernel, alone=True)
        with attention.using(kernel):
            found[kernel] = steps(config, CUDA, count=3)[0]
    for kernel, values in found.items():
        assert values == pytest.approx(found["math"], rel=1e-2), kernel


def test_draws_come_to_the_gpu_without_a_wait() -> None:
    config = tiny("pretrain")
    draws = masking(config, CUDA)  # type: ignore[arg-type]
    draws.at(0, 0, 8, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise, drop = draws.at(1, 0, 8, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted, factors = masking(config, CPU).at(1, 0, 8, 8)  # type: ignore[arg-type]
    assert torch.equal(noise.cpu(), wanted)
    assert drop is not None and factors is not None
    assert torch.equal(drop.cpu(), factors)
    assert torch.equal(drop.cpu(), drop_factors(0.2, 2, 0, 1, 0, 8, 8, CUDA).cpu())  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["memory", "files", "shards", "raw"])
def test_pictures_come_to_the_gpu_without_a_wait(form: str, tmp_path: Path) -> None:
    """With all augmentation; and they are those that the processor gives."""
    augment = {"randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}
    data = Data(name="builtin", image_size=32, train_pictures=32, val_pictures=8, augment=augment)  # type: ignore[arg-type]
    if form != "memory":
        folder = make_pictures(tmp_path / "files", 32, (80, 60))
        data = Data(name="imagefolder", path=str(folder), image_size=32, augment=data.augment)
    if form in ("shards", "raw"):
        prepare(folder, tmp_path / form, form, side=48)  # type: ignore[arg-type]
        data = Data(name="packed", path=str(tmp_path / form), image_size=32, augment=data.augment)
    dataset = open_dataset(data, "train")
    batches, wanted = (
        Loader(dataset, data, seed=0, batch_size=8, train=True, device=device).epoch(0) for device in (CUDA, CPU)
    )
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one brings what stays there
        try:
            batch = next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        other = next(wanted)
        assert torch.equal(batch.indices, other.indices)
        assert torch.equal(batch.labels.cpu(), other.labels)
        assert float((batch.images.cpu() - other.images).abs().mean()) < 0.005, "a rounding here and there"


def test_a_step_does_not_wait_for_the_gpu() -> None:
    """torch itself raises where the program would wait: forward, backward, optimizer and teacher of one step."""
    config = tiny("pretrain", precision="bf16")
    module = build(config).to(CUDA)  # type: ignore[arg-type]
    optimizer = adamw(module.student, 1e-3, 0.05, (0.9, 0.95))
    draws, images = masking(config, CUDA), torch.randn(8, 3, 32, 32, device=CUDA)  # type: ignore[arg-type]
    output = None
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first makes the optimizer's state
        try:
            optimizer.zero_grad(set_to_none=True)
            with autocast("bf16", CUDA):
                output = module(images, *draws.at(step, 0, 8, 8))
            output.loss.backward()
            optimizer.step()
            module.update_teacher(0.99)  # type: ignore[union-attr, operator]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert output is not None and math.isfinite(float(output.loss.detach()))
