"""The dry universe: results made up from the paper's values, marked everywhere, and never among real ones."""

from __future__ import annotations

import csv
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from calling import Called, assert_refused, call
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import run_of, write

from ablations.planner import Sweep, plan
from analysis import universe
from analysis.frame import collect
from analysis.paper import printed
from analysis.study import build
from analysis.universe import FAULTS, make
from sdae.errors import UserError
from sdae.run import execute
from sdae.store import MARK, NO_PICTURES, Store, SyntheticStore
from slurm.local import run_local
from slurm.submit import submit

ROOT = Path(__file__).resolve().parents[1]
LOST = {"TimedOut", "NodeFailure"}


def of(*artifacts: str, seeds: tuple[int, ...] = (0,), scale: str = "paper") -> Sweep:
    return plan(artifacts, scale, seeds, content=NO_PICTURES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Called]:
    """`reproduce --synthetic` of everything, three seeds, as a user calls it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("universe")
    began = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        called = call("reproduce", "--synthetic", "--seeds", "0,1,2")
    assert time.process_time() - began < 60
    return folder, called


# What the command leaves
def test_reproduce_synthetic_says_what_it_is(whole: tuple[Path, Called]) -> None:
    folder, called = whole
    assert called.code == 0, called
    first, last = called.out.splitlines()
    assert first.endswith("start with paper-synthetic/README.md")
    assert last.startswith("SYNTHETIC: ")
    assert "of 399 runs" in last
    assert sorted(path.name for path in folder.iterdir()) == ["paper-synthetic", "runs-synthetic"]
    assert "made up" in (folder / "runs-synthetic" / MARK).read_text()


def test_every_table_and_figure_is_there_and_filled(whole: tuple[Path, Called]) -> None:
    folder, _ = whole
    store = Store(folder / "runs-synthetic")
    for artifact in ("table1", "table2", "table5", "figure4a", "figure4b", "figure4c"):
        table = build(store, artifact, "paper")
        for column in table.columns:
            cells = [row.cells[column.name] for row in table.rows if row.cells[column.name].planned]
            assert sum(cell.estimate is not None for cell in cells) * 2 >= len(cells) > 0, (artifact, column.name)
            for cell in (cell for cell in cells if cell.estimate and cell.paper is not None):
                assert cell.estimate.mean == pytest.approx(cell.paper, rel=0.06)
    for name in ("figure4", "figure4a", "figure4b", "figure4c"):
        assert (folder / "paper-synthetic" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("artifact", ["table1", "table2", "table5", "figure4a", "figure4b", "figure4c"])
def test_every_export_of_a_table_carries_the_mark(whole: tuple[Path, Called], artifact: str) -> None:
    out = whole[0] / "paper-synthetic"
    for suffix in ("md", "tex", "html"):
        assert "SYNTHETIC RESULTS" in (out / f"{artifact}.{suffix}").read_text(), suffix
    assert json.loads((out / f"{artifact}.json").read_text())["synthetic"] is True
    rows = list(csv.DictReader((out / f"{artifact}.csv").open()))
    assert {row["synthetic"] for row in rows} == {"True"}
    assert "SYNTHETIC" in (out / "README.md").read_text()


def test_the_figures_carry_the_mark() -> None:
    from matplotlib.figure import Figure

    from analysis.figures import paint, panel_of

    table = build(Store("none"), "figure4b", "paper")
    table.synthetic = True
    figure: Figure = paint([panel_of(table)])
    assert "SYNTHETIC" in figure.get_suptitle()
    assert any(text.get_text() == "SYNTHETIC" for text in figure.axes[0].texts)


def test_every_export_of_the_store_carries_the_mark(whole: tuple[Path, Called], tmp_path: Path) -> None:
    store = whole[0] / "runs-synthetic"
    for suffix, read in ((".csv", pd.read_csv), (".json", pd.read_json), (".parquet", pd.read_parquet)):
        assert call("results", "export", "--out", tmp_path / f"x{suffix}", "--store", store).out.startswith("SYNTHETIC")
        frame: Any = read(tmp_path / f"x{suffix}")
        assert len(frame) > 300
        assert frame["synthetic"].all(), suffix
    identity = next(i for i in Store(store).ids() if i.startswith("pretrain") and Store(store).run(i).done)
    for words in (
        ["results", "list"], ["results", "collect"], ["results", "show", identity],
        ["results", "compare", identity, identity], ["sweep", "list", "--scale", "paper"],
        ["sweep", "plan", "--scale", "paper"], ["sweep", "status", "--scale", "paper"],
    ):  # fmt: skip
        called = call(*words, "--store", store)
        assert called.code == 0
        assert called.out.splitlines()[0].startswith("SYNTHETIC"), words
    for words in (["results", "show", identity], ["results", "collect"], ["sweep", "status", "--scale", "paper"]):
        assert json.loads(call(*words, "--store", store, "--json").out)["synthetic"] is True
    assert all(row["synthetic"] for row in json.loads(call("results", "list", "--store", store, "--json").out))


def test_sweep_commands_find_the_made_up_runs(whole: tuple[Path, Called]) -> None:
    words = ("--scale", "paper", "--store", whole[0] / "runs-synthetic", "--json", "--seeds", "0,1,2")
    counts = json.loads(call("sweep", "status", *words).out)["counts"]
    assert sum(counts.values()) == 399
    assert counts["done"] > 320
    assert counts["failed"] > 0
    assert counts["lost"] > 0
    assert json.loads(call("sweep", "plan", *words).out)["done"] == counts["done"]


def test_options_that_run_or_read_are_refused_with_it(tmp_path: Path) -> None:
    for words in (["--jobs", "2"], ["--data", str(tmp_path)]):
        assert_refused(call("reproduce", "--synthetic", "--store", tmp_path / "s", *words), "--synthetic", "--data")
    assert_refused(call("reproduce", "table9", "--synthetic", "--store", tmp_path / "s"), "table9")
    assert not (tmp_path / "s").exists()


# Made up and measured stay apart
def test_real_runs_refuse_a_synthetic_store(tmp_path: Path) -> None:
    store, sweep = SyntheticStore(tmp_path / "made"), plan(["table1"], "smoke")
    make(store, of("table1", scale="smoke"))
    before = sorted(path.relative_to(store.root) for path in store.root.rglob("*"))
    (tmp_path / "run.yaml").write_text("stage: cost\n")
    for words in (
        ["reproduce", "table1"], ["sweep", "submit", "table1"], ["sweep", "retry", "table1"],
        ["run", tmp_path / "run.yaml"],
        ["sweep", "submit", "table1", "--on", "slurm", "--profile", ROOT / "examples" / "profiles" / "a100.yaml"],
    ):  # fmt: skip
        assert_refused(call(*words, "--store", store.root), str(store.root), MARK, "another --store")
    for attempt in (
        lambda: execute(run_of(sweep, "table1.mae.time").config, store),
        lambda: run_local(sweep, store),
        lambda: submit([], store, None, None, None, scale="smoke"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match="holds synthetic results"):
            attempt()
    assert sorted(path.relative_to(store.root) for path in store.root.rglob("*")) == before


def test_synthetic_results_refuse_a_real_store(tmp_path: Path) -> None:
    sweep = plan(["table1"], "smoke")
    run = run_of(sweep, "table1.mae.time")
    store = Store(tmp_path / "real")
    store.run(run.id).create(run.config)
    called = call("reproduce", "table1", "--synthetic", "--store", store.root, "--out", tmp_path / "out")
    assert_refused(called, str(store.root), run.id, MARK)
    assert not (store.root / MARK).exists()
    assert not (tmp_path / "out").exists()
    (tmp_path / "handed" / ".slurm").mkdir(parents=True)  # runs on their way, none of them begun
    assert_refused(call("reproduce", "table1", "--synthetic", "--store", tmp_path / "handed"), ".slurm")
    (tmp_path / "empty").mkdir()
    assert SyntheticStore(tmp_path / "empty").synthetic
    assert SyntheticStore(tmp_path / "empty").synthetic  # and again


def test_what_stands_in_the_wrong_store_is_not_read(tmp_path: Path) -> None:
    made = SyntheticStore(tmp_path / "made")
    sweep = of("table5")
    make(made, sweep, missing=0, faults=0)
    run = run_of(sweep, "table5.folds.top1")
    write(made, run.config, run.id, {"top1": 99.0}, synthetic=False)
    row = collect(made).set_index("id").loc[run.id]
    assert (row["state"], row["synthetic"]) == ("torn", False)
    assert "of a real run" in row["message"]
    table = build(made, "table5", "paper")
    assert table.rows[-1].cells["top1"].estimate is None
    assert any(run.id in note for note in table.notes)
    (made.root / MARK).unlink()  # the index remembers rows that were read with the mark
    frame = collect(Store(made.root)).set_index("id")
    assert frame.loc[run.id, "state"] == "done"
    others = frame.drop(index=run.id)
    assert set(others["state"]) == {"torn"}
    assert others["synthetic"].all()
    assert others["message"].str.contains("synthetic").all()
    (made.root / MARK).touch()
    assert Counter(collect(made)["state"]) == {"done": len(frame) - 1, "torn": 1}


def test_a_made_up_run_has_another_id_than_the_real_one() -> None:
    real = plan(["table5"], "smoke")
    assert not real.runs.keys() & of("table5", scale="smoke").runs.keys()


# What is made up
def files_of(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def test_the_same_seed_makes_the_same_universe(tmp_path: Path) -> None:
    sweep = of("table1", "table2", "figure4b", seeds=(0, 1))
    stores = [SyntheticStore(tmp_path / name) for name in ("a", "b", "c")]
    counts = [make(store, sweep, seed=seed, faults=0.1) for store, seed in zip(stores, (0, 0, 1), strict=True)]
    a, b, c = map(files_of, stores)
    running = {identity for identity in stores[0].ids() if (stores[0].run(identity).path / "claim.json").exists()}
    assert len(running) == counts[0]["running"] > 0
    same = [name for name in a if name.partition("/")[0] not in running]
    assert a.keys() == b.keys()
    assert all(a[name] == b[name] for name in same)
    assert a != c
    part = SyntheticStore(tmp_path / "d")
    make(part, of("table1"), missing=0, faults=0)
    assert all(a[name] == content for name, content in files_of(part).items() if name in a)
    make(stores[2], sweep, seed=0, faults=0.1)  # upon another one: replaced
    c = files_of(stores[2])
    assert all(a[name] == c[name] for name in same)


def test_values_are_the_papers_and_spread_as_seeds_do(tmp_path: Path) -> None:
    store = SyntheticStore(tmp_path / "s")
    sweep = of("table1", "table2", "table5", seeds=tuple(range(40)))
    make(store, sweep, missing=0, faults=0)
    frame = collect(store).set_index("id")
    assert set(frame["state"]) == {"done"}
    cells = {name: cell for artifact in sweep.artifacts for name, cell in artifact.cells.items()}
    spread = {"finetune": 0.10, "linprobe": 0.15}
    for name, runs in sweep.cells.items():
        values = frame.loc[[identity for _, identity in runs], cells[name].metric].dropna()
        if name.endswith(".overhead"):
            times = [frame.loc[[i for _, i in sweep.cells[f"table1.{row}.time"]], "time"].mean()
                     for row in (name.split(".")[1], "mae")]  # fmt: skip
            assert len(values) == 0 or values.mean() == pytest.approx(100 * (times[0] / times[1] - 1), abs=1.5)
            continue
        sd = spread.get(str(frame.loc[runs[0][1], "stage"]), 0.01 * printed()[name].value)
        assert abs(values.mean() - printed()[name].value) < 5 * sd / len(values) ** 0.5, name
        if not name.endswith(".memory"):
            assert 0.6 * sd < values.std() < 1.5 * sd, name


def test_a_run_that_feeds_several_cells_has_one_value() -> None:
    sweep = of("table2", "table5", "figure4b")
    means = universe._means(sweep)
    shared = sweep.cells["figure4b.folds-3.top1"][0][1]
    assert shared == sweep.cells["table2.sdae-100.finetune"][0][1]
    assert means[shared]["top1"] == 83.5
    assert means[sweep.cells["figure4b.crop-36.top1"][0][1]]["top1"] == 82.81
    between = [means[sweep.cells[f"figure4b.crop-{n}.top1"][0][1]]["top1"] for n in (36, 49, 79, 122)]
    assert between == sorted(between)
    assert between[-1] < 83.04


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "linprobe", "cost"])
def test_a_made_up_run_looks_like_a_real_one(whole: tuple[Path, Called], stage: str) -> None:
    folders = sorted((ROOT / "results" / "mini" / "runs").glob(f"{stage}-*/result.json"))
    real = next(r for f in folders if "mae" not in str((r := json.loads(f.read_text()))["config"].get("method")))
    store = Store(whole[0] / "runs-synthetic")
    ids = [i for i in store.ids() if i.startswith(stage)]
    run = next(r for r in map(store.run, ids) if (found := r.result()) and "mae" not in str(found["config"]))
    made = run.result()
    assert made
    assert made.keys() == real.keys()
    assert made["dataset"].keys() == real["dataset"].keys()
    assert made["time"].keys() == real["time"].keys()
    assert made["metrics"].keys() - {"knn_top1"} == real["metrics"].keys() - {"knn_top1"}
    assert made["synthetic"] is True
    assert len(made["weights"]) == len(real["weights"])
    assert run.config()
    assert {"commit", "command", "packages", "host", "slurm"} <= (run.provenance() or {}).keys()
    assert "done in" in run.log.read_text()
    rows = run.metrics()
    assert len(rows) == (0 if stage == "cost" else 20)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    if rows:
        assert rows[0]["loss"] > 1.2 * rows[-1]["loss"]
        assert {"step", "epoch", "loss", "lr", "images_per_s", "mfu", "data_wait", "peak_memory"} <= rows[-1].keys()
    if stage == "pretrain":
        assert {"momentum", "target_std", "target_rank", "teacher_distance", "knn_top1"} <= rows[-1].keys()


# Faults
def test_each_fault_shows_as_what_it_is(tmp_path: Path) -> None:
    sweep = of("figure4a", "figure4c")
    store = SyntheticStore(tmp_path / "s")
    counts = make(store, sweep, missing=0.05, faults=0.2)
    assert set(counts) == {"done", "missing", *FAULTS}
    assert sum(counts.values()) == sweep.unique
    frame = collect(store).set_index("id")
    for fault in FAULTS:
        if fault in ("torn", "running"):
            rows = frame[frame["state"] == fault]
        elif fault == "stale":
            rows = frame[frame["substance"] == "0" * 16]
            assert set(rows["state"]) == {"done"}
        else:
            rows = frame[(frame["state"] == "failed") & (frame["failure"] == fault)]
        assert len(rows) == counts[fault], fault
    assert len(frame) == sweep.unique - counts["missing"]
    cells = {cell.cell: cell for name in ("figure4a", "figure4c") for cell in build(store, name, "paper").cells()}
    shown = {"done": "measured", "torn": "failed", "failed": "failed", "running": "running"}
    for name, runs in sweep.cells.items():
        state = frame["state"].get(runs[0][1], "missing")
        assert cells[name].state == shown.get(str(state), "not run"), (name, state)
        assert (cells[name].estimate is not None) == (state == "done")
    words = ("sweep", "status", "figure4a", "figure4c", "--scale", "paper", "--store", store.root)
    standings = Counter(row["state"] for row in json.loads(call(*words, "--json").out)["runs"])
    assert standings["lost"] == sum(counts[fault] for fault in LOST)
    assert standings["running"] == counts["running"]
    assert re.search(r"NonFiniteLoss: the loss is nan at step \d+", call(*words).out)


SMALL = of("table2", "table5", "figure4b", seeds=(0, 1))


@settings(max_examples=60, deadline=None, print_blob=True)
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_no_column_loses_more_than_half_of_its_cells(seed: int, missing: float, faults: float) -> None:
    fates = universe._fates(SMALL, seed, missing, faults)
    assert fates == universe._fates(SMALL, seed, missing, faults)
    fates = {identity: fate for identity, fate in fates.items() if fate != "stale"}
    for run in SMALL.runs.values():
        if any(need in fates for need in run.needs):
            assert fates[run.id] == "missing"
    for artifact in SMALL.artifacts:
        for column in artifact.columns:
            names = [c.name for c in artifact.cells.values() if c.column == column.name and c.name in SMALL.cells]
            left = [name for name in names if any(identity not in fates for _, identity in SMALL.cells[name])]
            assert 2 * len(left) >= len(names)


def test_an_ablation_of_ones_own_is_made_up_too(tmp_path: Path) -> None:
    own = tmp_path / "depth.yaml"
    own.write_text(
        "title: Depth of the decoder\ncolumns: {top1: {run: finetune, metric: top1}}\n"
        "runs: {finetune: {recipe: finetune, init: {run: pretrain}}}\n"
        "rows:\n  'depth-{n}':\n    grid: {n: [1, 2, 4, 8]}\n"
        "    runs: {pretrain: {recipe: sdae, model: {decoder_depth: '{n}'}}}\n"
    )
    called = call("reproduce", own, "--synthetic", "--store", tmp_path / "s", "--out", tmp_path / "out", "--json")
    assert called.code == 0, called
    document = json.loads(called.out)
    assert (document["synthetic"], document["scale"], document["counts"]) == (True, "paper", {"done": 8})
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    values = [row["cells"]["top1"]["measured"] for row in found["rows"]]
    assert all(80 < value < 87 for value in values)
    assert all(row["cells"]["top1"]["paper"] is None for row in found["rows"])
