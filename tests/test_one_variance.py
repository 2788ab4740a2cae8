"""What one variance that arms share, or none, allows to be said: the cases where most arms have one seed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import t

from analysis.claims import Claim, Contrast, target
from analysis.diff import half_of_difference
from analysis.inference import Measured, judge
from analysis.statistics import Estimate, Pool, estimate, not_worse, pool

ONE = Fraction(1)


def measured(**seeds: list[float]) -> dict[str, Measured]:
    common = pool(seeds.values(), steps=True)
    return {name: Measured(estimate(values, common, steps=True), name) for name, values in seeds.items()}


def greater(a: str, b: str) -> Claim:
    return Claim("x", "x", "x", "greater", "", (Contrast({a: ONE, b: -ONE}, target("> 0")),))


def test_the_one_arm_with_seeds_is_the_pool() -> None:
    """Its variance and the others' are one number, known to its own degrees of freedom."""
    cells = measured(a=[84.05, 84.19], b=[83.5])
    (found,) = judge([greater("a", "b")], cells)
    spread = 0.14 / 2**0.5
    half = float(t.ppf(0.975, 1)) * spread * (1 / 2 + 1) ** 0.5
    assert found.verdict == "undecided"
    assert found.readings[0].low == pytest.approx(0.62 - half)
    assert found.readings[0].high == pytest.approx(0.62 + half)
    assert cells["a"].estimate.source == "seeds"
    one, other = (cells[name].estimate for name in "ab")
    assert half_of_difference(one, other) == pytest.approx(half)
    assert not_worse({"a": one, "b": other}, True) == {"a", "b"}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_differences_cover(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    covered = marked = 0
    for _ in range(3000):
        cells = measured(a=list(draw.normal(84, 0.1, seeds)), b=list(draw.normal(84, 0.1, 1)))
        one, other = (cells[name].estimate for name in "ab")
        half = half_of_difference(one, other)
        assert half is not None
        covered += abs(one.mean - other.mean) <= half
        marked += len(not_worse({"a": one, "b": other}, True)) == 1
    assert 0.938 <= covered / 3000 <= 0.962
    assert 0.084 <= marked / 3000 <= 0.116


def test_a_tie_of_three_seeds_is_one_whatever_its_mean_rounds_to() -> None:
    tie = [49.92] * 3
    assert np.var(tie) > 0, "the mean of three equal numbers is not always that number"
    assert pool([tie], steps=True) is None
    assert pool([tie, [49.9, 50.0]], steps=True) is not None


def test_a_tie_of_two_seeds_tells_no_spread() -> None:
    """Accuracies are shares of so many pictures, so that two seeds may well agree to the last digit."""
    cells = measured(a=[60.5, 60.5], b=[60.4], c=[60.45])
    assert {cell.estimate.half for cell in cells.values()} == {None}
    assert not_worse({name: cell.estimate for name, cell in cells.items()}, True) == set()
    assert {found.verdict for found in judge([greater("a", "b"), greater("b", "c")], cells)} == {"undecided"}
    assert estimate([60.5, 60.5]) == Estimate(60.5, 2, 0.0, 1, "seeds"), "of a memory, which is exact"
    assert pool([[60.5, 60.5]]) == Pool(0.0, 1, 1)


def test_one_arm_against_itself_is_level_without_a_spread() -> None:
    one = Measured(estimate([60.5, 60.5], steps=True), "arm")
    level = Claim("x", "x", "x", "comparable", "", (Contrast({"a": ONE, "b": -ONE}, target("[-0.3, 0.3]")),))
    (found,) = judge([level], {"a": one, "b": one})
    assert found.verdict == "supported"
