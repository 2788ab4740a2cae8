"""What makes a run fast must leave its numbers alone: each setting over 200 steps, with and without it; some that
have had theirs over 64 more, together."""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import ROOT, free_port, numbers, torchrun
from test_resume import science
from torch.utils._python_dispatch import TorchDispatchMode

from ablations import scaling
from ablations.planner import plan
from sdae.config import Config, dump, parse, run_id
from sdae.errors import Interrupted, UserError
from sdae.methods.sdae import SdAE
from sdae.run import execute
from sdae.stages import session
from sdae.stages.pretrain import build
from sdae.stages.session import NOISE, Masking, drop_factors, uniform
from sdae.store import Store
from sdae.training import attention, loop, parallel
from sdae.training.checkpoints import load_weights
from sdae.training.distributed import World
from sdae.training.loop import Stop
from sdae.yamls import merge

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of a loss, where only rounding may differ
# 200 steps of 8 pictures, at a rate that moves the weights: differences of rounding have their chance to grow
LONG = {"optim": {"epochs": 25, "base_lr": 0.032}, "efficiency": {"log_every": 1, "checkpoint_minutes": 60}}


SHORT = {"optim": {"epochs": 8}}  # 64 steps of settings together that have their 200 in another test


def long(stage: str = "pretrain", **changes: Any) -> Config:
    return tiny(stage, **merge(LONG, changes))


def losses(store: Store, config: Config) -> list[float]:
    execute(config, store)
    return [row["loss"] for row in store.run(run_id(config)).metrics()]


# Draws


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 2), st.booleans())
def test_draws_made_ahead_are_those_made_when_asked(steps: list[int], ranks: int, ahead: bool) -> None:
    """In any order of steps, as a resumed run asks: those of the step, of this rank's pictures."""
    count = 8 // ranks
    masking = Masking(3, 16, 0.5, 2, CPU, ahead)
    for step in steps:
        for rank in range(ranks):
            noise, drop = masking.at(step, rank * count, count, 8)
            whole = uniform((8, 16), 3, NOISE, step)
            assert torch.equal(noise, whole[rank * count : (rank + 1) * count])
            expected = drop_factors(0.5, 2, 3, step, rank * count, count, 8, CPU)
            assert drop is not None
            assert torch.equal(drop, expected)


def test_a_run_whose_draws_are_made_ahead_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = long()
    execute(config, Store(tmp_path / "a"))
    monkeypatch.setattr(
        "sdae.stages.pretrain.masking",
        lambda c, device: Masking(c.seed, c.tokens, c.model.drop_path, c.model.depth or 0, device, True),
    )
    assert session.masking(config, CPU)._thread is None  # type: ignore[arg-type]
    execute(config, Store(tmp_path / "b"))
    assert science(Store(tmp_path / "a"), config) == science(Store(tmp_path / "b"), config)


# Nothing waits


class _Reads(TorchDispatchMode):
    """Counts what would make the program wait for a GPU: a number read out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [{"name": "mae"}, {"ema": {"every": "iteration"}}])
def test_no_step_reads_a_number(method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two rows of the log nothing is read back; a GPU's queue would run empty."""
    config = tiny("pretrain", method=method, efficiency={"log_every": 1000}, optim={"epochs": 1, "clip": 1.0})
    counts: list[int] = []
    with _Reads() as reads, monkeypatch.context() as patch:
        patch.setattr(loop.LossGuard, "check", lambda *_: None)  # on a CPU it looks at each step, on a GPU with a row
        patch.setattr(Stop, "agreed", lambda self, world, step: bool(counts.append(len(reads.found))))
        execute(config, Store(tmp_path))
    assert len(counts) == 8
    assert counts[0] == counts[6], reads.found  # all steps but the first and the last, which ends the epoch
    assert len(reads.found) > counts[6]  # then its loss is read: the counter counts


# Checkpointing


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_checkpointing_gives_the_same_bits(stage: str, tmp_path: Path) -> None:
    plain, again = long(stage), long(stage, efficiency={"checkpointing": True})
    assert run_id(plain) == run_id(again)
    execute(plain, Store(tmp_path / "a"))
    execute(again, Store(tmp_path / "b"))
    assert science(Store(tmp_path / "a"), plain) == science(Store(tmp_path / "b"), again)


def test_checkpointing_keeps_fewer_activations() -> None:
    module = build(tiny("pretrain", model={"depth": 6}))  # type: ignore[arg-type]
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)

    def kept() -> int:
        held: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            output = module(images, noise)
        assert output.loss.requires_grad
        return sum(held.values())

    before = kept()
    parallel.set_checkpointing(module, True)
    assert kept() < before / 2


# Gradients in bf16


def test_bf16_gradients_are_another_run() -> None:
    """They change numbers, so they are in the id; left off, the ids are those of before there was the key."""
    on = tiny("pretrain", optim={"bf16_gradients": True})
    assert run_id(on) != run_id(tiny("pretrain"))
    assert run_id(tiny("pretrain", optim={"bf16_gradients": False})) == run_id(tiny("pretrain"))


def test_bf16_gradients_are_rounded_in_one_process_too(tmp_path: Path) -> None:
    exact = losses(Store(tmp_path / "a"), long())
    rounded = losses(Store(tmp_path / "b"), long(optim={"bf16_gradients": True}))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(5, 3)).sum().backward()
    parallel.round_to_bf16(layer)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


# Attention


def test_attention_is_measured_at_the_tokens_of_the_run() -> None:
    """The paper's: 49 visible and cls, all and cls, three folds of 49 and cls."""
    config = parse({"stage": "pretrain"})
    found = {part.part: part for part in attention.sequences(config, 96)}
    assert {name: (part.rows, part.tokens) for name, part in found.items()} == {
        "encoder": (96, 50), "decoder": (96, 197), "teacher": (3 * 96, 50),
    }  # fmt: skip
    assert [found[name].trained for name in ("encoder", "decoder", "teacher")] == [True, True, False]
    masked = parse({"stage": "pretrain", "method": {"teacher": {"view": "masked"}}})
    assert attention.sequences(masked, 4)[2].tokens == 148
    full = parse({"stage": "cost", "method": {"teacher": {"view": "full"}}})
    assert attention.sequences(full, 4)[2].tokens == 197
    crop = parse({"stage": "cost", "method": {"teacher": {"view": "crop", "tokens": 49}}})
    assert attention.sequences(crop, 4)[2][1:3] == (4, 50)
    assert len(attention.sequences(parse({"stage": "pretrain", "method": {"name": "mae"}}), 4)) == 2
    assert attention.sequences(parse({"stage": "segment"}), 4) == []


def test_attention_kernels_that_are_not_here_are_left_out() -> None:
    parts = [attention.Sequences("encoder", 2, 20, 2, 8, 3, True), attention.Sequences("teacher", 2, 9, 2, 8, 3, False)]
    seconds = attention.measure(parts, CPU, torch.float32, repeats=2)
    assert "math" in seconds
    assert "cudnn" not in seconds
    assert all(value > 0 for value in seconds.values())


def test_the_fastest_attention_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("pretrain")
    world = World(0, 1, torch.device("cuda", 0))
    attention._chosen.cache_clear()
    monkeypatch.setattr(attention, "measure", lambda *_: {"flash": 2.0, "efficient": 1.0, "math": 9.0})
    assert attention.fastest(config, 8, world) == "efficient"
    monkeypatch.setattr(attention, "measure", lambda *_: {"flash": 1.0, "efficient": 2.0, "math": 9.0})
    assert attention.fastest(config, 8, world) == "efficient", "what this process has compiled for these shapes"
    assert attention.fastest(config, 8, World(0, 1, CPU)) is None  # as torch chooses: the bits stay
    asked = tiny("pretrain", efficiency={"attention": "math"})
    assert attention.fastest(asked, 8, world) is None
    attention._chosen.cache_clear()
    monkeypatch.setattr(attention, "measure", lambda *_: {})
    assert attention.fastest(config, 8, world) is None
    attention._chosen.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one kind")
    state = attention.remembered("flash", world.device)
    assert attention.kept(config, state, world.device) == "flash"  # a run that goes on keeps what it had
    assert attention.kept(asked, state, world.device) is None  # unless it is told otherwise
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another kind")
    assert attention.kept(config, state, world.device) is None
    assert attention.remembered(None, CPU) == {}
    with attention.using("math"):
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_compiled_code_is_that_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's caches of compiled code do not know the kernel: the tag tells them, in one process a reset."""
    resets: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    tags = []
    for kernel, alone in (("flash", True), ("flash", True), ("math", False), ("flash", True)):
        attention.compile_with(kernel, alone)
        tags.append((torch.compiler.config.cache_key_tag, len(resets)))
    assert tags == [("attention=flash", 0), ("attention=flash", 0), ("attention=math", 0), ("attention=flash", 1)]


# Refusals


@pytest.mark.parametrize(
    ("changes", "world", "parts"),
    [
        ({"stage": "finetune", "efficiency": {"fsdp": True}}, 2, ("efficiency.fsdp", "finetune", "allowed: false")),
        ({"efficiency": {"cuda_graphs": True}}, 2, ("efficiency.cuda_graphs", "2 processes", "false")),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes: dict[str, Any], world: int, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as told:
        parallel.refuse(parse({"stage": "pretrain", **changes}), World(0, world, CPU))  # type: ignore[arg-type]
    assert "\n" not in str(told.value)
    assert all(part in str(told.value) for part in parts)


def test_graphs_want_compiled_code() -> None:
    with pytest.raises(UserError, match="cuda_graphs: true wants compile: true"):
        parse({"stage": "pretrain", "efficiency": {"cuda_graphs": True, "compile": False}})


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"efficiency\.fsdp"):
        execute(tiny("finetune", efficiency={"fsdp": True}), Store(tmp_path))
    assert Store(tmp_path).ids() == []


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "mae"}, {}, {"teacher": {"view": "full"}}], ids=["mae", "folds", "full"])
def test_the_step_is_one_graph(method: dict[str, Any]) -> None:
    """No graph break: student, teacher, masks and loss are compiled together, and give the eager numbers."""
    config = tiny("pretrain", method=method)
    module = build(config)  # type: ignore[arg-type]
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, config.tokens)
    drop = drop_factors(0.2, 2, 0, 0, 0, 4, 4, CPU)
    whole = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    found = whole(images, noise, drop)
    wanted = module(images, noise, drop)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
    assert not found.target.requires_grad
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_losses_are_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 200 steps to `TOLERANCE` of their size: kernels that are fused round otherwise."""
    config = long(model={"depth": 1})
    eager = losses(Store(tmp_path / "a"), config)
    monkeypatch.setattr(parallel, "COMPILED_ON", {"cpu"})
    fast = config.efficiency.model_copy(update={"compile": True})
    compiled = losses(Store(tmp_path / "b"), config.model_copy(update={"efficiency": fast}))
    torch._dynamo.reset()
    assert compiled == pytest.approx(eager, rel=TOLERANCE)


@pytest.mark.slow
def test_compiled_and_checkpointed_losses_are_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = losses(Store(tmp_path / "a"), long())
    monkeypatch.setattr(parallel, "COMPILED_ON", {"cpu"})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = long(efficiency={"compile": True, "checkpointing": True})
    compiled = losses(Store(tmp_path / "b"), config)
    torch._dynamo.reset()
    assert compiled == pytest.approx(eager, rel=TOLERANCE)


COMPILED_ON_CPU = """
import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the graphs and their cuts; no compiler
from sdae.training import parallel
parallel.COMPILED_ON.add("cpu")
from sdae.config import load
from sdae.run import execute
from sdae.store import Store
execute(load(sys.argv[1]), Store(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("further", "steps"),
    [({"micro_batch": 2}, {}), ({"checkpointing": True}, SHORT), ({"fsdp": True}, SHORT)],
    ids=["micro-batch", "checkpointing", "fsdp"],
)
def test_two_compiled_processes_give_the_numbers_of_one(
    further: dict[str, Any], steps: dict[str, Any], tmp_path: Path
) -> None:
    eager = losses(Store(tmp_path / "a"), long(**steps))
    config = long(**steps, efficiency={"compile": True, **further})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dump(config)))
    (tmp_path / "run.py").write_text(COMPILED_ON_CPU)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1"]
    words += ["--master-port", free_port(), tmp_path / "run.py", tmp_path / "run.yaml", tmp_path / "b"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [row["loss"] for row in Store(tmp_path / "b").run(run_id(config)).metrics()]
    assert found == pytest.approx(eager, rel=TOLERANCE)


# Shared among processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("efficiency", "steps"),
    [
        ({"fsdp": True}, {}),
        ({"fsdp": True, "checkpointing": True, "micro_batch": 2}, SHORT),
        ({"checkpointing": True}, SHORT),
    ],
    ids=["fsdp", "fsdp-checkpointing-micro", "ddp-checkpointing"],
)
def test_shared_weights_give_the_numbers_of_one_process(
    efficiency: dict[str, Any], steps: dict[str, Any], tmp_path: Path
) -> None:
    changes = merge({"probe": {"knn_every": 4, "pictures": 45}, "optim": {"clip": 1.0}}, steps)
    alone = long(**changes)
    execute(alone, Store(tmp_path / "one"))
    shared = long(**changes, efficiency=efficiency)
    done = torchrun(shared, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (Store(tmp_path / name).run(run_id(alone)) for name in ("one", "two"))
    assert numbers(two)[0] == numbers(one)[0]
    assert numbers(two)[1] == pytest.approx(numbers(one)[1], rel=TOLERANCE)
    theirs, ours = one.result(), two.result()
    assert theirs is not None
    assert ours is not None
    assert ours["metrics"]["knn_top1"] == theirs["metrics"]["knn_top1"]
    assert ours["metrics"]["teacher_distance"] == pytest.approx(theirs["metrics"]["teacher_distance"], rel=1e-4)
    assert set(ours["weights"]) == set(theirs["weights"])
    for name in theirs["weights"]:
        mine, wanted = (load_weights(f.checkpoints / name)[0] for f in (two, one))
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in wanted.items()}
        for key, value in wanted.items():
            if "qkv.bias" not in key:  # its key third has no gradient: Adam turns rounding into steps
                gap = (mine[key].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
                assert float(gap) < 1e-3, f"{name}: {key}"


@pytest.mark.slow
def test_a_run_goes_on_shared_and_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state in between is one format: begun alone, gone on shared, ended alone."""
    alone, shared = long(), long(efficiency={"fsdp": True})
    wanted = losses(Store(tmp_path / "whole"), alone)
    store = Store(tmp_path / "mixed")

    def stopped_at(at: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Stop, "agreed", lambda self, world, step: step == at)
            with pytest.raises(Interrupted):
                execute(alone, store)

    stopped_at(13)
    (tmp_path / "stop.py").write_text(
        "from sdae.training.loop import Stop\nStop.agreed = lambda self, world, step: step == 29\n" + COMPILED_ON_CPU
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dump(shared)))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1"]
    words += ["--master-port", free_port(), tmp_path / "stop.py", tmp_path / "run.yaml", store.root]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "stopped at step 29 of 200" in done.stderr, done.stderr
    shutil.copytree(store.root, tmp_path / "copy")
    execute(alone, store)
    found = [row["loss"] for row in store.run(run_id(alone)).metrics()]
    assert found == pytest.approx(wanted, rel=TOLERANCE)
    assert found[:13] == wanted[:13]
    execute(shared, Store(tmp_path / "copy"))  # with one process there is nothing to share
    assert [row["loss"] for row in Store(tmp_path / "copy").run(run_id(shared)).metrics()] == found


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "steps"), [(False, {}), (True, SHORT)], ids=["ddp", "fsdp"])
def test_gradients_exchanged_in_bf16(fsdp: bool, steps: dict[str, Any], tmp_path: Path) -> None:
    config = long(**merge({"optim": {"bf16_gradients": True}, "efficiency": {"fsdp": fsdp}}, steps))
    exact, alone = losses(Store(tmp_path / "a"), long(**steps)), losses(Store(tmp_path / "b"), config)
    done = torchrun(config, tmp_path / "c")
    assert done.returncode == 0, done.stderr
    together = numbers(Store(tmp_path / "c").run(run_id(config)))[1]
    assert together != pytest.approx(exact, rel=1e-6)  # Adam divides most of it out
    assert together == pytest.approx(alone, rel=1e-3)
    assert together == pytest.approx(exact, rel=2e-2)


def test_the_teacher_moves_by_the_rule_of_before() -> None:
    """Bit for bit t m + s (1 - m) in two roundings: older runs go on as they began."""
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    module = build(tiny("pretrain", seed=seed % 1000))  # type: ignore[arg-type]
    assert isinstance(module, SdAE)
    before = {name: p.detach().clone() for name, p in module.teacher.named_parameters()}
    student = dict(module.student.named_parameters())
    module.update_teacher(0.97)
    for name, parameter in module.teacher.named_parameters():
        assert torch.equal(parameter, torch.add(before[name] * 0.97, student[name].detach(), alpha=1 - 0.97)), name


# What the pages and the commands around it say


@pytest.mark.slow
def test_gpu_evidence_runs_dry(tmp_path: Path) -> None:
    """Each part of benchmarks/gpu.py on a CPU: a file of each, results without weights, done once and not again."""
    words = [sys.executable, "benchmarks/gpu.py", "--out", tmp_path / "out", "--store", tmp_path / "runs", "--dry"]
    words += ["--minutes", "60"]  # a part that is slow here has not failed
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def once(*more: str) -> str:
        done = subprocess.run(
            [*map(str, words), *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    once("--only", "step,changes,cost,arms")
    found = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert set(found) == {"step", "changes", "cost", "arms"}
    assert {name: values.get("failed") for name, values in found.items()} == dict.fromkeys(found)
    assert {"commit", "packages", "cpu"} <= set(found["step"])
    assert str(ROOT) not in json.dumps(found)
    assert {part["part"] for part in found["step"]["measured"]["parts"][0]["parts"]} == {
        "step", "encoder", "decoder", "teacher", "optimizer",
    }  # fmt: skip
    apart = {row["change"]: row["losses"] for row in found["changes"]["measured"]["rows"]}
    assert len(apart) > 4 and max(apart.values()) < TOLERANCE, apart
    (row,) = found["cost"]["rows"]
    assert {"arch", "view", "folds", "mfu", "images_per_s", "images_per_s_repeats", "memory"} <= set(row)
    with tarfile.open(tmp_path / "out" / "runs.tar") as tar:
        kept = {name.partition("/")[2] for name in tar.getnames()}
    assert kept == {"result.json"}
    before = {i: Store(tmp_path / "runs").run(i).result() for i in Store(tmp_path / "runs").ids()}
    assert "0 of those begun are left" in once("--only", "arms")
    assert {i: Store(tmp_path / "runs").run(i).result() for i in before} == before


def test_a_dry_trial_does_not_stand_for_the_evidence(tmp_path: Path) -> None:
    (tmp_path / "tests.json").write_text(json.dumps({"benchmark": "gpu-tests", "dry": True, "summary": "1 passed"}))
    words = ["--out", tmp_path, "--store", tmp_path / "runs", "--only", "tests", "--minutes", "0.001"]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "no time is left" in done.stdout, done
    assert json.loads((tmp_path / "tests.json").read_text())["dry"] is False


def test_a_deadline_lets_the_arms_save_themselves(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        options = argparse.Namespace(store=tmp_path / "runs", jobs=1, dry=True, data=None)
        ended = gpu.run(plan(["table5"], "smoke"), options, time.monotonic() + 1)
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.path.remove(str(ROOT / "benchmarks"))
    assert ended["interrupted"]
    assert ended["left"] > 0
    assert not ended["troubles"]


def test_no_change_that_is_always_made_moves_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 200 steps each, as they were measured."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from changes import LIMITS

    rows = json.loads((ROOT / "results" / "performance" / "changes.json").read_text())["rows"]
    assert {row["steps"] for row in rows} == {200}
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    assert [row for row in rows if not row["losses"] <= LIMITS[row["precision"]]] == []


def test_pages_are_those_that_the_files_make() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_performance.py", "--check"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_page_claims_no_gpu_without_a_file(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import make_performance as pages

    sys.path.remove(str(ROOT / "docs"))
    row = {"view": "folds", "folds": 3, "arch": "vit_base_patch16", "images_per_s": 100.0, "gflop_per_image": 80.0}
    cpu = {
        "benchmark": "pretrain_step",
        "device": "cpu",
        "gpus": ["a GPU that was idle"],
        "cpu": "a CPU",
        "rows": [row],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    text = pages.performance(pages.read(tmp_path))
    assert "No GPU figure exists" in text
    assert "a GPU that was idle" not in text
    assert "`results/performance/cpu.json`" in text
    assert pages.measured_speed(pages.read(tmp_path)) is None
    (tmp_path / "dry.json").write_text(json.dumps({**cpu, "device": "cuda", "dry": True}))
    assert "No GPU figure exists" in pages.performance(pages.read(tmp_path))
    (tmp_path / "gpu.json").write_text(json.dumps({"measured": {"rows": [row], "device": "cuda"}, "gpus": ["a GPU"]}))
    files = pages.read(tmp_path)
    assert "Measured on: a GPU." in pages.performance(files)
    assert pages.measured_speed(files) == (8e12, "gpu.json")
    assert "`results/performance/gpu.json`" in pages.scaling(files)


@pytest.mark.parametrize("method", [{"name": "mae"}, {}])
def test_the_cost_model_counts_the_weights_that_are_trained(method: dict[str, Any]) -> None:
    config = tiny("pretrain", method=method)
    module = build(config)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert scaling.trained_weights(config) == trained  # type: ignore[arg-type]


def test_the_cost_model() -> None:
    """A step that hides its exchange is arithmetic and the last bucket; one that cannot waits for the rest."""
    config = parse({"stage": "pretrain"})
    one, eight, many = (scaling.step(config, n, 400e12, scaling.Cluster()) for n in (1, 8, 64))  # type: ignore[arg-type]
    assert one.seconds == one.compute
    assert eight.compute == pytest.approx(one.compute / 8)
    assert 0 < eight.exposed < eight.exchange
    assert many.efficiency < eight.efficiency < one.efficiency == 1
    size = 4 * scaling.trained_weights(config)  # type: ignore[arg-type]
    assert scaling.Cluster(latency=0).all_reduce(size, 8) == pytest.approx(2 * 7 / 8 * size / 300e9)
    half = parse({"stage": "pretrain", "optim": {"bf16_gradients": True}})
    assert scaling.step(half, 64, 400e12, scaling.Cluster()).exchange < 0.6 * many.exchange  # type: ignore[arg-type]


# The plain step that ours is timed against


@pytest.mark.parametrize("view", ["mae", "masked", "folds"])
def test_the_plain_step_has_our_loss(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from plain import Plain
    from pretrain_step import Variant, config_of

    config = config_of(Variant(view, "eager", "fp32", 6), argparse.Namespace(size="nano", steps=None))
    values = {"stage": "pretrain", "method": config.method.model_dump(), "model": config.model.model_dump()}
    ours = build(parse(values | {"data": {"image_size": config.data.image_size}, "precision": "fp32"}))
    theirs = Plain(config)
    theirs.load_state_dict(ours.state_dict())
    images, noise = torch.randn(6, 3, 32, 32), torch.rand(6, config.tokens)
    assert theirs(images, noise).item() == pytest.approx(ours(images, noise).loss.item(), rel=1e-5)
