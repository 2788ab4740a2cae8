"""What `explain` knows of a cell, in the words and the order in which the page shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from analysis.explain import SOURCES, explain, machine
from analysis.render import name_of
from analysis.study import Study

DETAILED = 5  # runs of a cell that are told one by one
SHOWN = 12  # entries of any list
LENGTH = 2000  # characters of any text
NOTHING = "nothing: one seed, and no arm of the stage has several"  # tells the interval


def explanations(study: Study) -> dict[str, Any]:
    """{cell: {title, known}} of every cell that some run feeds; `known` is what a dialog shows, name by name."""
    few = {cell: runs[:DETAILED] for cell, runs in study.sweep.cells.items()}
    ids = {identity for runs in few.values() for _, identity in runs}
    rows = study.frame.index.isin([*ids, *study.frame.loc[study.frame.index.isin(ids), "need"].dropna()])
    # A run's files are read when it is explained, and all rows are looked through for each cell: so there are few
    thin = replace(study, sweep=replace(study.sweep, cells=few), frame=study.frame[rows])
    told = {}
    for table in study.tables.values():
        for row in table.rows:
            for column in table.columns:
                cell = row.cells.get(column.name)
                if cell is not None and study.sweep.cells.get(cell.cell):
                    others = [identity for _, identity in study.sweep.cells[cell.cell][DETAILED:]]
                    known = dict(_known(explain(thin, cell.cell), others, column.decimals + 1))
                    title = f"{name_of(table.artifact)}: {row.label}, {column.label}"
                    told[cell.cell] = {"title": title, "known": _trimmed(known)}
    return told


def _known(e: dict[str, Any], others: list[str], digits: int) -> Iterator[tuple[str, Any]]:
    paper, measured = e["paper"], e["measured"]
    unit = f" {e['unit']}" if e["unit"] else ""
    yield "Cell", e["cell"]
    yield "Paper", f"{paper['value']:.{paper['decimals']}f}{unit} ({paper['where']})" if paper else "does not print it"
    if measured:
        yield "Measured", f"{measured['mean']:.{digits}f}{unit}, the mean of {measured['n']}"
        bounds = [f"{measured[end]:.{digits}f}" for end in ("low", "high") if measured[end] is not None]
        source = SOURCES.get(measured["source"], NOTHING)
        yield "Interval (95 %)", f"{' to '.join(bounds)}, from {source}" if bounds else source
    else:
        yield "Measured", f"nothing: {e['state']}"
    if e["difference"] is not None:
        yield "Difference", f"{e['difference']:+.{digits}f}: {e['verdict']}".replace("-", "−")
    if e["synthetic"]:
        yield "Synthetic", "these results are made up; no model was trained"
    if e["stale"]:
        yield "Stale", "the code that makes this number has changed in substance since its runs"
    if e["runs"]:
        yield f"Config, beside {e['above'] or 'defaults'}", list(_differences(e["runs"][0])) or "the same"
    yield "Runs", [_run(run, digits) for run in e["runs"]]
    if others:
        yield "Further runs", others


def _differences(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in (run, run["needs"]):
        for key, (there, here) in ((one and one["config"]) or {}).items():
            yield {"stage": one["stage"], "key": key, "there": _value(there), "here": _value(here)}


def _value(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _run(run: dict[str, Any], digits: int, takes: str | None = None) -> dict[str, Any]:
    """`title` stands for the run while it is folded. `takes`: what another starts from. Left out: what is unknown."""
    value = None if run["value"] is None else f"{run['value']:.{digits}f}"
    facts = {
        "title": ", ".join(filter(None, [f"seed {run['seed']}: {run['id']}", run["state"], value])), "Takes": takes,
        "Run": run["id"], "Message": run["message"], "Commit": _code(run),
        "Machine": machine(run), "Ended": run["ended"],
        "GPU-hours": None if run["gpu_hours"] is None else f"{run['gpu_hours']:.3g} on {run['device']}",
        "Checkpoints": [_file(file) for file in run["checkpoints"]],
        "Log": "\n".join(run["log"]) + "\n" if run["log"] else None,
    }  # fmt: skip
    if run.get("needs"):
        weights = run["weights"] or {}
        what = f"{weights.get('weights')} weights, epoch {weights.get('epoch')}"
        facts["Starts from"] = [_run(run["needs"], digits, what)]
    return {name: fact for name, fact in facts.items() if fact not in (None, "", [])}


def _code(run: dict[str, Any]) -> str | None:
    if not run["commit"]:
        return None
    changed = " with changes" if run["dirty"] else ""
    return str(run["commit"])[:10] + changed + (", substance changed since" if run["stale"] else "")


def _file(file: dict[str, Any]) -> dict[str, Any]:
    size = "gone" if file["bytes"] is None else f"{file['bytes'] / 1e6:.3g} MB"
    return {"file": file["name"], "size": size, "SHA-256": file["sha256"]}


def _trimmed(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _trimmed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        left = [f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else []
        return [*map(_trimmed, value[:SHOWN]), *left]
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, str) and len(value) > LENGTH:
        return "..\n" + value[-LENGTH:]
    return value
