"""Where a cell comes from: the paper's value, the measured one, and of each run seed, config, code, machine and files.

Nothing is made up: what a run did not record is null, and a run that is not there, failed, torn or running says so.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablations.artifact import load_artifact
from analysis.export import flat
from analysis.frame import unknown
from analysis.paper import printed
from analysis.study import Study
from analysis.study import study as study_of
from analysis.table import stale
from sdae.config import NOT_SCIENCE, dump, parse
from sdae.errors import UserError
from sdae.files import plain_file, read_record
from sdae.store import RunFolder, Store, number

LOG_LINES = 10
DETAILED = 2  # runs of which a terminal gets everything; JSON has it of all
_COLUMNS = [
    "seed", "state", "failure", "message", "seconds", "commit", "dirty", "substance", "started", "ended", "device",
]  # fmt: skip
_NOT_COMPARED = ("seed", "init.run", "data.path")  # differ between arms by their nature, or are no science


def explain_cell(
    store: Store,
    cell: str,
    artifact: str | Path | None = None,
    scale: str | Path = "smoke",
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`explain` for one cell of a store, which plans no more runs than it shows. artifact: a user's own file."""
    loaded = load_artifact(str(artifact or cell.partition(".")[0]), scale)
    place = loaded.cells.get(cell)
    if place is None:
        raise UserError(unknown("cell", cell, loaded.cells))
    column = [name for name, other in loaded.cells.items() if other.column == place.column and name in loaded.specs]
    before = column[: column.index(cell)] if cell in column else []
    source = loaded.path if artifact else loaded.name
    return explain(study_of(store, [source], scale, seeds, cells={cell, *before[-1:]}), cell)


def explain(study: Study, cell: str) -> dict[str, Any]:
    """All that is behind one cell, as JSON values. Raises `UserError` for a cell that the study does not have.

    {cell, artifact, row, label, column, unit, scale, dataset, synthetic, paper: {value, decimals, where} | null,
    measured: {mean, low, high, n, source} | null, difference, verdict, state, stale, runs: [{id, seed, state, message,
    value, stage, config, weights, commit, dirty, substance, stale, environment, checkpoints, log, started, ended,
    device, gpu_hours, needs}], above}. `above` is the cell of the nearest row before it that has runs, null in the
    first such row. Of a run's `config` there is only what differs from that cell's run, or else from the stage's
    defaults: {key: [there, here]}. `needs`: the run whose weights it starts from, likewise. `gpu_hours`: wall time of
    the last attempt times the number of processes, on `device`.
    """
    table, row, column = study.place(cell)
    place, value = row.cells[column.name], printed().get(cell)
    (artifact,) = (a for a in study.artifacts if a.name == table.artifact)
    above = _above(study, cell)
    estimate = place.estimate
    return {
        "cell": cell, "artifact": table.artifact, "row": row.name, "label": row.label, "column": column.name,
        "unit": column.unit, "scale": table.scale, "dataset": table.dataset, "synthetic": study.store.synthetic,
        "paper": None if place.paper is None else {
            "value": place.paper, "decimals": place.paper_decimals, "where": value.where if value else artifact.path,
        },
        "measured": estimate and {
            "mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n,
            "source": estimate.source,
        },
        "difference": place.difference, "verdict": place.verdict, "state": place.state, "stale": place.stale,
        "runs": list(_Runs(study, cell, artifact.cells[cell].metric).beside(above)), "above": above,
    }  # fmt: skip


def _above(study: Study, cell: str) -> str | None:
    table, _, column = study.place(cell)
    names = [r.cells[column.name].cell for r in table.rows if column.name in r.cells]
    before = [name for name in names[: names.index(cell)] if name in study.sweep.cells]
    return before[-1] if before and cell in study.sweep.cells else None


class _Runs:
    """The runs of one cell."""

    def __init__(self, study: Study, cell: str, metric: str | None):
        self.study, self.metric, self.stale = study, metric, stale(study.frame)
        self.runs = study.sweep.cells.get(cell, [])
        ids = {i: None for _, run in self.runs for i in (run, *study.sweep.runs[run].needs)}
        columns = [*_COLUMNS, *([metric] if metric and metric in study.frame.columns else [])]
        rows = study.frame.loc[[i for i in ids if i in study.frame.index], columns].astype(object)
        self.known: dict[str, dict[str, Any]] = rows.where(rows.notna(), None).to_dict("index")  # type: ignore[assignment]

    def beside(self, above: str | None) -> Iterator[dict[str, Any]]:
        """Each run, set against the one of its seed in the cell above."""
        others = dict(self.study.sweep.cells[above]) if above else {}
        for seed, identity in self.runs:
            yield self.one(identity, others.get(seed), needs=True)

    def one(self, identity: str, other: str | None, needs: bool) -> dict[str, Any]:
        folder, known = self.study.store.run(identity), self.known.get(identity, {})
        state = known.get("state", "not run")
        result = (folder.result() if state == "done" else None) or {}
        record = (folder.provenance() if known else None) or {}
        planned = self.study.sweep.runs.get(identity)
        # As planned; of a run that is not planned here (another's pre-training), as it ran
        config: dict[str, Any] | None = dump(planned.config) if planned else result.get("config")
        init = (config or {}).get("init") or {}
        devices = max(number(result, "world_size"), 1)
        hours = known["seconds"] * devices / 3600 if known.get("seconds") is not None else None
        value = known.get(self.metric) if self.metric and needs and state == "done" else None
        found = {
            "id": identity, "seed": (config or known).get("seed"), "state": state,
            "message": _progress(folder) if state == "running" else _message(known), "value": value,
            "stage": identity.rpartition("-")[0], "config": self.different(config, other),
            "weights": {k: init[k] for k in ("weights", "epoch") if init.get(k) is not None} or None,
            **{k: record.get(k) if known.get(k) is None else known[k] for k in ("commit", "dirty", "substance")},
            "stale": identity in self.stale,
            "environment": _environment(record) if record else None,
            "checkpoints": _checkpoints(folder, result) if known else [], "log": _tail(folder) if known else [],
            "started": _iso(known.get("started")), "ended": _iso(known.get("ended")), "device": known.get("device"),
            "gpu_hours": hours,
        }  # fmt: skip
        if needs:
            need, beside = init.get("run"), self.study.sweep.runs.get(other or "")
            others = beside.needs if beside else []
            found["needs"] = self.one(need, others[0] if others else None, needs=False) if need else None
        return found

    def different(self, config: dict[str, Any] | None, other: str | None) -> dict[str, list[Any]] | None:
        """{key: [there, here]} against another run, or, where there is none of this stage, against the defaults."""
        if config is None:
            return None
        planned, stage = self.study.sweep.runs.get(other or ""), config["stage"]
        there = dump(planned.config) if planned and planned.config.stage == stage else _defaults(stage)
        a, b = (dict(flat({k: v for k, v in c.items() if k not in NOT_SCIENCE})) for c in (there, config))
        keys = [key for key in dict.fromkeys([*a, *b]) if key not in _NOT_COMPARED]
        return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}


@functools.cache
def _defaults(stage: str) -> dict[str, Any]:
    return dump(parse({"stage": stage}))


def _environment(record: dict[str, Any]) -> dict[str, Any]:
    packages, gpus = record.get("packages"), record.get("gpus")
    return {
        "python": _word(record.get("python")),
        "torch": _word(packages.get("torch")) if isinstance(packages, dict) else None,
        "host": _word(record.get("host")), "cores": int(number(record, "cores")) or None,
        "gpus": [*map(str, gpus)] if isinstance(gpus, list) else None,
    }  # fmt: skip


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _checkpoints(folder: RunFolder, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, recorded sha256 (null: none was) and size (null: the file is gone) of the weights; no file is hashed."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(folder.checkpoints) as entries:
        sizes = {e.name: e.stat().st_size for e in entries if e.name.endswith(".safetensors") and e.name[0] != "."}
    listed = result.get("weights")
    recorded: dict[str, Any] = listed if isinstance(listed, dict) else {}
    names = [*recorded, *sorted(sizes.keys() - recorded.keys())]
    return [{"name": n, "sha256": recorded.get(n) or _checksum(folder, n), "bytes": sizes.get(n)} for n in names]


def _checksum(folder: RunFolder, name: str) -> str | None:
    """As a state that a run goes on from has it beside itself."""
    return (read_record((folder.checkpoints / name).with_suffix(".sha256.json")) or {}).get("sha256")


def _tail(folder: RunFolder) -> list[str]:
    """The last lines of the log."""
    with contextlib.suppress(OSError), open(folder.log, "rb", opener=plain_file) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
        return file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    return []


def _progress(folder: RunFolder) -> str | None:
    beat = folder.heartbeat() or {}
    epoch, epochs = number(beat, "epoch"), number(beat, "epochs")
    return f"epoch {epoch:g} of {epochs:.0f}" if epochs and isinstance(beat.get("epoch"), (int, float)) else None


def _message(known: dict[str, Any]) -> str | None:
    parts = [known.get("failure") if known.get("state") == "failed" else None, known.get("message")]
    return ": ".join(filter(None, parts)) or None


def _iso(value: Any) -> str | None:
    return None if value is None else value.isoformat(timespec="seconds")


# For a reader
def text(explained: dict[str, Any]) -> str:
    """What `explain` found, as plain lines for a terminal; all of it for the first few runs."""
    return "\n".join(_lines(explained)) + "\n"


def _lines(e: dict[str, Any]) -> Iterator[str]:
    yield f"{e['cell']}: {e['label']}, {e['column']}" + (f" ({e['unit']})" if e["unit"] else "")
    if e["synthetic"]:
        yield "SYNTHETIC: these results are made up, no model was trained"
    paper, measured, runs = e["paper"], e["measured"], e["runs"]
    digits = 1 + (paper["decimals"] if paper else 1)
    yield _line("scale", f"{e['scale']}{', ' + e['dataset'] if e['dataset'] else ''}")
    yield _line("paper", f"{paper['value']:.{paper['decimals']}f} ({paper['where']})" if paper else "does not print it")
    if measured:
        half = None if measured["high"] is None else (measured["high"] - measured["low"]) / 2
        source = SOURCES.get(measured["source"])
        spread = ", no interval" if half is None else f" ± {half:.{digits}f} (95 %, from {source})"
        yield _line("measured", f"{measured['mean']:.{digits}f}{spread}, n = {measured['n']} of {len(runs)}")
        if e["difference"] is not None:
            yield _line("difference", f"{e['difference']:+.{digits}f}: {e['verdict']}")
    elif not runs:
        yield _line("measured", "nothing: no run fills this cell, it shows the paper's value alone")
    else:
        yield _line("measured", f"nothing: {e['state']}")
    if e["stale"]:
        yield _line("stale", "the code that makes these numbers has changed in substance since")
    if not runs:
        return
    yield ""
    yield _line("config", f"beside {e['above']}" if e["above"] else "beside the stage's defaults")
    yield from _differences(runs[0])
    yield ""
    rows = [
        [f"seed {r['seed']}", r["id"], r["state"], _number(r["value"], digits), _code(r), "stale" * r["stale"]]
        for r in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    for run in runs[:DETAILED]:
        yield ""
        yield from _of_run(run)
    if len(runs) > DETAILED:
        yield ""
        yield f"{len(runs) - DETAILED} more runs: --json has all of each"


SOURCES = {
    "seeds": "its seeds", "pooled": "the variance pooled over the stage's arms", "repeats": "the repeats in the run",
}  # fmt: skip


def _line(name: str, value: str) -> str:
    return f"{name:<10}  {value}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _code(run: dict[str, Any]) -> str:
    return f"{run['commit'][:10]}{'+changes' if run['dirty'] else ''}" if run["commit"] else ""


def _differences(run: dict[str, Any]) -> Iterator[str]:
    for one in (run, run["needs"]):
        if one is None:
            continue
        if not one["config"]:
            yield f"  {one['stage']}: {'the same' if one['config'] is not None else 'unknown'}"
        for key, (there, here) in (one["config"] or {}).items():
            yield f"  {one['stage']}: {key}: {_value(there)} -> {_value(here)}"


def _value(value: Any) -> str:
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _of_run(run: dict[str, Any]) -> Iterator[str]:
    yield f"{run['id']}: {run['state']}" + (f": {run['message']}" if run["message"] else "")
    if run["state"] != "not run":
        yield from (f"  {_line(*line)}" for line in _facts(run))
    if run.get("needs"):
        weights = run["weights"] or {}
        yield f"  starts from the {weights.get('weights', 'weights')} (epoch {weights.get('epoch', 'unknown')}) of:"
        yield from (f"  {line}" for line in _of_run(run["needs"]))


def machine(run: dict[str, Any]) -> str:
    """Host, devices and versions, as far as they are recorded."""
    known = run["environment"] or {}
    gpus, cores = known.get("gpus"), known.get("cores")
    devices = f"{len(gpus)} x {gpus[0]}" if gpus else f"{cores} cores" if cores else ""
    versions = [f"{name} {known[name]}" for name in ("python", "torch") if known.get(name)]
    return ", ".join(filter(None, [known.get("host"), devices, *versions]))


def _facts(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    code = _code(run) or "not recorded"
    if run["substance"]:
        code += f", substance {run['substance']}{' (changed since)' if run['stale'] else ''}"
    yield "code", code
    yield "machine", machine(run) or "not recorded"
    if run["started"]:
        hours = "" if run["gpu_hours"] is None else f": {run['gpu_hours']:.3g} h of {run['device']}"
        yield "time", f"{run['started']} to {run['ended']}{hours}"
    files = run["checkpoints"]
    for file in files[:2]:
        size = "gone" if file["bytes"] is None else f"{file['bytes'] / 1e6:.3g} MB"
        yield "weights", f"{file['name']} ({size}) sha256 {file['sha256'] or 'not recorded'}"
    if len(files) > 2:
        yield "", f"and {len(files) - 2} more"
    for at, line in enumerate(run["log"]):
        yield "" if at else "log", line
