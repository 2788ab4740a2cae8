"""The notebooks, executed from top to bottom; what they call: views, similarity, neighbours, curves; the command."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import ROOT, assert_refused, call, spawn
from conftest import tiny
from synthetic import fill

from ablations.planner import plan
from analysis.curves import (
    COLUMNS,
    attempt,
    curves,
    marked,
    plot_costs,
    plot_curves,
    pretrainings,
    spent,
    summary,
    tally,
)
from analysis.pictures import photograph, plot_maps, plot_neighbours, plot_views
from analysis.study import build, study
from sdae.config import Pretrain
from sdae.errors import UserError
from sdae.inspect import finished, neighbours, samples, similarity_map, teacher_views
from sdae.run import execute
from sdae.sections import Teacher
from sdae.store import RunFolder, Store

NOTEBOOKS = sorted((ROOT / "analysis/notebooks").glob("*.ipynb"))
NAMES = ["claims", "cost", "dense", "figure4", "one_arm", "tables"]


def texts(figure: Any) -> str:
    axes = [t.get_text() for ax in figure.axes for t in [*ax.texts, ax.title]]
    legends = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    return "\n".join([figure.get_suptitle(), *axes, *legends])


# The notebooks as files, and executed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = json.loads(path.read_text())
    nbformat.validate(nbformat.from_dict(notebook))
    assert notebook["metadata"] == {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert all(name in "".join(code[0]["source"]) for name in ("STORE", "SDAE_STORE", "SCALE", "SDAE_SCALE"))
    assert max(len("".join(cell["source"]).splitlines()) for cell in code[1:]) <= 8, "cells call functions, no more"


def executed(name: str, store: Path, scale: str = "smoke") -> tuple[str, list[bytes]]:
    """All that the cells printed or showed as text, and their pictures. Fails where a cell raises."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / f"analysis/notebooks/{name}.ipynb", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDAE_STORE", str(store))
        patch.setenv("SDAE_SCALE", scale)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("SDAE_PICTURE", raising=False)
        patience = {"timeout": 600, "startup_timeout": 600, "iopub_timeout": 60}
        nbclient.NotebookClient(notebook, **patience, resources={"metadata": {"path": str(store.parent)}}).execute()
    shown, pictures = [], []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        pictures += [base64.b64decode(data["image/png"])] if "image/png" in data else []
        shown.append(output.get("text") or data.get("text/markdown") or data.get("text/plain", ""))
        assert output.get("name") != "stderr", output
    return "\n".join(shown), pictures


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real store: the arms of Table 5, of Table 1, and one MAE."""
    folder = tmp_path_factory.mktemp("measured")
    own = folder / "baseline.yaml"
    own.write_text(
        "title: MAE\ncolumns: {top1: {run: finetune, metric: top1}}\nrows: {mae: {runs: {pretrain: {recipe: mae, "
        "optim: {epochs: 300}}, finetune: {recipe: finetune, init: {run: pretrain}}}}}\n"
    )
    done = spawn(
        "reproduce", "table1", "table3", "table4", "table5", own, "--store", folder / "runs", "--out", folder / "paper"
    )
    assert done.code == 0, done
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")  # one store for all
@pytest.mark.parametrize(
    ("name", "pictures", "parts"),
    [
        ("figure4", 2, ["runs done, seeds 0", "figure4a.epoch-*: not run"]),
        ("tables", 0, ["| Multi fold |", "'state': 'measured'"]),
        ("claims", 0, ["undecided"]),
        ("one_arm", 8, []),
        ("cost", 2, ["finetune", "median seconds"]),
        ("dense", 4, ["| SdAE | 300 |", "needs weights", "display.Image"]),
    ],
)
def test_notebooks_on_a_real_store(measured: Path, name: str, pictures: int, parts: list[str]) -> None:
    shown, drawn = executed(name, measured)
    assert len(drawn) == pictures, shown
    assert all(len(picture) > 10_000 for picture in drawn)
    assert "SYNTHETIC" not in shown
    for part in parts:
        assert part in shown, shown


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_on_an_empty_store(tmp_path: Path, name: str) -> None:
    """They say what is missing, and nothing is invented. (Figure 3 needs no run.)"""
    shown, drawn = executed(name, tmp_path / "none")
    assert "no run is done; nothing below is measured" in shown
    if name == "tables":
        assert "'measured': None" in shown
        assert not re.search("measured +[1-9]|partly", shown.split("{")[0])
    if name == "claims":
        assert "supported" not in shown
        assert "contradicted" not in shown
    if name == "one_arm":
        assert len(drawn) == 1
        assert shown.count("table5.folds: not run: none of its 1 pre-trainings is done") == 6
    if name in ("figure4", "cost"):
        assert "not run" in shown


def test_there_are_five_and_they_come_with_the_package() -> None:
    import tomllib

    assert [path.stem for path in NOTEBOOKS] == NAMES
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "notebooks/*.ipynb" in data["analysis"]


# What each teacher view sees


@pytest.mark.parametrize(("size", "patch", "masked"), [(224, 16, 147), (32, 4, 48), (32, 8, 12)])
def test_the_views_are_those_of_the_trainer(size: int, patch: int, masked: int) -> None:
    """The method itself, run on the same noise, feeds its teacher the patches that the picture shows."""
    from sdae.methods.sdae import SdAE
    from sdae.stages.session import NOISE, uniform

    seed = int(np.random.default_rng().integers(1000))
    print("seed", seed)
    changes = {"data": {"image_size": size}, "model": {"patch_size": patch}}
    views = teacher_views(photograph(), tiny(**changes), seed=seed)
    tokens = (size // patch) ** 2
    assert views.picture.shape == (size, size, 3)
    assert list(views.teachers) == ["full picture", "all masked patches", "crop", "fold"]
    hidden = set(range(tokens)) - set(views.student.tolist())
    assert len(hidden) == masked
    for view, sight in zip(({"view": "full"}, {"view": "masked"}, {"view": "crop", "tokens": tokens - masked},
                            {"view": "folds", "folds": 3}), views.teachers.values(), strict=True):  # fmt: skip
        config = tiny(**changes, method={"teacher": view}, seed=seed)
        method = SdAE(config)
        fed: list[np.ndarray[Any, Any]] = []
        embed = method.teacher.embed

        def spy(patches: Any, ids: Any = None, embed: Any = embed, fed: Any = fed, folds: int = len(sight.sees)) -> Any:
            fed.append(np.arange(tokens)[None] if ids is None else ids.reshape(folds, -1).numpy())
            return embed(patches, ids)

        method.teacher.embed = spy  # type: ignore[method-assign]
        out = method(torch.zeros(1, 3, size, size), uniform((1, tokens), seed, NOISE, 0))
        assert np.array_equal(fed[0], sight.sees)
        assert out.prediction.shape[0] * out.prediction.shape[1] == len(sight.predicted)
        assert set(sight.predicted.tolist()) <= hidden


def test_folds_are_all_masked_patches_once() -> None:
    for folds in (1, 2, 3, 4, 7):
        views = teacher_views(photograph(), teachers={"own": Teacher(view="folds", folds=folds)}, seed=folds)
        seen = views.teachers["own"].sees
        assert seen.shape == (folds, 147 // folds)
        assert len(set(seen.flatten().tolist())) == seen.size
        assert not set(seen.flatten().tolist()) & set(views.student.tolist())
    assert views.teachers["own"].sees.size == 147


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    for bad, said in (
        (tmp_path / "none.jpg", "none.jpg: cannot be read"),
        (tmp_path / "torn.jpg", "torn.jpg: broken picture"),
        (np.zeros((8, 8)), "allowed: uint8 of shape"),
    ):
        with pytest.raises(UserError, match=said):
            teacher_views(bad)
    with pytest.raises(UserError, match=r"own: .*150 is more than the 147 masked patches"):
        teacher_views(photograph(), teachers={"own": Teacher(view="crop", tokens=150)})


def test_the_photograph_is_the_users_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert photograph().is_file()
    monkeypatch.setenv("SDAE_PICTURE", "mine.png")
    assert photograph() == Path("mine.png")


# Finished pre-trainings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Folds with two seeds, a crop, the full view, MAE: two epochs each."""
    store = Store(tmp_path_factory.mktemp("inspect") / "runs")
    changes: dict[str, Any] = {"optim": {"epochs": 2}, "probe": {"knn_every": 1}, "model": {"patch_size": 4}}
    for method in ({}, {"teacher": {"view": "crop", "tokens": 16}}, {"teacher": {"view": "full"}}, {"name": "mae"}):
        execute(tiny(**changes, method=method), store)
    execute(tiny(**changes, seed=1), store)
    return store


def runs(store: Store, **wanted: Any) -> list[RunFolder]:
    """By method and view."""
    found = []
    for folder in map(store.run, store.ids()):
        config = finished(folder)
        teacher = config.method.teacher
        facts = {"name": config.method.name, "view": teacher and teacher.view, "seed": config.seed}
        found += [folder] if wanted.items() <= facts.items() else []
    return found


def test_similarity_is_of_masked_patches_only(store: Store) -> None:
    for wanted, predicted in (({"view": "folds", "seed": 0}, 48), ({"view": "crop"}, 16), ({"name": "mae"}, 48)):
        (run,) = runs(store, **wanted)
        maps = similarity_map(run, samples(run, 3))
        assert maps.values.shape == maps.visible.shape == (3, 8, 8)
        assert maps.pictures.shape == (3, 32, 32, 3)
        known = np.isfinite(maps.values)
        assert known.sum((1, 2)).tolist() == [predicted] * 3
        assert maps.visible.sum((1, 2)).tolist() == [16] * 3
        assert not (known & maps.visible).any()
        if maps.what == "cosine similarity":
            assert np.abs(maps.values[known]).max() <= 1 + 1e-5
        else:
            assert maps.values[known].min() >= 0


def test_similarity_of_the_full_view_is_its_loss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the authors' cosine runs over channels, so one minus its mean is the loss; so is MAE's mean error."""
    import sdae.inspect as module

    for wanted in ({"view": "full"}, {"name": "mae"}):
        (run,) = runs(store, **wanted)
        losses: list[float] = []
        original = module._trained

        def watched(run: RunFolder, original: Any = original, losses: list[float] = losses) -> Any:
            config, method, device = original(run)
            method.register_forward_hook(lambda _m, _i, output: losses.append(float(output.loss)))
            return config, method, device

        monkeypatch.setattr(module, "_trained", watched)
        maps = similarity_map(run, samples(run, 5))
        mean = float(np.nanmean(maps.values))
        assert (mean if "name" in wanted else 1 - mean) == pytest.approx(losses[0], abs=1e-5)
        monkeypatch.undo()


def test_similarity_of_equal_prediction_and_target_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdae.inspect as module

    (run,) = runs(store, view="folds", seed=0)
    original = module._trained

    def perfect(run: RunFolder) -> Any:
        config, method, device = original(run)
        method.register_forward_hook(lambda _m, _i, output: output._replace(prediction=3 * output.target))
        return config, method, device

    monkeypatch.setattr(module, "_trained", perfect)
    values = similarity_map(run, samples(run, 2)).values
    assert values[np.isfinite(values)] == pytest.approx(1.0, abs=1e-6)


def test_looking_twice_sees_the_same_and_another_seed_other_masks(store: Store) -> None:
    (run,) = runs(store, view="folds", seed=0)
    one, two, other = (similarity_map(run, [photograph()], seed) for seed in (0, 0, 1))
    assert np.array_equal(one.values, two.values, equal_nan=True)
    assert not np.array_equal(one.visible, other.visible)


def test_neighbours_are_those_of_the_online_probe(store: Store) -> None:
    """The probe's weighted vote over these neighbours gives the kNN accuracy that the run itself wrote down."""
    for run in runs(store, name="sdae"):
        probe = finished(run).probe
        near = neighbours(run, queries=10**6, k=probe.k)
        right = 0
        for own, labels, similarity in zip(near.query_labels, near.labels, near.similarity, strict=True):
            votes = dict.fromkeys(sorted(set(labels)), 0.0)
            for label, value in zip(labels, similarity, strict=True):
                votes[label] += float(np.exp(value / probe.temperature))
            right += max(votes, key=lambda label: votes[label]) == own
        result = run.result()
        assert result is not None
        assert 100 * right / len(near.labels) == pytest.approx(result["metrics"]["knn_top1"], abs=1e-3)


def test_a_training_picture_is_its_own_nearest(store: Store) -> None:
    (run,) = runs(store, view="folds", seed=0)
    picture = samples(run, 4, "train")[2]
    for which, epoch in (("student", "last"), ("teacher", 1)):
        near = neighbours(run, [picture], 3, which, epoch)
        assert near.similarity[0, 0] == pytest.approx(1, abs=1e-5)
        assert np.array_equal(near.pictures[0, 0], picture)
        assert (np.diff(near.similarity) <= 0).all()
        assert near.query_labels == [None]


def test_a_folder_of_pictures_of_any_size(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for n in range(8):
            (tmp_path / f"set/{split}/{n % 2}").mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40 + n, 60 - n, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"set/{split}/{n % 2}/{n}.png")
    data = {"name": "imagefolder", "path": str(tmp_path / "set"), "train_pictures": None, "val_pictures": None}
    store = Store(tmp_path / "runs")
    run = store.run(execute(tiny(data=data, optim={"epochs": 1}), store)["id"])
    near = neighbours(run, 3, 2)
    assert near.pictures.shape == (3, 2, 32, 32, 3)
    assert similarity_map(run, samples(run, 2)).pictures.shape == (2, 32, 32, 3)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(UserError, match=r"data\.path"):
        neighbours(run, 3, 2)


def test_runs_that_cannot_be_looked_into(store: Store, tmp_path: Path) -> None:
    (run,) = runs(store, view="crop")
    with pytest.raises(UserError, match="this run is not done"):
        similarity_map(store.run("pretrain-0000000000000000"), [photograph()])
    with pytest.raises(UserError, match="pictures: none was given"):
        similarity_map(run, [])
    with pytest.raises(UserError, match="k: 65 neighbours of 64 pictures"):
        neighbours(run, 2, 65)
    with pytest.raises(UserError, match=r"init\.epoch: 9 was not saved"):
        neighbours(run, 2, 2, epoch=9)
    (mae,) = runs(store, name="mae")
    with pytest.raises(UserError, match="has no teacher"):
        neighbours(mae, 2, 2, weights="teacher")

    copy = RunFolder(Path(shutil.copytree(run.path, tmp_path / run.id)))
    torn = copy.checkpoints / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(UserError, match="torn or changed"):
        similarity_map(copy, [photograph()])
    torn.unlink()
    with pytest.raises(UserError, match="no such checkpoint"):
        similarity_map(copy, [photograph()])
    shutil.rmtree(copy.checkpoints)
    for look in (lambda: similarity_map(copy, [photograph()]), lambda: neighbours(copy), lambda: samples(copy, 1)):
        with pytest.raises(UserError, match=rf"{run.id}: no checkpoint is left in .*run it again"):
            look()
    result = copy.path / "result.json"
    whole = json.loads(result.read_text())
    for odd, said in (
        ({"weights": None}, "tells of no weights"),
        ({"config": None}, "expected a mapping of keys"),
        ({"config": {"stage": "cost"}}, r"is a cost run \(allowed: a pre-training\)"),
    ):
        result.write_text(json.dumps(whole | odd))
        with pytest.raises(UserError, match=said):
            neighbours(copy)


# Drawing


def test_curves_of_two_seeds_are_one_line_with_a_band(store: Store) -> None:
    ids = [run.id for run in runs(store)]
    frame = curves(store, ids, ["loss", "target_rank"])
    assert list(frame.columns) == COLUMNS
    assert set(frame["key"]) == {"loss", "target_rank"}
    assert set(frame["label"]) == {"SdAE, 3 folds", "SdAE, crop of 16", "SdAE, full", "MAE"}
    assert frame.groupby("label")["arm"].nunique().max() == 1
    row = next(row for row in store.run(ids[0]).metrics() if "loss" in row)
    mine = frame[(frame["id"] == ids[0]) & (frame["key"] == "loss") & (frame["step"] == row["step"])]
    assert mine["value"].item() == row["loss"]
    figure = plot_curves(frame, ["loss", "target_rank"])
    assert len(figure.axes[0].lines) == 4
    assert len(figure.axes[1].lines) == 3, "MAE has no targets"
    assert "95 % interval over up to 2 seeds" in texts(figure)
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in figure.axes[0].lines}
    assert len(looks) == 4
    assert "probe" not in texts(figure)
    with pytest.raises(UserError, match="run 'pretrain-x' is unknown"):
        curves(store, ["pretrain-x"])


def test_pictures_are_drawn(store: Store) -> None:
    (run,) = runs(store, view="folds", seed=0)
    views = plot_views(teacher_views(photograph()))
    assert len(views.axes) == 8
    for part in ("student: 49 patches", "teacher, full picture: 196", "teacher, fold 3 of 3: 49"):
        assert part in texts(views)
    assert "cosine similarity" in plot_maps(similarity_map(run, samples(run, 2))).axes[-1].get_ylabel()
    near = plot_neighbours(neighbours(run, 2, 3))
    assert len(near.axes) == 8
    assert "query: " in texts(near)


def test_grey_is_what_is_not_seen() -> None:
    """The drawn pictures of the folds, laid over one another, are the picture without the student's patches."""
    from analysis.pictures import UNSEEN, _only

    views = teacher_views(np.zeros((224, 224, 3), np.uint8))
    folds = [_only(views, ids) for ids in views.teachers["fold"].sees]
    seen = sum((fold == 0).all(2).astype(int) for fold in folds)
    student = (_only(views, views.student) == 0).all(2)
    assert np.array_equal(seen, 1 - student.astype(int))
    assert set(np.unique(folds[0])) == {0, UNSEEN}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("made") / "runs")
    fill(store, plan(["table1", "table5"], "paper", (0, 1), content="feed"))
    for identity in store.ids():
        if identity.startswith("pretrain"):
            rows = [{"step": n, "epoch": n, "loss": 1 / n} for n in (1, 2, 3)]
            store.run(identity).metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return store


def test_made_up_results_are_marked(made_up: Store) -> None:
    s = study(made_up, ["table1", "table5"], "paper")
    ids = pretrainings(s, "table5.folds")
    assert len(ids) == 2
    for figure in (plot_curves(curves(made_up, ids), ["loss"]), plot_costs(s.tables["table1"])):
        assert "SYNTHETIC RESULTS, made up" in figure.get_suptitle()
        assert all("SYNTHETIC" in [text.get_text() for text in ax.texts] for ax in figure.axes)
    assert summary(s).startswith("SYNTHETIC")
    assert tally(s).columns.name == spent(s).columns.name == "SYNTHETIC"
    with pytest.raises(UserError, match=r"is synthetic: .* there are no weights"):
        similarity_map(made_up.run(ids[0]), [photograph()])


def test_made_up_and_real_runs_are_not_drawn_together(made_up: Store, store: Store, tmp_path: Path) -> None:
    both = Store(shutil.copytree(store.root, tmp_path / "runs"))
    one = next(i for i in made_up.ids() if i.startswith("pretrain"))
    shutil.copytree(made_up.run(one).path, both.run(one).path)
    with pytest.raises(UserError, match="some are synthetic: not mixed"):
        curves(both, both.ids())


def test_costs_and_names_of_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = study(Store(tmp_path / "none"), ["table1", "table5"], "smoke")
    figure = plot_costs(s.tables["table1"])
    assert texts(figure).count("not run") == 3
    assert "SYNTHETIC" not in texts(figure)
    assert attempt(lambda: pretrainings(s, "table5.folds")) is None
    assert "table5.folds: not run: none of its 1 pre-trainings is done" in capsys.readouterr().out
    assert attempt(lambda: pretrainings(s, "table5.fold")) is None
    assert "cell 'table5.fold' is unknown" in capsys.readouterr().out
    assert spent(s).empty
    assert marked(s, tally(s)).columns.name is None
    assert (
        plot_costs(build(Store(tmp_path / "none"), "table1", "paper")).legends[0].get_texts()[0].get_text() == "paper"
    )


# sdae-cli notebook


def test_notebook_copies_once_and_opens_jupyterlab_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jupyterlab")
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    assert call("notebook", "--store", "mine", "--no-browser").code == 0
    assert sorted(path.stem for path in Path("notebooks").iterdir()) == NAMES
    assert os.environ["SDAE_STORE"] == str(tmp_path / "mine")
    assert os.environ["SDAE_SCALE"] == "smoke"
    assert started[0][:4] == [sys.executable, "-m", "jupyterlab", "notebooks"]
    assert "--no-browser" in started[0]
    Path("notebooks/cost.ipynb").write_text("mine")
    Path("notebooks/tables.ipynb").unlink()
    assert call("notebook", "one_arm").code == 0
    assert Path("notebooks/cost.ipynb").read_text() == "mine"
    assert Path("notebooks/tables.ipynb").read_bytes() == (ROOT / "analysis/notebooks/tables.ipynb").read_bytes()
    assert any(word.endswith("/lab/tree/one_arm.ipynb") for word in started[1])


def test_notebook_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(
        call("notebook", "table5"), "'table5' is unknown", "allowed: claims, cost, dense, figure4, one_arm, tables"
    )
    assert_refused(call("notebook", "--scale", "huge"), "huge")
    monkeypatch.setattr("cli.notebook.find_spec", lambda name: None)
    assert_refused(call("notebook"), "JupyterLab is not installed: pip install -e '.[notebook]'")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("jupyterlab")
    words = ["notebook", "tables", "--no-browser", "--port", "0", "--store", "runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    yield process
    process.send_signal(signal.SIGTERM)
    process.wait(600)


def test_notebook_starts_a_real_jupyterlab(lab: subprocess.Popen[str]) -> None:
    """It answers at the address that it prints, on the notebook asked for, and serves our five."""
    assert lab.stdout is not None
    said, match, until = "", None, time.monotonic() + 300
    while match is None and time.monotonic() < until:
        line = lab.stdout.readline()
        assert line, said
        said += line
        match = re.search(r"(http://127\.0\.0\.1:\d+)/lab/tree/tables\.ipynb\?token=(\w+)", line)
    assert match, said

    def fetch(address: str) -> bytes:
        while True:  # it says where it is a moment before it listens
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    return bytes(answer.read())
            except urllib.error.URLError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    assert b"JupyterLab" in fetch(match[0])
    contents = json.loads(fetch(f"{match[1]}/api/contents?token={match[2]}"))["content"]
    assert {entry["name"] for entry in contents} == {f"{name}.ipynb" for name in NAMES}
    assert "python3" in json.loads(fetch(f"{match[1]}/api/kernelspecs?token={match[2]}"))["kernelspecs"]


def test_a_paper_config_shows_the_papers_counts() -> None:
    views = teacher_views(photograph(), Pretrain())
    assert len(views.student) == 49
    assert [sight.sees.shape for sight in views.teachers.values()] == [(1, 196), (1, 147), (1, 49), (3, 49)]
