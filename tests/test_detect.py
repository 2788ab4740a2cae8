"""Mask R-CNN and its metric: what it computes, what it learns, and that ranks and stops do not matter."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from test_distributed import torchrun
from torch import Tensor

from sdae.config import Detect, parse, run_id
from sdae.data.fingerprint import resolve
from sdae.errors import Interrupted, UserError
from sdae.models.dense import Pyramid
from sdae.models.maskrcnn import MaskRCNN, Sampler, first, giou
from sdae.run import execute
from sdae.sections import Backbone, Model
from sdae.stages import detect
from sdae.stages.detect import network
from sdae.store import Store
from sdae.training.checkpoints import load_weights
from sdae.training.loop import Stop
from sdae.yamls import merge

Json = dict[str, Any]
SMALL: Json = {
    "stage": "detect", "precision": "fp32", "efficiency": TINY["efficiency"],
    "data": {
        "name": "builtin", "image_size": 64, "longest": 96, "classes": 4, "train_pictures": 16, "val_pictures": 9,
        "augment": {"sides": [48, 64], "crop": [24, 40], "crop_sides": [40, 56]},
    },
    "model": {"width": 24, "depth": 4, "heads": 2, "patch_size": 8, "drop_path": 0.1},
    "head": {"channels": 16, "hidden": 32, "rpn_sampled": 32, "sampled": 32, "proposals": 50},
    "optim": {"steps": 6, "batch_size": 4, "warmup_steps": 2, "milestones": [5]},
}  # fmt: skip


def small(**changes: Any) -> Detect:
    config = parse(merge(SMALL, changes))
    assert isinstance(config, Detect)
    return config.model_copy(update={"data": resolve(config.data)})


def made(config: Detect, classes: int = 4, seed: int = 0) -> MaskRCNN:
    module = network(config, classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.backbone.init_timm()
        module.init_weights()
    return module


def targets(objects: int, size: int = 64) -> dict[str, Tensor]:
    """The first `objects` of three squares."""
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 30, 60, 60], [2, 40, 18, 62]])[:objects]
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {"boxes": boxes, "labels": torch.tensor([1, 4, 2])[:objects], "masks": masks}


# The network


def test_giou_by_the_definition() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.uniform(0, 100, (2, 40, 2, 2)), axis=2)  # (side, pair, low and high, x and y)
    ours, theirs = corners.reshape(2, 40, 4)
    wanted = 0.0
    for (ax, ay, aX, aY), (bx, by, bX, bY) in zip(ours, theirs, strict=True):
        both = max(0.0, min(aX, bX) - max(ax, bx)) * max(0.0, min(aY, bY) - max(ay, by))
        either = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - both
        hull = (max(aX, bX) - min(ax, bx)) * (max(aY, bY) - min(ay, by))
        wanted += 1 - (both / either - (hull - either) / hull)
    found = giou(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_vit_b_has_the_parameters_of_its_layers() -> None:
    def layer(inputs: int, outputs: int, cells: int = 1, bias: bool = True) -> int:
        return inputs * outputs * cells + outputs * bias

    d, c, k = 768, 256, 80
    block = 2 * 2 * d + layer(d, 3 * d) + layer(d, d) + layer(d, 4 * d) + layer(4 * d, d)
    wanted = {
        "backbone": layer(3, d, 256) + d + (1 + 14 * 14) * d + 12 * block + 3 * layer(d, d, 4) + 2 * d,
        "fpn": 4 * (layer(d, c) + layer(c, c, 9)),
        "rpn": layer(c, c, 9) + layer(c, 3) + layer(c, 12),
        "regions": 4 * (layer(c, c, 9, bias=False) + 2 * c) + layer(49 * c, 1024) + layer(1024, k + 1)
        + layer(1024, 4 * (k + 1)) + 4 * layer(c, c, 9) + layer(c, c, 4) + layer(c, k + 1),
    }  # fmt: skip
    config = parse({"stage": "detect", "data": {"image_size": 224, "longest": 224}})
    assert isinstance(config, Detect)
    with torch.device("meta"):
        module = network(config, k)
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    assert found == wanted
    assert sum(wanted.values()) == 114_886_645


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_maps_anchors_and_regions_share_their_strides(patch: int) -> None:
    config = small(model={"patch_size": patch})
    module = made(config)
    images = torch.zeros(1, 3, 6 * patch, 4 * patch)  # the fifth map has an odd side
    features = module.features(images)
    assert [tuple(f.shape) for f in features.values()] == [
        (1, 16, 24, 16), (1, 16, 12, 8), (1, 16, 6, 4), (1, 16, 3, 2), (1, 16, 2, 1),
    ]  # fmt: skip
    from torchvision.models.detection.image_list import ImageList

    anchors = module.rpn.anchor_generator(ImageList(images, [(6 * patch, 4 * patch)]), list(features.values()))[0]
    assert len(anchors) == 3 * (24 * 16 + 12 * 8 + 6 * 4 + 3 * 2 + 2)
    stride = patch / 4
    assert torch.allclose(anchors[1], torch.tensor([-4.0, -4, 4, 4]) * stride)  # eight cells a side, ratio 1
    second = anchors[1 + 3 * (16 + 1)]
    assert torch.allclose(second, anchors[1] + stride)  # one cell below and beside
    assert torch.allclose((anchors[-2] - anchors[-5])[[1, 3]], torch.tensor(16 * stride))
    assert module.regions.box_roi_pool.scales == [1 / (stride * 2**k) for k in range(4)]
    sides = torch.tensor([27.9, 28.1, 55.9, 56.1, 111.9, 112.1, 999]) * stride
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert module.regions.box_roi_pool.map_levels([boxes]).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_patches_without_a_quarter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.patch_size: 6 is not a multiple of 4"):
        execute(small(model={"patch_size": 6}, data={"image_size": 60}), Store(tmp_path))


def test_a_window_over_the_whole_picture_is_global_attention() -> None:
    model = Model(width=24, depth=5, heads=2, patch_size=8, positions="relative")
    module = Pyramid(model, 32, Backbone(window=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.init_timm()
        for block in module.blocks:
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
        x = torch.randn(2, 16, 24)
    assert module.taps == (1, 2, 3, 4)
    windowed, everywhere = (module.block(module.blocks[0], x, (4, 4), None, inside) for inside in (True, False))
    torch.testing.assert_close(windowed, everywhere)
    small_windows = Pyramid(model, 32, Backbone(window=2))
    small_windows.load_state_dict(module.state_dict())
    assert not torch.allclose(small_windows.block(small_windows.blocks[0], x, (4, 4), None, True), everywhere)


def test_sampling_depends_on_the_picture_alone() -> None:
    labels = torch.tensor([1.0] * 30 + [0.0] * 200 + [-1.0] * 50)
    sampler = Sampler(64, 0.25)

    def taken(*keys: int) -> list[list[int]]:
        sampler.generators = [torch.Generator().manual_seed(key) for key in keys]
        objects, ground = sampler([labels] * len(keys))
        return [torch.where(o | g)[0].tolist() for o, g in zip(objects, ground, strict=True)]

    one, other = taken(5, 6)
    assert [one] == taken(5)
    assert [other] == taken(6)
    assert one != other
    assert sum(i < 30 for i in one) == 16
    assert len(one) == 64
    assert max(one) < 230
    few = first(torch.tensor([True, False, True]), 5, torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert few.tolist() == [True, False, True]


@pytest.mark.parametrize("loss", ["giou", "smooth_l1"])
@pytest.mark.parametrize("objects", [(0, 0), (0, 2), (3, 1)])
def test_batches_with_few_or_no_objects(objects: tuple[int, int], loss: str) -> None:
    module = made(small(head={"box_loss": loss})).train()
    before = torch.random.get_rng_state()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    total, parts = module(images, [(64, 64), (60, 50)], [targets(n) for n in objects], None, [7, 8])
    total.backward()
    assert torch.isfinite(total)
    assert float(parts.sum()) == pytest.approx(float(total.detach()), rel=1e-5)
    unused = [n for n, p in module.named_parameters() if p.grad is None]
    assert unused == []  # or several processes would wait for them
    if objects == (0, 0):
        assert parts[[1, 3, 4]].tolist() == [0, 0, 0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_bf16_keeps_boxes_and_losses_in_fp32() -> None:
    module = made(small()).train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = images, [(64, 64)] * 2, [targets(3), targets(1)], None, [7, 8]
    exact, _ = module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = module(*inputs)
        found = module.eval().detect(images, [(64, 64)] * 2)
    loss.backward()
    assert loss.dtype == parts.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)
    assert {t.dtype for one in found for t in one.values()} == {torch.float32, torch.int64}


def test_the_box_weight_weighs_boxes() -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    parts = [
        made(small(head={"box_weight": weight})).train()(images, [(64, 64)], [targets(2)], None, [7])[1]
        for weight in (10, 20)
    ]
    torch.testing.assert_close(parts[1], parts[0] * torch.tensor([1, 1, 1, 2, 1]))


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Detect, Json]:
    store, config = Store(tmp_path_factory.mktemp("detect")), small()
    return store, config, execute(config, store)


def test_a_run_on_builtin(finished: tuple[Store, Detect, Json]) -> None:
    store, config, result = finished
    metrics = result["metrics"]
    assert {"apb", "apb50", "apb75", "apm", "apm50", "apm75", "loss", "steps"} <= set(metrics)
    assert all(0 <= metrics[name] <= 100 for name in metrics if name.startswith("ap"))
    folder = store.run(result["id"])
    rows = folder.metrics()
    assert rows[-1]["step"] == config.optim.steps
    parts = [rows[-1][f"loss_{name}"] for name in ("rpn_class", "rpn_box", "class", "box", "mask")]
    assert all(part >= 0 for part in parts)
    record = json.loads((folder.path / "evaluation.json").read_text())
    assert record["classes"] == ["stripes-disc", "checks-square", "dots-triangle", "zigzag-ring"]
    assert len(record["ap_box"]) == len(record["ap_mask"]) == 4
    assert {kind: set(curves) for kind, curves in record["precision"].items()} == {
        "bbox": {"0.5", "0.75", "mean"}, "segm": {"0.5", "0.75", "mean"},
    }  # fmt: skip
    assert all(len(curve) == 101 for curves in record["precision"].values() for curve in curves.values())
    assert record["left_out"] == {"train": 0, "val": 0}


def test_workers_change_nothing(finished: tuple[Store, Detect, Json], tmp_path: Path) -> None:
    store, _, result = finished
    again = execute(small(efficiency={"workers": 2}), Store(tmp_path))
    assert again["id"] == result["id"]
    assert again["metrics"] == result["metrics"]
    losses = [[row["loss"] for row in s.run(result["id"]).metrics()] for s in (store, Store(tmp_path))]
    assert losses[0] == losses[1]


def test_prediction_of_any_picture(finished: tuple[Store, Detect, Json]) -> None:
    store, _, result = finished
    config, module, classes = detect.load_trained(store.run(result["id"]))
    unsure = config.model_copy(update={"test": config.test.model_copy(update={"score": 0.0})})
    module = network(unsure, len(classes))
    weights = load_weights(store.run(result["id"]).checkpoints / "model.safetensors")[0]
    module.load_state_dict(weights)
    image = (torch.rand(3, 50, 130, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    found = detect.predict(module, unsure, image)
    n = len(found["scores"])
    assert n > 0
    assert found["masks"].shape == (n, 50, 130)
    assert (np.diff(found["scores"]) <= 0).all()
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= np.array([130, 50, 130, 50]) + 1e-3).all()
    assert set(found["labels"].tolist()) <= set(range(4))
    middle = float(np.median(found["scores"]))
    some = detect.surest(found, middle)
    assert (some["scores"] >= middle).all()
    assert len(some["masks"]) == len(some["boxes"]) == len(some["scores"]) < n
    assert detect.drawn(image, some, classes).size == (130, 50)
    with pytest.raises(UserError, match="not a finished run of the stage detect"):
        detect.load_trained(store.run("detect-0000000000000000"))


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    from test_detect_data import annotation, content, written

    values = content()
    values["annotations"].append(annotation(7, 5, 2, 1, 1, 0.2))
    data = written(tmp_path / "coco", values).model_dump(mode="json", exclude={"fingerprint"})
    augment = {"sides": [32, 40], "crop": [16, 24], "crop_sides": [24, 32]}
    config = small(data={**data, "augment": augment, **dict.fromkeys(("classes", "train_pictures", "val_pictures"))},
                   optim={"batch_size": 3})  # fmt: skip
    result = execute(config, Store(tmp_path / "store"))
    assert result["skipped"] == ["train: 1 objects without a usable box or mask"]
    assert result["dataset"]["classes"] == 2
    record = json.loads((Store(tmp_path / "store").run(result["id"]).path / "evaluation.json").read_text())
    assert record["left_out"] == {"train": 1, "val": 0}


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_ends_with_the_same_bits(
    at: int, finished: tuple[Store, Detect, Json], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config, _ = finished
    stopped = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, world, step: step == at)
        with pytest.raises(Interrupted):
            execute(config, stopped)
    execute(config, stopped)
    kept = []
    for store in (whole, stopped):
        folder = store.run(run_id(config))
        result = folder.result()
        assert result is not None
        tensors = load_weights(folder.checkpoints / "model.safetensors")[0]
        losses = [(row["step"], row["loss"], row["loss_mask"]) for row in folder.metrics()]
        evaluation = (folder.path / "evaluation.json").read_bytes()
        kept.append(({k: t.numpy().tobytes() for k, t in tensors.items()}, losses, result["metrics"], evaluation))
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """With pictures of many sizes, and an odd number of them in the test."""
    config = small(head={"sampled": 24}, optim={"steps": 4, "milestones": [3]}, efficiency={"log_every": 1})
    one = execute(config, Store(tmp_path / "one"))
    done = torchrun(config, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    alone, together = (Store(tmp_path / name).run(run_id(config)) for name in ("one", "two"))
    for ours, theirs in zip(together.metrics(), alone.metrics(), strict=True):
        for name in ("loss", "loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box", "loss_mask"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), (ours["step"], name)
    result = together.result()
    assert result is not None
    for name, value in one["metrics"].items():
        assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=0.2), name  # AP has steps
    record = json.loads((together.path / "evaluation.json").read_text())
    assert record["ap_box"] == pytest.approx(
        json.loads((alone.path / "evaluation.json").read_text())["ap_box"], rel=1e-4, abs=0.2
    )


@pytest.mark.slow
def test_vit_b_takes_a_step() -> None:
    config = parse({"stage": "detect", "data": {"image_size": 224, "longest": 224}})
    assert isinstance(config, Detect)
    module = made(config, 80).train()
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    loss, _ = module(images, [(224, 224)], [targets(3, 224)], None, [1])
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def eight_pictures(source: Path, root: Path) -> None:
    """Landscapes of at most three objects, each at least a quarter of the picture a side, to train and to test on."""
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    of: dict[int, list[Json]] = {}
    for one in content["annotations"]:
        of.setdefault(one["image_id"], []).append(one)
    chosen = [
        p for p in content["images"]
        if p["width"] > p["height"] and 0 < len(of.get(p["id"], [])) <= 3 and not any(
            one["iscrowd"] or one["bbox"][2] < p["width"] / 4 or one["bbox"][3] < p["height"] / 4 for one in of[p["id"]]
        )
    ][:8]  # fmt: skip
    assert len(chosen) == 8
    content |= {"images": chosen, "annotations": [one for p in chosen for one in of[p["id"]]]}
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (root / f"{split}2017").mkdir()
        for p in chosen:
            shutil.copy(source / "train2017" / p["file_name"], root / f"{split}2017")


@pytest.mark.slow
def test_overfits_eight_pictures_of_coco(real: Callable[[str], Path], tmp_path: Path) -> None:
    eight_pictures(real("coco-mini-482"), tmp_path / "eight")
    config = small(
        data={
            "name": "coco-json", "path": str(tmp_path / "eight"), "image_size": 96, "longest": 128,
            "augment": {"sides": [96], "crop": None, "flip": False},
            **dict.fromkeys(("classes", "train_pictures", "val_pictures")),
        },
        model={"width": 64, "heads": 4, "drop_path": 0.0},
        head={"channels": 32, "hidden": 128, "rpn_sampled": 256, "sampled": 64, "proposals": 100},
        optim={
            "steps": 200, "batch_size": 8, "lr": 1e-3, "warmup_steps": 30, "milestones": [150], "layer_decay": None,
            "weight_decay": 0.01,
        },
    )  # fmt: skip
    metrics = execute(config, Store(tmp_path / "store"))["metrics"]
    print(metrics)
    assert metrics["apb50"] > 80
    assert metrics["apm50"] > 70
