"""The built-in pictures: the same bytes everywhere, labels that fit what is drawn, no shortcut through colour."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sdae.data import builtin
from sdae.data.randomness import hashed, splitmix64


def test_splitmix64_is_the_published_one() -> None:
    # First outputs for seed 1234567 of the reference implementation (Vigna's splitmix64.c).
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.array([1234567], np.uint64) + np.arange(3, dtype=np.uint64) * golden
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert len(set(hashed(0, np.arange(1000)).tolist())) == 1000


@pytest.mark.parametrize(
    ("split", "size", "classes", "expected"),
    [("train", 32, 10, "0669d3107c8dd7a7"), ("val", 48, 20, "76ec66bec21ddb74")],
)
def test_bytes_never_change(split: str, size: int, classes: int, expected: str) -> None:
    pictures = builtin.render(range(100), split, size, classes)
    digest = hashlib.sha256(pictures.images.tobytes() + pictures.labels.astype("<i8").tobytes())
    for seen in pictures.instances:
        digest.update(np.packbits(seen.masks).tobytes() + seen.boxes.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == expected, "the pictures changed: builtin.VERSION must change with them"


def test_a_picture_depends_on_its_index_alone() -> None:
    whole = builtin.render(range(150), "train", 32)
    some = builtin.render([149, 3, 70], "train", 32)
    assert (some.images == whole.images[[149, 3, 70]]).all()
    assert (some.labels == [9, 3, 0]).all()
    for one, i in zip(some.instances, [149, 3, 70], strict=True):
        assert (one.masks == whole.instances[i].masks).all()
    assert (builtin.render(range(150), "val", 32).images != whole.images).any()


def test_instances_are_disjoint_boxed_and_end_with_the_picture_s_class() -> None:
    pictures = builtin.render(range(64), "train", 64, 20)
    for i, seen in enumerate(pictures.instances):
        assert (seen.masks.sum(0) <= 1).all()
        assert seen.labels[-1] == pictures.labels[i]
        assert seen.masks[-1].sum() == seen.masks.sum((1, 2)).max()
        assert seen.labels.max() < 20
        for mask, (x0, y0, x1, y1) in zip(seen.masks, seen.boxes, strict=True):
            outside = mask.copy()
            outside[y0:y1, x0:x1] = False
            assert mask.any()
            assert not outside.any()
            assert mask[y0, x0:x1].any() and mask[y1 - 1, x0:x1].any() and mask[y0:y1, x0].any()


def test_every_shape_and_texture_differs() -> None:
    names = builtin.class_names(builtin.MAX_CLASSES)
    assert len(set(names)) == 20
    assert names[7] == "zigzag-triangle"


def test_colour_is_no_shortcut() -> None:
    """Nearest class mean on colour statistics stays near chance (10 %)."""
    train, val = (builtin.render(range(1000), split, 32, instances=False) for split in ("train", "val"))
    features = [np.concatenate([p.images.mean((2, 3)), p.images.std((2, 3))], 1) for p in (train, val)]
    means = np.stack([features[0][train.labels == c].mean(0) for c in range(10)])
    guess = ((features[1][:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == val.labels).mean() < 0.2
