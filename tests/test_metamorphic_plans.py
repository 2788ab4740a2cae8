"""Plans and claims that must stay as they are, or move as foretold, when something beside the point changes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import fill
from test_claims import cell, claim, difference

from ablations.planner import available, plan
from analysis.claims import Contrast, Interval, target
from analysis.inference import Measured, holm, judge
from analysis.statistics import Pool, estimate
from analysis.study import study
from analysis.verdicts import judge_study
from sdae.config import dump, run_id
from sdae.store import Store

CONTENT = "0" * 16
seeds = st.integers(0, 2**31)


# The planner
def test_the_order_of_artifacts_does_not_matter() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    names = available()
    straight = plan(names, "smoke", content=CONTENT)
    random.Random(seed).shuffle(names)
    shuffled = plan(names, "smoke", content=CONTENT)
    assert {i: dump(run.config) for i, run in straight.runs.items()} == {
        i: dump(r.config) for i, r in shuffled.runs.items()
    }
    assert (straight.cells, straight.requested) == (shuffled.cells, shuffled.requested)
    for identity, run in straight.runs.items():
        other = shuffled.runs[identity]
        assert (run.needs, sorted(run.feeds), run.paper) == (other.needs, sorted(other.feeds), other.paper)


def test_sharing_never_changes_a_config_and_parts_make_the_whole() -> None:
    whole = plan((), "smoke", content=CONTENT)
    requested = 0
    together: set[str] = set()
    for name in available():
        alone = plan([name], "smoke", content=CONTENT)
        requested += alone.requested
        together |= set(alone.runs)
        assert alone.requested == alone.unique == len(alone.runs)
        assert alone.cells == {c: runs for c, runs in whole.cells.items() if c.startswith(f"{name}.")}
        for identity, run in alone.runs.items():
            assert dump(run.config) == dump(whole.runs[identity].config)
            assert run.feeds == [cell for cell in whole.runs[identity].feeds if cell.startswith(f"{name}.")]
    assert (together, requested) == (set(whole.runs), whole.requested)


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_seeds_add_up(scale: str) -> None:
    every = plan(["table2", "figure4c"], scale, (0, 3, 7), content=CONTENT)
    alone = {seed: plan(["table2", "figure4c"], scale, (seed,), content=CONTENT) for seed in (7, 0, 3)}
    assert set(every.runs) == {identity for sweep in alone.values() for identity in sweep.runs}
    assert every.requested == sum(sweep.requested for sweep in alone.values())
    assert every.unique == sum(sweep.unique for sweep in alone.values()), "seeds share nothing"
    for name, runs in every.cells.items():
        assert runs == [alone[seed].cells[name][0] for seed in (0, 3, 7)]
    for identity, run in every.runs.items():
        other = alone[run.config.seed].runs[identity]
        assert (dump(run.config), run.needs, run.paper, run.origin) == (
            dump(other.config),
            other.needs,
            other.paper,
            other.origin,
        )
        assert identity == run_id(run.config)


def test_some_cells_are_a_part_of_the_plan() -> None:
    whole = plan(["table2"], "smoke", (0, 1), content=CONTENT)
    wanted = {"table2.sdae-300.linear", "table2.mae-100.finetune", "table2.moco-v3-300.linear"}
    part = plan(["table2"], "smoke", (0, 1), content=CONTENT, cells=wanted)
    assert part.cells == {name: whole.cells[name] for name in wanted & set(whole.cells)}
    assert part.blocked == {name: whole.blocked[name] for name in wanted & set(whole.blocked)}
    assert all(dump(run.config) == dump(whole.runs[identity].config) for identity, run in part.runs.items())
    assert all(set(run.feeds) <= wanted and run.feeds for run in part.runs.values())
    assert part.requested == part.unique == 8


# Claims
@settings(deadline=None)
@given(st.permutations([83.5, 83.9, 84.4, 84.1]), st.permutations([82.5, 83.0, 82.9]))
def test_the_order_of_seeds_and_runs_does_not_matter(a: list[float], b: list[float]) -> None:
    pooled = Pool(0.02, 9, 3)
    assert estimate(a, pooled) == estimate(sorted(a), pooled) and estimate(b) == estimate(sorted(b))
    cells = {"b": Measured(estimate(b, pooled), "b"), "a": Measured(estimate(a, pooled), "a")}
    (one,) = judge([claim(difference("a", "b"))], cells)
    (other,) = judge([claim(difference("a", "b"))], dict(reversed(cells.items())))
    assert (one.verdict, one.p, one.readings) == (other.verdict, other.p, other.readings)


def test_the_order_of_claims_does_not_matter() -> None:
    cells = {name: cell(84 + step, arm=name) for name, step in (("a", 0.4), ("b", 0.0), ("c", 0.15), ("d", -0.2))}
    ledger = [replace(claim(difference(x, y)), id=f"{x}{y}") for x in "abcd" for y in "abcd" if x != y]
    straight = {j.claim.id: (j.verdict, j.p_holm) for j in judge(ledger, cells)}
    assert {j.claim.id: (j.verdict, j.p_holm) for j in judge(ledger[::-1], cells)} == straight
    assert {verdict for verdict, _ in straight.values()} == {"supported", "contradicted", "undecided"}
    for x, y in ("ab", "ac", "bd"):  # the other way round it is the contrary
        contrary = {"supported": "contradicted", "contradicted": "supported", "undecided": "undecided"}
        assert straight[y + x] == (contrary[straight[x + y][0]], pytest.approx(straight[x + y][1]))


@settings(deadline=None)
@given(st.floats(-40, 10), st.floats(-1, 1), st.sampled_from(["> 0", ">= 0.3", "[-0.3, 0.3]", "0.5"]))
def test_a_constant_on_all_arms_changes_nothing(constant: float, gap: float, allowed: str) -> None:
    def judged(more: float) -> Any:
        (found,) = judge(
            [claim(difference("a", "b", allowed))],
            {"a": cell(80 + gap + more, arm="a"), "b": cell(80.0 + more, arm="b")},
        )
        return found

    one, other = judged(0.0), judged(constant)
    assert other.p == pytest.approx(one.p, abs=1e-9)
    assert other.readings[0].estimate == pytest.approx(one.readings[0].estimate, abs=1e-9)
    if abs(one.p - 0.05) > 1e-9:
        assert other.verdict == one.verdict


@settings(deadline=None)
@given(st.floats(0.1, 50), st.floats(-1, 1))
def test_the_unit_changes_nothing(unit: float, gap: float) -> None:
    def judged(times: float) -> Any:
        cells = {
            "a": cell((50 + gap) * times, arm="a", sd=0.3 * times),
            "b": cell(50.0 * times, arm="b", sd=0.3 * times),
        }
        return judge([claim(difference("a", "b")), claim(Contrast({"a": Fraction(1)}, target("1.0"), over="b"))], cells)

    for one, other in zip(judged(1.0), judged(unit), strict=True):
        assert other.p == pytest.approx(one.p, rel=1e-6)


@pytest.mark.parametrize("kind", ["greater", "sensitive"])
def test_a_verdict_is_monotone_in_the_estimate(kind: str) -> None:
    order = ["contradicted", "undecided", "supported"]
    pair = [difference("a", "b", "> 0.3"), difference("a", "c", "> 0.3")]
    said = []
    for mean in np.linspace(82, 86, 81):
        cells = {"a": cell(float(mean), 9, "a"), "b": cell(84.0, 9, "b"), "c": cell(84.2, 9, "c")}
        (found,) = judge([claim(*pair, kind=kind)], cells)
        said.append((order.index(found.verdict), -found.holds, found.fails))
    for part in range(3):
        values = [row[part] for row in said]
        assert values == sorted(values)
    assert {row[0] for row in said} == {0, 1, 2}


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), seeds)
def test_holm_by_hand(values: list[float], seed: int) -> None:
    """Of the k-th smallest: the largest of (m - i) p_i up to it; permuted with its values."""
    ordered = sorted(values)
    by_hand = [
        min(1.0, max((len(ordered) - i) * p for i, p in enumerate(ordered[: k + 1]))) for k in range(len(ordered))
    ]
    assert holm(ordered) == pytest.approx(by_hand)
    shuffled = [*range(len(values))]
    random.Random(seed).shuffle(shuffled)
    assert holm([values[i] for i in shuffled]) == pytest.approx([holm(values)[i] for i in shuffled])


fractions = st.fractions(-5, 5, max_denominator=10)


def between(a: Fraction, b: Fraction, open_low: bool, open_high: bool) -> Interval:
    return Interval(min(a, b), max(a, b), open_low and a != b, open_high and a != b)


intervals = st.builds(between, fractions, fractions, st.booleans(), st.booleans())


@settings(deadline=None)
@given(intervals, intervals, fractions, fractions)
def test_intervals_by_their_points(one: Interval, other: Interval, p: Fraction, q: Fraction) -> None:
    def point(x: Fraction) -> Interval:
        return Interval(x, x)

    assert one.holds(one) and one.meets(one)
    assert one.meets(other) == other.meets(one)
    if one.holds(point(p)) and other.holds(point(p)):
        assert one.meets(other)
    if one.holds(point(p)) and other.holds(point(q)):
        assert one.plus(other).holds(point(p + q))
        assert one.times(q).holds(point(p * q)) or q == 0
    if one.holds(other) and other.holds(point(p)):
        assert one.holds(point(p)) and one.meets(other)
    assert one.times(Fraction(-1)).times(Fraction(-1)) == one
    assert one.plus(point(p)).plus(point(-p)) == one


def test_a_study_does_not_hang_on_the_order_of_its_runs(tmp_path: Path) -> None:
    """Runs written down in another order, and a constant on every arm: the same verdicts, in the same words."""
    sweep = plan(["table5"], "smoke", (0, 1, 2), content=CONTENT)
    means = {
        "table5.folds.top1": 84.0,
        "table5.full.top1": 83.0,
        "table5.masked.top1": 83.6,
        "table5.full-raw.top1": 82.0,
    }
    found = []
    for name, constant in (("a", 0.0), ("b", -20.0)):
        store = Store(tmp_path / name)
        mine = sweep if name == "a" else replace(sweep, runs=dict(reversed(sweep.runs.items())))
        fill(store, mine, {cell: mean + constant for cell, mean in means.items()}, 0.05)
        found.append(judge_study(study(store, ["table5"], "smoke")))
    assert {"supported"} <= {entry["verdict"] for entry in found[0]}
    for one, other in zip(*found, strict=True):
        assert (one["claim"], one["verdict"], one["needs"]) == (other["claim"], other["verdict"], other["needs"])
        if one["estimate"] is not None:
            assert other["estimate"] == pytest.approx(one["estimate"], abs=1e-9)
            assert other["p"] == pytest.approx(one["p"], abs=1e-9)
    assert json.dumps(found[0])
