"""Tables from planted results: means, intervals, verdicts, states; and the paper's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import fill, run_of, write

from ablations.planner import MISSING, NEEDS_RELEASED, available, load_artifact, plan
from analysis import study as studies
from analysis.paper import Printed, dashes, printed
from analysis.statistics import FEW, Estimate, Pool, estimate, not_worse, pool, verdict
from analysis.study import build
from analysis.table import Table, TableCell
from sdae.errors import UserError
from sdae.store import Store

PRINT = "feedfeedfeedfeed"


def made(tmp_path: Path, artifacts: list[str], scale: str, seeds: tuple[int, ...], *args, **kwargs) -> Store:  # type: ignore[no-untyped-def]
    store = Store(tmp_path / "runs")
    fill(store, plan(artifacts, scale, seeds, content=PRINT), *args, **kwargs)
    return store


def cell(table: Table, name: str) -> TableCell:
    return next(c for c in table.cells() if c.cell == name)


# The paper's numbers
def test_every_printed_value_has_its_cell() -> None:
    cells = {name: load_artifact(artifact) for artifact in available() for name in load_artifact(artifact).cells}
    assert set(printed()) | dashes() <= set(cells)
    assert not set(printed()) & dashes()
    tables_only = {name for name, artifact in cells.items() if artifact.kind == "table"}
    assert tables_only == set(printed()) - {"figure4b.crop-36.top1", "figure4b.full.top1"} | dashes()
    for name, value in printed().items():
        assert value.value == round(value.value, value.decimals)
        assert value.unit == next(c.unit for c in cells[name].columns if c.name == name.rpartition(".")[2])


def test_printed_values() -> None:
    values = printed()
    assert values["table5.folds.top1"] == Printed(84.1, 1, "%", "Table 5")
    assert values["table5.folds.top1"].bounds == (84.05, 84.15)
    assert values["table1.mae.time"].bounds == (550.5, 551.5)
    assert {k: v.value for k, v in values.items() if k.startswith("figure")} == {
        "figure4b.crop-36.top1": 82.81, "figure4b.full.top1": 83.04,
    }  # fmt: skip
    sums = dict.fromkeys(("table1", "table2", "table3", "table4", "table5", "figure4b"), 0.0)
    for name, value in values.items():
        sums[name.partition(".")[0]] += value.value
    # Summed over the paper's own text by a parser of its tables, apart from this file.
    assert {k: round(v, 2) for k, v in sums.items() if k != "figure4b"} == {
        "table1": 3666.64, "table2": 1407.2, "table3": 423.6, "table4": 2795.0, "table5": 335.3,
    }  # fmt: skip


# Statistics
values = st.lists(st.floats(0, 1000), min_size=1, max_size=6)
pools = st.none() | st.builds(Pool, st.floats(0, 100), st.integers(1, 50), st.integers(1, 9))
numbers = st.builds(Printed, st.integers(0, 1000).map(lambda n: n / 10), st.just(1), st.just("%"), st.just("Table 0"))


@given(values, pools)
def test_an_interval_is_around_its_mean(seeds: list[float], pooled: Pool | None) -> None:
    found = estimate(seeds, pooled)
    assert min(seeds) <= found.mean <= max(seeds)
    assert found.n == len(seeds)
    if len(seeds) == 1 and pooled is None:
        assert found.low is found.high is found.source is None
    else:
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.mean <= found.high
        few = len(seeds) < FEW and pooled is not None and pooled.df > len(seeds) - 1
        assert found.source == ("pooled" if few else "seeds")
        if few and pooled:  # never wider than alone would be with one seed
            assert found.half == pytest.approx(estimate(seeds[:1], pooled).half / len(seeds) ** 0.5)


@given(values, pools, numbers)
def test_a_verdict_says_where_the_interval_lies(seeds: list[float], pooled: Pool | None, paper: Printed) -> None:
    found, (lower, upper) = estimate(seeds, pooled), paper.bounds
    said = verdict(found, paper)
    if found.low is None or found.high is None:
        assert said == "undecided"
    elif said == "above":
        assert found.low >= upper
    elif said == "below":
        assert found.high < lower
    else:
        assert found.low < upper
        assert found.high >= lower
        assert (said == "agrees") == (found.high - found.low <= 2 * max(0.01 * paper.value, 0.1))


@given(st.dictionaries(st.sampled_from("abcdef"), st.builds(estimate, values, pools), min_size=1), st.booleans())
def test_the_best_is_not_worse_than_itself(column: dict[str, Estimate], higher: bool) -> None:
    marked = not_worse(column, higher)
    if len(column) == 1 or any(e.error is None for e in column.values()):
        assert marked == set()
    else:
        best = (max if higher else min)(column, key=lambda k: column[k].mean)
        assert best in marked


def test_known_intervals() -> None:
    # scipy.stats.t.interval(0.95, 2, 84.1, 0.1 / 3**0.5) = (83.8516, 84.3484)
    found = estimate([84.0, 84.1, 84.2])
    assert (found.low, found.high) == pytest.approx((83.85159, 84.34841), abs=1e-5)
    pooled = pool([[1.0, 3.0], [5.0], [2.0, 2.0, 2.0]])
    assert pooled == Pool(pytest.approx(2 / 3), 3, 2)
    assert pool([[1.0], [2.0]]) is None
    assert estimate([50.0], repeats=(2.0, 4)) == Estimate(50.0, 1, 1.0, 3, "repeats")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (84.05, 84.149, "agrees"), (83.9, 84.05, "agrees"), (83.9, 84.049, "below"), (84.15, 84.2, "above"),
        (84.1499, 84.2, "agrees"), (83.0, 85.0, "undecided"), (84.1, 84.1, "agrees"),
    ],
)  # fmt: skip
def test_verdicts_at_the_edges(low: float, high: float, said: str) -> None:
    fixed = type("Fixed", (Estimate,), {"low": low, "high": high})
    assert verdict(fixed((low + high) / 2, 9), Printed(84.1, 1, "%", "")) == said


def test_bold_is_welch() -> None:
    column = {
        "best": estimate([84.0, 84.1, 84.2]),
        "near": estimate([83.9, 84.0, 84.1]),
        "far": estimate([80.0, 80.1, 80.2]),
    }
    assert not_worse(column, True) == {"best", "near"}
    assert not_worse(column, False) == {"far"}
    one = Pool(0.01, 4, 2)
    assert not_worse({"a": estimate([84.0], one), "b": estimate([83.9], one), "c": estimate([80.0], one)}, True) == {
        "a",
        "b",
    }


# Tables
def test_planted_means_come_back_with_verdicts(tmp_path: Path) -> None:
    means = {
        "table5.full-raw.top1": 83.7,
        "table5.full.top1": 90.0,
        "table5.masked.top1": 70.0,
        "table5.folds.top1": 84.1,
    }
    store = made(tmp_path, ["table5"], "paper", (0, 1, 2, 3, 4), means, 0.1)
    table = build(store, "table5", "paper")
    assert table.synthetic
    assert table.seeds == [0, 1, 2, 3, 4]
    assert (table.dataset, table.model) == ("imagefolder (256 pictures, 224 px)", "vit_base_patch16 (768x12)")
    assert table.commits == ["c0ffeec0ff"]
    assert [c.verdict for c in table.cells()] == ["agrees", "above", "below", "agrees"]
    assert [c.best for c in table.cells()] == [False, True, False, False]
    for found in table.cells():
        assert found.estimate is not None
        assert found.estimate.mean == pytest.approx(means[found.cell], abs=0.3)
        assert (found.estimate.n, len(found.runs), found.state) == (5, 5, "measured")


def test_json_contract(tmp_path: Path) -> None:
    store = made(tmp_path, ["table5"], "smoke", (0, 1), skip=("table5.masked",))
    found = json.loads(json.dumps(build(store, "table5", "smoke").to_dict(), allow_nan=False))
    assert (found["artifact"], found["scale"], found["synthetic"]) == ("table5", "smoke", True)
    assert [row["row"] for row in found["rows"]] == ["full-raw", "full", "masked", "folds"]
    entry = found["rows"][3]["cells"]["top1"]
    assert set(entry) >= {"cell", "paper", "measured", "low", "high", "seeds", "runs", "verdict", "paper_decimals"}
    assert (entry["cell"], entry["paper"], entry["paper_decimals"], entry["seeds"]) == ("table5.folds.top1", 84.1, 1, 2)
    assert entry["low"] < entry["measured"] < entry["high"]
    assert entry["verdict"] is None  # another scale than the paper's is never compared
    empty = found["rows"][2]["cells"]["top1"]
    assert (empty["measured"], empty["low"], empty["seeds"], empty["runs"], empty["state"]) == (
        None,
        None,
        0,
        [],
        "not run",
    )


@pytest.mark.parametrize("scale", ["smoke", "mini", "small", "paper"])
def test_an_empty_store_is_not_an_error(tmp_path: Path, scale: str) -> None:
    for artifact in available():
        table = build(Store(tmp_path / "none"), artifact, scale)
        assert table.runs == 0
        assert {c.state for c in table.cells()} <= {"not run", MISSING if scale == "paper" else NEEDS_RELEASED}
        assert all(c.verdict is None for c in table.cells())


def test_one_seed_borrows_variance_or_has_no_interval(tmp_path: Path) -> None:
    store = made(tmp_path, ["table5"], "smoke", (0,))
    table = build(store, "table5", "smoke")
    found = cell(table, "table5.folds.top1").estimate
    assert found is not None
    assert (found.n, found.low, found.high) == (1, None, None)
    assert any("no interval" in note for note in table.notes)
    assert not any(c.best for c in table.cells())
    sweep = plan(["figure4b"], "smoke", (0, 1), content=PRINT)
    fill(store, sweep, skip=tuple(name for name in sweep.cells if name != "figure4b.masked.top1"))
    table = build(store, "table5", "smoke", seeds=[0])
    found = cell(table, "table5.folds.top1").estimate
    assert found is not None
    assert (found.n, found.source, found.df) == (1, "pooled", 1)
    assert any("1 arm, 1 df" in note for note in table.notes)


def test_costs_take_the_spread_of_their_repeats(tmp_path: Path) -> None:
    sweep = plan(["table1"], "smoke", (0,), content=PRINT)
    store = Store(tmp_path / "runs")
    for name in ("mae", "folds"):
        run = run_of(sweep, f"table1.{name}.time")
        metrics = {
            "time": 10.0,
            "time_repeats": [9.0, 10.0, 11.0],
            "overhead": 28.0,
            "overhead_repeats": [27.0, 28.0, 29.0],
            "memory": 1.5,
        }
        write(store, run.config, run.id, metrics)
    table = build(store, "table1", "smoke")
    time, memory, none = (cell(table, f"table1.{name}") for name in ("folds.time", "folds.memory", "mae.overhead"))
    assert time.estimate == Estimate(10.0, 1, pytest.approx(1 / 3**0.5), 2, "repeats")
    assert memory.estimate == Estimate(1.5, 1)
    assert (none.estimate, none.dash, none.state) == (None, True, "no value")
    assert any("repeats" in note for note in table.notes)


def test_states(tmp_path: Path) -> None:
    sweep = plan(["table5"], "smoke", (0, 1, 2), content=PRINT)
    store = Store(tmp_path / "runs")
    fill(store, sweep)
    runs = {
        row: [sweep.runs[i] for _, i in sweep.cells[f"table5.{row}.top1"]]
        for row in ("full-raw", "full", "masked", "folds")
    }
    store.remove(runs["full"][0].id)
    for run in runs["masked"]:
        store.remove(run.id)
        store.run(run.id).create(run.config)
        store.run(run.id).fail("NonFiniteLoss", "loss is nan")
    (store.run(runs["folds"][1].id).path / "result.json").write_text("{")
    table = build(store, "table5", "smoke")
    assert [c.state for c in table.cells()] == ["measured", "partly", "failed", "partly"]
    assert [(c.planned, len(c.runs)) for c in table.cells()] == [(3, 3), (3, 2), (3, 0), (3, 2)]
    assert any(runs["folds"][1].id in note and "cannot be read" in note for note in table.notes)


def test_synthetic_results_do_not_mix_with_real_ones(tmp_path: Path) -> None:
    store = made(tmp_path, ["table5"], "smoke", (0, 1))
    run = run_of(plan(["table5"], "smoke", content=PRINT), "table5.folds.top1")
    write(store, run.config, run.id, {"top1": 80.0}, synthetic=False)
    table = build(store, "table5", "smoke")
    (cell,) = [cell for cell in table.cells() if cell.cell == "table5.folds.top1"]
    assert (cell.state, run.id in cell.runs, table.synthetic) == ("partly", False, True)
    assert any(run.id in note and "of a real run" in note for note in table.notes)


def test_two_configs_are_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path, ["table5"], "smoke", (0, 1))

    def muddled(*args, **kwargs):  # type: ignore[no-untyped-def]
        sweep = plan(*args, **kwargs)
        other = sweep.cells["table5.full.top1"]
        sweep.cells["table5.folds.top1"] = [sweep.cells["table5.folds.top1"][0], other[1]]
        return sweep

    monkeypatch.setattr(studies, "plan", muddled)
    with pytest.raises(UserError, match="differ in more than the seed"):
        build(store, "table5", "smoke")


def test_pictures_are_those_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader's machine has no ImageNet: the runs say which pictures they saw."""
    store = Store(tmp_path / "runs")
    fill(store, plan(["table5"], "paper", (0, 1), content="aaaa"))
    assert build(store, "table5", "paper").runs == 8
    fill(store, plan(["table5"], "paper", (0,), content="bbbb"))
    assert build(store, "table5", "paper").runs == 8
    assert "aaaa (16 runs), bbbb (8 runs)" in capsys.readouterr().err


def test_a_users_own_artifact_has_its_own_paper_values(tmp_path: Path) -> None:
    own = tmp_path / "ratio.yaml"
    own.write_text(
        """title: "Mask & ratio"
columns: {top1: {run: finetune, metric: top1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain}}}
rows:
  "ratio-{mask_ratio}":
    grid: {mask_ratio: [0.5, 0.9]}
    runs: {pretrain: {recipe: sdae, optim: {epochs: 100}, method: {mask_ratio: "{mask_ratio}"}}}
paper: {ratio-0.5.top1: 83.0}
"""
    )
    store = made(tmp_path, [str(own)], "smoke", (0,))
    table = build(store, own, "smoke")
    assert [(c.paper, c.state) for c in table.cells()] == [(83.0, "measured"), (None, "measured")]


def test_scaled_numbers_stand_beside_the_papers(tmp_path: Path) -> None:
    smoke = build(Store(tmp_path), "figure4a", "smoke").rows[0].meta
    assert smoke["momentum"] == 0.9
    assert smoke["momentum here"] < smoke["momentum"]
    assert smoke["epochs here"] < smoke["epochs"] == 100
    assert build(Store(tmp_path), "figure4b", "smoke").rows[0].meta["tokens here"] == 12
    assert "epoch here" in build(Store(tmp_path), "figure4c", "smoke").rows[0].meta
    assert not any("here" in key for key in build(Store(tmp_path), "figure4a", "paper").meta_keys)
