"""What is drawn and said of an evaluation class by class, and how often simulated verdicts are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic import fill, run_of

from ablations.planner import plan
from analysis import dense
from analysis.simulation import power, simulate
from analysis.study import study
from sdae.errors import UserError
from sdae.store import Store

CLASSES = ["sky", "road", "cat", "dog"]
CONFUSION = [[8, 1, 0, 1], [2, 6, 0, 0], [0] * 4, [5, 0, 0, 1]]
SEGMENT = {"classes": CLASSES, "iou": [80.0, 60.5, None, 3.25], "confusion": CONFUSION}
CURVE = {key: {"0.5": [1.0, 0.5], "0.75": [0.8, 0.2], "mean": [0.6, 0.1]} for key in ("bbox", "segm")}
DETECT = {"classes": CLASSES, "ap_box": [50.0, 20.0, None, 1.0], "ap_mask": [40.0, 10.0, None, 2.0], "precision": CURVE}


def texts(found: dict[str, Any]) -> list[str]:
    figure = dense.plot_evaluation(found, "a title")
    return [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_yticklabels(), *ax.get_xticklabels())]


def test_an_evaluation_is_drawn_with_every_class() -> None:
    for found in (SEGMENT, DETECT):
        said = texts(found)
        assert set(CLASSES) <= set(said)
        assert "does not occur" in said
        assert dense.svg(found) == dense.svg(found), "the same numbers give the same bytes"
    legend = dense.plot_evaluation(DETECT).axes[1].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "box, IoU 0.5"


def test_of_many_classes_the_largest_are_shown() -> None:
    many = [f"class {n}" for n in range(dense.MOST_CLASSES + 5)]
    scores = [float(n % 100) for n in range(len(many))]
    shown = texts({"classes": many, "ap_box": scores, "ap_mask": scores, "precision": CURVE})
    assert len([text for text in shown if text.startswith("class ")]) == dense.MOST_CLASSES


def test_an_evaluation_in_words() -> None:
    words = "IoU in percent of 3 classes, the best sky 80.0, road 60.5, dog 3.2; the worst sky 80.0, road 60.5, dog 3.2"
    assert dense.summary(SEGMENT) == words
    assert dense.summary(DETECT).startswith("AP of boxes in percent of 3 classes, the best sky 50.0")
    assert dense.summary({"classes": ["sky"], "iou": [None]}) == "IoU: no class occurs"


def test_the_views_of_a_study(tmp_path: Path) -> None:
    sweep = plan(["table3", "table4", "table5"], "smoke", content="synthetic")
    store = Store(tmp_path / "runs")
    fill(store, sweep)
    cells = [name for name in sweep.cells if name.startswith(("table3", "table4"))]
    runs = {run_of(sweep, cell).id for cell in cells}
    for identity in runs:
        folder = store.run(identity)
        folder.path.joinpath("evaluation.json").write_text(json.dumps(SEGMENT if "segment" in identity else DETECT))
    some = run_of(sweep, cells[0])
    (store.run(some.id).path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(store.run(some.id).path / "pictures" / "0.jpg")
    found = study(store, ["table3", "table4", "table5"], "smoke")
    entries = dense.views(found)
    assert {entry["run"] for entry in entries} == runs
    (with_picture,) = [entry for entry in entries if entry["pictures"]]
    assert with_picture["run"] == some.id
    assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", with_picture["pictures"][0])
    assert all(entry["image"].startswith("data:image/svg+xml;base64,") for entry in entries)
    assert dense.first_run(found, cells[0]).id == some.id
    (store.run(some.id).path / "evaluation.json").unlink()
    assert len(dense.views(found)) == len(entries) - 1, "made-up runs have scores only"
    with pytest.raises(UserError, match=r"no evaluation\.json"):
        dense.evaluation_of(store.run(some.id))
    with pytest.raises(UserError, match=r"cell 'table3\.none\.miou' is unknown"):
        dense.first_run(found, "table3.none.miou")
    for wrong, what in (
        ({"classes": []}, "classes: "),
        ({"classes": CLASSES}, "ap_box: missing"),
        (SEGMENT | {"iou": ["80", 1.0, 2.0, 3.0]}, "iou.0"),
        (SEGMENT | {"confusion": CONFUSION[1:]}, "not one value for each of its 4 classes"),
        (SEGMENT | {"confusion": [*CONFUSION[1:], [1]]}, "not one value for each of its 4 classes"),
        (
            DETECT | {"precision": {"bbox": CURVE["bbox"]}},
            "precision: expected bbox and segm, each with 0.5, 0.75, mean",
        ),
    ):
        folder.path.joinpath("evaluation.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"evaluation.json: {what}"):
            dense.evaluation_of(folder)
        assert len(dense.views(found)) == len(entries) - (1 if folder.id == some.id else 2)
    empty = study(Store(tmp_path / "none"), ["table3"], "smoke")
    with pytest.raises(UserError, match=f"{cells[0]}: not run"):
        dense.first_run(empty, cells[0])


def test_simulated_verdicts_are_right_but_for_few() -> None:
    found = simulate(8, 3, seed=1, unequal=0.2, single=0.3).to_dict()
    assert found["universes"] == 8
    assert found["ledgers_with_a_wrong_verdict"] <= 0.25
    assert found["coverage_of_contrasts"] > 0.9
    assert found["coverage_of_cells"] > 0.9
    assert 0 < found["definite"] < 1
    assert power(0.0, 3, 20) < 0.03 < power(1.0, 3, 20) < power(3.0, 3, 20)
    assert power(2.0, 3, 20, tests=10) < power(2.0, 3, 20)
