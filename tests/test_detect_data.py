"""Pictures with objects: what is read, what is refused, and that picture, boxes and masks stay together."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdae.data import builtin
from sdae.data.coco import Broken, run_lengths
from sdae.data.datasets import UnreadableError
from sdae.data.objects import ObjectSet as Objects
from sdae.data.objects import Scene, bitmap, encoded, filled, fitted, listing_of, open_objects
from sdae.errors import UserError
from sdae.sections import DetectData, ObjectAugment

Json = dict[str, Any]
HEIGHT, WIDTH = 40, 60


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotation(identity: int, picture: int, category: int, x: float, y: float, side: float, **other: Any) -> Json:
    plain = {"id": identity, "image_id": picture, "category_id": category, "bbox": [x, y, side, side], "iscrowd": 0}
    return {**plain, "area": side * side, "segmentation": square(x, y, side), **other}


def content() -> Json:
    """Five pictures of two categories: one has two objects, one a crowd beside its object, one nothing, one a crowd."""
    crowd = {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [100, 300, HEIGHT * WIDTH - 400]}}
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (5, 3, 9, 7, 4)]
    annotations = [
        annotation(1, 5, 18, 10, 10, 20), annotation(2, 3, 2, 4, 4, 12), annotation(3, 5, 2, 30, 5, 15),
        annotation(4, 3, 18, 20, 4, 16, **crowd), annotation(5, 7, 18, 2, 2, 9), annotation(6, 4, 2, 2, 2, 9, **crowd),
    ]  # fmt: skip
    categories = [{"id": 18, "name": "dog"}, {"id": 2, "name": "ant"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def written(root: Path, train: Any = None, val: Any = None) -> DetectData:
    """A folder in COCO's layout; the json of each split may be given, as values or as text."""
    (root / "annotations").mkdir(parents=True)
    for split, given_json in (("train", train), ("val", val)):
        values = content() if given_json is None else given_json
        text = values if isinstance(values, str) else json.dumps(values)
        (root / "annotations" / f"instances_{split}2017.json").write_text(text)
        (root / f"{split}2017").mkdir()
        for i in (5, 3, 9, 7, 4):
            Image.new("RGB", (WIDTH, HEIGHT), (i, i, i)).save(root / f"{split}2017" / f"{i}.png")
    return DetectData(name="coco-json", path=str(root), image_size=32, longest=64)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# What is read


def test_pictures_without_objects_are_tested_but_not_trained_on(tmp_path: Path) -> None:
    data = written(tmp_path / "coco")
    found = listing_of(data)
    assert found.classes == ("ant", "dog")  # by id
    assert found.counts == {"train": (3,), "val": (5,)}
    train, val = open_objects(data, "train", 0), open_objects(data, "val", 0)
    assert [Path(train.path_of(i)).name for i in range(len(train))] == ["3.png", "5.png", "7.png"]
    assert [Path(val.path_of(i)).name for i in range(len(val))] == ["3.png", "4.png", "5.png", "7.png", "9.png"]
    image, scene = train.read(1)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert (image == 5).all()
    assert scene.labels.tolist() == [2, 1]
    assert scene.boxes.tolist() == [[10, 10, 30, 30], [30, 5, 45, 20]]
    assert train.read(0)[1].labels.tolist() == [1]  # the crowd beside it is not trained on
    assert train.left_out == val.left_out == 0


def test_the_ground_truth_is_the_json(tmp_path: Path) -> None:
    truth = open_objects(written(tmp_path / "coco"), "val", 0).ground_truth()
    assert [p["id"] for p in truth["images"]] == [3, 4, 5, 7, 9]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in truth["annotations"]] == [
        (3, 1, 0), (3, 2, 1), (4, 1, 1), (5, 2, 0), (5, 1, 0), (7, 2, 0),
    ]  # fmt: skip
    assert truth["annotations"][1]["segmentation"] == content()["annotations"][3]["segmentation"]
    assert truth["annotations"][3]["segmentation"] == content()["annotations"][0]["segmentation"]


def test_a_part_of_the_pictures_and_of_the_classes(tmp_path: Path) -> None:
    data = written(tmp_path / "coco")
    part = data.model_copy(update={"train_pictures": 2, "val_pictures": 3})
    assert listing_of(part).counts == {"train": (2,), "val": (3,)}
    assert len(open_objects(part, "train", 0)) == 2
    assert [p["id"] for p in open_objects(part, "val", 0).ground_truth()["images"]] == [3, 4, 5]
    three = content()
    three["categories"].append({"id": 1, "name": "bee"})
    data = written(tmp_path / "three", three, three).model_copy(update={"classes": 2})
    assert listing_of(data).classes == ("bee", "ant")
    train = open_objects(data, "train", 0)
    assert [Path(train.path_of(i)).name for i in range(len(train))] == ["3.png", "5.png"]
    assert {a["category_id"] for a in open_objects(data, "val", 0).ground_truth()["annotations"]} == {2}


def test_degenerate_objects_are_left_out_of_training_and_counted(tmp_path: Path) -> None:
    values = content()
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    values["annotations"] += [
        annotation(7, 5, 2, 1, 1, 0.5), annotation(8, 5, 2, WIDTH - 0.5, 1, 9),
        annotation(9, 5, 2, 1, 1, 9, segmentation=[]), annotation(10, 9, 2, 1, 1, 9, segmentation=empty),
        annotation(11, 5, 2, 1, 1, 0.5, iscrowd=1),
    ]  # fmt: skip
    data = written(tmp_path / "coco", values, values)
    train, val = open_objects(data, "train", 0), open_objects(data, "val", 0)
    assert (train.left_out, val.left_out) == (4, 0)
    assert listing_of(data).counts["train"] == (3,)  # picture 9 still has nothing to train on
    assert len(train.read(1)[1].labels) == 2
    assert len(val.ground_truth()["annotations"]) == 10  # all but the one without a mask: it cannot be scored


def test_the_listing_is_kept_and_a_changed_json_is_read_anew(tmp_path: Path) -> None:
    data = written(tmp_path / "coco")
    assert listing_of(data).counts["val"] == (5,)
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    values = content()
    values["images"].append({"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH})
    file.write_text(json.dumps(values))
    assert listing_of(data).counts["val"] == (6,)
    kept = list((tmp_path / "cache" / "sdae" / "objects").iterdir())
    assert len(kept) == 2
    for damaged in ("{ torn", "[]", "{}", '{"classes": 1, "train": "many", "val": null}'):
        for one in kept:
            one.write_text(damaged)
        assert listing_of(data).counts["val"] == (6,)


def test_a_listing_needs_no_torch(tmp_path: Path) -> None:
    written(tmp_path / "coco")
    code = (
        "import sys; from sdae.data.objects import listing_of; from sdae.sections import DetectData\n"
        f"print(listing_of(DetectData(name='coco-json', path={str(tmp_path / 'coco')!r})).counts['val'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout == "(5,)\n", done.stderr


def test_coco_itself(real: Callable[[str], Path]) -> None:
    data = DetectData(path=str(real("coco-mini-482")))
    found = listing_of(data)
    assert len(found.classes) == 80
    assert (found.classes[0], found.classes[-1]) == ("person", "toothbrush")
    assert found.counts == {"train": (292,), "val": (188,)}
    train = open_objects(data, "train", 0)
    image, scene = train.read(7)
    picture, seen = train.cut(image, scene, 0, 7)
    assert picture.shape[1:] == seen["masks"].shape[1:]
    assert picture.dtype == torch.float32
    assert picture.min() >= 0
    assert picture.max() <= 255
    assert min(picture.shape[1:]) in data.augment.sides or max(picture.shape[1:]) == 1333
    small, _ = open_objects(data, "val", 0).whole(image, scene)
    assert min(small.shape[1:]) == 800 or max(small.shape[1:]) == 1333


def test_builtin_objects() -> None:
    data = DetectData(name="builtin", image_size=48, longest=96, classes=4, train_pictures=6, val_pictures=5)
    assert listing_of(data).counts == {"train": (6,), "val": (5,)}
    val = open_objects(data, "val", 0)
    drawn = builtin.render([3], "val", 48, 4)
    image, scene = val.read(3)
    assert torch.equal(image, torch.from_numpy(drawn.images[0]))
    assert scene.labels.tolist() == (drawn.instances[0].labels + 1).tolist()
    truth = val.ground_truth()
    of_three = [a for a in truth["annotations"] if a["image_id"] == 3]
    assert [a["area"] for a in of_three] == drawn.instances[0].masks.sum((1, 2)).tolist()
    assert [c["name"] for c in truth["categories"]] == list(builtin.class_names(4))
    with pytest.raises(UserError, match=r"data\.classes: builtin has 20 classes, 21 were asked for"):
        listing_of(data.model_copy(update={"classes": 21}))


# What is refused


def changed(where: str, index: int, **values: Any) -> Json:
    out = copy.deepcopy(content())
    out[where][index].update(values)
    return out


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
REFUSED: list[tuple[Any, str]] = [
    ("{", "not json: Expecting property name"),
    ("[]", "not COCO's layout: it has no list 'images'"),
    ({**content(), "images": []}, "its list 'images' is empty"),
    ({**content(), "categories": []}, "its list 'categories' is empty"),
    ({**content(), "annotations": {}}, "it has no list 'annotations'"),
    (changed("images", 1, height="tall"), "images want id, file_name, height, width"),
    (changed("images", 1, id=5), "two of its images have the same id"),
    (changed("categories", 1, id=18), "two of its categories have the same id"),
    (changed("annotations", 2, image_id=77), "annotation 3: image_id 77 is not in the json's list"),
    (changed("annotations", 2, category_id=77), "annotation 3: category_id 77 is not in the json's list"),
    (changed("annotations", 2, bbox=[1, 2, 3]), "annotation 3: bbox must be four numbers"),
    (changed("annotations", 2, bbox=[1, 2, 3, float("nan")]), "annotation 3: bbox must be four numbers"),
    (changed("annotations", 2, segmentation=[[1, 1, 9, 9]]), "annotation 3: a polygon of 2 points (at least 3)"),
    (changed("annotations", 2, segmentation=[[1, 1, 9, 9, 9]]), "annotation 3: a polygon of 2.5 points"),
    (changed("annotations", 2, segmentation=[[1, 1, 9, 9, 9, None]]), "annotation 3: a polygon must be numbers"),
    (changed("annotations", 2, segmentation="1 1"), "annotation 3: segmentation must be a list of polygons, or an RLE"),
    (changed("annotations", 2, segmentation=RLE | {"size": [60, 40]}), "RLE of size [60, 40], its picture is [40, 60]"),
    (changed("annotations", 2, segmentation=RLE | {"counts": [7, 9]}), "an RLE of 16 pixels, its picture has 2400"),
    (changed("annotations", 2, segmentation=RLE | {"counts": [2401, -1]}), "RLE counts must be a list of numbers"),
    (changed("annotations", 2, segmentation=RLE | {"counts": "PPYo"}), "RLE counts are no string of COCO's"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_json_that_is_wrong(values: Any, message: str, split: str, tmp_path: Path) -> None:
    data = written(tmp_path / "coco", **{split: values})
    with pytest.raises(UserError) as error:
        listing_of(data)
    assert message in str(error.value)
    assert f"instances_{split}2017.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_annotations_can_be_skipped(tmp_path: Path) -> None:
    values = changed("annotations", 2, segmentation=[[1, 1, 9, 9]])
    data = written(tmp_path / "coco", values).model_copy(update={"on_error": "skip"})
    train = open_objects(data, "train", 0)
    assert train.left_out == 1
    assert train.read(1)[1].labels.tolist() == [2]


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    data = written(tmp_path / "coco")
    with pytest.raises(UserError, match=r"data\.path: coco needs a folder with PATH/train2017, PATH/val2017"):
        listing_of(DetectData())
    with pytest.raises(UserError, match="nowhere: no such folder"):
        listing_of(data.model_copy(update={"path": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match="train_pictures: 4 were asked for, there are 3"):
        listing_of(data.model_copy(update={"train_pictures": 4}))
    with pytest.raises(UserError, match="classes: 3 were asked for, coco-json has 2"):
        listing_of(data.model_copy(update={"classes": 3}))
    (tmp_path / "coco" / "val2017").rename(tmp_path / "coco" / "test2017")
    with pytest.raises(UserError, match="val2017: no such folder"):
        listing_of(data)
    (tmp_path / "coco" / "test2017").rename(tmp_path / "coco" / "val2017")
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"instances_val2017\.json: cannot be read: No such file"):
        listing_of(data)


def test_sets_without_objects_or_with_other_categories(tmp_path: Path) -> None:
    empty, other = {**content(), "annotations": []}, changed("categories", 0, name="cat")
    for i, (train, val, message) in enumerate([
        (empty, None, "no object to train on"), (None, empty, "no object to test on"), (None, other, "the categories"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=message):
            listing_of(written(tmp_path / str(i), train, val))


def test_pictures_that_are_wrong(tmp_path: Path) -> None:
    train = open_objects(written(tmp_path / "coco"), "train", 0)
    Path(train.path_of(0)).unlink()
    with pytest.raises(UnreadableError, match=r"3\.png: cannot be read: No such file"):
        train.read(0)
    Image.new("RGB", (HEIGHT, WIDTH)).save(train.path_of(1))
    with pytest.raises(UnreadableError, match=r"5\.png: has 40 x 60 pixels, its json says 60 x 40"):
        train.read(1)


def test_run_lengths_of_coco() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = np.random.default_rng(seed)
    for _ in range(60):
        pixels = generator.random(generator.integers(1, 150, 2)) < generator.random() ** 2
        text = encoded(pixels)["counts"]
        runs = run_lengths(text.decode())
        assert sum(runs) == pixels.size
        assert (bitmap(np.array(runs, np.float64), pixels.shape) == pixels).all()
    for wrong in ("", "P", "\x01", "é" * 3, "o" * 40 + "0"):
        with pytest.raises(Broken):
            run_lengths(wrong)


# Augmentation


def blob(generator: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """A polygon of 12 corners around a place, nowhere thin."""
    angle = np.arange(12) * np.pi / 6
    radius = generator.uniform(9, 14, 12)
    centre = generator.uniform(0.25, 0.75, 2) * (width, height)
    points: NDArray[np.float64] = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.clip(0, (width, height))


def eroded(mask: Tensor, by: int) -> Tensor:
    """Without what is nearer to the mask's or the picture's edge."""
    outside = F.pad((~mask).float(), (by,) * 4, value=1.0)[None, None]
    return F.max_pool2d(outside, 2 * by + 1, 1)[0, 0] == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), as_bitmap=st.booleans(), cropped=st.booleans(), flip=st.booleans())
def test_picture_boxes_and_masks_stay_together(seed: int, as_bitmap: bool, cropped: bool, flip: bool) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(48, 90, 2).tolist()
    polygons = [blob(generator, height, width) for _ in range(2)]
    painted = [filled([p.ravel()], (height, width)) for p in polygons]
    image = torch.from_numpy(np.stack([*painted, np.zeros((height, width), bool)]).astype(np.uint8) * 255)
    boxes = np.array([[*p.min(0), *p.max(0)] for p in polygons])
    shapes = painted if as_bitmap else [[p.ravel()] for p in polygons]
    crop = (30, 44) if cropped else None
    augment = ObjectAugment(sides=(40, 64, 96), crop=crop, crop_sides=(44, 60), flip=flip)
    data = DetectData(name="builtin", augment=augment, longest=150)
    scene = Scene(boxes, np.array([3, 5]), list(shapes), 1, (height, width))
    picture, seen = Objects(data, "train", 11, [], 1).cut(image, scene, 2, seed)
    scale = min(picture.shape[1:]) / 30  # at most: of the smallest window
    near = max(2, round(scale) + 1)
    assert min(picture.shape[1:]) in augment.sides or max(picture.shape[1:]) == 150
    labels = seen["labels"].tolist()
    for k, label in enumerate((3, 5)):
        there = picture[k] > 127.5
        if label not in labels:
            assert not eroded(there, near).any()
            continue
        mask, box = (seen[name][labels.index(label)] for name in ("masks", "boxes"))
        assert not (eroded(mask, near) & ~there).any()
        assert not (eroded(there, near) & ~mask).any()
        y, x = torch.where(mask)
        tight = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        apart = (tight - box) * torch.tensor([1, 1, -1, -1])
        assert (apart >= -near).all()  # the box holds its mask
        if not cropped:
            assert (apart <= near).all()
    assert seen["masks"].shape[1:] == picture.shape[1:]


def test_the_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    data = DetectData(
        name="builtin", image_size=64, longest=128,
        augment=ObjectAugment(sides=(48, 56, 64, 72), crop=(30, 40), crop_sides=(44, 50)),
    )  # fmt: skip
    train, other = open_objects(data, "train", 4), open_objects(data, "train", 5)
    image, scene = train.read(0)
    assert torch.equal(train.cut(image, scene, 1, 2)[0], train.cut(image, scene, 1, 2)[0])
    for differs in (other.cut(image, scene, 1, 2), train.cut(image, scene, 2, 2), train.cut(image, scene, 1, 3)):
        assert not torch.equal(differs[0], train.cut(image, scene, 1, 2)[0])
    cuts = [train.cut(image, scene, 0, i)[0] for i in range(300)]
    sides = [min(c.shape[1:]) for c in cuts]
    assert all(60 < sides.count(side) < 95 for side in (48, 56, 64, 72))
    whole = [c for c in cuts if c.shape[1] == c.shape[2] and c.shape[1] == 64]  # crops are seldom square
    plain = train.whole(image, scene)[0]
    assert any(torch.equal(c, plain) for c in whole)
    assert any(torch.equal(c, plain.flip(2)) for c in whole)
    assert 100 < sum(c.shape[1] == c.shape[2] for c in cuts) < 200


def test_sizes() -> None:
    assert fitted((480, 640), 800, 1333) == (800, 1067)
    assert fitted((640, 480), 800, 1333) == (1067, 800)
    assert fitted((300, 900), 800, 1333) == (444, 1333)
