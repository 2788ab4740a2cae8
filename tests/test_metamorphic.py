"""What must stay as it is, or move as foretold, when something beside the point changes.

Elsewhere: permuting a batch, folds as rows against one by one, one fold against all masked (tests/test_method.py);
accumulation (tests/test_trainer.py); one process against two (tests/test_distributed.py).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_method import batch, sdae

from sdae.config import Pretrain, run_id
from sdae.data.objects import encoded, open_objects
from sdae.data.segmentation import IGNORE
from sdae.models.encoder import patchify
from sdae.objective import cosine_loss, normalize, pixel_loss
from sdae.sections import DetectData, Teacher
from sdae.stages.detect import score
from sdae.stages.segment import confusion, scores
from sdae.training.optimizers import Optim, ema_momentum, schedule
from sdae.views import View, as_rows, split
from sdae.weights import fit

VIEWS = [("full", {}), ("masked", {}), ("crop", {"tokens": 5}), ("folds", {"folds": 3}), ("folds", {"folds": 5})]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(3, 9))
seeds = st.integers(0, 2**31)


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Views
@pytest.mark.parametrize(("view", "keys"), VIEWS)
def test_a_batch_in_parts_has_the_mean_of_their_losses(view: str, keys: dict[str, int]) -> None:
    module = sdae(view, **keys)
    images, noise = batch()
    whole = module(images, noise)
    parts = [module(images[i : i + 1], noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).mean())
    torch.testing.assert_close(whole.features, torch.cat([part.features for part in parts]), rtol=1e-5, atol=1e-5)


def test_one_view_has_one_spelling_and_one_id() -> None:
    def config(**teacher: Any) -> Pretrain:
        found = tiny("pretrain", method={"teacher": teacher})
        assert isinstance(found, Pretrain)
        return found

    same = [
        [config(view="masked"), config(view="masked", folds=4), config(view="crop", tokens=12)],
        [config(view="masked"), config(view="folds", folds=1)],
        [config(view="full"), config(view="full", tokens=3), config(view="crop", tokens=16)],
        [config(view="folds", folds=3), config(), config(view="folds", tokens=7)],
    ]  # fmt: skip
    for group in same:
        assert len({run_id(one) for one in group}) == 1
        assert all(one == group[0] for one in group)
    assert len({run_id(one) for group in same for one in group}) == 3
    assert View.of(Teacher(view="crop", tokens=12), 12) == View.of(Teacher(view="masked"), 12) == View(12)
    assert View.of(Teacher(view="masked", folds=3, tokens=5), 12) == View(12), (
        "what a view does not use changes nothing"
    )
    assert View.of(Teacher(view="folds", folds=3, tokens=5), 12) == View(4, 3)
    assert View.of(Teacher(view="crop", folds=3, tokens=5), 12) == View(5)
    assert View.of(Teacher(view="full", folds=3, tokens=5), 12) == View(12, full=True)
    assert (View(4, 3).used, View(5, 2).used, View(12).used) == (12, 10, 12)


@pytest.mark.parametrize("folds", [2, 3, 4])
def test_the_first_fold_is_the_crop_of_its_length(folds: int) -> None:
    images, noise = batch()
    many, one = sdae("folds", folds=folds)(images, noise), sdae("crop", tokens=12 // folds)(images, noise)
    torch.testing.assert_close(many.features[::folds], one.features)
    torch.testing.assert_close(many.prediction[::folds], one.prediction)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_folds_are_the_list_cut_up(batch_size: int, folds: int, length: int, channels: int) -> None:
    tokens = torch.arange(batch_size * folds * length * channels).view(batch_size, folds * length, channels)
    rows = as_rows(tokens, folds)
    assert rows.shape == (batch_size * folds, length, channels)
    for row in range(batch_size):
        assert torch.equal(torch.cat([*rows[row * folds : (row + 1) * folds]]), tokens[row])


@settings(deadline=None)
@given(seeds, st.integers(1, 15))
def test_what_is_visible_depends_on_the_order_of_the_noise_alone(seed: int, visible: int) -> None:
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed))
    for one, other in zip(split(noise, visible), split(noise.exp() * 3 - 7, visible), strict=True):
        assert torch.equal(one, other)


def test_stochastic_depth_is_the_student_s_alone() -> None:
    module = sdae()
    images, noise = batch()
    plain = module(images, noise)
    kept, dropped = (module(images, noise, torch.full((2, 2, 4), factor)) for factor in (1.0, 0.0))
    torch.testing.assert_close(kept.prediction, plain.prediction)
    assert not torch.allclose(dropped.prediction, plain.prediction)
    assert torch.equal(dropped.target, plain.target)


def test_patches_that_change_places_take_their_noise_along() -> None:
    """The student's picture of visible patches knows their places: so do positions, and nothing else does."""
    module = sdae("masked")
    images, _ = batch()
    tokens = module.teacher.embed(patchify(images, 8))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    straight = module.teacher.encode(tokens)
    permuted = module.teacher.encode(tokens[:, order])
    torch.testing.assert_close(permuted[:, 1:], straight[:, 1:][:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted[:, 0], straight[:, 0], rtol=1e-5, atol=1e-5)


def test_positions_at_another_resolution() -> None:
    """Resized to the same grid they are the same; a level field stays level; there and back is near."""
    encoder = sdae().teacher
    state, model = encoder.state_dict(), tiny("pretrain").model
    same = fit(copy.deepcopy(state), model, 32, "here")
    assert all(torch.equal(same[name], value) for name, value in state.items())
    level = state | {"pos_embed": torch.full_like(state["pos_embed"], 0.5)}
    for size in (16, 48, 64):
        larger = fit(copy.deepcopy(level), model, size, "here")["pos_embed"]
        assert larger.shape == (1, 1 + (size // 8) ** 2, 24)
        torch.testing.assert_close(larger, torch.full_like(larger, 0.5))
    ramp = torch.linspace(-1, 1, 4).repeat(4)[None, :, None].expand(1, 16, 24)
    smooth = state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], ramp], dim=1)}
    back = fit(fit(copy.deepcopy(smooth), model, 64, "here"), model, 32, "here")["pos_embed"]
    torch.testing.assert_close(back, smooth["pos_embed"], rtol=0, atol=0.1)


# Objective
@settings(deadline=None)
@given(shapes, seeds, st.floats(0.5, 20), st.floats(-5, 5))
def test_normalized_targets_forget_scale_and_offset(
    shape: tuple[int, ...], seed: int, scale: float, offset: float
) -> None:
    features = drawn(shape, seed).double() * 3
    normalized = normalize(features)
    torch.testing.assert_close(normalize(features * scale + offset), normalized, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normalized.mean(-1), torch.zeros_like(normalized[..., 0]), rtol=0, atol=1e-9)
    varied = features.var(-1) > 0.1
    torch.testing.assert_close(
        normalized.var(-1)[varied], torch.ones_like(normalized[..., 0])[varied], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(normalize(-features), -normalized)


@settings(deadline=None)
@given(shapes, seeds, st.floats(0.01, 100), st.sampled_from([1, 2]))
def test_the_cosine_forgets_scale(shape: tuple[int, ...], seed: int, scale: float, axis: int) -> None:
    one, other = drawn(shape, seed), drawn(shape, seed + 1)
    loss = cosine_loss(one, other, axis)
    torch.testing.assert_close(cosine_loss(one * scale, other, axis), loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(cosine_loss(one, other * scale, axis), loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(cosine_loss(other, one, axis), loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(cosine_loss(-one, other, axis), 2 - loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(cosine_loss(one, one, axis), torch.tensor(0.0), rtol=0, atol=2e-6)
    torch.testing.assert_close(cosine_loss(one.mT, other.mT, 3 - axis), loss, rtol=0, atol=2e-6)


def test_nothing_predicted_is_a_loss_of_one() -> None:
    nothing = torch.zeros(2, 3, 4, requires_grad=True)
    loss = cosine_loss(nothing, drawn((2, 3, 4), 0), 1)
    assert float(loss) == 1.0
    loss.backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()
    small = drawn((2, 3, 4), 1) * 1e-6
    torch.testing.assert_close(
        cosine_loss(small, drawn((2, 3, 4), 0), 1), cosine_loss(small * 1e6, drawn((2, 3, 4), 0), 1)
    )


@settings(deadline=None)
@given(shapes, seeds, st.floats(0.5, 4), st.floats(-2, 2))
def test_pixel_loss(shape: tuple[int, ...], seed: int, scale: float, offset: float) -> None:
    prediction, pixels = drawn(shape, seed), drawn(shape, seed + 1)
    moved = pixel_loss(prediction + offset, pixels + offset, False)
    torch.testing.assert_close(moved, pixel_loss(prediction, pixels, False), rtol=1e-4, atol=1e-5)
    scaled = pixel_loss(prediction * scale, pixels * scale, False)
    torch.testing.assert_close(scaled, scale**2 * pixel_loss(prediction, pixels, False), rtol=1e-4, atol=1e-5)
    assert float(pixel_loss(pixels, pixels, False)) == 0.0
    assert float(pixel_loss(normalize(pixels), pixels, True)) == pytest.approx(0.0, abs=1e-9)
    half = pixel_loss(prediction.bfloat16(), pixels, False)
    assert half.dtype == cosine_loss(prediction.bfloat16(), pixels.bfloat16(), 1).dtype == torch.float32


# The teacher
def test_momentum_1_keeps_the_teacher_and_0_makes_it_the_student() -> None:
    module = sdae()
    before = copy.deepcopy(module.teacher.state_dict())
    far = module.teacher_distance()
    module.update_teacher(1.0)
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    module.update_teacher(0.5)
    assert module.teacher_distance() == pytest.approx(far / 2, rel=1e-5)
    module.update_teacher(0.0)
    student = module.student.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in module.teacher.state_dict().items())
    assert module.teacher_distance() == 0.0


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.99), st.floats(0.1, 0.99))
def test_two_moves_towards_one_student_are_one(first: float, second: float) -> None:
    module = sdae()
    other = copy.deepcopy(module)
    module.update_teacher(first)
    module.update_teacher(second)
    other.update_teacher(first * second)
    for one, two in zip(module.teacher.parameters(), other.teacher.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_teacher_s_distance_is_relative() -> None:
    module = sdae()
    with torch.no_grad():
        for name, parameter in module.teacher.named_parameters():
            parameter.copy_(module.student.get_parameter(name) * 1.25)
    assert module.teacher_distance() == pytest.approx(0.25, rel=1e-5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8)
    assert module.teacher_distance() == pytest.approx(0.25, rel=1e-5)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 400))
def test_momentum_of_an_epoch(start: float, end: float, epochs: int) -> None:
    def at(epoch: int) -> float:
        return ema_momentum(epoch, start=start, end=end, epochs=epochs)

    assert at(0) == pytest.approx(start) and at(epochs) == pytest.approx(end)
    for epoch in (1, epochs // 2, epochs - 1):
        assert at(epoch) + at(epochs - epoch) == pytest.approx(start + end), "the cosine is symmetric"
        assert 1 - at(epoch) == pytest.approx(ema_momentum(epoch, start=1 - start, end=1 - end, epochs=epochs))
    assert ema_momentum(3, start=start, end=None, epochs=epochs) == start


# The learning rate and the batch
@settings(deadline=None)
@given(st.integers(1, 64), st.integers(2, 8), st.integers(1, 9))
def test_the_learning_rate_grows_with_the_batch(size: int, times: int, per_epoch: int) -> None:
    """`times` as large a batch: as large a rate at each part of the run, in as few steps."""
    keys = {"epochs": 6, "warmup_epochs": 2, "base_lr": 0.01}
    small = schedule(Optim(batch_size=size, **keys), per_epoch * times)
    large = schedule(Optim(batch_size=size * times, **keys), per_epoch)
    assert small.steps == large.steps * times
    for step in range(large.steps):
        assert large.rate(step) == pytest.approx(times * small.rate(step * times))


# Metrics and mirrors
@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 5))
def test_segmentation_scores_of_mirrored_pictures(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.choice([*range(classes), IGNORE], size=(6, 9)))
    found = torch.from_numpy(rng.integers(0, classes, (6, 9)))
    labels[0, 0] = 0
    straight = confusion(found, labels, classes)
    for turned in (lambda x: x.flip(1), lambda x: x.flip(0), lambda x: x.T):
        assert torch.equal(confusion(turned(found), turned(labels), classes), straight)
    order = rng.permutation(classes)
    renamed, plain = scores(straight.numpy()[np.ix_(order, order)]), scores(straight.numpy())
    assert renamed["iou"] == [plain["iou"][k] for k in order]
    for name in ("miou", "macc", "aacc"):
        assert renamed[name] == pytest.approx(plain[name])
        assert scores(7 * straight.numpy())[name] == pytest.approx(plain[name])


def test_detection_scores_of_mirrored_pictures() -> None:
    seed = 5
    rng = np.random.default_rng(seed)
    truth = open_objects(DetectData(name="builtin", image_size=64, longest=64, val_pictures=3), "val", 0).ground_truth()
    sizes = {p["id"]: (p["height"], p["width"]) for p in truth["images"]}

    def box(one: dict[str, Any], shift: float) -> dict[str, Any]:
        height, width = sizes[one["image_id"]]
        x, y, w, h = one["bbox"]
        x = min(max(0.0, x + shift), width - w)
        mask = np.zeros((height, width), bool)
        mask[round(y) : round(y + h), round(x) : round(x + w)] = True
        return {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": [x, y, w, h],
            "segmentation": encoded(mask),
        }

    def mirrored(one: dict[str, Any]) -> dict[str, Any]:
        x, y, w, h = one["bbox"]
        return box({**one, "bbox": [sizes[one["image_id"]][1] - x - w, y, w, h]}, 0.0)

    true = [{**one, **box(one, 0.0)} for one in truth["annotations"]]
    found = [box(one, float(rng.integers(-3, 4))) | {"score": 0.9 - 0.01 * i} for i, one in enumerate(true)]
    straight, _ = score({**truth, "annotations": true}, found)
    turned, _ = score(
        {**truth, "annotations": [{**one, **mirrored(one)} for one in true]},
        [mirrored(one) | {"score": one["score"]} for one in found],
    )
    assert turned == pytest.approx(straight)
    assert 0 < straight["apb"] < 100
    halved, _ = score({**truth, "annotations": true}, [{**one, "score": one["score"] / 2} for one in found[::-1]])
    assert halved == pytest.approx(straight), "of scores their order alone counts"
