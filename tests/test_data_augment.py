"""Augmentation against its models: torchvision's resized crop, timm's RandAugment upon Pillow, timm's batch mixing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdae.data import builtin, crop, mix, randaugment
from sdae.data.mixing import erase
from sdae.errors import UserError
from sdae.sections import Augment


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.from_numpy(builtin.render(range(24), "train", 64, instances=False).images)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_resized_crop_is_torchvision_s(pictures: Tensor, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 64))
    top, left = data.draw(st.integers(0, 64 - height)), data.draw(st.integers(0, 64 - width))
    out, flip = data.draw(st.sampled_from([16, 32, 64, 80])), data.draw(st.booleans())
    image = pictures[data.draw(st.integers(0, 23))]
    bicubic = F.InterpolationMode.BICUBIC
    expected = F.resized_crop(image.float(), top, left, height, width, [out, out], bicubic, antialias=True)
    expected = (expected.flip(2) if flip else expected).clamp(0, 255)
    box = torch.tensor([[top, left, height, width]])
    found = crop.resized_crop(image[None], box, torch.tensor([flip]), out)[0]
    assert (found - expected).abs().max() < 1.01
    assert (found - expected).abs().mean() < 0.02


def test_whole_picture_resized_is_torchvision_s(pictures: Tensor) -> None:
    for out in (32, 48, 96):
        expected = F.resize(pictures.float(), [out, out], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
        assert (crop.resize(pictures, out) - expected).abs().max() < 0.1
    assert torch.equal(crop.resize(pictures, 64), pictures.float())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.02, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_boxes_lie_in_the_picture(height: int, width: int, low: float, share: float, seed: int) -> None:
    scale = (low, low + (1 - low) * share)
    box = crop.boxes(seed, 0, np.arange(50), height, width, scale)
    top, left, h, w = box.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_boxes_have_the_asked_for_areas_and_ratios() -> None:
    box = crop.boxes(0, 0, np.arange(20000), 500, 500, (0.2, 0.8))
    area, ratio = box[:, 2] * box[:, 3] / 250000, np.log(box[:, 3] / box[:, 2])
    assert 0.198 < area.min() < 0.21
    assert 0.79 < area.max() < 0.802
    assert abs(area.mean() - 0.497) < 0.01
    assert abs(ratio).max() < math.log(4 / 3) + 0.01
    assert abs(ratio.mean()) < 0.01
    assert abs(box[:, :2].mean(0) / (500 - box[:, 2:]).mean(0) - 0.5).max() < 0.02


def test_fallback_is_the_widest_allowed_crop_in_the_middle() -> None:
    assert crop.boxes(0, 0, np.arange(3), 30, 300, (1.0, 1.0)).tolist() == [[0, 130, 30, 40]] * 3
    assert crop.boxes(0, 0, np.arange(3), 300, 30, (1.0, 1.0)).tolist() == [[130, 0, 40, 30]] * 3


NAMES = [entry[0] for entry in randaugment.PIXELWISE] + [entry[0] for entry in randaugment.GEOMETRIC]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("increasing", [False, True])
def test_operation_is_timm_s(name: str, increasing: bool, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    k = NAMES.index(name)
    theirs = name
    if increasing and f"{name}Increasing" in timm_augment.NAME_TO_OP:
        theirs = f"{name}Increasing"
    image = pictures[:1, :, :56].float()
    pillow = Image.fromarray(pictures[0, :, :56].permute(1, 2, 0).numpy())
    for magnitude in (0.0, 2.5, 5.0, 8.6, 9.0, 10.0):
        for sign in (1.0, -1.0):
            monkeypatch.setattr(timm_augment, "_randomly_negate", lambda v, sign=sign: v * sign)
            level = timm_augment.LEVEL_TO_ARG[theirs]
            arguments = level(magnitude, {}) if level else ()
            if name == "Posterize" and arguments[0] == 0:
                continue  # Pillow 13 refuses 0 bits, which older ones made black
            fill = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
            expected = np.array(timm_augment.NAME_TO_OP[theirs](pillow, *arguments, **fill)).astype(float)
            value = randaugment.TO_VALUE[k](np.array([magnitude]) / 10, np.array([sign]), increasing)
            if k < len(randaugment.PIXELWISE):
                found = randaugment.PIXELWISE[k][1](image, torch.from_numpy(value).float()[:, None, None, None])
            else:
                found = randaugment.affine(image, torch.from_numpy(randaugment.matrices(name, value, 56, 64)).float())
            assert np.abs(found[0].permute(1, 2, 0).numpy() - expected).max() <= 1, (magnitude, sign)


def test_operations_leave_plain_pictures_alone_where_pillow_does() -> None:
    plain = torch.full((1, 3, 8, 8), 77.0)
    assert torch.equal(randaugment.auto_contrast(plain, plain), plain)
    assert torch.equal(randaugment.equalize(plain, plain), plain)


def test_randaugment_draws_like_timm() -> None:
    policy = randaugment.RandAugment("rand-m9-mstd0.5-inc1")
    assert (policy.layers, policy.magnitude, policy.deviation, policy.increasing) == (2, 9.0, 0.5, True)
    choice, values = policy.draw(0, 0, np.arange(60000), 0)
    assert abs((choice == -1).mean() - 0.5) < 0.01
    counts = np.bincount(choice[choice >= 0], minlength=15)
    assert abs(counts / 2000 - 1).max() < 0.1
    degrees = values[choice == NAMES.index("Rotate")]
    assert abs(np.abs(degrees).mean() - 27) < 0.1
    assert abs(np.abs(degrees).std() - 1.5) < 0.1  # clipped at 30
    assert abs((degrees > 0).mean() - 0.5) < 0.05
    assert not (policy.draw(0, 0, np.arange(100), 1)[0] == choice[:100]).all()


def test_randaugment_of_a_picture_does_not_depend_on_its_batch(pictures: Tensor) -> None:
    policy = randaugment.RandAugment("rand-m9-n3-mstd0.5-inc1")
    index = np.arange(100, 124)
    before = pictures.clone()
    whole = policy(pictures.float(), 1, 2, index)
    pieces = [policy(pictures[i : i + 5].float(), 1, 2, index[i : i + 5]) for i in range(0, 24, 5)]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(pictures, before)
    assert (whole != pictures).flatten(1).any(1).sum() > 12
    assert torch.equal(whole, whole.round())
    assert whole.min() >= 0
    assert whole.max() <= 255


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 5, (n,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.integers(0, 1000), st.integers(0, 3), st.integers(3, 6))
def test_mixing_a_slice_gives_the_slice_of_the_whole(mixup: float, cutmix: float, step: int, a: int, b: int) -> None:
    augment = Augment(mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    images, labels = batch()
    whole, targets = mix(images, labels, augment, 5, 7, step, 0, 12)
    part, some = mix(images[2 * a : 2 * b], labels[2 * a : 2 * b], augment, 5, 7, step, 2 * a, 12)
    assert torch.equal(part, whole[2 * a : 2 * b])
    assert torch.equal(some, targets[2 * a : 2 * b])
    assert torch.allclose(targets.sum(1), torch.ones(12))
    assert torch.equal(images, batch()[0])


def test_mixup_and_cutmix_are_timm_s_formulas() -> None:
    images, labels = batch()
    partner = images.view(6, 2, 3, 16, 16).flip(1).view_as(images)
    one_hot = torch.nn.functional.one_hot(labels, 5).float() * 0.9 + 0.02
    other = one_hot.view(6, 2, 5).flip(1).view_as(one_hot)
    seen = set()
    for step in range(40):
        mixed, targets = mix(images, labels, Augment(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 5, 0, step, 0, 12)
        taken = (mixed == partner).all(1).float()  # of each pixel: is it the partner's
        own = (mixed == images).all(1).float()
        if bool((taken + own >= 1).all()):
            share = 1 - taken.mean((1, 2))
            assert (taken == taken[:1]).all()  # one box for the batch
            expected = one_hot * share[:, None] + other * (1 - share[:, None])
            assert torch.allclose(targets, expected, atol=1e-6)
            seen.add("cutmix")
        else:
            share = ((mixed - partner) / (images - partner)).median()
            assert torch.allclose(mixed, images * share + partner * (1 - share), atol=1e-4)
            assert torch.allclose(targets, one_hot * share + other * (1 - share), atol=1e-4)
            seen.add("mixup")
    assert seen == {"cutmix", "mixup"}


def test_without_mixing_targets_are_smoothed_one_hot() -> None:
    images, labels = batch(3)
    same, targets = mix(images, labels, Augment(label_smoothing=0.1), 5, 0, 0, 0, 3)
    assert same is images
    assert torch.allclose(targets, torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.02)


def test_odd_batches_cannot_be_mixed() -> None:
    with pytest.raises(UserError, match="even"):
        mix(*batch(3), Augment(mixup=0.8), 5, 0, 0, 0, 3)


def test_erasing() -> None:
    images = torch.zeros(4000, 3, 24, 24)
    index = np.arange(4000)
    out = erase(images, 0.25, 3, 1, index)
    hit = (out != 0).any(1)
    share = hit.flatten(1).float().mean(1)
    erased = share > 0
    assert abs(erased.float().mean() - 0.25) < 0.03
    assert share[erased].min() > 0.01
    assert share.max() < 1 / 3 + 0.03
    noise = out[out != 0]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    for mask in hit[erased][:50]:  # one rectangle each
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
    assert torch.equal(erase(images[70:90], 0.25, 3, 1, index[70:90]), out[70:90])
    assert not torch.equal(erase(images[:50], 0.25, 3, 2, index[:50]), out[:50])
    assert not images.any()
