"""Pictures with label maps: which ones, how they are read, what the training augmentation may and may not do."""

from __future__ import annotations

import colorsys
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import assert_ends, assert_refused, call
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdae.data import builtin, scenes
from sdae.data.datasets import UnreadableError
from sdae.data.loader import statistics
from sdae.data.scenes import SegmentSet, bilinear, distort, nearest, saturate, scaled
from sdae.data.segmentation import FOLDERS, IGNORE, listing_of, open_segmentation
from sdae.errors import UserError
from sdae.sections import SceneAugment, SegmentData

SIDES = st.integers(1, 60)


def folder_with(
    root: Path, maps: dict[str, list[NDArray[Any]]], classes: tuple[str, ...] = ("road", "tree", "sky")
) -> Path:
    """A segmentation-folder with these label maps, 0 = ignore, and pictures of random colours."""
    rng = np.random.default_rng(0)
    for split, labels in maps.items():
        for kind in ("images", "annotations"):
            (root / kind / FOLDERS[split]).mkdir(parents=True)
        for i, stored in enumerate(labels):
            picture = rng.integers(0, 256, (*stored.shape, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "images" / FOLDERS[split] / f"{i:03d}.jpg")
            Image.fromarray(stored).save(root / "annotations" / FOLDERS[split] / f"{i:03d}.png")
    lines = ["0\tunlabelled (ignore)", *(f"{i}\t{name}" for i, name in enumerate(classes, 1))]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    return root


def some_maps(train: int = 6, val: int = 4, size: tuple[int, int] = (30, 40)) -> dict[str, list[NDArray[Any]]]:
    rng = np.random.default_rng(1)
    coarse = [rng.integers(0, 4, (3, 4), dtype=np.uint8) for _ in range(train + val)]
    fine = [np.kron(c, np.ones((size[0] // 3, size[1] // 4), np.uint8)) for c in coarse]
    return {"train": fine[:train], "val": fine[train:]}


def of(root: Path, **more: Any) -> SegmentData:
    return SegmentData.model_validate({"name": "segmentation-folder", "path": str(root), "image_size": 32} | more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_with(tmp_path / "set", some_maps())


# --- which pictures and classes


def test_camvid(real: Callable[[str], Path]) -> None:
    root = real("camvid-11")
    data = of(root)
    found = listing_of(data)
    assert found.counts == {"train": (367,), "val": (101,)}
    assert len(found.classes) == 11
    assert found.classes[:3] == ("sky", "building", "pole")
    pictures = open_segmentation(data, "val", 0)
    image, labels = pictures.read(5)
    assert image.shape == (3, 360, 480)
    assert image.dtype == torch.uint8
    name = Path(pictures.path_of(5)).stem
    stored = np.array(Image.open(root / "annotations" / "validation" / f"{name}.png")).astype(int)
    assert (labels.numpy() == np.where(stored == 0, IGNORE, stored - 1)).all()
    assert labels.dtype == torch.int64
    assert (labels == IGNORE).any()


def test_ade20k_has_150_classes_wherever_their_names_are(real: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "ade"
    shutil.copytree(real("ade20k-sample-6"), root)
    data = of(root, name="ade20k", image_size=512)
    listed = listing_of(data)
    assert listed.counts == {"train": (3,), "val": (3,)}
    assert (len(listed.classes), listed.classes[0], listed.classes[-1]) == (150, "wall", "flag")
    for split in ("train", "val"):
        pictures = open_segmentation(data, split, 0)  # type: ignore[arg-type]
        for i in range(3):
            image, labels = pictures.read(i)
            assert labels.shape == image.shape[1:]
            present = set(labels.unique().tolist()) - {IGNORE}
            assert len(present) > 3
            assert max(present) < 150
            picture, target = pictures.cut(image, labels, 0, i)
            assert (picture.shape, target.shape) == ((3, 512, 512), (512, 512))
    rows = [f"{i}\t0.1\t10\t2\t0\t{name}" for i, name in enumerate(listed.classes, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    (root / "classes.txt").unlink()
    assert listing_of(data) == listed
    (root / "objectInfo150.txt").unlink()
    numbers = listing_of(data).classes
    assert (len(set(numbers)), numbers[0]) == (150, "class 1")
    (root / "classes.txt").write_text("1\twall\n2\tsky\n")
    with pytest.raises(UserError, match=r"classes\.txt: 2 classes, ade20k has 150"):
        listing_of(data)


def test_a_part_of_the_pictures_is_the_same_for_all_seeds_and_no_film(folder: Path) -> None:
    data = of(folder, train_pictures=3)
    paths = [[s.path_of(i) for i in range(len(s))] for s in (open_segmentation(data, "train", seed) for seed in (0, 1))]
    assert paths[0] == paths[1] == sorted(paths[0])
    assert len(paths[0]) == 3
    assert [Path(p).name for p in paths[0]] != ["000.jpg", "001.jpg", "002.jpg"]
    assert listing_of(data).counts == {"train": (3,), "val": (4,)}


def test_classes_that_are_not_taken_are_ignored(folder: Path) -> None:
    (_, every), (_, some) = (open_segmentation(of(folder, **more), "train", 0).read(1) for more in ({}, {"classes": 2}))
    assert (every == 2).any()
    assert (some == torch.where(every == 2, IGNORE, every)).all()
    assert listing_of(of(folder, classes=2)).classes == ("road", "tree")


def test_builtin_shows_the_visible_objects_upon_the_ground() -> None:
    data = SegmentData(name="builtin", image_size=64, classes=7, train_pictures=5, val_pictures=3)
    assert listing_of(data).counts == {"train": (5,), "val": (3,)}
    pictures = open_segmentation(data, "train", 0)
    assert pictures.classes == ["ground", *builtin.class_names(6)]
    drawn = builtin.render(range(5), "train", 64, 6)
    for i in range(5):
        image, labels = pictures.read(i)
        assert (image.numpy() == drawn.images[i]).all()
        seen = drawn.instances[i]
        assert ((labels == 0).numpy() == ~seen.masks.any(0)).all()
        for mask, label in zip(seen.masks, seen.labels, strict=True):
            assert (labels.numpy()[mask] == label + 1).all()
    assert len(listing_of(SegmentData(name="builtin")).classes) == 11
    with pytest.raises(UserError, match=r"data\.classes: 22 were asked for, builtin has 21"):
        listing_of(SegmentData(name="builtin", classes=22))


def test_listing_needs_no_torch(folder: Path) -> None:
    code = "import sys; from sdae.sections import SegmentData; from sdae.data.segmentation import listing_of; "
    code += "found = listing_of(SegmentData(name='segmentation-folder', path=sys.argv[1], image_size=32)); "
    code += "sys.exit('torch' in sys.modules or len(found.classes) != 3)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], timeout=600).returncode == 0


# --- what is wrong with a folder


@pytest.mark.parametrize(
    ("breaks", "parts"),
    [
        (lambda root: shutil.rmtree(root), ["set: no such folder", "annotations/{training,validation}/*.png"]),
        (lambda root: shutil.rmtree(root / "annotations" / "validation"), ["no folder annotations/validation in it"]),
        (lambda root: [p.unlink() for p in (root / "images/validation").iterdir()], ["validation: no pictures in it"]),
        (lambda root: (root / "classes.txt").unlink(), ["classes.txt: no such file", "INDEX<TAB>NAME"]),
        (lambda root: (root / "classes.txt").write_text("1 road\n"), ["line 1: '1 road' is not INDEX<TAB>"]),
        (lambda root: (root / "classes.txt").write_text("1\ta\n3\tb\n"), ["2 classes, numbered up to 3"]),
        (lambda root: (root / "classes.txt").write_text("1\ta\n1\tb\n"), ["line 2: '1\\tb' is not"]),
    ],
)  # fmt: skip
def test_a_folder_that_is_laid_out_otherwise(breaks: Callable[[Path], Any], parts: list[str], folder: Path) -> None:
    breaks(folder)
    with pytest.raises(UserError) as told:
        open_segmentation(of(folder), "train", 0)
    assert "\n" not in str(told.value)
    for part in ("data.path: ", *parts):
        assert part in str(told.value)


def test_more_pictures_or_classes_than_there_are(folder: Path) -> None:
    for key, n, have in (("train_pictures", 7, 6), ("val_pictures", 9, 4)):
        with pytest.raises(UserError, match=rf"data\.{key}: {n} were asked for, there are {have}"):
            listing_of(of(folder, **{key: n}))
    with pytest.raises(UserError, match=r"data\.classes: 4 were asked for, segmentation-folder has 3"):
        listing_of(of(folder, classes=4))


def test_missing_label_maps_are_counted_when_opened(folder: Path) -> None:
    for name in ("002.png", "004.png"):
        (folder / "annotations" / "training" / name).unlink()
    with pytest.raises(UserError, match=r"training/002\.png: no such label map \(missing for 2 of 6 pictures\)"):
        open_segmentation(of(folder), "train", 0)
    left = open_segmentation(of(folder, on_error="skip"), "train", 0)
    with pytest.raises(UnreadableError, match=r"002\.png: no such label map"):
        left.read(2)
    (folder / "annotations" / "validation" / "000.png").unlink()
    with pytest.raises(UserError, match="missing for 1 of 4 pictures"):  # a test counts every picture
        open_segmentation(of(folder, on_error="skip"), "val", 0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.full((30, 40), 4, np.uint8), "holds the label 4 (allowed: 0 for none, 1 to 3)"),
        (np.full((30, 40), 255, np.uint8), "holds the label 255 (allowed: 0 for none, 1 to 3)"),
        (np.full((30, 40), 700, np.uint16), "holds the label 700 (allowed"),
        (np.ones((40, 30), np.uint8), "the label map has 30 x 40 pixels, its picture "),
        (np.ones((30, 40, 3), np.uint8), "a label map has one channel of 8 or 16 bits, this one is RGB"),
        (b"no picture", "broken label map: not a picture"),
    ],
)
def test_label_maps_that_cannot_be_read(content: Any, told: str, folder: Path) -> None:
    file = folder / "annotations" / "training" / "001.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        Image.fromarray(content).save(file)
    with pytest.raises(UnreadableError) as error:
        open_segmentation(of(folder), "train", 0).read(1)
    assert str(error.value).startswith(f"{file}: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_palettes_and_16_bits_are_read_as_they_are_stored(folder: Path) -> None:
    pictures = open_segmentation(of(folder), "train", 0)
    _, wanted = pictures.read(0)
    file = folder / "annotations" / "training" / "000.png"
    stored = Image.open(file)
    palette = Image.fromarray(np.array(stored)).convert("P")
    palette.putdata(np.array(stored).flatten().tolist())
    palette.putpalette([255, 0, 0, 9, 9, 9, 0, 255, 0, 7, 0, 255])
    palette.save(file)
    assert Image.open(file).mode == "P"
    assert (pictures.read(0)[1] == wanted).all()
    Image.fromarray(np.array(stored).astype(np.uint16)).save(file)
    assert (pictures.read(0)[1] == wanted).all()


def write_run(tmp_path: Path, root: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
        {{stage: segment, precision: fp32, data: {{name: segmentation-folder, path: "{root}", image_size: 32}},
          model: {{width: 24, depth: 2, heads: 2, patch_size: 8}}, head: {{channels: 8, aux_channels: 8}},
          optim: {{steps: 4, batch_size: 3, warmup_steps: 1}},
          efficiency: {{compile: false, workers: 0, threads: 1}}}}"""
    )
    return file


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no such label map"), (9, "holds the label 9"), ("size", "the label map has"), (b"", "broken label map")],
)
def test_a_run_on_bad_label_maps_ends_with_one_line(content: Any, told: str, folder: Path, tmp_path: Path) -> None:
    for file in (folder / "annotations" / "training").iterdir():
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            stored = np.full((30, 40), 9, np.uint8) if content == 9 else np.ones((8, 8), np.uint8)
            Image.fromarray(stored).save(file)
    assert_refused(
        call("run", write_run(tmp_path, folder), "--store", tmp_path / "store"), told, "annotations/training"
    )


# --- augmentation


@given(SIDES, SIDES, st.floats(1, 80), st.floats(1, 5))
@example(height=1, width=60, shorter=80.0, longest=1.0)
def test_sides_keep_their_ratio(height: int, width: int, shorter: float, longest: float) -> None:
    rows, columns = scaled(height, width, shorter, longest)
    short, long = sorted((rows, columns))
    assert short <= shorter + 0.5
    assert long <= longest * shorter + 0.5
    assert short >= shorter - 0.5 or long >= longest * shorter - 0.5
    factor = min(shorter / min(height, width), longest * shorter / max(height, width))
    assert rows == pytest.approx(max(1, height * factor), abs=0.5001)
    assert columns == pytest.approx(max(1, width * factor), abs=0.5001)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 90), st.integers(1, 90), st.randoms(use_true_random=False)
)
def test_resized_boxes_are_those_of_the_resized_picture(height: int, width: int, h: int, w: int, rng: Any) -> None:
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    top, left = rng.randrange(h), rng.randrange(w)
    box = top, left, rng.randrange(1, h - top + 1), rng.randrange(1, w - left + 1)
    part = (slice(top, top + box[2]), slice(left, left + box[3]))
    whole = F.interpolate(image[None].float(), (h, w), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(bilinear(image, (h, w), box), whole[:, *part], atol=2e-3, rtol=0)
    ids = torch.arange(height * width).view(height, width)
    rows = (2 * np.arange(h) + 1) * height // (2 * h)
    columns = (2 * np.arange(w) + 1) * width // (2 * w)
    assert (nearest(ids, (h, w), box).numpy() == ids.numpy()[rows][:, columns][part]).all()


def one(size: int = 32, seed: int = 3, **augment: Any) -> SegmentSet:
    """A set whose `cut` is looked at; it has no files."""
    data = SegmentData(name="segmentation-folder", image_size=size, augment=SceneAugment(**augment))
    return SegmentSet(data, "train", Path(), [], ["a", "b", "c"], 3, seed)


@settings(max_examples=80, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90), st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_picture_and_labels_stay_together(height: int, width: int, epoch: int, index: int, flip: bool) -> None:
    """A picture painted with its labels, a channel for each class, shows each label at its place after the cut."""
    draws = np.random.default_rng(index)
    labels = torch.from_numpy(draws.integers(0, 3, (height, width)))
    image = 255 * F.one_hot(labels, 3).permute(2, 0, 1).to(torch.uint8)
    picture, target = one(distort=False, flip=flip).cut(image, labels, epoch, index)
    assert (picture.shape, picture.dtype) == ((3, 32, 32), torch.float32)
    assert (target.shape, target.dtype) == ((32, 32), torch.int64)
    filling = target == IGNORE
    inside = ~filling
    here = picture.gather(0, target.clamp_max(2)[None])[0]
    assert (here[inside] >= 255 / 4 - 0.01).all()  # the nearest of four neighbours has a quarter of the weight
    sure = (picture > 255 * 0.751) & inside
    assert (sure.int().argmax(0)[sure.any(0)] == target[sure.any(0)]).all()
    mean = (255 * statistics(3)[0]).expand(3, 32, 32)
    assert (picture[:, filling] == mean[:, filling]).all()
    rows, columns = inside.any(1), inside.any(0)
    assert (inside == rows[:, None] & columns).all()  # the filling is below and at the right of a rectangle
    assert rows.int().diff().max() <= 0
    assert columns.int().diff().max() <= 0


def scene(seed: int = 0, height: int = 50, width: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (height // 10, width // 10), generator=generator)
    labels = labels.repeat_interleave(10, 0).repeat_interleave(10, 1)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8), labels


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_cut_is_a_function_of_seed_epoch_and_index() -> None:
    image, labels = scene()
    first = one().cut(image, labels, 2, 7)
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    np.random.seed(5)
    assert same(one().cut(image, labels, 2, 7), first)
    assert not same(one(seed=4).cut(image, labels, 2, 7), first)
    assert not same(one().cut(image, labels, 3, 7), first)
    assert not same(one().cut(image, labels, 2, 8), first)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one().cut(image, labels, 2, 7)
    assert torch.equal(torch.random.get_rng_state(), before)  # nor is the global state drawn from
    torch.random.set_rng_state(state)


def test_half_of_the_cuts_are_mirrored() -> None:
    image, labels = scene()
    mirrored = 0
    for index in range(200):
        plain, flipped = (
            one(distort=False, flip=f, scale=(1.0, 1.0)).cut(image, labels, 0, index) for f in (False, True)
        )
        if not same(plain, flipped):
            assert same(flipped, (plain[0].flip(2), plain[1].flip(1)))
            mirrored += 1
    assert 70 < mirrored < 130


def test_crops_avoid_too_much_of_one_class() -> None:
    image = torch.zeros(3, 40, 120, dtype=torch.uint8)
    labels = torch.zeros(40, 120, dtype=torch.int64)
    labels[:, 60:75] = 1  # most places of a crop show one class alone

    def poor(most: float) -> float:
        """Part of the crops in which one class has three quarters or more of the labelled pixels."""
        cut = one(scale=(1.0, 1.0), distort=False, most_of_one_class=most).cut
        found = [torch.bincount(cut(image, labels, 0, i)[1].flatten(), minlength=256)[:3] for i in range(150)]
        return float(np.mean([int(c.max()) >= 0.75 * int(c.sum()) for c in found]))

    assert poor(1.0) > 0.4
    assert poor(0.75) < 0.1


def test_scales_are_drawn_from_the_whole_range() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(32, 32, dtype=torch.int64)
    cut = one(scale=(0.5, 1.0), most_of_one_class=1.0).cut
    sides = [int((cut(image, labels, 0, i)[1][0] == 0).sum()) for i in range(300)]
    assert (min(sides), max(sides)) == (16, 32)
    assert np.mean(sides) == pytest.approx(24, abs=1)


# --- photometric distortion

NONE = [0.9] * 8  # brighter, contrast first, contrast, saturation, hue, strength, turn, amount


def test_distortion_by_hand() -> None:
    image = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)) * 255
    assert torch.equal(distort(image, NONE), image)
    for draw, added in ((0.0, -32.0), (0.25, 0.0), (0.375, 16.0)):
        torch.testing.assert_close(distort(image, [draw, *NONE[1:]]), (image + added).clamp(0, 255))
    contrast = [0.9, 0.1, 0.1, 0.9, 0.9, 0.75, 0.9, 0.9]
    torch.testing.assert_close(distort(image, contrast), (image * 1.25).clamp(0, 255))
    assert torch.equal(distort(image, [0.9, 0.6, *contrast[2:]]), distort(image, contrast))
    both = [0.9, 0.1, 0.1, 0.1, 0.9, 1.0, 0.9, 1.0]  # contrast in front of or behind the saturation
    front, behind = distort(image, both), distort(image, [0.9, 0.6, *both[2:]])
    torch.testing.assert_close(front, saturate((image * 1.5).clamp(0, 255), 1.5))
    torch.testing.assert_close(behind, (saturate(image, 1.5) * 1.5).clamp(0, 255))


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(0.5, 1.5), st.floats(0, 1))
def test_saturation_and_hue_are_those_of_hsv(colour: tuple[int, int, int], factor: float, turn: float) -> None:
    pixel = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1)
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    wanted = [255 * c for c in colorsys.hsv_to_rgb(h, min(1, s * factor), v)]
    assert saturate(pixel, factor).flatten().tolist() == pytest.approx(wanted, abs=0.02)
    turned = distort(pixel, [0.9, 0.9, 0.9, 0.9, 0.1, 0.9, turn, 0.9]).flatten().tolist()
    wanted = [255 * c for c in colorsys.hsv_to_rgb((h + (2 * turn - 1) / 10) % 1, s, v)]
    assert turned == pytest.approx(wanted, abs=0.02)


def test_distortion_stays_within_bytes_and_happens_half_of_the_time() -> None:
    image, labels = scene()
    cuts = [[one(distort=d, flip=False).cut(image, labels, 0, i)[0] for d in (False, True)] for i in range(100)]
    untouched = sum(torch.equal(plain, other) for plain, other in cuts)
    assert untouched < 20  # 1/16 are expected: four kinds, each every other time
    assert all(float(other.min()) > -0.01 and float(other.max()) < 255.01 for _, other in cuts)


def test_tries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[float] = []
    monkeypatch.setattr(scenes, "varied", lambda labels, most: looked.append(most) or False)
    image, labels = scene()
    one().cut(image, labels, 0, 0)
    assert len(looked) in (scenes.TRIES, scenes.TRIES + 1)


def test_an_error_ends_the_program_though_workers_read_ahead() -> None:
    """As that of classification does (tests/test_data.py)."""
    program = """
import torch
from sdae.data.dense import DenseLoader
from sdae.data.segmentation import open_segmentation
from sdae.sections import SegmentData
def main():
    pictures = open_segmentation(SegmentData(name="builtin", image_size=32, train_pictures=64), "train", 0)
    loader = DenseLoader(
        pictures, seed=0, batch_size=2, train=True, rank=0, world=1, device=torch.device("cpu"), workers=2, channels=3,
        on_error="raise", multiple=16,
    )
    for batch in loader.epoch(0):
        raise RuntimeError("in the middle of an epoch")
main()
"""
    assert_ends(program, "in the middle of an epoch")
