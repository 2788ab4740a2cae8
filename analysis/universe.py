"""A store full of made-up results: every table, figure, claim and page can be seen before anything is run.

A run's value is the mean over the values that the paper prints for the cells that it feeds, plus normal noise (`NOISE`,
one draw per run and metric). A cell that the paper does not print takes, for this purpose alone, what lies between its
printed neighbours in the column, evenly; past the last of them it falls by a tenth of a point per row, and in a column
without any it is a draw around the artifact's kind of value. Figure 4(a) and 4(c), of which the paper prints no value,
are drawn as its text tells them: momentum per iteration sensitive, per epoch flat and better for long training; the
student first, the teacher later. None of these is ever taken for the paper's, and other scales get the same values:
they are made up anyway. What is written is a function of (seed, run id) and of the code's commit; which runs are
missing or at fault, of the seed and the sweep. Only what is running holds the time.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from ablations.planner import Artifact, Cell, Row, Sweep
from analysis.madeup import ABOUT, NOISE, MadeUp, random_of
from analysis.paper import printed
from sdae.store import SyntheticStore

FAULTS = ("NonFiniteLoss", "torn", "running", "stale", "TimedOut", "OutOfMemory", "WorkerDied", "NodeFailure")


def make(
    store: SyntheticStore,
    sweep: Sweep,
    *,
    seed: int = 0,
    missing: float = 0.03,
    faults: float = 0.03,
    tell: Callable[[str], None] = lambda _: None,
) -> Counter[str]:
    """Fills `store` with a result for each run of `sweep`; how many came out as what: done, missing, or a fault's name.

    missing, faults: shares of the runs. A stale run is done, by other code than today's. No column of an artifact loses
    more than half of its cells. Runs that need a run that did not end are missing too. A folder of the same id is
    replaced.
    """
    fates = _fates(sweep, seed, missing, faults)
    means = _means(sweep)
    counts: Counter[str] = Counter()
    for number, run in enumerate(sweep.runs.values()):
        fate = fates.get(run.id, "done")
        counts[fate] += 1
        if store.run(run.id).path.exists():
            store.remove(run.id)
        if fate != "missing":
            store.put(run.id, MadeUp(run, seed, means.get(run.id, {}), sweep.scale.pictures).files(fate))
        if (number + 1) % 1000 == 0:
            tell(f"{number + 1} of {sweep.unique} runs made up")
    return counts


# What each cell is about
def _means(sweep: Sweep) -> dict[str, dict[str, float]]:
    """run -> metric -> the value that its noise is added to."""
    paper = {name: value.value for name, value in printed().items()}
    fed: dict[tuple[str, str], list[float]] = {}
    cells = {name: cell for artifact in sweep.artifacts for name, cell in artifact.cells.items()}
    for artifact in sweep.artifacts:
        paper |= {name: value for name, value in artifact.paper.items() if name not in paper}
    for name, runs in sweep.cells.items():
        for _, identity in runs:
            if name in paper:
                fed.setdefault((identity, str(cells[name].metric)), []).append(paper[name])
    known = {key: statistics.fmean(values) for key, values in fed.items()}
    means: dict[str, dict[str, float]] = {}
    for artifact in sweep.artifacts:
        for column in artifact.columns:
            rows = [(row, artifact.cells[f"{artifact.name}.{row.name}.{column.name}"]) for row in artifact.rows]
            rows = [(row, cell) for row, cell in rows if cell.name in sweep.cells]
            for cell, value in _column(artifact, rows, sweep, known).items():
                for _, identity in sweep.cells[cell]:
                    means.setdefault(identity, {}).setdefault(str(cells[cell].metric), value)
    for (identity, metric), value in known.items():
        means[identity][metric] = value
    return means


def _column(
    artifact: Artifact, rows: list[tuple[Row, Cell]], sweep: Sweep, known: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """A value for each cell of a column: the paper's, where it or another cell of the same run is printed."""
    told = {"figure4a": _momentum, "figure4c": _epochs}.get(artifact.name)
    if told:
        return {cell.name: told(row) for row, cell in rows}
    firsts = [(sweep.cells[cell.name][0][1], str(cell.metric)) for _, cell in rows]
    places = [n for n, key in enumerate(firsts) if key in known]
    values = [known[firsts[n]] for n in places]
    if not places:
        stages = [sweep.runs[identity].config.stage for identity, _ in firsts]
        draws = [random_of(cell.name).normal() for _, cell in rows]
        return {
            cell.name: ABOUT.get(s, 1.0) + 3 * NOISE.get(s, 0.1) * d
            for (_, cell), s, d in zip(rows, stages, draws, strict=True)
        }
    between = np.interp(range(len(rows)), places, values)
    past = [max(places[0] - n, n - places[-1], 0) for n in range(len(rows))]
    return {cell.name: float(v) - 0.1 * p for (_, cell), v, p in zip(rows, between, past, strict=True)}


def _momentum(row: Row) -> float:
    """Figure 4(a) as section 4.2 tells it."""
    momentum, longer = float(row.meta["momentum"]), 1.0 if int(row.meta["epochs"]) > 100 else 0.0
    if row.meta["every"] == "epoch":
        return 83.0 + 0.9 * longer - 30.0 * (momentum - 0.96) ** 2
    steps = abs(math.log2((1 - momentum) / 0.004))
    return 82.7 + 0.4 * longer - 0.25 * float(steps**1.5) * (1 + longer)


def _epochs(row: Row) -> float:
    """Figure 4(c) as section 4.4 tells it: lines that cross after the warm-up."""
    epoch = float(row.meta["epoch"])
    student = 83.2 - 4.0 * math.exp(-epoch / 90)
    return student if row.meta["weights"] == "student" else student + 0.5 * math.tanh((epoch - 55) / 40)


# What becomes of each run
def _fates(sweep: Sweep, seed: int, missing: float, faults: float) -> dict[str, str]:
    """The runs that are not done, and why."""
    after: dict[str, list[str]] = {}
    for run in sweep.runs.values():
        for need in run.needs:
            after.setdefault(need, []).append(run.id)
    alive = {cell: {identity for _, identity in runs} for cell, runs in sweep.cells.items()}
    columns: dict[tuple[str, str], list[str]] = {}
    fed: dict[str, list[str]] = {}
    for artifact in sweep.artifacts:
        for cell in artifact.cells.values():
            if cell.name in alive:
                columns.setdefault((artifact.name, cell.column), []).append(cell.name)
                for identity in alive[cell.name]:
                    fed.setdefault(identity, []).append(cell.name)
    column_of = {cell: key for key, names in columns.items() for cell in names}

    def spare(gone: set[str]) -> bool:
        """Whether every column keeps half of its cells without these runs; then they are taken out of `alive`."""
        touched = {cell for identity in gone for cell in fed.get(identity, ())}
        emptied = {cell for cell in touched if not alive[cell] - gone}
        for key in {column_of[cell] for cell in emptied}:
            if 2 * sum(bool(alive[cell]) and cell not in emptied for cell in columns[key]) < len(columns[key]):
                return False
        for cell in touched:
            alive[cell] -= gone
        return True

    wanted = [FAULTS[n % len(FAULTS)] for n in range(round(faults * sweep.unique))]
    wanted = (wanted + ["missing"] * round(missing * sweep.unique))[::-1]
    fates: dict[str, str] = {}
    for identity in sorted(sweep.runs, key=lambda i: hashlib.sha256(f"{seed} fate {i}".encode()).digest()):
        if not wanted:
            break
        if wanted[-1] == "stale" and identity not in fates:
            fates[identity] = wanted.pop()
            continue
        gone = {identity, *after.get(identity, ())}
        if len(gone) <= 3 and not gone & fates.keys() and spare(gone):
            fates |= dict.fromkeys(gone, "missing") | {identity: wanted.pop()}
    return fates
