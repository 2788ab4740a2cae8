"""results: what the store holds."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, StoreDir, emit, table, told_synthetic

app = typer.Typer(help="What the store holds: collect, list, show, compare, export.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(metavar="ID", help="A run's id or the beginning of it.")]


@app.command()
def collect(store: StoreDir = Path("runs"), json: Json = False) -> None:
    """Bring STORE/index.parquet up to date."""
    from analysis.frame import collect as gather
    from sdae.store import Store

    folder = Store(store)
    counts = {str(state): int(n) for state, n in gather(folder)["state"].value_counts().items()}
    if json:
        runs = sum(counts.values())
        return emit({"store": str(store), "synthetic": folder.synthetic, "runs": runs, "states": counts})
    told_synthetic(folder)
    print(
        f"{sum(counts.values())} runs in {store}: {', '.join(f'{n} {state}' for state, n in counts.items()) or 'none'}"
    )


@app.command("list")
def list_(
    store: StoreDir = Path("runs"),
    scale: Annotated[str | None, typer.Option("--scale", help="Only runs of this scale.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Only runs of this stage.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only runs in this state.")] = None,
    json: Json = False,
) -> None:
    """The runs, one a line."""
    from analysis.frame import collect as gather
    from sdae.store import Store

    frame = gather(Store(store))
    for column, wanted in (("scale", scale), ("stage", stage), ("state", state)):
        frame = frame if wanted is None else frame[frame[column] == wanted]
    records = jsonlib.loads(frame.to_json(orient="records", date_format="iso"))
    if json:
        return emit(records)
    keys = ["id", "state", "scale", "seed", "epochs", "top1", "loss", "seconds"]
    rows = [[f"{r[k]:.4g}" if isinstance(r.get(k), float) else r.get(k) for k in keys] for r in records]
    told_synthetic(Store(store))
    table(keys, rows, str(store))


@app.command()
def show(run: Run, store: StoreDir = Path("runs"), json: Json = False) -> None:
    """One run: config, result, failure, provenance."""
    import yaml

    from analysis.export import show as look
    from sdae.store import Store

    found = look(Store(store), run)
    if json:
        return emit(found)
    told_synthetic(Store(store))
    print(yaml.safe_dump(jsonlib.loads(jsonlib.dumps(found, default=str)), sort_keys=False), end="")


@app.command()
def compare(first: Run, second: Run, store: StoreDir = Path("runs"), json: Json = False) -> None:
    """Where two runs differ: keys of their configs, and their numbers."""
    from analysis.export import compare as look
    from sdae.store import Store

    found = look(Store(store), first, second)
    if json:
        return emit(found)
    told_synthetic(Store(store))
    rows = [[key, *values, None] for key, values in found["config"].items()]
    rows += [[key, *values] for key, values in found["metrics"].items()]
    table(["", *found["runs"], "difference"], rows)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="File: .csv, .parquet or .json.")],
    store: StoreDir = Path("runs"),
    json: Json = False,
) -> None:
    """Every run as a row of one file."""
    from analysis.export import export as write
    from sdae.store import Store

    rows = write(Store(store), out)
    if json:
        return emit({"file": str(out), "rows": rows})
    told_synthetic(Store(store))
    print(f"{rows} runs in {out}")
