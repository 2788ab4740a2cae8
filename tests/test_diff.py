"""What changed between two stores, or one store at two times: cells, verdicts, claims, and by which runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from calling import assert_refused, call
from synthetic import fill, run_of

from ablations.planner import Sweep, plan
from analysis.diff import diff, half_of_difference, side, text
from analysis.statistics import Estimate, Pool, estimate, pool
from analysis.study import study
from analysis.verdicts import judge_study
from sdae.errors import UserError
from sdae.store import Store

FOLDS, FULL = "table5.folds.top1", "table5.full.top1"


def planned(seeds: int = 3, scale: str = "paper") -> Sweep:
    return plan(["table5"], scale, range(seeds), content="feed")


def filled(root: Path, seeds: int = 3, scale: str = "paper", noise: float = 0.1, **means: float) -> Store:
    store = Store(root)
    fill(store, planned(seeds, scale), {f"table5.{row}.top1": mean for row, mean in means.items()}, noise, default=84.0)
    return store


def changed(store: Store, cell: str, **values: object) -> str:
    """Other keys in the result of the first run of a cell."""
    run = run_of(planned(), cell)
    file = store.run(run.id).path / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return run.id


def test_nothing_changed(tmp_path: Path) -> None:
    one = study(filled(tmp_path), ["table5"], "paper")
    found = diff(one, one, judge_study(one), judge_study(one))
    assert (found["cells"], found["verdicts"], found["claims"], found["notes"]) == ([], [], [], [])
    assert "0 moved, 0 appeared, 0 vanished cells; flipped: 0 verdicts of cells, 0 of claims" in text(found)


def test_a_further_seed(tmp_path: Path) -> None:
    a = study(filled(tmp_path / "a"), ["table5"], "paper")
    b = study(filled(tmp_path / "b", 4), ["table5"], "paper")
    found = diff(a, b)
    assert found == json.loads(json.dumps(found))
    assert (found["a"]["runs"], found["b"]["runs"], found["a"]["seeds"], found["synthetic"]) == (
        12,
        16,
        [0, 1, 2],
        True,
    )
    assert {cell["cell"] for cell in found["cells"]} == set(a.cells)
    for cell in found["cells"]:
        new = run_of(planned(4), cell["cell"], 3).id
        assert (cell["change"], cell["through"]) == ("moved", "its runs")
        assert cell["runs"] == {"came": [new], "went": [], "changed": []}
        assert cell["difference"] == pytest.approx(cell["b"] - cell["a"])
        assert cell["low"] < cell["difference"] < cell["high"]
        assert cell["significant"] == (cell["low"] > 0 or cell["high"] < 0)
    back = diff(b, a)["cells"][0]
    assert back["runs"]["went"] == found["cells"][0]["runs"]["came"]
    assert back["difference"] == pytest.approx(-found["cells"][0]["difference"])


def test_a_run_that_gave_another_number(tmp_path: Path) -> None:
    a, other = study(filled(tmp_path / "a"), ["table5"], "paper"), filled(tmp_path / "b")
    run = changed(other, FOLDS, metrics={"top1": 90.0})
    found = diff(a, study(other, ["table5"], "paper"))
    (cell,) = found["cells"]
    assert (cell["cell"], cell["change"], cell["runs"]["changed"]) == (FOLDS, "moved", [run])
    assert f"by ~{run}" in text(found)


def test_appeared_and_vanished(tmp_path: Path) -> None:
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    fill(a, planned(), skip=(FULL,))
    fill(b, planned(), skip=(FOLDS,))
    found = diff(study(a, ["table5"], "paper"), study(b, ["table5"], "paper"))
    changes = {cell["cell"]: cell for cell in found["cells"]}
    assert {name: cell["change"] for name, cell in changes.items()} == {FULL: "appeared", FOLDS: "vanished"}
    assert (changes[FULL]["a"], changes[FULL]["difference"], changes[FULL]["significant"]) == (None, None, None)
    assert len(changes[FULL]["runs"]["came"]) == len(changes[FOLDS]["runs"]["went"]) == 3
    assert "nothing" in text(found)


def test_verdicts_and_claims_that_flip_name_their_runs(tmp_path: Path) -> None:
    means = {"full-raw": 83.7, "full": 84.0, "masked": 83.5}
    a = study(filled(tmp_path / "a", 6, noise=0.02, folds=84.1, **means), ["table5"], "paper")
    b = study(filled(tmp_path / "b", 6, noise=0.02, folds=81.0, **means), ["table5"], "paper")
    found = diff(a, b, judge_study(a), judge_study(b))
    mine = sorted(run for run in a.cells[FOLDS].runs)
    (flip,) = found["verdicts"]
    assert (flip["cell"], flip["a"], flip["b"]) == (FOLDS, "agrees", "below")
    assert (flip["runs"]["changed"], flip["through"]) == (mine, "its runs")
    flips = {claim["claim"]: claim for claim in found["claims"]}
    assert flips
    assert {(claim["a"], claim["b"]) for claim in flips.values()} >= {("supported", "contradicted")}
    for claim in flips.values():
        assert set(claim["runs"]["changed"]) <= set(mine)
        assert claim["quote"]
        assert claim["claim"] in text(found)
    assert [cell["significant"] for cell in found["cells"]] == [True]


def test_a_flip_through_the_variance_of_others(tmp_path: Path) -> None:
    means = {"full-raw": 83.7, "full": 84.0, "masked": 83.5, "folds": 84.1}
    a, other = study(filled(tmp_path / "a", **means), ["table5"], "paper"), filled(tmp_path / "b", **means)
    run = changed(other, FULL, metrics={"top1": 95.0})
    flips = {flip["cell"]: flip for flip in diff(a, study(other, ["table5"], "paper"))["verdicts"]}
    assert (flips[FOLDS]["a"], flips[FOLDS]["b"]) == ("agrees", "undecided")
    assert (flips[FOLDS]["through"], flips[FOLDS]["runs"]["changed"]) == ("the pooled variance", [run])
    assert flips[FULL]["through"] == "its runs"


def test_two_times_of_one_store(tmp_path: Path) -> None:
    store = filled(tmp_path / "runs")
    late = changed(store, FOLDS, time={"started": 1.8e9 - 60, "ended": 1.8e9, "seconds": 60.0})  # 2027-01-15 08:00 UTC
    sides = [side(when, store, ["table5"], "paper") for when in ("2027-01-15T07:59+00:00", "2027-01-15T08:00+00:00")]
    (cell,) = diff(*sides)["cells"]
    assert (cell["cell"], cell["runs"]["came"]) == (FOLDS, [late])
    days = [side(when, store, ["table5"], "paper") for when in ("2027-01-13", "2027-01-16")]
    assert [len(day.cells[FOLDS].runs) for day in days] == [2, 3]
    before = side("2001-01-01", store, ["table5"], "paper")
    assert "A has no measured cell at scale paper." in diff(before, days[1])["notes"]


def test_a_date_ends_with_its_day_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Etc/GMT-9")  # nine hours before Greenwich: 08:00 UTC is 17:00 of the same day
    time.tzset()
    try:
        store = filled(tmp_path / "runs")
        changed(store, FOLDS, time={"ended": "2027-01-15T16:30:00+00:00"})  # 01:30 of the 16th here
        counts = [
            len(side(when, store, ["table5"], "paper").cells[FOLDS].runs)
            for when in ("2027-01-15", "2027-01-16", "2027-01-16T01:29", "2027-01-16 01:31", "2027-01-15T00:00")
        ]
        assert counts == [2, 3, 2, 3, 2]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_sides_that_cannot_be_compared(tmp_path: Path) -> None:
    paper, smoke = filled(tmp_path / "a"), filled(tmp_path / "b", scale="smoke")
    with pytest.raises(UserError, match="scales paper and smoke"):
        diff(study(paper, ["table5"], "paper"), study(smoke, ["table5"], "smoke"))
    real = Store(tmp_path / "real")
    fill(real, planned(), synthetic=False)
    with pytest.raises(UserError, match=r"synthetic results, .* does not: not compared"):
        diff(study(paper, ["table5"], "paper"), study(real, ["table5"], "paper"))
    with pytest.raises(UserError, match=r"'runs-2': neither a folder nor a time \(allowed: a store's folder, 2026-"):
        side("runs-2", paper, ["table5"], "paper")


def test_other_pictures_are_said(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a"), Store(tmp_path / "b")
    fill(b, plan(["table5"], "paper", range(3), content="beef"))
    for file in b.root.glob("*/result.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"dataset": {**result["dataset"], "train": 999}}))
    found = diff(study(a, ["table5"], "paper"), study(b, ["table5"], "paper"))
    assert len(found["notes"]) == 1
    assert "256 pictures" in found["notes"][0]
    assert "999 pictures" in found["notes"][0]


def test_the_interval_of_a_difference() -> None:
    """With runs in common the difference is that of fewer numbers: the interval covers what it says in both cases."""
    rng = np.random.default_rng(seed := 7)
    print(f"seed {seed}")
    for shared in (0, 2, 3):
        covered, times = 0, 3000
        for _ in range(times):
            groups = rng.normal(0, 1, (8, 3))
            common: Pool | None = pool([list(group) for group in groups])
            mine = list(rng.normal(0, 1, 3))
            theirs = mine[:shared] + list(rng.normal(0, 1, 5 - shared))
            a, b = estimate(mine, common), estimate(theirs, common)
            half = half_of_difference(a, b, shared)
            assert half is not None
            covered += abs(b.mean - a.mean) <= half
        assert 0.935 < covered / times < 0.97, shared
    same = Estimate(1.0, 3, 0.1, 2, "seeds")
    assert half_of_difference(same, same, 3) == 0.0
    assert half_of_difference(same, Estimate(1.0, 1)) is None
    plain = half_of_difference(same, same)
    assert plain == pytest.approx(2.7764 * 0.1 * math.sqrt(2), rel=1e-4)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled(Path("a"))
    filled(Path("b"), 4)
    words = ("paper", "diff", "a", "b", "--scale", "paper", "--artifact", "table5")
    found = json.loads(call(*words, "--json").out)
    assert found.keys() == {"scale", "synthetic", "a", "b", "notes", "cells", "verdicts", "claims"}
    assert len(found["cells"]) == 4
    said = call(*words)
    assert said.code == 0
    assert said.out.startswith("SYNTHETIC")
    assert "A: a, 12 runs at scale paper\nB: b, 16 runs at scale paper\n4 moved, 0 appeared" in said.out
    assert len(json.loads(call(*words, "--seeds", "0,1,2", "--json").out)["cells"]) == 0
    for when in ("yesterday", "0001-01-01T00:00+10:00", "9999-12-31T23:59-10:00"):  # the years 0 and 10000 in UTC
        assert_refused(call("paper", "diff", "a", when, "--store", "a"), f"{when!r}: neither a folder nor a time")
