"""Single runs and whole stores for a reader or another program: what `results show`, `compare` and `export` print."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.frame import collect
from sdae.config import dump
from sdae.errors import UserError
from sdae.files import make_folder, write_atomically
from sdae.store import RunFolder, Store

SUFFIXES = (".csv", ".parquet", ".json")


def export(store: Store, out: Path) -> int:
    """The frame of `analysis.frame.collect` (see there for its columns) as OUT.csv, .parquet or .json; rows written.

    Times are ISO 8601 in UTC in CSV and JSON. The column `synthetic` goes with every row.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: the ending says the format (allowed: {', '.join(SUFFIXES)})")
    frame = collect(store)
    buffer = io.BytesIO()
    if out.suffix == ".parquet":
        frame.to_parquet(buffer, index=False)
    elif out.suffix == ".csv":
        frame.to_csv(buffer, index=False, date_format="%Y-%m-%dT%H:%M:%S.%f+00:00")
    else:
        frame.to_json(buffer, orient="records", date_format="iso", indent=1)
    make_folder(out.parent)
    write_atomically(out, buffer.getvalue())
    return len(frame)


def show(store: Store, prefix: str) -> dict[str, Any]:
    """One run by its id or a beginning of it: {"id", "state", "synthetic", "config", "result", "failure", "provenance",
    "last"}.

    `last` is the last row of metrics.jsonl; what a run does not have is null.
    """
    run = store.find(prefix)
    rows = run.metrics()
    return {
        "id": run.id,
        "state": run.state(),
        "synthetic": store.synthetic,
        "config": _config(run),
        "result": {k: v for k, v in (run.result() or {}).items() if k != "config"} or None,
        "failure": run.failure(),
        "provenance": run.provenance(),
        "last": rows[-1] if rows else None,
    }


def compare(store: Store, first: str, second: str) -> dict[str, Any]:
    """{"runs", "synthetic", "config": {key: [a, b]} where they differ, "metrics": {key: [a, b, b - a]}} of two runs.

    Keys are dotted; null stands for a key or a number that one of them does not have.
    """
    runs = [store.find(first), store.find(second)]
    a, b = (dict(flat(_config(run) or {})) for run in runs)
    left, right = (found if isinstance(found := (run.result() or {}).get("metrics"), dict) else {} for run in runs)
    metrics: dict[str, list[Any]] = {}
    for key in dict.fromkeys([*left, *right]):
        before, after = left.get(key), right.get(key)
        if all(value is None or isinstance(value, (int, float)) for value in (before, after)):
            metrics[key] = [before, after, None if before is None or after is None else _minus(after, before)]
    config = {key: [a.get(key), b.get(key)] for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}
    return {"runs": [run.id for run in runs], "synthetic": store.synthetic, "config": config, "metrics": metrics}


def _config(run: RunFolder) -> dict[str, Any] | None:
    """From config.yaml, or, where a store was thinned out to its results, from result.json."""
    config = run.config()
    if config:
        return dump(config)
    found = (run.result() or {}).get("config")
    return found if isinstance(found, dict) else None


def _minus(after: float, before: float) -> float | None:
    """Null where one of them is a whole number beyond every float, and the other none."""
    try:
        return after - before
    except OverflowError:
        return None


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
