"""How often the verdicts on claims are right, found out on planted truths: wrong verdicts, coverage, power.

A universe plants a true mean for every cell, near the paper's, draws seeds around it, and judges the whole ledger as
`analysis.verdicts` judges a store. What is planted decides what is true, so every verdict can be marked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from scipy.stats import nct, t

from ablations.planner import plan
from analysis.claims import Claim, Contrast, Interval, claims
from analysis.inference import ALPHA, Judgement, Measured, judge
from analysis.paper import counts, printed
from analysis.statistics import Pool, estimate, pool

UNKNOWN = 83.5  # true mean about which cells are planted that the paper does not print
# Of fine-tuning accuracy between seeds: four published seeds of MAE's recipe, analysis/paper/claims.yaml
SPREAD = 0.094
SHIFTS = (0.0, 0.1, 0.3, 1.0)  # how far truths stray from the paper's numbers, each for a quarter of the universes


@dataclass
class Tally:
    """Counts over universes. `ledgers`: those with at least one wrong definite verdict."""

    universes: int = 0
    ledgers: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    covered: int = 0
    intervals: int = 0
    cells_covered: int = 0
    cells: int = 0

    def to_dict(self) -> dict[str, float]:
        definite = self.verdicts["right"] + self.verdicts["wrong"]
        return {
            "universes": self.universes,
            "ledgers_with_a_wrong_verdict": self.ledgers / self.universes,
            "wrong_of_definite": self.verdicts["wrong"] / definite if definite else 0.0,
            "definite": definite / max(1, sum(self.verdicts.values())),
            "coverage_of_contrasts": self.covered / self.intervals if self.intervals else math.nan,
            "coverage_of_cells": self.cells_covered / self.cells if self.cells else math.nan,
        }


@dataclass(frozen=True)
class World:
    """The ledger's cells: their arms (cells that one run fills are one), the stage of each arm, and the claims."""

    arms: Mapping[str, Hashable]
    stages: Mapping[Hashable, str]
    claims: tuple[Claim, ...]


def world() -> World:
    """All cells of the suite at the paper's scale; rows that no run fills are arms of their own."""
    sweep = plan([], "paper", content="simulated")
    arms: dict[str, Hashable] = {}
    stages: dict[Hashable, str] = {}
    for artifact in sweep.artifacts:
        for name, cell in artifact.cells.items():
            runs = sweep.cells.get(name)
            arm = (runs[0][1], cell.metric) if runs else (name,)
            arms[name] = arm
            stages[arm] = (
                f"{sweep.runs[runs[0][1]].config.stage} {cell.metric}" if runs else f"{artifact.name} {cell.column}"
            )
    return World(arms, stages, claims())


def simulate(universes: int, seeds: int, seed: int = 0, unequal: float = 0.0, single: float = 0.0) -> Tally:
    """`universes` ledgers with `seeds` seeds an arm.

    single: share of the arms that have one seed only. unequal: the arms' true spreads differ from their stage's by a
    factor of exp(normal x unequal), against what pooling assumes; 0 is what the intervals promise for.
    """
    here, rng, tally = world(), np.random.default_rng(seed), Tally()
    for index in range(universes):
        shift = SHIFTS[index % len(SHIFTS)]
        centres = {name: printed()[name].value if name in printed() else UNKNOWN for name in here.arms}
        truths = {arm: centres[name] + shift * rng.normal() for name, arm in here.arms.items()}
        drawn = _draw(here, truths, seeds, unequal, single, rng)
        _mark(tally, judge(here.claims, drawn, counts=counts()), drawn, {n: truths[a] for n, a in here.arms.items()})
    return tally


def _draw(
    here: World, truths: Mapping[Hashable, float], seeds: int, unequal: float, single: float, rng: np.random.Generator
) -> dict[str, Measured]:
    values: dict[Hashable, list[float]] = {}
    for arm, truth in truths.items():
        n = 1 if rng.random() < single else seeds
        spread = SPREAD * math.exp(unequal * rng.normal())
        values[arm] = [float(v) for v in rng.normal(truth, spread, n)]
    pools: dict[str, Pool | None] = {
        stage: pool([v for arm, v in values.items() if here.stages[arm] == stage])
        for stage in set(here.stages.values())
    }
    found = {arm: estimate(v, pools[here.stages[arm]]) for arm, v in values.items()}
    return {name: Measured(found[arm], arm) for name, arm in here.arms.items()}


def _mark(
    tally: Tally, judgements: list[Judgement], drawn: Mapping[str, Measured], truths: Mapping[str, float]
) -> None:
    tally.universes += 1
    wrong = False
    for judgement in judgements:
        if not judgement.readings:
            continue
        right = "supported" if _holds(judgement.claim, truths) else "contradicted"
        mark = "undecided" if judgement.verdict == "undecided" else "right" if judgement.verdict == right else "wrong"
        tally.verdicts[mark] += 1
        wrong |= mark == "wrong"
        for reading in judgement.readings:
            if reading.low is not None and reading.high is not None and reading.low < reading.high:
                tally.intervals += 1
                tally.covered += reading.low <= _value(reading.contrast, truths) <= reading.high
    tally.ledgers += wrong
    for name, one in drawn.items():
        if one.estimate.low is not None and one.estimate.high is not None:
            tally.cells += 1
            tally.cells_covered += one.estimate.low <= truths[name] <= one.estimate.high


def _value(contrast: Contrast, truths: Mapping[str, float]) -> float:
    return contrast.value({cell: truths[cell] if cell in truths else counts()[cell].value for cell in contrast.cells})


def _holds(claim: Claim, truths: Mapping[str, float]) -> bool:
    points = [Fraction(_value(contrast, truths)) for contrast in claim.contrasts]
    within = [c.target.holds(Interval(p, p)) for c, p in zip(claim.contrasts, points, strict=True)]
    return any(within) if claim.some else all(within)


def power(effect: float, seeds: int, df: int, tests: int = 1) -> float:
    """The chance that "A exceeds B" is supported, by the noncentral t distribution.

    effect: their true difference in standard deviations between seeds. df: degrees of freedom of the pooled variance.
    tests: the claims that Holm's method still counts (1: the last of the ledger, or a claim by itself).
    """
    bound = float(t.isf(ALPHA / 2 / tests, df))
    return float(nct.sf(bound, df, effect * math.sqrt(seeds / 2)))
