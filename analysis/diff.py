"""What changed between two stores, or one store at two times: cells, verdicts, claims, and by which runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from analysis.statistics import LEVEL, Estimate
from analysis.study import Study, study
from sdae.errors import UserError
from sdae.store import Store

NAMED = 3  # runs that a line has room for


def side(
    text: str, store: Store, artifacts: Sequence[str | Path], scale: str | Path, seeds: Sequence[int] | None = None
) -> Study:
    """A side of the comparison: the folder of a store, or a time until which the runs of `store` had ended.

    A date stands for its end; a time without a zone is that of this machine. UserError for what is neither.
    """
    if Path(text).is_dir():
        return study(Store(text), artifacts, scale, seeds)
    try:
        until = datetime.fromisoformat(text)
        if until.time() == time() and not any(mark in text for mark in "T: "):
            until += timedelta(days=1) - timedelta(microseconds=1)
        until = until.astimezone()
    except (ValueError, OverflowError):  # year 1 or 9999, which may be none in another zone
        raise UserError(
            f"{text!r}: neither a folder nor a time (allowed: a store's folder, 2026-01-31, 2026-01-31T18:00, "
            "2026-01-31T18:00+00:00)"
        ) from None
    return study(store, artifacts, scale, seeds, until)


@dataclass
class Change:
    """Runs that are in B only, in A only, or in both with different values."""

    came: set[str] = field(default_factory=set)
    went: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.came or self.went or self.changed)

    def to_dict(self) -> dict[str, list[str]]:
        return {"came": sorted(self.came), "went": sorted(self.went), "changed": sorted(self.changed)}

    @classmethod
    def of(cls, parts: Iterable[Change]) -> Change:
        found = cls()
        for part in parts:
            found.came |= part.came
            found.went |= part.went
            found.changed |= part.changed
        return found


def diff(
    a: Study, b: Study, verdicts_a: Sequence[Mapping[str, Any]] = (), verdicts_b: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """{scale, synthetic, a, b: {store, seeds, runs}, notes, cells, verdicts, claims}, as JSON values.

    cells: {cell, change: moved | appeared | vanished, a, b, difference, low, high, significant, runs, through}; the
    95 % interval is that of b - a and knows of runs that both have; null where nothing tells it.
    verdicts: {cell, a, b, runs, through} of those that flipped; claims: {claim, quote, a, b, runs, through} likewise,
    from what `judge_study` says of each side. `runs`: the ids that are responsible, {came, went, changed}; `through`:
    `its runs`; where these are the same, `the pooled variance` of its stage; or `the ledger`, all of whose claims share
    one risk.

    Raises UserError where the sides are not of one scale, or one is made up and the other is not.
    """
    if a.scale.name != b.scale.name:
        raise UserError(f"scales {a.scale.name} and {b.scale.name}: only runs of one scale are compared")
    if a.frame.size and b.frame.size and a.store.synthetic != b.store.synthetic:
        made_up, real = (a, b) if a.store.synthetic else (b, a)
        raise UserError(f"{made_up.store.root}: holds synthetic results, {real.store.root} does not: not compared")
    changes, estimates = _changes(a, b), (_estimates(a), _estimates(b))
    stages = {cell: _stage(a, cell) or _stage(b, cell) for cell in changes}
    blame = _Blame(changes, stages)
    flips = [
        {"cell": cell, "a": a.cells[cell].verdict, "b": b.cells[cell].verdict, **blame([cell])}
        for cell in changes
        if cell in a.cells and cell in b.cells
        if None not in (verdicts := {a.cells[cell].verdict, b.cells[cell].verdict}) and len(verdicts) == 2
    ]
    return {
        "scale": a.scale.name, "synthetic": a.store.synthetic or b.store.synthetic, "a": _about(a), "b": _about(b),
        "notes": list(_notes(a, b)),
        "cells": list(_moved(*estimates, changes, blame)), "verdicts": flips,
        "claims": list(_claims(verdicts_a, verdicts_b, blame)),
    }  # fmt: skip


def _about(one: Study) -> dict[str, Any]:
    runs = {run for cell in one.cells.values() for run in cell.runs}
    return {"store": str(one.store.root), "seeds": one.seeds, "runs": len(runs)}


def _notes(a: Study, b: Study) -> Iterator[str]:
    for name, one in (("A", a), ("B", b)):
        if not any(cell.estimate for cell in one.cells.values()):
            yield f"{name} has no measured cell at scale {one.scale.name}."
    for name in a.tables.keys() & b.tables.keys():
        for what in ("dataset", "model"):
            values = [getattr(one.tables[name], what) for one in (a, b)]
            if None not in values and values[0] != values[1]:
                yield f"{name} was measured on {values[0]} in A and on {values[1]} in B."


def _estimates(one: Study) -> dict[str, Estimate]:
    return {name: cell.estimate for name, cell in one.cells.items() if cell.estimate}


def _stage(one: Study, cell: str) -> str | None:
    planned = one.sweep.cells.get(cell)
    return one.sweep.runs[planned[0][1]].config.stage if planned else None


def _changes(a: Study, b: Study) -> dict[str, Change]:
    """Of every cell, which of its values came, went or are others."""
    found = {}
    metrics = {n: c.metric for one in (a, b) for artifact in one.artifacts for n, c in artifact.cells.items()}
    columns = {(m, k): _column(one, m) for m in set(metrics.values()) - {None} for k, one in enumerate((a, b))}
    for cell, metric in metrics.items():
        runs = [one.cells[cell].runs if cell in one.cells else [] for one in (a, b)]
        before, after = ({i: columns[metric, k][i] for i in ids} for k, ids in enumerate(runs))
        both = before.keys() & after.keys()
        found[cell] = Change(
            after.keys() - both, before.keys() - both, {i for i in both if before[i] != after[i]}
        )  # fmt: skip
    return found


def _column(one: Study, metric: str | None) -> dict[str, float]:
    return dict(one.frame[metric].dropna().items()) if metric in one.frame.columns else {}  # type: ignore[arg-type]


class _Blame:
    """Which runs a change comes from: its cells' own, else those of their stages, else any."""

    def __init__(self, changes: Mapping[str, Change], stages: Mapping[str, str | None]):
        self.changes, self.stages = changes, stages

    def __call__(self, cells: Iterable[str]) -> dict[str, Any]:
        mine = [cell for cell in cells if cell in self.changes]
        stages = {self.stages[cell] for cell in mine}
        for through, among in (
            ("its runs", mine),
            ("the pooled variance", [c for c in self.changes if self.stages[c] in stages]),
            ("the ledger", list(self.changes)),
        ):
            if change := Change.of(self.changes[cell] for cell in among):
                return {"runs": change.to_dict(), "through": through}
        return {"runs": Change().to_dict(), "through": None}


def _moved(
    before: Mapping[str, Estimate], after: Mapping[str, Estimate], changes: Mapping[str, Change], blame: _Blame
) -> Iterator[dict[str, Any]]:
    for cell, change in changes.items():
        a, b = before.get(cell), after.get(cell)
        if (a and a.mean) == (b and b.mean):
            continue
        what, gap, low, high = "appeared" if b else "vanished", None, None, None
        if a and b:
            what, gap = "moved", b.mean - a.mean
            half = half_of_difference(a, b, b.n - len(change.came | change.changed))
            low, high = (None, None) if half is None else (gap - half, gap + half)
        yield {
            "cell": cell, "change": what, "a": a and a.mean, "b": b and b.mean, "difference": gap, "low": low,
            "high": high, "significant": None if low is None or high is None else low > 0 or high < 0,
            **blame([cell]),
        }  # fmt: skip


def half_of_difference(a: Estimate, b: Estimate, shared: int = 0) -> float | None:
    """Half the 95 % interval of the difference of two means that have `shared` values in common; null: not known.

    Var = s_a^2 / n_a + s_b^2 / n_b - 2 s_a s_b shared / (n_a n_b), on Welch and Satterthwaite's degrees of freedom,
    or those of the variance that both have in common.
    """
    if a.error is None or b.error is None or a.df is None or b.df is None:
        return None
    one, two = a.error**2, b.error**2
    if one + two == 0:
        return 0.0
    common = a.pool is not None and a.pool == b.pool
    df = a.df if common else (one + two) ** 2 / (one**2 / a.df + two**2 / b.df)
    variance = one + two - 2 * a.error * b.error * shared / math.sqrt(a.n * b.n)
    return float(stdtrit(df, (1 + LEVEL) / 2)) * math.sqrt(max(variance, 0.0))


def _claims(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], blame: _Blame
) -> Iterator[dict[str, Any]]:
    earlier = {entry["claim"]: entry for entry in before}
    for entry in after:
        old = earlier.get(entry["claim"])
        if old and old["verdict"] != entry["verdict"]:
            cells = [*old.get("cells", ()), *entry.get("cells", ())]
            yield {
                "claim": entry["claim"], "quote": entry["quote"], "a": old["verdict"], "b": entry["verdict"],
                **blame(cells),
            }  # fmt: skip


# For a reader
def text(found: Mapping[str, Any]) -> str:
    """What `diff` found, as plain lines for a terminal."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["synthetic"]:
        yield "SYNTHETIC: these results are made up, no model was trained"
    for name in ("a", "b"):
        about = found[name]
        yield f"{name.upper()}: {about['store']}, {about['runs']} runs at scale {found['scale']}"
    yield from found["notes"]
    cells, verdicts, claims = found["cells"], found["verdicts"], found["claims"]
    counts = [f"{sum(c['change'] == what for c in cells)} {what}" for what in ("moved", "appeared", "vanished")]
    yield f"{', '.join(counts)} cells; flipped: {len(verdicts)} verdicts of cells, {len(claims)} of claims"
    for title, rows in (
        ("claims", [[c["claim"], c["a"], "->", c["b"], _by(c)] for c in claims]),
        ("verdicts", [[v["cell"], v["a"], "->", v["b"], _by(v)] for v in verdicts]),
        ("cells", [[c["cell"], _number(c["a"]), "->", _number(c["b"]), _gap(c), _by(c)] for c in cells]),
    ):
        if rows:
            yield f"\n{title}"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield from ("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.5g}"


def _gap(cell: Mapping[str, Any]) -> str:
    if cell["difference"] is None:
        return str(cell["change"])
    if cell["low"] is None:
        return f"{cell['difference']:+.3g} (no interval)"
    what = "significant" if cell["significant"] else "not significant"
    return f"{cell['difference']:+.3g} ({cell['low']:+.3g}, {cell['high']:+.3g}) {what}"


def _by(entry: Mapping[str, Any]) -> str:
    marks = {"came": "+", "went": "-", "changed": "~"}
    runs = [f"{mark}{run}" for key, mark in marks.items() for run in entry["runs"][key]]
    if not runs:
        return "by no run: the method of judging"
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    through = "" if entry["through"] == "its runs" else f", through {entry['through']}"
    return f"by {' '.join(runs[:NAMED])}{more}{through}"
