"""Figure 4 from planted results: files, panels, gaps, marks, and that drawing twice gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from synthetic import fill

from ablations.planner import plan
from analysis.figures import PANELS, draw, paint, panel_of
from analysis.study import build
from sdae.errors import UserError
from sdae.store import Store

FIGURES = ["figure4a", "figure4b", "figure4c"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store") / "runs")
    for scale in ("smoke", "paper"):
        sweep = plan(FIGURES, scale, (0, 1), content="feed")
        fill(store, sweep, skip=("figure4b.crop-79", "figure4c.teacher-100"))
    return store


def painted(store: Store, name: str, scale: str = "smoke") -> Figure:
    return paint([panel_of(build(store, name, scale))])


def texts(figure: Figure) -> str:
    found = [t.get_text() for ax in figure.axes for t in ax.texts]
    return "\n".join([*found, figure.get_suptitle()])


def test_three_panels_and_each_alone(store: Store, tmp_path: Path) -> None:
    assert list(PANELS) == FIGURES
    for name, stem in (("4", "figure4"), ("4b", "figure4b")):
        paths = draw(store, name, "smoke", tmp_path)
        assert [path.name for path in paths] == [f"{stem}.png", f"{stem}.svg", f"{stem}.pdf"]
        assert paths[0].read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in paths[1].read_bytes()
        assert paths[2].read_bytes().startswith(b"%PDF")


def test_drawing_twice_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    first, second = (draw(store, "figure4b", "paper", tmp_path / part) for part in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"Date" not in one.read_bytes()


def test_series_differ_without_colour(store: Store) -> None:
    for name, number in (("figure4a", 4), ("figure4b", 4), ("figure4c", 2)):
        axes = painted(store, name).axes[0]
        lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", "_", "|", None)]
        assert len({(str(line.get_marker()), str(line.get_linestyle())) for line in lines}) == number
        assert len(axes.get_legend().get_texts()) == number


def test_missing_points_stay_empty(store: Store) -> None:
    panel = panel_of(build(store, "figure4b", "smoke"))
    crop = next(series for series in panel.series if series.label == "teacher crop")
    assert [cell.estimate is None for cell in crop.cells] == [False, False, True, False]
    assert "Not run: 1 of 9 points, left empty." in texts(painted(store, "figure4b"))
    teacher = painted(store, "figure4c").axes[0].get_lines()[1]
    assert [str(y) for y in teacher.get_ydata()].count("nan") == 1


def test_the_papers_values_are_points_at_its_scale_only(store: Store) -> None:
    here, paper = painted(store, "figure4b"), painted(store, "figure4b", "paper")
    assert "not comparable: 36: 82.81; 196: 83.04." in texts(here)
    assert "not comparable" not in texts(paper)
    labels = [[t.get_text() for t in f.axes[0].get_legend().get_texts()] for f in (here, paper)]
    assert "paper" not in labels[0]
    assert labels[1][-1] == "paper"
    hollow = [line for line in paper.axes[0].get_lines() if line.get_markerfacecolor() == "none"]
    assert sorted(y for line in hollow for y in line.get_ydata()) == [82.81, 83.04]


def test_title_and_mark(store: Store) -> None:
    for scale, dataset in (("smoke", "builtin"), ("paper", "ImageNet-1k")):
        found = " ".join(texts(painted(store, "figure4a", scale)).split())
        assert f"Scale {scale}: {dataset}" in found
        assert "measured on" in found
        assert "SYNTHETIC RESULTS" in found
    assert "95 % interval of the mean, n = 2" in texts(painted(store, "figure4a"))


def test_an_empty_store_draws_empty_panels(tmp_path: Path) -> None:
    figure = painted(Store(tmp_path / "none"), "figure4c")
    assert "not run" in texts(figure)
    assert "SYNTHETIC" not in texts(figure)
    assert len(draw(Store(tmp_path / "none"), "4a", "paper", tmp_path)) == 3


def test_momenta_show_both_values(store: Store) -> None:
    ticks = panel_of(build(store, "figure4a", "smoke")).ticks
    assert ticks is not None
    assert next(iter(ticks.values())) == "0.90 (0.12)"
    assert list((panel_of(build(store, "figure4a", "paper")).ticks or {}).values())[::5] == ["0.90", "0.99", "0.999"]


def test_bad_names_and_places(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="table5 is a table"):
        draw(store, "table5", "smoke", tmp_path)
    with pytest.raises(UserError, match="4d"):
        draw(store, "4d", "smoke", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw(store, "4a", "smoke", tmp_path / "file")


def test_a_users_own_figure(tmp_path: Path) -> None:
    own = tmp_path / "ratio.yaml"
    own.write_text(
        """title: Mask ratio
kind: figure
columns: {top1: {run: finetune, metric: top1}, top5: {run: finetune, metric: top5}}
runs: {finetune: {recipe: finetune, init: {run: pretrain}}}
rows:
  "ratio-{mask_ratio}":
    grid: {mask_ratio: [0.5, 0.9]}
    runs: {pretrain: {recipe: sdae, optim: {epochs: 100}, method: {mask_ratio: "{mask_ratio}"}}}
"""
    )
    store = Store(tmp_path / "runs")
    fill(store, plan([str(own)], "smoke", (0, 1), content="feed"))
    assert [path.name for path in draw(store, str(own), "smoke", tmp_path)] == ["ratio.png", "ratio.svg", "ratio.pdf"]
