"""One store at one scale, read once: the sweep that its runs belong to, and every table and figure of it.

Tables, figures, claims, provenance and the report are all made from a `Study`, so that they cannot tell different
stories of one store.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.planner import Artifact, Column, Sweep, available, content_key, plan
from ablations.scale import Scale, load_scale
from analysis import frame as frames
from analysis.table import Builder, Table, TableCell, TableRow
from sdae.errors import UserError
from sdae.store import Store


@dataclass
class Study:
    """`frame`: every run of the store, by id, whatever its scale. `tables`: by artifact, in the paper's order.

    `arms`: of every planned run, as the frame's column of that name.
    """

    store: Store
    sweep: Sweep
    seeds: list[int]
    frame: pd.DataFrame
    tables: dict[str, Table]
    arms: Mapping[str, str]

    @property
    def scale(self) -> Scale:
        return self.sweep.scale

    @property
    def artifacts(self) -> list[Artifact]:
        return self.sweep.artifacts

    @property
    def synthetic(self) -> bool:
        """Whether all of it is made up: the store's mark says so."""
        return self.store.synthetic

    @property
    def cells(self) -> dict[str, TableCell]:
        return {cell.cell: cell for table in self.tables.values() for cell in table.cells()}

    def place(self, cell: str) -> tuple[Table, TableRow, Column]:
        """Where a cell stands; UserError with the nearest names where there is none such."""
        for table in self.tables.values():
            for row in table.rows:
                for column in table.columns:
                    if column.name in row.cells and row.cells[column.name].cell == cell:
                        return table, row, column
        raise UserError(frames.unknown("cell", cell, self.cells))


def study(
    store: Store,
    artifacts: Sequence[str | Path] = (),
    scale: str | Path = "smoke",
    seeds: Sequence[int] | None = None,
    until: datetime | None = None,
    cells: Collection[str] | None = None,
) -> Study:
    """Some artifacts (none given: all of the suite's; names, or files of a user's own) from what the store holds.

    seeds: null for all that it holds. until: only runs that had ended by then. cells: only the runs of these are
    planned, all others count as not run. Raises `UserError` where two configs would stand in one mean.
    """
    loaded = load_scale(scale)
    frame = frames.collect(store)
    if until is not None:
        frame = frame[frame["ended"] <= until]
    here = frame[(frame["scale"] == loaded.name) | frame["scale"].isna()]
    if seeds is None:
        seeds = sorted({int(seed) for seed in here["seed"].dropna()}) or [0]
    sweep = _sweep(here, artifacts or available(), loaded, seeds, cells)
    builder = Builder(frame.set_index("id"), sweep, list(seeds), store.synthetic)
    tables = {artifact.name: builder.table(artifact) for artifact in sweep.artifacts}
    return Study(store, sweep, list(seeds), builder.frame, tables, builder.arms)


def build(store: Store, artifact: str | Path, scale: str | Path = "smoke", seeds: Sequence[int] | None = None) -> Table:
    """One table or figure; see `study`."""
    (table,) = study(store, [artifact], scale, seeds).tables.values()
    return table


def _sweep(
    here: pd.DataFrame,
    artifacts: Sequence[str | Path],
    scale: Scale,
    seeds: Sequence[int],
    cells: Collection[str] | None,
) -> Sweep:
    """The plan that the store's runs belong to. The pictures need not be here: their fingerprint is in the runs."""
    counts = contents(here)
    likely = {key: next(iter(values)) for key, values in counts.items()}
    unsure = {key: values for key, values in counts.items() if len(values) > 1}
    certain = {key: value for key, value in likely.items() if key not in unsure}
    sweep = plan(artifacts, scale, seeds, content=certain, cells=cells)
    if not unsure or not sweep.provisional:
        return sweep
    for key, values in unsure.items():
        found = ", ".join(f"{value} ({n} runs)" for value, n in values.items())
        told = f"{scale.name}: the store has runs on several sets of {key}: {found}; showing the first"
        print(told, file=sys.stderr)
    return plan(artifacts, scale, seeds, content=likely, cells=cells)


def contents(here: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By `content_key`: which fingerprints and digests the runs have, and how many of them, the most frequent first."""
    pictures = here.loc[here["fingerprint"].notna().to_numpy(bool), ["stage", "dataset", "fingerprint"]]
    weights = here.loc[here["digest"].notna().to_numpy(bool), ["weights", "digest"]]
    found: dict[str, Counter[str]] = defaultdict(Counter)
    known: Any  # pandas has no type for the values of several columns
    for known, number in pictures.value_counts().items():  # the frame has ten thousand rows, and few sets
        stage, dataset, value = known
        found[content_key(stage, dataset)][value] += int(number)
    for known, number in weights.value_counts().items():
        name, value = known
        found[name][value] += int(number)
    return {key: dict(values.most_common()) for key, values in found.items()}
