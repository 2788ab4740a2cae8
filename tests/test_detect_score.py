"""AP by COCO's rules: what pycocotools says of the same detections."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdae.data.objects import bitmap, encoded, filled, open_objects
from sdae.sections import DetectData
from sdae.stages.detect import pasted, score

Json = dict[str, Any]


def coco_mini(real: Callable[[str], Path]) -> DetectData:
    return DetectData(name="coco-json", path=str(real("coco-mini-482")))


def mask_of(one: Json, size: tuple[int, int]) -> Any:
    """An annotation's or a result's mask."""
    if isinstance(one["segmentation"], list):
        return filled([np.array(polygon) for polygon in one["segmentation"]], size)
    return bitmap(np.array(one["segmentation"]["counts"], np.float64), size)


def perturbed(truth: Json, generator: np.random.Generator) -> list[Json]:
    """Results near the truth: moved, called by another name, absent, many times, in crowds, or out of nothing."""
    sizes = {p["id"]: (p["height"], p["width"]) for p in truth["images"]}
    results = []
    for one in truth["annotations"]:
        size = sizes[one["image_id"]]
        for _ in range(generator.choice([0, 1, 1, 1, 2])):
            dx, dy = (generator.normal(0, 0.08, 2) * one["bbox"][2:]).round().astype(int).tolist()
            mask = np.roll(mask_of(one, size), (dy, dx), (0, 1))
            x, y, w, h = one["bbox"]
            other = generator.random() < 0.15
            results.append({
                "image_id": one["image_id"], "score": float(generator.choice([0.3, generator.random()])),
                "category_id": int(generator.integers(1, 81)) if other else one["category_id"],
                "bbox": [x + dx, y + dy, w * float(generator.uniform(0.8, 1.2)), h], "segmentation": encoded(mask),
            })  # fmt: skip
    for picture in truth["images"][::7]:  # and where nothing is
        mask = np.zeros(sizes[picture["id"]], bool)
        mask[10:60, 20:90] = True
        common = {"image_id": picture["id"], "category_id": 1, "score": float(generator.random())}
        results.append({**common, "bbox": [20.0, 10.0, 70.0, 50.0], "segmentation": encoded(mask)})
    return results


def test_ap_is_that_of_pycocotools(real: Callable[[str], Path]) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    seed = random.randrange(2**32)
    print("seed", seed)
    data = coco_mini(real)
    truth = open_objects(data, "val", 0).ground_truth()
    assert any(a["iscrowd"] for a in truth["annotations"])
    assert {p["id"] for p in truth["images"]} > {a["image_id"] for a in truth["annotations"]}
    results = perturbed(truth, np.random.default_rng(seed))
    scores, record = score(truth, results)
    theirs = pycocotools.COCO(f"{data.path}/annotations/instances_val2017.json")
    ids = sorted(theirs.getCatIds())
    for kind, name, other in (("bbox", "apb", "segmentation"), ("segm", "apm", "bbox")):
        own = [{k: v for k, v in r.items() if k != other} | {"category_id": ids[r["category_id"] - 1]} for r in results]
        evaluation = COCOeval(theirs, theirs.loadRes(own), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0.05 < evaluation.stats[0] < 0.9  # neither nothing nor all is found
        for part, wanted in zip(("", "50", "75", "_small", "_medium", "_large"), evaluation.stats[:6], strict=True):
            assert scores[name + part] == pytest.approx(100 * wanted, abs=1e-6), part
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        assert (precision > -1).all()
        per_class = precision.mean((0, 1))
        assert record["ap_box" if kind == "bbox" else "ap_mask"] == pytest.approx((100 * per_class).tolist(), abs=1e-6)
        for key, curve in (("0.5", precision[0]), ("0.75", precision[5]), ("mean", precision.mean(0))):
            assert record["precision"][kind][key] == pytest.approx(curve.mean(1).tolist(), abs=1e-9)


def test_the_truth_has_ap_100(real: Callable[[str], Path]) -> None:
    truth = open_objects(coco_mini(real), "val", 0).ground_truth()
    sizes = {p["id"]: (p["height"], p["width"]) for p in truth["images"]}
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "score": 0.9, "bbox": one["bbox"],
         "segmentation": encoded(mask_of(one, sizes[one["image_id"]]))}
        for one in truth["annotations"] if not one["iscrowd"]
    ]  # fmt: skip
    scores, _ = score(truth, results)
    assert scores == {name: pytest.approx(100) for name in scores}
    assert len(scores) == 12


def test_nothing_found_and_classes_without_objects() -> None:
    data = DetectData(name="builtin", image_size=64, longest=64, val_pictures=2)
    truth = open_objects(data, "val", 0).ground_truth()
    scores, record = score(truth, [])
    there = {a["category_id"] - 1 for a in truth["annotations"]}
    assert {scores[name] for name in ("apb", "apb50", "apb75", "apm", "apm50", "apm75")} == {0.0}
    assert [k for k, ap in enumerate(record["ap_box"]) if ap is not None] == sorted(there)
    assert record["precision"]["segm"]["0.5"] == [0.0] * 101


def test_masks_are_pasted_where_their_box_is() -> None:
    ones = np.ones((28, 28), np.float32)
    mask = pasted(ones, np.array([3, 5, 10, 7], np.float32), (12, 20))
    y, x = np.nonzero(mask)
    assert (x.min(), x.max(), y.min(), y.max(), mask.sum()) == (3, 9, 5, 6, 14)
    assert pasted(ones, np.array([-4, -4, 40, 40], np.float32), (12, 20)).all()
    assert not pasted(ones, np.array([5, 5, 5, 9], np.float32), (12, 20)).any()
    grid = (np.arange(28) + 0.5) / 28 - 0.5
    disc = np.exp(-8 * (grid**2 + grid[:, None] ** 2)).astype(np.float32)  # a half at a radius of 0.294
    area = pasted(disc, np.array([10, 20, 90, 100], np.float32), (120, 120)).sum()
    assert area == pytest.approx(np.pi * (0.2943 * 80) ** 2, rel=0.02)
