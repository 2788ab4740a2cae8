"""The statistics of claims: supported, contradicted or undecided by measured cells, and what would decide.

A claim holds if all of its contrasts do (`analysis.claims`). Each contrast has two one-sided tests (Student's t): that
its number lies within what the sentence allows, and that it lies beyond. Supported takes all contrasts (an
intersection-union test, at no cost), contradicted takes one (Bonferroni over the claim's contrasts); where one contrast
is enough for a claim to hold, the other way round. A claim's p is twice the smaller of the two, which is what a
two-sided 95 % interval tells, and Holm's method goes over the whole ledger: of all definite verdicts together, at least
one is wrong in at most 5 % of ledgers.

Cells are means over seeds and taken as independent; cells that the same runs fill are one number. A cell that no run of
the suite fills (another group's method) stands in with its printed value at the paper's scale, where it may be any
number that is printed so.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from analysis.claims import Claim, Contrast, Interval, interval
from analysis.paper import Printed
from analysis.statistics import LEVEL, Estimate

ALPHA = 1 - LEVEL
POWER = 0.8  # with the seeds that an undecided claim is said to need
MOST_SEEDS = 1000  # beyond that nobody runs them
ZERO = Interval(Fraction(0), Fraction(0))
Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True)
class Measured:
    """A cell's estimate; `arm` is equal for cells that the same runs fill with the same metric."""

    estimate: Estimate
    arm: Hashable


@dataclass(frozen=True)
class Form:
    """A weighted sum of measured cells, and a constant of which only the interval is known."""

    mean: float
    variance: float | None  # of `mean`; null where some cell has none
    df: float
    constant: Interval

    def beyond(self, bound: Fraction | float, side: int) -> float:
        """One-sided p of the sum not being above (side 1) or below (-1) the bound, whatever the constant is."""
        if math.isinf(bound):
            return 0.0 if (bound < 0) == (side > 0) else 1.0
        if self.variance is None:
            return 1.0
        worst = float(self.constant.low if side > 0 else self.constant.high)
        gap = side * (self.mean + worst - float(bound))
        if self.variance <= 0:
            return 0.0 if gap > 0 else 1.0
        return float(stdtr(self.df, -gap / math.sqrt(self.variance)))


@dataclass(frozen=True)
class Reading:
    """One contrast as measured: its number, 95 % interval, and the p-values of `holds` and `fails` (one-sided)."""

    contrast: Contrast
    estimate: float
    low: float | None
    high: float | None
    holds: float
    fails: float
    spread: dict[Hashable, float]  # by arm: weight squared times the variance of one seed


@dataclass
class Judgement:
    """`readings`: of the contrasts that could be measured. `missing`: cells without a value; `printed`: stand-ins.

    `deciding`: the reading that the estimate shows, the one that is closest to deciding otherwise.
    """

    claim: Claim
    readings: list[Reading]
    missing: list[str]
    printed: list[str]
    holds: float = 1.0
    fails: float = 1.0
    p_holm: float | None = None
    verdict: Verdict = "undecided"

    @property
    def p(self) -> float | None:
        """Of the verdict that lies nearer; null where nothing was measured."""
        return min(1.0, 2 * min(self.holds, self.fails)) if self.readings else None

    @property
    def deciding(self) -> Reading | None:
        if not self.readings:
            return None
        towards = self.fails < self.holds
        if towards == self.claim.some:  # all contrasts are needed for this verdict: the weakest counts
            return max(self.readings, key=lambda r: r.fails if towards else r.holds)
        return min(self.readings, key=lambda r: r.fails if towards else r.holds)


def judge(
    ledger: Iterable[Claim],
    measured: Mapping[str, Measured],
    printed: Mapping[str, Printed] | None = None,
    counts: Mapping[str, Printed] | None = None,
    absolute: bool = True,
) -> list[Judgement]:
    """Every claim, Holm's method over all of them.

    printed: values that stand in for cells without a measurement. counts: exact settings. absolute: whether numbers of
    the sentences apply (they do at the paper's scale); otherwise a contrast that names a value is not measured.
    """
    found = [_judge(claim, measured, printed or {}, counts or {}, absolute) for claim in ledger]
    tested = [judgement for judgement in found if judgement.p is not None]
    for judgement, p in zip(tested, holm([j.p or 0.0 for j in tested]), strict=True):
        judgement.p_holm = p
        if p <= ALPHA:
            judgement.verdict = "supported" if judgement.holds < judgement.fails else "contradicted"
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values. (statsmodels has them too, and collects garbage at every call: 0.15 s each.)"""
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    factors = np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(values, dtype=float)[order]))
    return [float(p) for p in adjusted]


def names_a_value(contrast: Contrast) -> bool:
    """Whether a contrast states a number of the paper, and not only an order or a nearness."""
    low, high = contrast.target.low, contrast.target.high
    return bool(contrast.over) or (not math.isinf(high) and low != -high) or (math.isinf(high) and low > 1)


def _judge(
    claim: Claim,
    measured: Mapping[str, Measured],
    printed: Mapping[str, Printed],
    counts: Mapping[str, Printed],
    absolute: bool,
) -> Judgement:
    result = Judgement(claim, [], [], [])
    open_contrasts = 0
    settled: list[bool | None] = []
    for contrast in claim.contrasts:
        if all(cell in counts for cell in contrast.cells):
            settled.append(contrast.agrees(counts))
            continue
        constants = {c: n for c in contrast.cells if c not in measured and (n := counts.get(c) or printed.get(c))}
        missing = [cell for cell in contrast.cells if cell not in measured and cell not in constants]
        result.missing += missing
        result.printed += [cell for cell in constants if cell not in counts]
        if missing or len(constants) == len(contrast.cells) or (names_a_value(contrast) and not absolute):
            open_contrasts += 1
        else:
            result.readings.append(_read(contrast, measured, constants))
    result.missing, result.printed = list(dict.fromkeys(result.missing)), list(dict.fromkeys(result.printed))
    if result.readings:
        holds, fails = ([getattr(r, side) for r in result.readings] for side in ("holds", "fails"))
        every, one = (fails, holds) if claim.some else (holds, fails)
        all_of_them = max([*every, *[1.0] * open_contrasts])
        one_of_them = min(1.0, min(one) * (len(one) + open_contrasts))
        if claim.some in settled:  # a setting decides
            all_of_them, one_of_them = 1.0, 0.0
        result.holds, result.fails = (one_of_them, all_of_them) if claim.some else (all_of_them, one_of_them)
    return result


def _read(contrast: Contrast, measured: Mapping[str, Measured], constants: Mapping[str, Printed]) -> Reading:
    target, over = contrast.target, contrast.over
    weights = {cell: float(weight) for cell, weight in contrast.terms.items()}

    def form(bound: Fraction | float) -> tuple[Form, Fraction | float]:
        """The sum to hold against a bound, and the bound: for a ratio, of - bound x over against 0."""
        if over is None or math.isinf(bound):
            return _form(weights, measured, constants), bound
        return _form({**weights, over: weights.get(over, 0.0) - float(bound)}, measured, constants), 0.0

    (low_form, low), (high_form, high) = form(target.low), form(target.high)
    holds = max(low_form.beyond(low, 1), high_form.beyond(high, -1))
    fails = min(low_form.beyond(low, -1), high_form.beyond(high, 1))
    top = _form(weights, measured, constants)
    if over is None:
        estimate, bounds = _middle(top), _bounds(top)
    else:
        below = _form({over: 1.0}, measured, constants)
        estimate = _middle(top) / _middle(below)
        bounds = _fieller(top, below, _form({**weights, over: weights.get(over, 0.0) - estimate}, measured, constants))
        weights = {**weights, over: -estimate}
    return Reading(contrast, estimate, *bounds, holds, fails, _spread(weights, measured))


def _form(weights: Mapping[str, float], measured: Mapping[str, Measured], constants: Mapping[str, Printed]) -> Form:
    """Arms that share a pooled variance count as one source of it; sources combine by Welch and Satterthwaite."""
    constant = ZERO
    arms: dict[Hashable, tuple[float, Estimate]] = {}
    for cell, weight in weights.items():
        if cell in measured:
            one = measured[cell]
            before = arms[one.arm][0] if one.arm in arms else 0.0
            arms[one.arm] = (before + weight, one.estimate)
        else:
            constant = constant.plus(interval(constants[cell]).times(Fraction(weight)))
    mean = math.fsum(weight * e.mean for weight, e in arms.values())
    sources: dict[Hashable, tuple[float, float]] = {}
    for arm, (weight, e) in arms.items():
        if weight == 0:
            continue
        if e.error is None or e.df is None:
            return Form(mean, None, 1.0, constant)
        source = e.pool if e.pool is not None else arm
        sources[source] = (sources[source][0] if source in sources else 0.0) + (weight * e.error) ** 2, e.df
    variance = math.fsum(v for v, _ in sources.values())
    scale = math.fsum(v * v / df for v, df in sources.values())
    return Form(mean, variance, variance * variance / scale if scale > 0 else 1.0, constant)


def _middle(form: Form) -> float:
    return form.mean + float(form.constant.low + form.constant.high) / 2


def _bounds(form: Form) -> tuple[float | None, float | None]:
    """The 95 % interval; ends of an unknown constant widen it."""
    if form.variance is None:
        return None, None
    half = float(stdtrit(form.df, 1 - ALPHA / 2)) * math.sqrt(form.variance)
    return form.mean + float(form.constant.low) - half, form.mean + float(form.constant.high) + half


def _fieller(top: Form, below: Form, difference: Form) -> tuple[float | None, float | None]:
    """Fieller's interval of top / below, independent of one another; none where `below` may be 0."""
    if top.variance is None or below.variance is None:
        return None, None
    if difference.variance == 0:  # no spread at all, or a cell over itself
        return _middle(top) / _middle(below), _middle(top) / _middle(below)
    t = float(stdtrit(difference.df, 1 - ALPHA / 2))
    a, b = _middle(top), _middle(below)
    g = t * t * below.variance / (b * b)
    if g >= 1:
        return None, None
    half = t / abs(b) * math.sqrt(top.variance * (1 - g) + (a / b) ** 2 * below.variance)
    return (a / b - half) / (1 - g), (a / b + half) / (1 - g)


def _spread(weights: Mapping[str, float], measured: Mapping[str, Measured]) -> dict[Hashable, float]:
    total: dict[Hashable, float] = {}
    for cell, weight in weights.items():
        if cell in measured:
            total[measured[cell].arm] = total.get(measured[cell].arm, 0.0) + weight
    errors = {one.arm: one.estimate for one in measured.values() if one.arm in total}
    return {arm: (w * (errors[arm].error or 0.0)) ** 2 * errors[arm].n for arm, w in total.items() if w}


def seeds_needed(judgement: Judgement, tests: int) -> int | None:
    """Seeds of each arm that decide with a power of 80 %, were the estimates the truth and Holm's share ALPHA / tests.

    Null where no interval tells the spread; `MOST_SEEDS` + 1 where no number that anyone runs would do.
    """
    if not judgement.readings or any(r.low is None for r in judgement.readings):
        return None
    inside = [r.contrast.target.holds(Interval(Fraction(r.estimate), Fraction(r.estimate))) for r in judgement.readings]
    holds = any(inside) if judgement.claim.some else all(inside)
    needs = []
    for reading, is_inside in zip(judgement.readings, inside, strict=True):
        if is_inside == holds:
            target = reading.contrast.target
            distance = min(abs(float(end) - reading.estimate) for end in (target.low, target.high))
            needs.append(_seeds(distance, math.fsum(reading.spread.values()), tests))
    return max(needs) if holds != judgement.claim.some else min(needs)


def _seeds(distance: float, variance: float, tests: int) -> int:
    if distance <= 0:
        return MOST_SEEDS + 1
    quantiles = float(-ndtri(ALPHA / 2 / max(tests, 1)) + ndtri(POWER))
    return min(MOST_SEEDS + 1, max(2, math.ceil(quantiles**2 * variance / distance**2)))
