"""A table or figure of the paper from a store: per cell the printed value, the measured mean, its interval, a verdict.

Cells come from the planner: it says which run ids feed a cell, and only those runs count. What differs in anything
but the seed is never averaged, and synthetic results never stand beside real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.planner import Artifact, Cell, Column, PlannedRun, Sweep, plan
from ablations.scale import Scale, load_scale
from analysis import frame as frames
from analysis.paper import Printed, dashes, printed
from analysis.statistics import Estimate, Pool, estimate, not_worse, pool, verdict
from sdae.config import dump
from sdae.errors import UserError
from sdae.store import Store

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

    measured; partly (fewer seeds than asked for); running; failed; not run; no value (done, without this metric).
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
        return {
            "artifact": self.artifact,
            "kind": self.kind,
            "title": self.title,
            "scale": self.scale,
            "scale_title": self.scale_title,
            "dataset": self.dataset,
            "model": self.model,
            "synthetic": self.synthetic,
            "seeds": self.seeds,
            "runs": self.runs,
            "commits": self.commits,
            "columns": [
                {
                    "column": c.name,
                    "label": c.label,
                    "unit": c.unit,
                    "decimals": c.decimals,
                    "higher_is_better": c.higher_is_better,
                }
                for c in self.columns
            ],
            "rows": [
                {"row": r.name, "label": r.label, "meta": r.meta, "cells": {k: c.to_dict() for k, c in r.cells.items()}}
                for r in self.rows
            ],
            "notes": self.notes,
        }


def build(store: Store, artifact: str | Path, scale: str | Path = "smoke", seeds: Sequence[int] | None = None) -> Table:
    """`artifact` (a name, or a user's own file) at `scale`, from what the store holds. `seeds` null: all that it holds.

    Raises `UserError` where synthetic and real results would stand in one table, or two configs in one mean.
    """
    loaded = load_scale(scale)
    frame = frames.collect(store)
    here = frame[(frame["scale"] == loaded.name) | frame["scale"].isna()]
    if seeds is None:
        seeds = sorted({int(seed) for seed in here["seed"].dropna()}) or [0]
    sweep = _sweep(here, artifact, loaded, seeds)
    return _Builder(frame.set_index("id"), sweep, list(seeds)).table(sweep.artifacts[0])


def _sweep(here: pd.DataFrame, artifact: str | Path, scale: Scale, seeds: Sequence[int]) -> Sweep:
    """The plan that the store's runs belong to. The pictures need not be here: their fingerprint is in the runs."""
    counts = here.loc[here["dataset"] == scale.data["name"], "fingerprint"].value_counts()
    if len(counts) == 1:
        return plan([artifact], scale, seeds, fingerprint=str(counts.index[0]))
    sweep = plan([artifact], scale, seeds)
    if sweep.provisional and len(counts):
        found = ", ".join(f"{name} ({n} runs)" for name, n in counts.items())
        print(
            f"{scale.name}: the store has runs on several sets of pictures: {found}; showing the first", file=sys.stderr
        )
        return plan([artifact], scale, seeds, fingerprint=str(counts.index[0]))
    return sweep


class _Builder:
    def __init__(self, frame: pd.DataFrame, sweep: Sweep, seeds: list[int]):
        self.frame, self.sweep, self.seeds = frame, sweep, seeds
        self.arms = arms(sweep)
        self.printed, self.dashes = printed(), dashes()
        self.used: set[str] = set()
        self.notes: list[str] = []
        self.pools: dict[tuple[str, str], Pool | None] = {}

    def table(self, artifact: Artifact) -> Table:
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
        synthetic = set(runs["synthetic"].dropna())
        if len(synthetic) > 1:
            made_up = runs.index[runs["synthetic"].fillna(False).astype(bool)]
            found = f"{len(made_up)} of {len(runs)} runs are synthetic (e.g. {made_up[0]})"
            raise UserError(f"{artifact.name}: {found}: not mixed with real ones")
        table = Table(
            artifact.name, artifact.kind, artifact.title, self.sweep.scale.name, self.sweep.scale.title,
            self.dataset(runs), ", ".join(frames.distinct(runs["model"])) or None, artifact.columns, rows, self.seeds,
            len(runs), self.commits(runs), synthetic == {True}, list(artifact.notes),
        )  # fmt: skip
        self.explain(table)
        return table

    def cell(self, cell: Cell, artifact: Artifact) -> TableCell:
        paper = self.printed.get(cell.name)
        if paper is None and cell.name in artifact.paper:
            column = next(c for c in artifact.columns if c.name == cell.column)
            paper = Printed(artifact.paper[cell.name], column.decimals, column.unit, artifact.name)
        ids = list(dict.fromkeys(identity for _, identity in self.sweep.cells.get(cell.name, [])))
        rows = self.frame.loc[[i for i in ids if i in self.frame.index]]
        states = set(rows["state"])
        done = rows[rows["state"] == "done"]
        known = done[cell.metric].dropna() if cell.metric in done.columns else done["top1"].iloc[:0]
        value, decimals = (paper.value, paper.decimals) if paper else (None, None)
        dash = cell.name in self.dashes
        result = TableCell(cell.name, value, decimals, dash, "not run", len(ids), list(known.index))
        if "torn" in states:
            torn = rows.index[rows["state"] == "torn"]
            self.notes.append(f"{', '.join(torn)}: {rows.loc[torn[0], 'message']}; left out.")
        if not len(known):
            if len(done):
                result.state = "no value"
            elif states & {"failed", "torn"}:
                result.state = "failed"
            elif "running" in states:
                result.state = "running"
            return result
        kinds = {self.arms[identity] for identity in known.index}
        if len(kinds) > 1:
            raise UserError(f"{cell.name}: {', '.join(known.index)} differ in more than the seed: not averaged")
        self.used.update(known.index)
        result.state = "measured" if len(known) == len(ids) else "partly"
        assert cell.metric is not None
        pooled = self.pooled(str(done.loc[known.index[0], "stage"]), cell.metric)
        result.estimate = estimate([float(v) for v in known], pooled, _repeats(done, cell.metric))
        if paper is not None and self.sweep.scale.name == "paper":
            result.verdict = verdict(result.estimate, paper)
        return result

    def pooled(self, stage: str, metric: str) -> Pool | None:
        """Over every arm of this stage in the store at this scale and on these pictures, not this artifact's only."""
        if (stage, metric) not in self.pools:
            mine = self.frame[self.frame["state"].eq("done") & self.frame[metric].notna()]
            mine = mine[mine["stage"].eq(stage)]
            planned = mine.index.isin(list(self.sweep.runs))
            same = mine["scale"].eq(self.sweep.scale.name).fillna(False).astype(bool)
            for key in ("fingerprint", "synthetic"):
                values = set(mine.loc[planned, key].dropna())
                same &= mine[key].isin(values) if values else True
            mine = mine[planned | same.to_numpy()]
            names = [self.arms.get(str(i), a) for i, a in zip(mine.index, mine["arm"], strict=True)]
            groups = mine[metric].groupby(pd.Series(names, index=mine.index, dtype=object))
            self.pools[stage, metric] = pool([list(values) for _, values in groups])
        return self.pools[stage, metric]

    def scaled_meta(self, rows: list[TableRow]) -> None:
        """Where the scale changed a number that a row prints, the row shows both, the paper's and the one that ran."""
        for row in rows:
            for key in [key for key in row.meta if key in _HERE]:
                for cell in row.cells.values():
                    value = self.here(_HERE[key], cell)
                    if value is not None:
                        row.meta[f"{key} here"] = value

    def here(self, key: str, cell: TableCell) -> Any:
        found = self.sweep.cells.get(cell.cell)
        run: PlannedRun | None = self.sweep.runs[found[0][1]] if found else None
        while run is not None and key != "init.epoch" and run.needs:
            run = self.sweep.runs.get(run.needs[0])
        if run is None or key not in run.paper:
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
        if "pooled" in sources:
            pools = {(p.arms, p.df): f"{p.arms} arm{'s' * (p.arms > 1)}, {p.df} df" for p in self.pools.values() if p}
            notes.append(
                "Cells with one seed borrow the variance pooled over the arms of their stage that have several "
                f"({'; '.join(pools.values())})."
            )
        if "repeats" in sources:
            notes.append("Intervals of costs with one seed come from the repeats within the run.")
        if None in sources:
            notes.append(
                "Cells without ± have one seed, and no arm has several to borrow a variance from: no interval."
            )
        notes += dict.fromkeys(self.notes)


def arms(sweep: Sweep) -> dict[str, str]:
    """The arm of every planned run: as the frame's column, but from the plan, so that it needs no folder."""
    found: dict[str, str] = {}
    for identity, run in sweep.runs.items():
        config = dump(run.config)
        need = (config.get("init") or {}).get("run")
        found[identity] = frames.arm_name(frames.config_hash(config)[1], found.get(need, need) if need else None)
    return found


def _repeats(done: pd.DataFrame, metric: str) -> tuple[float, int] | None:
    """Spread and number of a single cost run's repeats."""
    column = f"{metric}_sd"
    if len(done) != 1 or column not in done.columns or pd.isna(done[column].iloc[0]):
        return None
    return float(done[column].iloc[0]), int(done["repeats"].iloc[0])
