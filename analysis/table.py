"""A table or figure of the paper from a store: per cell the printed value, the measured mean, its interval, a verdict.

Cells come from the planner: it says which run ids feed a cell, and only those runs count. What differs in anything
but the seed is never averaged, and synthetic results never stand beside real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ablations.planner import MISSING, NEEDS_RELEASED, Artifact, Cell, Column, PlannedRun, Sweep
from analysis import frame as frames
from analysis.paper import Printed, dashes, printed
from analysis.statistics import FEW, Estimate, Pool, estimate, not_worse, pool, verdict
from sdae import provenance
from sdae.config import dump
from sdae.errors import UserError

STALE = "†"
# Which key of a config says at this scale what a row prints in the paper's terms.
_HERE = {
    "momentum": "method.ema.momentum",
    "tokens": "method.teacher.tokens",
    "epochs": "optim.epochs",
    "epoch": "init.epoch",
}


@dataclass
class TableCell:
    """`paper` null: the paper does not print it (`dash`: it prints a dash). No `estimate`: see `state`, one of

    measured; partly (fewer seeds than asked for); running; failed; not run; no value (done, without this metric);
    or what blocks it (`Sweep.blocked`).
    `difference`: measured minus printed, at the paper's scale only. `stale`: some run, or one that it needs, was made
    by code that has changed in substance since.
    """

    cell: str
    paper: float | None
    paper_decimals: int | None
    dash: bool
    state: str
    planned: int
    runs: list[str]
    estimate: Estimate | None = None
    verdict: str | None = None
    best: bool = False
    difference: float | None = None
    stale: bool = False

    def to_dict(self) -> dict[str, Any]:
        found = self.estimate
        return {
            "cell": self.cell,
            "paper": self.paper,
            "paper_decimals": self.paper_decimals,
            "measured": found and found.mean,
            "low": found and found.low,
            "high": found and found.high,
            "seeds": found.n if found else 0,
            "seeds_planned": self.planned,
            "runs": self.runs,
            "verdict": self.verdict,
            "state": self.state,
            "best": self.best,
            "interval": found and found.source,
            "difference": self.difference,
            "stale": self.stale,
        }


@dataclass
class TableRow:
    """`meta`: what the paper prints beside the label; keys that end in `here` hold this scale's value of the same."""

    name: str
    label: str
    meta: dict[str, Any]
    cells: dict[str, TableCell]


@dataclass
class Table:
    """`runs`: how many runs the measured values come from. `dataset`, `model`, `commits`: as those runs say."""

    artifact: str
    kind: str
    title: str
    scale: str
    scale_title: str
    dataset: str | None
    model: str | None
    columns: list[Column]
    rows: list[TableRow]
    seeds: list[int]
    runs: int = 0
    commits: list[str] = field(default_factory=list)
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[TableCell]:
        return [cell for row in self.rows for cell in row.cells.values()]

    @property
    def meta_keys(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row.meta))

    @property
    def comparable(self) -> bool:
        """Whether measured values may be set against the paper's: at the paper's scale only."""
        return self.scale == "paper"

    @property
    def caption(self) -> str:
        """Title, scale, dataset and model in a sentence each; every rendering carries it."""
        known = [text for text in (self.dataset, self.model) if text]
        parts = [self.title, f"Scale {self.scale_title}"] + ([f"Measured on {', '.join(known)}"] if known else [])
        parts.append(f"{self.runs} run{'' if self.runs == 1 else 's'}")
        if self.synthetic:
            parts.insert(0, "SYNTHETIC RESULTS, made up to test this table")
        return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `rows[].cells[COLUMN]` is the same for tables and figures."""
        plain = ("artifact", "kind", "title", "scale", "scale_title", "dataset", "model", "synthetic", "seeds", "runs")
        of_column = ("label", "unit", "decimals", "higher_is_better")
        return {
            **{key: getattr(self, key) for key in (*plain, "commits")},
            "columns": [{"column": c.name} | {key: getattr(c, key) for key in of_column} for c in self.columns],
            "rows": [
                {"row": r.name, "label": r.label, "meta": r.meta, "cells": {k: c.to_dict() for k, c in r.cells.items()}}
                for r in self.rows
            ],
            "notes": self.notes,
        }


class Builder:
    """Makes the tables of one sweep from the frame (indexed by run id); variances are pooled once for all of them."""

    def __init__(self, frame: pd.DataFrame, sweep: Sweep, seeds: list[int], synthetic: bool = False):
        self.frame, self.sweep, self.seeds, self.synthetic = frame, sweep, seeds, synthetic
        self.arms = arms(sweep, frame)
        self.printed, self.dashes = printed(), dashes()
        self.pools: dict[tuple[str, str], Pool | None] = {}
        self.stale = stale(frame)
        self.states = dict(zip(map(str, frame.index), map(str, frame["state"]), strict=True))
        self.values: dict[str | None, dict[str, float]] = {}

    def table(self, artifact: Artifact) -> Table:
        self.used: set[str] = set()
        self.notes: list[str] = []
        rows = [TableRow(row.name, row.label, dict(row.meta), {}) for row in artifact.rows]
        by_name = {row.name: row for row in rows}
        for cell in artifact.cells.values():
            by_name[cell.row].cells[cell.column] = self.cell(cell, artifact)
        self.scaled_meta(rows)
        for column in artifact.columns:
            shown = {row.name: row.cells[column.name] for row in rows if column.name in row.cells}
            estimates = {name: place.estimate for name, place in shown.items() if place.estimate}
            for name in not_worse(estimates, column.higher_is_better):
                shown[name].best = True
        runs = self.frame.loc[sorted(self.used)]
        table = Table(
            artifact.name, artifact.kind, artifact.title, self.sweep.scale.name, self.sweep.scale.title,
            self.dataset(runs), ", ".join(frames.distinct(runs["model"])) or None, artifact.columns, rows, self.seeds,
            len(runs), self.commits(runs), self.synthetic, list(artifact.notes),
        )  # fmt: skip
        self.explain(table)
        return table

    def cell(self, cell: Cell, artifact: Artifact) -> TableCell:
        paper = self.printed.get(cell.name)
        if paper is None and cell.name in artifact.paper:
            column = next(c for c in artifact.columns if c.name == cell.column)
            paper = Printed(artifact.paper[cell.name], column.decimals, column.unit, artifact.name)
        ids = list(dict.fromkeys(identity for _, identity in self.sweep.cells.get(cell.name, [])))
        states = {i: self.states[i] for i in ids if i in self.states}
        done = [i for i, state in states.items() if state == "done"]
        measured = self.measured(cell.metric)
        known = [i for i in done if i in measured]
        value, decimals = (paper.value, paper.decimals) if paper else (None, None)
        dash = cell.name in self.dashes
        result = TableCell(cell.name, value, decimals, dash, "not run", len(ids), known)
        if torn := [i for i, state in states.items() if state == "torn"]:
            why: Any = self.frame.at[torn[0], "message"]
            self.notes.append(f"{', '.join(torn)}: {why}; left out.")
        if not known:
            if done:
                result.state = "no value"
            elif {"failed", "torn"} & set(states.values()):
                result.state = "failed"
            elif "running" in states.values():
                result.state = "running"
            elif cell.name in self.sweep.blocked:
                result.state = self.sweep.blocked[cell.name]
            return result
        if len({self.arms[identity] for identity in known}) > 1:
            raise UserError(f"{cell.name}: {', '.join(known)} differ in more than the seed: not averaged")
        self.used.update(known)
        result.state = "measured" if len(known) == len(ids) else "partly"
        result.stale = not self.stale.isdisjoint(known)
        assert cell.metric is not None
        stage = str(self.frame.at[known[0], "stage"])
        # A cost grows with what is measured, so the arms of its stage have no variance in common
        pooled = None if stage == "cost" and len(known) > 1 else self.pooled(stage, cell.metric)
        repeats = self.repeats(known[0], cell.metric) if len(done) == 1 else None
        result.estimate = estimate([measured[i] for i in known], pooled, repeats, steps=stage != "cost")
        if paper is not None and self.sweep.scale.name == "paper":
            result.verdict = verdict(result.estimate, paper)
            result.difference = result.estimate.mean - paper.value
        return result

    def measured(self, metric: str | None) -> dict[str, float]:
        """The value of every run that has one."""
        if metric not in self.values:
            known = self.frame[metric].dropna() if metric in self.frame.columns else pd.Series(dtype=float)
            self.values[metric] = {str(i): float(value) for i, value in known.items()}
        return self.values[metric]

    def repeats(self, run: str, metric: str) -> tuple[float, int] | None:
        """Spread and number of a cost run's repeats."""
        if f"{metric}_sd" not in self.frame.columns:
            return None
        spread: Any = self.frame.at[run, f"{metric}_sd"]
        number: Any = self.frame.at[run, "repeats"]
        return None if pd.isna(spread) else (float(spread), int(number))

    def pooled(self, stage: str, metric: str) -> Pool | None:
        """Over every arm of this stage in the store at this scale and on these pictures, not this artifact's only."""
        if (stage, metric) not in self.pools:
            columns = ["scale", "fingerprint", "synthetic", "arm", metric]
            done = self.frame["stage"].eq(stage) & self.frame["state"].eq("done") & self.frame[metric].notna()
            mine = self.frame.loc[done.to_numpy(bool), columns]
            planned = mine.index.isin(list(self.sweep.runs))
            same = mine["scale"].eq(self.sweep.scale.name).fillna(False).astype(bool)
            for key in ("fingerprint", "synthetic"):
                values = set(mine.loc[planned, key].dropna())
                same &= mine[key].isin(values) if values else True
            mine = mine[planned | same.to_numpy()]
            names = [self.arms.get(str(i), a) for i, a in zip(mine.index, mine["arm"], strict=True)]
            groups = mine[metric].groupby(pd.Series(names, index=mine.index, dtype=object))
            self.pools[stage, metric] = pool([list(values) for _, values in groups], steps=stage != "cost")
        return self.pools[stage, metric]

    def scaled_meta(self, rows: list[TableRow]) -> None:
        """Where the scale changed a number that a row prints, the row shows both, the paper's and the one that ran."""
        for row in rows:
            for key in [key for key in row.meta if key in _HERE]:
                for cell in row.cells.values():
                    value = self.here(_HERE[key], cell, row.meta[key])
                    if value is not None:
                        row.meta[f"{key} here"] = value

    def here(self, key: str, cell: TableCell, printed: Any) -> Any:
        """What a printed number of the row has become: of the run that has it, the first one of those in a row."""
        found = self.sweep.cells.get(cell.cell)
        run: PlannedRun | None = self.sweep.runs[found[0][1]] if found else None
        chain: list[PlannedRun] = []
        while run is not None:
            chain.insert(0, run)
            run = self.sweep.runs.get(run.needs[0]) if run.needs else None
        run = next((r for r in chain if key in r.paper and _same_number(r.paper[key], printed)), None)
        if run is None:
            return None
        value: Any = dump(run.config)
        for part in key.split("."):
            value = value[part]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    def dataset(self, runs: pd.DataFrame) -> str | None:
        costs = runs.loc[runs["stage"] == "cost", "image_size"].dropna()
        names = [f"generated pictures of {int(size)} px" for size in sorted(set(costs))]
        for (name, size), group in runs.groupby(["dataset", "image_size"], dropna=True):
            pictures = group["train"].max()
            names.append(f"{name} ({'' if pd.isna(pictures) else f'{int(pictures)} pictures, '}{size} px)")
        return ", ".join(names) or None

    def commits(self, runs: pd.DataFrame) -> list[str]:
        changed = runs["dirty"].fillna(False).astype(bool)
        return frames.distinct(runs["commit"].str[:10] + changed.map({True: "+changes", False: ""}))

    def explain(self, table: Table) -> None:
        cells = [cell for cell in table.cells() if cell.estimate]
        sources = {cell.estimate.source for cell in cells if cell.estimate}
        notes = table.notes
        if table.synthetic:
            notes.append("SYNTHETIC: these results were made up to test the tables; no model was trained.")
        if not table.comparable and any(cell.paper is not None for cell in table.cells()):
            notes.append("Measured at another scale than the paper's: side by side, not compared; no verdict is given.")
        if table.runs == 0:
            notes.append("The store has no finished run of this artifact at this scale.")
        if any(cell.state == NEEDS_RELEASED for cell in table.cells()):
            notes.append(f"{NEEDS_RELEASED}: released ones, of ViT-B/16 at 224 px; this scale's network is another.")
        if any(cell.state == MISSING for cell in table.cells()):
            notes.append(f"{MISSING}: import them with `sdae-cli weights import` (docs/weights.md says which).")
        if any(cell.stale for cell in cells):
            notes.append(f"{STALE}: the code that makes these numbers has changed in substance since their runs.")
        if "pooled" in sources:
            pools = {(p.arms, p.df): f"{p.arms} arm{'s' * (p.arms > 1)}, {p.df} df" for p in self.pools.values() if p}
            notes.append(
                f"Cells with fewer than {FEW} seeds have the variance pooled over all arms of their stage with several "
                f"({'; '.join(pools.values())})."
            )
        if "repeats" in sources:
            notes.append("Intervals of costs with one seed come from the repeats within the run.")
        if None in sources:
            notes.append(
                "Cells without ± have one seed, and no arm has several to borrow a variance from: no interval."
            )
        notes += dict.fromkeys(self.notes)


def stale(frame: pd.DataFrame) -> set[str]:
    """Ids of the runs that were made, or whose need was made, by code that has changed in substance since.

    frame: indexed by id. A run that does not say by which code it was made is not among them.
    """
    recorded = frame.loc[frame["substance"].notna().to_numpy(bool), ["stage", "substance"]]
    today = {stage: provenance.substance(stage) for stage in set(recorded["stage"]) & provenance.STAGE_MODULES.keys()}
    expected = recorded["stage"].map(today)
    changed = set(recorded.index[(expected.notna() & (expected != recorded["substance"])).to_numpy(bool)])
    needs = frame["need"].dropna()
    return changed | set(needs.index[needs.isin(changed)]) if changed else changed


def arms(sweep: Sweep, frame: pd.DataFrame | None = None) -> dict[str, str]:
    """The arm of every planned run: as the frame's column, but from the plan, so that it needs no folder.

    frame: indexed by id; what it knows is not worked out again.
    """
    own: dict[str, str] = {}
    if frame is not None:
        known = frame["arm"].dropna()
        known = known[known.index.isin(list(sweep.runs))]
        own = {str(i): str(arm).partition("+")[0] for i, arm in zip(known.index, known, strict=True)}
    found: dict[str, str] = {}
    for identity, run in sweep.runs.items():
        need = getattr(getattr(run.config, "init", None), "run", None)
        mine = own.get(identity) or frames.config_hash(dump(run.config))[1]
        found[identity] = frames.arm_name(mine, found.get(need, need) if need else None)
    return found


def _same_number(value: Any, printed: Any) -> bool:
    """A row's meta may be text, such as "0.90"; one that is no number at all stands for whatever the run has."""
    try:
        return math.isclose(float(value), float(printed), rel_tol=1e-9)
    except (TypeError, ValueError):
        return True
