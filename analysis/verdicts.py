"""The claims of a study against its cells: estimate, interval, verdict, and what an undecided one would take."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ablations.artifact import available
from ablations.cost import calibrate, gpu_hours
from analysis.claims import Claim, claims, number, of_artifact
from analysis.inference import MOST_SEEDS, Judgement, Measured, judge, seeds_needed
from analysis.paper import Printed, counts, printed
from analysis.render import csv_text
from analysis.study import Study
from sdae.errors import UserError

NAMED = 3  # cells that a line has room for
FORMATS = ("md", "csv")
VERDICTS = ("supported", "contradicted", "undecided")
ELSEWHERE = "Measured at another scale than the paper's: sentences that give a number wait for the paper's scale."
COLUMNS = (
    "claim", "verdict", "estimate", "low", "high", "target", "contrast", "seeds", "p", "p_holm", "needs", "where",
    "quote", "scale", "synthetic", "printed",
)  # fmt: skip


def judge_study(study: Study) -> list[dict[str, Any]]:
    """The claims of a study against its cells, in the paper's order, a user's own last.

    Each is {claim, quote, where, kind, verdict, estimate, low, high, needs, p, p_holm, target, contrast, seeds, cells,
    printed, scale, synthetic}: `estimate` with its 95 % interval is that of `contrast`, the one that decides; `needs`:
    what an undecided claim would take; `seeds`: the fewest of its cells; `printed`: cells with a stand-in.
    """
    found = judge(ledger(study), measured(study), _stand_ins(study), counts(), study.scale.name == "paper")
    tests = sum(judgement.p is not None and judgement.verdict == "undecided" for judgement in found)
    price = _Price(study)
    return [_entry(judgement, study, tests, price) for judgement in found]


def ledger(study: Study) -> list[Claim]:
    """All of the paper's claims where the study has all of its artifacts, else those over cells of the study."""
    names = set(study.cells)
    whole = set(available()) <= set(study.tables)
    mine = [claim for claim in claims() if whole or names & set(claim.cells)]
    return mine + [claim for artifact in study.artifacts for claim in of_artifact(artifact)]


def measured(study: Study) -> dict[str, Measured]:
    """The study's cells that have a value."""
    metrics = {name: cell.metric for artifact in study.artifacts for name, cell in artifact.cells.items()}
    return {n: Measured(c.estimate, (metrics[n], *c.runs)) for n, c in study.cells.items() if c.estimate}


def _stand_ins(study: Study) -> dict[str, Printed]:
    """Printed values of the rows that no run can fill here, where the scale is the paper's."""
    if study.scale.name != "paper":
        return {}
    cells = [cell for artifact in study.artifacts for cell in artifact.cells.values()]
    empty = [cell.name for cell in cells if not cell.metric or cell.name in study.sweep.blocked]
    return {name: printed()[name] for name in empty if name in printed()}


class _Price:
    """What further seeds of cells take, in runs and in low and high GPU-hours."""

    def __init__(self, study: Study):
        self.sweep, self.calibration = study.sweep, calibrate(study.store)
        self.states = study.frame["state"].to_dict()

    def knows(self, cells: Iterable[str]) -> bool:
        """Whether these are cells of the artifacts that were asked for."""
        return all(any(cell in artifact.cells for artifact in self.sweep.artifacts) for cell in cells)

    def of(self, cells: Iterable[str], seeds: int | None = None) -> str:
        """`seeds` more of each cell; null: of what is planned and not done."""
        planned = {cell: self.sweep.cells.get(cell, []) for cell in cells}
        runs = [[i for _, i in entries[: 1 if seeds else None]] for entries in planned.values()]
        wanted = set(itertools.chain(*runs))
        for identity in [*wanted]:
            while needs := [n for n in self.sweep.runs[identity].needs if n in self.sweep.runs]:
                wanted.update(needs)
                identity = needs[0]
        if seeds is None:
            wanted = {i for i in wanted if self.states.get(i) != "done"}
        pictures = self.sweep.scale.pictures
        hours = [gpu_hours(self.sweep.runs[i], self.calibration, pictures) for i in sorted(wanted)]
        low, high = (math.fsum(h[k] for h in hours) * (seeds or 1) for k in (0, 1))
        count = len(wanted) * (seeds or 1)
        return f"{count} run{'s' * (count != 1)}, {_hours(low, high)}"


def _hours(low: float, high: float) -> str:
    if high < 0.1:
        return "less than 0.1 GPU-hours"
    digits = 0 if low >= 10 else 1
    return f"{low:,.{digits}f} to {high:,.{digits}f} GPU-hours"


def _entry(judgement: Judgement, study: Study, tests: int, price: _Price) -> dict[str, Any]:
    claim, reading = judgement.claim, judgement.deciding
    cells = {name: study.cells[name].estimate for name in claim.cells if name in study.cells}
    known = {name: {"measured": e.mean, "n": e.n} for name, e in cells.items() if e}
    return {
        "claim": claim.id, "quote": claim.quote, "where": claim.where, "kind": claim.kind,
        "verdict": judgement.verdict, "estimate": reading and reading.estimate, "low": reading and reading.low,
        "high": reading and reading.high, "needs": _needs(judgement, tests, price, known),
        "p": judgement.p, "p_holm": judgement.p_holm,
        "target": str(reading.contrast.target) if reading else None,
        "contrast": reading.contrast.formula() if reading else None,
        "seeds": min((value["n"] for value in known.values()), default=0), "cells": known,
        "printed": judgement.printed, "scale": study.scale.name, "synthetic": study.synthetic,
    }  # fmt: skip


def _needs(judgement: Judgement, tests: int, price: _Price, known: Mapping[str, Mapping[str, Any]]) -> str | None:
    claim = judgement.claim
    if judgement.verdict != "undecided":
        return None
    if not claim.contrasts:
        return f"nothing that a run could tell: {claim.note}"
    if all(cell in counts() for cell in claim.cells):
        return "nothing that a run could tell: it is about settings"
    absent = judgement.missing or ([] if judgement.readings else judgement.printed)
    if absent:
        planned = [cell for cell in absent if price.sweep.cells.get(cell)]
        names = ", ".join(absent[:NAMED]) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
        if planned:
            return f"not measured: {names}: {price.of(planned)}"
        why = "no run of this suite fills it" if price.knows(absent) else "not asked for"
        return f"not measured: {names} ({price.sweep.blocked.get(absent[0], why)})"
    if not judgement.readings or judgement.deciding is None:
        return "the scale paper: the sentence gives a number"
    seeds = seeds_needed(judgement, tests)
    if seeds is None:
        return "a second seed of some arm of the stage: nothing tells the spread yet"
    n = min((value["n"] for value in known.values()), default=0)
    if seeds > MOST_SEEDS:
        return f"more than {MOST_SEEDS} seeds: {number(judgement.deciding.estimate)} is at the edge"
    more = max(seeds - n, 1)
    return f"{n + more} seeds of each arm, {more} more: {price.of(known, more)}"


def render(entries: Sequence[Mapping[str, Any]], study: Study, format: str = "md") -> str:
    """The entries of `judge_study` as Markdown or CSV."""
    if format not in FORMATS:
        raise UserError(f"format {format!r}: claims are printed as {', '.join(FORMATS)} or json")
    if format == "csv":
        return csv_text(COLUMNS, [{**entry, "printed": " ".join(entry["printed"])} for entry in entries])
    tally = Counter(entry["verdict"] for entry in entries)
    made_up = " SYNTHETIC RESULTS, made up." if study.synthetic else ""
    lines = [
        f"**Claims.** Scale {study.scale.title}.{made_up}",
        "",
        f"{len(entries)} claims: {', '.join(f'{tally[verdict]} {verdict}' for verdict in VERDICTS)}.",
        "",
        *([] if study.scale.name == "paper" else [ELSEWHERE, ""]),
        "| verdict | claim | the sentence | estimate | says | needs |",
        "| :-- | :-- | :-- | --: | :-- | :-- |",
    ]
    for entry in entries:
        cells = (entry["verdict"], f"`{entry['claim']}`", entry["quote"], found(entry), entry["target"], entry["needs"])
        flat = (re.sub(r"<(?!/?su[bp]>)", "&lt;", " ".join(str(cell or "").split())) for cell in cells)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in flat) + " |")
    return "\n".join(lines) + "\n"


def found(entry: Mapping[str, Any]) -> str:
    """`1.15 (0.99, 1.32)`."""
    if entry["estimate"] is None:
        return ""
    interval = f" ({number(entry['low'])}, {number(entry['high'])})" if entry["low"] is not None else ""
    return number(entry["estimate"]) + interval
