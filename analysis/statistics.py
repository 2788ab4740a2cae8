"""Means over seeds, their intervals, and what may be said of them. Student's t throughout, 95 %."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from analysis.paper import Printed

LEVEL = 0.95
FEW = 10  # an arm with fewer seeds takes the variance that the arms of its stage have in common
PRECISE = 0.01  # an interval whose half is wider than this share of the printed value cannot tell whether it agrees
Verdict = Literal["agrees", "above", "below", "undecided"]


@dataclass(frozen=True)
class Pool:
    """Variance between seeds, pooled over arms that have several."""

    variance: float
    df: int
    arms: int


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds. `error` is its standard error on `df` degrees of freedom; null where nothing tells it.

    `source` of the error: `seeds` (this cell's own), `pooled` (few seeds, the variance of all arms of the stage),
    `repeats` (one cost run, the spread of its repeats), or null. `pool`: the variance that others have in common with
    it; the only arm with several seeds is the pool.
    """

    mean: float
    n: int
    error: float | None = None
    df: float | None = None
    source: Literal["seeds", "pooled", "repeats"] | None = None
    pool: Pool | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the 95 % interval."""
        if self.error is None or self.df is None:
            return None
        return float(stdtrit(self.df, (1 + LEVEL) / 2)) * self.error

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half


def pool(groups: Iterable[Sequence[float]], steps: bool = False) -> Pool | None:
    """The pooled variance of groups (arms) of seeds; groups of one tell nothing of it.

    steps: the values are multiples of something, such as a share of so many pictures; then ties alone tell nothing.
    """
    several = [np.asarray(group, dtype=float) for group in groups if len(group) >= 2]
    df = sum(len(group) - 1 for group in several)
    if not df:
        return None
    if steps and all(group.min() == group.max() for group in several):  # a mean of equal numbers is off by a last digit
        return None
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in several) / df
    return Pool(variance, df, len(several))


def estimate(
    values: Sequence[float], pooled: Pool | None = None, repeats: tuple[float, int] | None = None, steps: bool = False
) -> Estimate:
    """The mean of one value per seed. `repeats`: (standard deviation, number) of the repeats within a single run;
    `steps` as in `pool`.

    With `FEW` seeds or more the interval is Student's on their own variance. With fewer it takes the variance pooled
    over the stage's arms, its own among them, where that stands on more degrees of freedom; a single cost run has the
    spread of its repeats. Where nothing tells it, there is no interval.
    """
    mean, n = math.fsum(values) / len(values), len(values)
    mean = min(max(mean, min(values)), max(values))  # one value's mean is that value, to the last bit
    if n == 1 and repeats is not None and repeats[1] >= 2:
        return Estimate(mean, n, repeats[0] / math.sqrt(repeats[1]), repeats[1] - 1, "repeats")
    if n < FEW and pooled is not None and pooled.df > n - 1:
        return Estimate(mean, n, math.sqrt(pooled.variance / n), pooled.df, "pooled", pooled)
    if n >= 2 and not (steps and min(values) == max(values)):
        shared = pooled if pooled is not None and pooled.df == n - 1 else None
        return Estimate(mean, n, float(np.std(values, ddof=1)) / math.sqrt(n), n - 1, "seeds", shared)
    return Estimate(mean, n)


def verdict(measured: Estimate, printed: Printed) -> Verdict:
    """A measured mean against a printed value, which stands for the half-open interval of all that rounds to it.

    - above, below: the whole 95 % interval lies beyond that of the printed value: the difference is significant.
    - agrees: the two overlap and the measurement is precise: half its interval is at most 1 % of the printed value,
      or one unit of its last digit where that is more. (84.1 ± 0.5 agrees; 84.1 ± 2 tells nothing.)
    - undecided: they overlap and it is not that precise, or there is no interval.
    """
    if measured.low is None or measured.high is None:
        return "undecided"
    lower, upper = printed.bounds
    if measured.low >= upper:
        return "above"
    if measured.high < lower:
        return "below"
    limit = max(PRECISE * abs(printed.value), 10.0**-printed.decimals)
    return "agrees" if measured.high - measured.low <= 2 * limit else "undecided"


def not_worse(estimates: dict[str, Estimate], higher_is_better: bool) -> set[str]:
    """The entries of a column that are not statistically worse than its best (Welch's t, one-sided, 5 %).

    Two entries that both borrow the pooled variance are compared on its degrees of freedom. Empty where entries have no
    interval or there is only one: then nothing can be said.
    """
    known = {k: e for k, e in estimates.items() if e.error is not None and e.df is not None}
    if len(known) < 2 or len(known) < len(estimates):
        return set()
    best = (max if higher_is_better else min)(known.values(), key=lambda e: e.mean)
    return {k for k, e in known.items() if _p_worse(e, best) >= 1 - LEVEL}


def _p_worse(one: Estimate, best: Estimate) -> float:
    """One-sided p of `one` being as good as `best`."""
    gap = abs(one.mean - best.mean)
    assert one.error is not None
    assert one.df is not None
    assert best.error is not None
    assert best.df is not None
    a, b = one.error**2, best.error**2
    if a + b == 0:
        return 1.0 if gap == 0 else 0.0
    both_pooled = one.pool is not None and one.pool == best.pool
    share = a / (a + b)
    df = one.df if both_pooled else 1 / (share**2 / one.df + (1 - share) ** 2 / best.df)  # Welch-Satterthwaite
    return float(stdtr(df, -gap / math.sqrt(a + b)))
