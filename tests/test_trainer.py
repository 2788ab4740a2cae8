"""Schedules, optimizers, the loop and its stages: what a run must and must not do."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_resume import science
from torch import Tensor, nn

from sdae.config import Config, run_id
from sdae.data import Loader, open_dataset
from sdae.data.datasets import subset
from sdae.errors import Interrupted, RunFailed
from sdae.methods.sdae import SdAE
from sdae.models.classifier import Classifier
from sdae.models.encoder import Encoder
from sdae.models.normalization import GlobalBatchNorm
from sdae.run import execute
from sdae.sections import Data, Head, Model
from sdae.stages.cost import Bench
from sdae.stages.pretrain import build
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import load_weights, states
from sdae.training.loop import Stop
from sdae.training.optimizers import lars, layer_of, learning_rate, parameter_groups
from sdae.yamls import merge

MIXING = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "erasing": 0.25, "randaugment": "rand-m9-mstd0.5-inc1"}
STEPS = 24  # of a tiny run: 64 pictures, 8 a batch, 3 epochs


def done(config: Config, root: Path) -> tuple[RunFolder, dict[str, Any]]:
    result = execute(config, Store(root))
    return Store(root).run(result["id"]), result


def weights(folder: RunFolder, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_weights(folder.checkpoints / name)[0]


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.metrics()]


# Schedules and parameter groups


@given(st.floats(0, 299.99), st.floats(0, 1))
def test_learning_rate_is_that_of_facts_md(t: float, minimum: float) -> None:
    lr = learning_rate(t, peak=2.0, epochs=300, warmup=60, minimum=minimum)
    wanted = 2 * t / 60 if t < 60 else minimum + (2 - minimum) * (1 + math.cos(math.pi * (t - 60) / 240)) / 2
    assert lr == pytest.approx(wanted)


def test_learning_rate_at_its_corners() -> None:
    rule = {"peak": 8e-4, "epochs": 300, "warmup": 60, "minimum": 1e-6}
    assert learning_rate(0, **rule) == 0
    assert learning_rate(60, **rule) == pytest.approx(8e-4)
    assert learning_rate(180, **rule) == pytest.approx((8e-4 + 1e-6) / 2)
    assert learning_rate(300, **rule) == pytest.approx(1e-6)
    assert learning_rate(0, peak=1, epochs=5, warmup=0, minimum=0) == 1
    assert learning_rate(4.9, peak=1, epochs=5, warmup=5, minimum=0) == pytest.approx(0.98)


def test_a_run_takes_the_learning_rate_of_its_place(tmp_path: Path) -> None:
    config = tiny("pretrain", optim={"base_lr": 0.032, "min_lr": 1e-4}, efficiency={"log_every": 1})
    folder, _ = done(config, tmp_path)
    found = [row["lr"] for row in folder.metrics()]
    rule = {"peak": 0.032 * 8 / 256, "epochs": 3, "warmup": 1, "minimum": 1e-4}
    assert found == pytest.approx([learning_rate(step / 8, **rule) for step in range(STEPS)])
    assert found[0] == 0


def test_layer_decay_is_that_of_facts_md() -> None:
    network = Classifier(Model(width=8, depth=12, heads=2, patch_size=8, drop_path=0.1), 16, Head(), 5)
    groups = parameter_groups(network, 0.05, 0.65, 12, ("cls_token", "pos_embed"))
    rule = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert len(rule) == len(list(network.parameters()))
    wanted = {
        "patch_embed.proj.weight": (13, 0.05), "patch_embed.proj.bias": (13, 0), "cls_token": (13, 0),
        "pos_embed": (13, 0),
        "blocks.0.attn.qkv.weight": (12, 0.05), "blocks.0.norm1.weight": (12, 0), "blocks.11.mlp.fc2.weight": (1, 0.05),
        "blocks.11.mlp.fc2.bias": (1, 0), "fc_norm.weight": (0, 0), "head.weight": (0, 0.05), "head.bias": (0, 0),
    }  # fmt: skip
    named = dict(network.named_parameters())
    for name, (power, decay) in wanted.items():
        scale, found = rule[id(named[name])]
        assert (scale, found) == (pytest.approx(0.65**power), decay), name
    assert layer_of("fc_norm.weight", 12) == layer_of("head.weight", 12) == 13


def test_pretraining_decays_all_but_one_dimension() -> None:
    module = build(tiny("pretrain"))
    groups = parameter_groups(module.student, 0.04)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}  # type: ignore[attr-defined]
    trained = {name: p for name, p in module.student.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert (id(parameter) in decayed) == (parameter.dim() > 1), name
    assert {g["lr_scale"] for g in groups} == {1.0}
    assert not {"pos_embed", "decoder_pos_embed"} & set(trained)


def test_lars_adapts_matrices_only() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = lars(layer, lr=0.5, weight_decay=0.0)
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    for _ in range(3):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.clone()
            if name == "weight":
                gradient *= 0.001 * before[name].norm() / gradient.norm()
            momentum[name] = 0.9 * momentum[name] + gradient
            before[name] = before[name] - 0.5 * momentum[name]
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), before[name])


def test_batch_norm_without_affine() -> None:
    ours, torch_s = GlobalBatchNorm(6), nn.BatchNorm1d(6, eps=1e-6, affine=False)
    assert not list(ours.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(9, 6, generator=generator) * 3 + 2
        weight = torch.randn(9, 6, generator=generator)
        gradients = []
        for layer in (ours, torch_s):
            given_x = x.clone().requires_grad_()
            (layer(given_x) * weight).sum().backward()
            gradients.append(given_x.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x), torch_s(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), torch_s.state_dict())
    torch.testing.assert_close(ours.eval()(x), torch_s.eval()(x))


# Pre-training


def test_a_pretraining_tells_what_it_promises(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    config = tiny("pretrain", probe={"knn_every": 2, "pictures": 40})
    result = execute(config, Store(tmp_path), progress=told.append)
    folder = Store(tmp_path).run(run_id(config))
    assert {(status["id"], status["epochs"], status["steps"]) for status in told} == {(folder.id, 3, STEPS)}
    assert {p.name for p in folder.path.iterdir()} >= {"config.yaml", "provenance.json", "metrics.jsonl", "result.json"}
    assert set(result["weights"]) == {"model.safetensors"} | {
        f"{which}-epoch-{epoch:05d}.safetensors" for which in ("student", "teacher") for epoch in (1, 2, 3)
    }
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    for row in rows:
        assert {"epoch", "loss", "lr", "images_per_s", "mfu", "data_wait", "peak_memory"} <= set(row)
        assert {"target_std", "target_rank", "teacher_distance"} <= set(row)
    assert [row["step"] for row in rows if "momentum" in row] == [8, 16, 24]
    assert [row["step"] for row in rows if "knn_top1" in row] == [16, 24]
    metrics = result["metrics"]
    assert metrics["knn_top1"] == rows[-1]["knn_top1"]
    assert metrics["loss"] == rows[-1]["loss"]
    assert metrics["epochs"] == 3
    assert 0 < metrics["target_rank"] <= 24
    heartbeat = folder.heartbeat()
    assert heartbeat is not None
    assert (heartbeat["step"], heartbeat["steps"]) == (STEPS, STEPS)
    assert not states(folder.checkpoints)  # a finished run keeps no state
    assert execute(tiny("pretrain", probe={"knn_every": 2}), Store(tmp_path)) == result  # done is done


def test_the_knn_probe_against_a_slow_one(tmp_path: Path) -> None:
    config = tiny("pretrain", probe={"knn_every": 3, "pictures": 40, "k": 5}, optim={"base_lr": 0.05})
    folder, result = done(config, tmp_path)
    encoder = Encoder(config.model, 32)
    encoder.load_state_dict(weights(folder, "student-epoch-00003.safetensors"))
    features, labels = [], []
    for split in ("train", "val"):
        dataset = subset(open_dataset(config.data, split), 40)
        images = next(Loader(dataset, config.data, seed=0, batch_size=40, train=False).epoch(0)).images
        with torch.no_grad():
            vectors = encoder(images)[:, 1:].mean(1)
        features.append(vectors / vectors.norm(dim=1, keepdim=True))
        labels.append(dataset.labels.tolist())
    hits = 0
    for query, answer in zip(features[1], labels[1], strict=True):
        cosines = [float(query @ row) for row in features[0]]
        votes: dict[int, float] = defaultdict(float)
        for i in sorted(range(40), key=lambda i: -cosines[i])[:5]:
            votes[labels[0][i]] += math.exp(cosines[i] / 0.07)
        hits += max(votes, key=lambda label: votes[label]) == answer
    assert result["metrics"]["knn_top1"] == pytest.approx(100 * hits / 40)


def test_a_part_of_the_pictures_is_of_all_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b", "c", "d"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(20):
                (tmp_path / split / name / f"{i:02d}.png").touch()
    files = open_dataset(Data(name="imagefolder", path=str(tmp_path)), "train")
    part = subset(files, 32)
    assert len(part) == 32
    assert set(part.labels.tolist()) == {0, 1, 2, 3}  # files lie class by class: the first 32 are of two
    assert [Path(part.path_of(i)).parent.name for i in range(32)] == ["abcd"[k] for k in part.labels.tolist()]
    built = open_dataset(tiny("pretrain").data, "train")
    assert set(subset(built, 32).labels.tolist()) == set(range(10))
    assert subset(built, 64) is built


@pytest.mark.parametrize(
    ("ema", "calls"),
    [
        ({"every": "epoch", "momentum": 0.9, "momentum_end": 0.99}, [0.9, 0.9225, 0.9675]),
        ({"every": "epoch", "momentum": 0.9, "momentum_end": None}, [0.9] * 3),
        ({"every": "iteration", "momentum": 0.9, "momentum_end": 0.99}, [0.9] * 8 + [0.9225] * 8 + [0.9675] * 8),
    ],
)
def test_when_the_teacher_moves(
    ema: dict[str, Any], calls: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("pretrain", method={"ema": ema})
    seen: list[float] = []
    teacher = {f"teacher.{k}": v.clone() for k, v in build(config).teacher.state_dict().items()}  # type: ignore[union-attr]
    true = SdAE.update_teacher

    def update(self: SdAE, momentum: float) -> None:
        seen.append(momentum)
        true(self, momentum)
        student = self.student.state_dict()
        for name in teacher:
            part = student[name.removeprefix("teacher.")]
            teacher[name] = momentum * teacher[name] + (1 - momentum) * part

    monkeypatch.setattr(SdAE, "update_teacher", update)
    folder, _ = done(config, tmp_path)
    assert seen == pytest.approx(calls)
    final = weights(folder)
    for name, wanted in teacher.items():
        torch.testing.assert_close(final[name], wanted)


def test_looking_on_changes_no_number(tmp_path: Path) -> None:
    plain = tiny("pretrain")
    probed = tiny(
        "pretrain", probe={"knn_every": 1}, scale="other", efficiency={"log_every": 1, "checkpoint_minutes": 60}
    )
    assert run_id(plain) == run_id(probed)
    assert science(*ran(plain, tmp_path / "a"))[0] == science(*ran(probed, tmp_path / "b"))[0]
    tuned = tiny("finetune")
    watched = tiny("finetune", probe={"eval_every": 1})
    assert science(*ran(tuned, tmp_path / "a"))[::2] == science(*ran(watched, tmp_path / "b"))[::2]
    assert ["top1" in row for row in Store(tmp_path / "b").run(run_id(tuned)).metrics()].count(True) == 2


def ran(config: Config, root: Path) -> tuple[Store, Config]:
    execute(config, Store(root))
    return Store(root), config


def test_seeds_decide(tmp_path: Path) -> None:
    a, b = (losses(done(tiny("pretrain", seed=seed), tmp_path)[0]) for seed in (1, 2))
    again = losses(done(tiny("pretrain", seed=1), tmp_path / "again")[0])
    assert a == again
    assert all(x != y for x, y in zip(a, b, strict=True))


def test_mae_runs_without_a_teacher(tmp_path: Path) -> None:
    folder, result = done(tiny("pretrain", method={"name": "mae"}, optim={"base_lr": 0.05}), tmp_path)
    assert {name.split("-")[0] for name in result["weights"]} == {"student", "model.safetensors"}
    assert not any("teacher" in name for name in weights(folder))
    assert "teacher_distance" not in result["metrics"]
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.parametrize("method", [{"name": "mae"}, {"teacher": {"view": "folds"}}])
def test_a_cost_run(method: dict[str, Any], tmp_path: Path) -> None:
    _, result = done(tiny("cost", method=method, cost={"pictures": 1000}), tmp_path)
    metrics = result["metrics"]
    assert metrics["time"] == pytest.approx(1000 / metrics["images_per_s"])
    assert metrics["memory"] > 0
    assert 0 < metrics["mfu"] < 1
    assert metrics["flop_counter_gflop"] == pytest.approx(metrics["gflop_per_image"], rel=0.3)
    assert len(metrics["time_repeats"]) == 3
    assert (metrics["overhead"] is None) == ("name" in method)
    assert len(metrics["overhead_repeats"]) == (0 if "name" in method else 3)


def test_a_cost_run_that_is_told_to_stop_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no state to save, but keeps no one waiting for its last repeat."""
    config, turns = tiny("cost", cost={"repeats": 50}), []

    def repeat(bench: Bench) -> float:
        turns.append(bench)
        if len(turns) > 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "repeat", repeat)
        with pytest.raises(Interrupted, match="begins anew"):
            execute(config, Store(tmp_path))
    assert len(turns) < 12
    assert Store(tmp_path).run(run_id(config)).failure() is None
    done(config.model_copy(update={"cost": tiny("cost").cost}), tmp_path)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "linprobe"])
def test_bf16_on_the_cpu(stage: str, tmp_path: Path) -> None:
    half, _ = done(tiny(stage, precision="bf16"), tmp_path)
    full, _ = done(tiny(stage), tmp_path)
    assert half.id != full.id
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.05)
    assert all(t.dtype != torch.bfloat16 for t in weights(half).values())


# Gradient accumulation, resume, failure


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {}),
        ("pretrain", {"method": {"teacher": {"view": "full"}, "ema": {"every": "iteration"}}}),
        ("pretrain", {"method": {"name": "mae"}}),
        ("finetune", {"data": {"augment": MIXING}}),
        ("finetune", {"optim": {"clip": 0.1}}),
    ],
)
def test_accumulation_changes_nothing(stage: str, changes: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = done(tiny(stage, **changes), tmp_path / "whole")
    parts, _ = done(tiny(stage, **merge(changes, {"efficiency": {"micro_batch": 3}})), tmp_path / "parts")
    assert whole.id == parts.id
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    ours = weights(parts)
    for name, wanted in weights(whole).items():
        if "qkv.bias" in name:  # its key third has no gradient: Adam turns rounding into steps
            continue
        gap = (ours[name].double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
        assert float(gap) < 1e-5, name


def test_batch_statistics_are_never_accumulated(tmp_path: Path) -> None:
    for stage, changes in (("linprobe", {}), ("finetune", {"head": {"norm": "batch"}})):
        whole = science(*ran(tiny(stage, **changes), tmp_path / "whole"))
        micro = merge(changes, {"efficiency": {"micro_batch": 3}})
        assert science(*ran(tiny(stage, **micro), tmp_path / "parts")) == whole


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"method": {"ema": {"every": "iteration"}}, "probe": {"knn_every": 1}}),
        ("linprobe", {}),
        ("finetune", {"data": {"augment": MIXING}, "optim": {"weight_ema": 0.9, "clip": 1.0, "layer_decay": 0.65}}),
    ],
)
@pytest.mark.parametrize("step", [1, 11, 16])
def test_resumed_runs_end_with_the_same_bits(
    stage: str, changes: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(stage, **changes)
    execute(config, Store(tmp_path / "whole"))
    stopped = Store(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, world, now: now == step)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 24"):
            execute(config, stopped)
    folder = stopped.run(run_id(config))
    assert folder.state() == "started"
    assert folder.result() is None
    execute(config, stopped)
    assert science(stopped, config) == science(Store(tmp_path / "whole"), config)


def test_a_non_finite_loss_stops_the_run(tmp_path: Path) -> None:
    config = tiny("finetune", optim={"base_lr": 1e30, "warmup_epochs": 0}, efficiency={"log_every": 100})
    store = Store(tmp_path)
    with pytest.raises(RunFailed, match="non-finite loss at step") as caught:
        execute(config, store)
    message = str(caught.value)
    assert "\n" not in message
    folder = store.run(run_id(config))
    step = int(re.findall(r"at step (\d+)", message)[0])
    named = [int(i) for i in re.findall(r"pictures: ([\d, ]+);", message)[0].split(", ")]
    loader = Loader(open_dataset(config.data, "train"), config.data, seed=0, batch_size=8, train=True)
    epoch, within = divmod(step, 8)
    assert named == next(loader.epoch(epoch, within)).indices.tolist()
    tensors, metadata = load_weights(folder.checkpoints / f"nonfinite-{step:08d}.safetensors")
    assert (metadata["id"], metadata["step"]) == (folder.id, step)
    assert any(name.startswith("optimizer.") for name in tensors)
    failure = folder.failure()
    assert failure is not None
    assert set(failure) >= {"class", "message", "traceback", "attempt"}
    assert (failure["attempt"], folder.state(), folder.result()) == (1, "failed", None)
    assert "non-finite loss" in failure["message"]
    assert "non-finite loss" in folder.log.read_text()
    with pytest.raises(RunFailed):
        execute(config, store)
    assert (folder.failure() or {})["attempt"] == 2


def test_one_bad_picture_stops_the_run_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Loader._finish

    def finish(self: Loader, images: Tensor, epoch: int, part: Any) -> Tensor:
        out = true(self, images, epoch, part)
        return out * float("nan") if epoch == 1 and 5 in part else out

    monkeypatch.setattr(Loader, "_finish", finish)
    config = tiny("pretrain", efficiency={"micro_batch": 3})
    with pytest.raises(RunFailed, match=r"step (8|9|1[0-5]) .*pictures: .*\b5\b"):
        execute(config, Store(tmp_path))
    rows = Store(tmp_path).run(run_id(config)).metrics()
    assert all(math.isfinite(row["loss"]) for row in rows)


# Fine-tuning and probing


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder, dict[str, Any]]:
    config = tiny("finetune", optim={"base_lr": 0.05}, data={"val_pictures": 53})
    return config, *done(config, tmp_path_factory.mktemp("finetuned"))


def test_top1_and_top5_count_every_picture_once(finetuned: tuple[Config, RunFolder, dict[str, Any]]) -> None:
    config, folder, result = finetuned
    tensors = weights(folder)
    network = Classifier(config.model, 32, config.head, 10)  # type: ignore[union-attr]
    network.load_state_dict(tensors)
    network.eval()
    dataset = open_dataset(config.data, "val")
    hits = defaultdict(int)
    for batch in Loader(dataset, config.data, seed=0, batch_size=1, train=False).epoch(0):
        with torch.no_grad():
            ranked = network(batch.images)[0].argsort(descending=True).tolist()
        hits[1] += int(batch.labels[0]) in ranked[:1]
        hits[5] += int(batch.labels[0]) in ranked[:5]
    assert len(dataset) == 53  # 6 batches of 8 and a ragged one
    assert result["metrics"]["top1"] == pytest.approx(100 * hits[1] / 53)
    assert result["metrics"]["top5"] == pytest.approx(100 * hits[5] / 53)
    assert result["dataset"]["val"] == 53
    assert 0 < hits[1] < hits[5] < 53


def test_all_of_the_network_is_tuned(finetuned: tuple[Config, RunFolder, dict[str, Any]], tmp_path: Path) -> None:
    _, folder, _ = finetuned
    start = tiny("finetune", optim={"base_lr": 1e-30, "epochs": 1, "warmup_epochs": 0, "min_lr": 0})
    first = weights(done(start, tmp_path)[0])
    for name, value in weights(folder).items():
        assert not torch.equal(value, first[name]), name
    assert float(first["head.weight"].abs().max()) < 1e-4  # trunc-normal 2e-5
    assert "norm.weight" not in first  # replaced by fc_norm


def test_averaged_weights_are_what_is_scored(tmp_path: Path) -> None:
    plain = done(tiny("finetune", optim={"base_lr": 0.05}), tmp_path)[1]["metrics"]
    folder, result = done(tiny("finetune", optim={"base_lr": 0.05, "weight_ema": 1 - 1e-12}), tmp_path)
    still = {"base_lr": 1e-30, "epochs": 1, "warmup_epochs": 0, "min_lr": 0}
    first, scored = done(tiny("finetune", optim=still), tmp_path)
    assert result["metrics"]["loss"] == plain["loss"]
    assert result["metrics"]["top5"] == scored["metrics"]["top5"] != plain["top5"]
    kept = weights(folder)
    for name, value in weights(first).items():
        torch.testing.assert_close(kept[name], value)  # and what is scored is what is kept


def test_a_probe_trains_the_head_alone(tmp_path: Path) -> None:
    parent = tmp_path / "store"
    _, pretrained = done(tiny("pretrain"), parent)
    init = {"run": pretrained["id"], "weights": "teacher", "epoch": 2}
    modes: list[tuple[bool, bool]] = []

    def watch(self: Classifier, images: Tensor, drop: Tensor | None = None) -> Tensor:
        modes.append((self.blocks.training, self.fc_norm.training))
        assert drop is None
        return features(self, images, drop)

    features = Classifier.features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "features", watch)
        folder, result = done(tiny("linprobe", init=init, optim={"base_lr": 1.0}), parent)
    assert set(modes[:STEPS]) == {(False, True)}
    assert set(modes[STEPS:]) == {(False, False)}
    encoder = load_weights(Store(parent).run(pretrained["id"]).checkpoints / "teacher-epoch-00002.safetensors")[0]
    final = weights(folder)
    for name, value in encoder.items():
        assert torch.equal(final[name], value), name
    assert not any("fc_norm.weight" in name for name in final)
    assert int(final["fc_norm.num_batches_tracked"]) == STEPS
    assert bool(final["fc_norm.running_mean"].any())
    assert bool(final["head.bias"].any())
    assert math.isfinite(result["metrics"]["loss"])


def test_what_cannot_be_read_is_counted_in_the_result(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((40, 40), 80 + i).convert("RGB").save(folder / f"{i}.png")
    broken = [tmp_path / "pictures" / split / "bee" / "1.png" for split in ("train", "val")]
    for file in broken:
        file.write_bytes(file.read_bytes()[:50])
    data = {"name": "imagefolder", "path": str(tmp_path / "pictures"), "train_pictures": None, "val_pictures": None}
    for stage, names in (("pretrain", broken[:1]), ("finetune", broken)):
        config = tiny(stage, data=data | {"on_error": "skip"}, optim={"epochs": 1})
        _, result = done(config, tmp_path / "store")
        assert result["skipped"] == [str(name) for name in names]
    with pytest.raises(RunFailed, match=r"bee/1\.png"):
        done(tiny("pretrain", data=data, optim={"epochs": 1}), tmp_path / "other")
    (only,) = Store(tmp_path / "other").ids()
    assert Store(tmp_path / "other").run(only).state() == "failed"
    json.loads((tmp_path / "other" / only / "failure.json").read_text())
