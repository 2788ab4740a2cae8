"""Segmentation: UperNet, slide and whole inference, mIoU, runs that end, resume and share their work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calling import assert_refused, call
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_segment_data import folder_with, some_maps, write_run
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.config import Segment, parse
from sdae.data.fingerprint import resolve
from sdae.data.segmentation import IGNORE, open_segmentation
from sdae.files import read_json
from sdae.models.upernet import UperNet, cross_entropy
from sdae.run import execute
from sdae.sections import Backbone, Model, SegmentHead
from sdae.stages import segment
from sdae.stages.segment import confusion, load_trained, predict, probabilities, scores, slide, starts, whole
from sdae.store import RunFolder, Store
from sdae.yamls import merge

SMALL: dict[str, Any] = merge(
    {k: v for k, v in TINY.items() if k != "optim"},
    {
        "stage": "segment",
        "data": {"train_pictures": 16, "val_pictures": 7},
        "head": {"channels": 8, "aux_channels": 8},
        "optim": {"steps": 12, "batch_size": 4, "warmup_steps": 2, "lr": 1e-3},
    },
)


def small(**changes: Any) -> Segment:
    """A complete config that trains and tests in a second or two on one CPU thread."""
    config = parse(merge(SMALL, changes))
    assert isinstance(config, Segment)
    return config.model_copy(update={"data": resolve(config.data)})


def done(config: Segment, root: Path) -> tuple[RunFolder, dict[str, Any]]:
    result = execute(config, Store(root))
    return Store(root).run(result["id"]), result


def fresh(config: Segment, classes: int = 5, seed: int = 0) -> UperNet:
    torch.manual_seed(seed)
    module = segment.network(config, classes)
    module.backbone.init_timm()
    module.init_weights()
    return module


# --- mIoU


def sets_of_pixels(pairs: list[tuple[NDArray[Any], NDArray[Any]]], classes: int) -> dict[str, Any]:
    """Scores from the definition: for each class the pixels that have it, as sets of (picture, place)."""
    truth: list[set[tuple[int, int]]] = [set() for _ in range(classes)]
    found: list[set[tuple[int, int]]] = [set() for _ in range(classes)]
    for k, (label, guess) in enumerate(pairs):
        for place in np.flatnonzero(label != IGNORE):
            truth[label.flat[place]].add((k, int(place)))
            found[guess.flat[place]].add((k, int(place)))
    both = [len(t & f) for t, f in zip(truth, found, strict=True)]
    iou = [100 * b / len(t | f) if t | f else None for b, t, f in zip(both, truth, found, strict=True)]
    accuracy = [100 * b / len(t) if t else None for b, t in zip(both, truth, strict=True)]
    means = [float(np.mean([x for x in values if x is not None])) for values in (iou, accuracy)]
    return {
        "miou": means[0], "macc": means[1], "aacc": 100 * sum(both) / sum(map(len, truth)), "iou": iou,
        "accuracy": accuracy,
    }  # fmt: skip


def camvid(root: Path, **changes: Any) -> Segment:
    data = {"name": "segmentation-folder", "path": str(root), "train_pictures": 8, "val_pictures": 3}
    return small(**merge({"data": data}, changes))


def test_miou_on_camvid_is_that_of_the_saved_predictions(real: Callable[[str], Path], tmp_path: Path) -> None:
    config = camvid(real("camvid-11"), optim={"steps": 20, "lr": 3e-3}, test={"scales": [1.0, 1.5], "flip": True})
    folder, result = done(config, tmp_path / "store")
    loaded, module, classes = load_trained(folder)
    pictures = open_segmentation(config.data, "val", 0)
    assert classes == pictures.classes
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", predict(module, loaded, pictures.read(i)[0]).numpy())
    pairs = [(pictures.read(i)[1].numpy(), np.load(tmp_path / f"{i}.npy")) for i in range(3)]
    assert all(label.shape == guess.shape == (360, 480) for label, guess in pairs)
    assert any((label == IGNORE).any() for label, _ in pairs)
    wanted = sets_of_pixels(pairs, 11)
    assert len({guess.tobytes() for _, guess in pairs}) == 3
    assert {k: result["metrics"][k] for k in ("miou", "macc", "aacc")} == {
        k: wanted[k] for k in ("miou", "macc", "aacc")
    }
    evaluation = read_json(folder.path / "evaluation.json")
    assert evaluation["iou"] == wanted["iou"]
    assert evaluation["accuracy"] == wanted["accuracy"]
    assert evaluation["classes"] == classes
    assert np.sum(evaluation["confusion"]) == sum((label != IGNORE).sum() for label, _ in pairs)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_definition(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    most = rng.integers(1, classes + 1)  # so some classes are in neither or in one of the two
    pairs = []
    for _ in range(3):
        label = rng.choice([*range(most), IGNORE], size=(5, 7))
        pairs.append((label, rng.integers(0, classes, (5, 7))))
    pairs[0][0].flat[0] = 0
    counts = sum(confusion(torch.from_numpy(g), torch.from_numpy(t), classes) for t, g in pairs)
    assert isinstance(counts, Tensor)
    assert scores(counts.numpy()) == sets_of_pixels(pairs, classes)


def test_a_class_in_neither_truth_nor_prediction_counts_for_nothing() -> None:
    found = scores(np.array([[6, 2, 0, 0], [0, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert found["iou"] == [75.0, 80.0, None, None]
    assert (found["miou"], found["macc"], found["aacc"]) == (77.5, 87.5, 87.5)
    found = scores(np.array([[6, 0, 2], [0, 8, 0], [0, 0, 0]]))  # predicted, yet nowhere true
    assert found["iou"] == [75.0, 100.0, 0.0]
    assert found["accuracy"] == [75.0, 100.0, None]


def test_validation_pictures_without_any_label(tmp_path: Path) -> None:
    maps = some_maps()
    root = folder_with(tmp_path / "set", {**maps, "val": [np.zeros_like(m) for m in maps["val"]]})
    called = call("run", write_run(tmp_path, root), "--store", tmp_path / "store")
    assert_refused(called, "no validation picture of segmentation-folder has a labelled pixel")


# --- inference


class Fake(nn.Module):
    """Logits are the picture itself, plus a ramp over each window times `ramp`."""

    def __init__(self, ramp: float = 0.0, patch: int = 4):
        super().__init__()
        self.backbone, self.ramp = SimpleNamespace(patch=patch), ramp
        self.sizes: list[tuple[int, ...]] = []

    def logits(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape))
        height, width = images.shape[2:]
        place = torch.arange(height)[:, None] * 100.0 + torch.arange(width)
        return images + self.ramp * place


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 64))
def test_windows_cover_the_length(length: int, side: int, stride: int) -> None:
    stride = min(stride, side)
    found = starts(length, side, stride)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[-1] == max(length - side, 0)
    assert all(b - a <= stride for a, b in pairwise(found))
    assert all(b - a == stride for a, b in pairwise(found[:-1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 32), st.floats(0, 1))
def test_overlapping_windows_are_averaged(height: int, width: int, stride: int, ramp: float) -> None:
    config = small(test={"stride": stride})  # windows of 32
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    found = slide(Fake(ramp), config, image)  # type: ignore[arg-type]
    total, count = np.zeros((3, height, width)), np.zeros((height, width))
    for y in range(0, 10**6, stride):
        for x in range(0, 10**6, stride):
            top, left = min(y, max(height - 32, 0)), min(x, max(width - 32, 0))
            rows, columns = np.arange(top, min(top + 32, height)), np.arange(left, min(left + 32, width))
            part = np.ix_(rows, columns)
            place = 100.0 * (rows - top)[:, None] + (columns - left)
            total[(slice(None), *part)] += image.numpy()[(slice(None), *part)] + ramp * place
            count[part] += 1
            if left + 32 >= width:
                break
        if top + 32 >= height:
            break
    np.testing.assert_allclose(found.numpy(), total / count, rtol=1e-4, atol=1e-4)


def test_slide_is_whole_where_one_window_is_the_picture() -> None:
    config = small()
    module = fresh(config).eval()
    image = torch.randn(3, 32, 32)
    with torch.no_grad():
        one, other = slide(module, config, image), whole(module, image)
    assert torch.equal(one, other)
    assert one.shape == (5, 32, 32)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70))
def test_whole_fills_up_to_patches_and_cuts_off_again(height: int, width: int) -> None:
    image = torch.rand(3, height, width)
    fake = Fake(patch=8)
    torch.testing.assert_close(whole(fake, image), image)  # type: ignore[arg-type]
    assert fake.sizes == [(1, 3, -(-height // 8) * 8, -(-width // 8) * 8)]


def test_the_default_stride_is_two_thirds() -> None:
    fake = Fake()
    slide(fake, small(data={"image_size": 512}), torch.rand(3, 512, 853))  # type: ignore[arg-type]
    assert starts(853, 512, 341) == [0, 341]
    assert fake.sizes == [(2, 3, 512, 512)]


def test_scales_and_flips_are_averaged() -> None:
    config = small(test={"scales": [0.5, 1.0, 1.75], "flip": True})
    module = fresh(config).eval()
    image = torch.randn(3, 40, 60)

    def chances(picture: Tensor, **test: Any) -> Tensor:
        with torch.no_grad():
            return probabilities(module, small(test=test), picture, (50, 75))

    together = chances(image, scales=[0.5, 1.0, 1.75], flip=True)
    torch.testing.assert_close(together.sum(0), torch.ones(50, 75))
    single = [
        chances(view, scales=[scale]).flip(2) if mirrored else chances(view, scales=[scale])
        for scale in (0.5, 1.0, 1.75)
        for mirrored, view in ((False, image), (True, image.flip(2)))
    ]
    torch.testing.assert_close(together, torch.stack(single).mean(0))
    mirrored = chances(image.flip(2), scales=[0.5, 1.0, 1.75], flip=True).flip(2)
    torch.testing.assert_close(together, mirrored)
    assert not torch.allclose(together, single[2])


def test_pictures_are_tested_at_the_size_of_the_recipe() -> None:
    fake = Fake()
    config = small(data={"augment": {"longest": 4.0}}, test={"mode": "whole", "scales": [1.0, 0.5]})
    for size, wanted in (((60, 90), (32, 48)), ((10, 100), (13, 128)), ((300, 30), (128, 13))):
        fake.sizes.clear()
        found = probabilities(fake, config, torch.rand(3, *size), size)  # type: ignore[arg-type]
        assert found.shape == (3, *size)
        assert fake.sizes[0][2:] == tuple(-(-n // 4) * 4 for n in wanted)


# --- the network


def test_shapes_and_parameters_of_the_paper_s_network() -> None:
    """UperNet upon ViT-B at 512 with 150 classes: 163 M parameters, counted layer by layer."""
    with torch.device("meta"):
        module = UperNet(Model(), 512, Backbone(), SegmentHead(), 150)
    d, c, side = 768, 768, 32

    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel**2 + 2 * outputs  # no bias; BatchNorm's scale and shift

    block = 12 * d * d + 13 * d  # qkv, projection, two of the MLP with biases; two LayerNorms
    encoder = (16 * 16 * 3 * d + d) + d + (1 + side**2) * d + 12 * block
    pyramid = 3 * (4 * d * d + d) + 2 * d
    head = 4 * conv(d, c, 1) + conv(d + 4 * c, c, 3) + 3 * conv(d, c, 1) + 3 * conv(c, c, 3) + conv(4 * c, c, 3)
    classifiers = (c + 1) * 150 + conv(d, 256, 3) + (256 + 1) * 150
    count = sum(p.numel() for p in module.parameters())
    assert count == encoder + pyramid + head + classifiers
    assert count == pytest.approx(163e6, rel=0.01)
    assert module.backbone.taps == (3, 5, 7, 11)
    images = torch.empty(2, 3, 512, 512, device="meta")
    assert module.eval().logits(images).shape == (2, 150, 128, 128)
    assert [tuple(m.shape[2:]) for m in module.backbone(images)] == [(128, 128), (64, 64), (32, 32), (16, 16)]
    assert module.logits(torch.empty(1, 3, 400, 512, device="meta")).shape == (1, 150, 100, 128)
    assert module.dropped == 768 + 256
    with torch.device("meta"):
        plain = UperNet(Model(), 512, Backbone(), SegmentHead(aux_weight=0), 150)
    assert sum(p.numel() for p in plain.parameters()) == count - conv(d, 256, 3) - (256 + 1) * 150


@pytest.mark.slow
def test_vit_b_at_512_takes_a_training_step() -> None:
    config = parse({"stage": "segment", "data": {"name": "builtin"}, "precision": "fp32"})
    assert isinstance(config, Segment)
    module = fresh(config, 150)
    images, labels = torch.randn(1, 3, 512, 512), torch.randint(0, 150, (1, 512, 512))
    before = module.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (loss,) = module(images, labels)
    loss.backward()
    optimizer.step()
    assert float(loss.detach()) == pytest.approx(1.4 * np.log(150), rel=0.1)  # nothing is known yet
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    assert not torch.equal(module.classifier.weight, before)


def test_the_loss_counts_unlabelled_pixels_in_its_denominator() -> None:
    logits, labels = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 32, 32))
    labels[:, :8] = IGNORE
    upon = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    wanted = F.cross_entropy(upon.permute(0, 2, 3, 1)[labels != IGNORE], labels[labels != IGNORE]) * 0.75
    torch.testing.assert_close(cross_entropy(logits, labels), wanted)
    assert float(cross_entropy(logits, torch.full_like(labels, IGNORE))) == 0
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def test_the_fcn_beside_is_weighted_and_dropout_takes_whole_channels() -> None:
    config = small(model={"drop_path": 0.0})
    module = fresh(config)
    images, labels = torch.randn(3, 3, 32, 32), torch.randint(0, 5, (3, 32, 32))
    ones = torch.ones(3, module.dropped)
    with torch.no_grad():
        loss = module(images, labels)[0]
        torch.testing.assert_close(module(images, labels, None, ones)[0], loss)
        none = module(images, labels, None, ones * 0)[0]  # zero channels and zero biases: every class is as likely
        assert float(none) == pytest.approx(1.4 * np.log(5), rel=1e-5)
        beside = ones.clone()
        beside[:, : config.head.channels] = 0
        own = ones.clone()
        own[:, config.head.channels :] = 0
        parts = float(module(images, labels, None, beside)[0]) + float(module(images, labels, None, own)[0])
    assert parts - float(none) == pytest.approx(float(loss), rel=1e-5)


def test_one_picture_a_batch_trains() -> None:
    module = fresh(small())
    module(torch.randn(1, 3, 32, 32), torch.randint(0, 5, (1, 32, 32)))[0].backward()  # pooled to a single place
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
