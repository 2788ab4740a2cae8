"""results: what the store holds."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import Json, ScaleName, StoreDir, ask, emit, note, say, seeds_or_all, store_at, table, told_synthetic
from sdae.errors import UserError

if TYPE_CHECKING:
    from analysis.prune import Prunable

app = typer.Typer(help="What the store holds: collect, list, show, compare, export; upkeep.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(metavar="ID", help="A run's id or the beginning of it.")]


@app.command()
def collect(store: StoreDir = Path("runs"), json: Json = False) -> None:
    """Bring STORE/index.parquet up to date."""
    from analysis.frame import collect as gather

    folder = store_at(store)
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

    frame = gather(store_at(store))
    for column, wanted in (("scale", scale), ("stage", stage), ("state", state)):
        frame = frame if wanted is None else frame[frame[column] == wanted]
    records = jsonlib.loads(frame.to_json(orient="records", date_format="iso"))
    if json:
        return emit(records)
    keys = ["id", "state", "scale", "seed", "epochs", "top1", "loss", "seconds"]
    rows = [[f"{r[k]:.4g}" if isinstance(r.get(k), float) else r.get(k) for k in keys] for r in records]
    told_synthetic(store_at(store))
    table(keys, rows, str(store))


@app.command()
def show(run: Run, store: StoreDir = Path("runs"), json: Json = False) -> None:
    """One run: config, result, failure, provenance."""
    import yaml

    from analysis.export import show as look

    found = look(store_at(store), run)
    if json:
        return emit(found)
    told_synthetic(store_at(store))
    print(yaml.safe_dump(jsonlib.loads(jsonlib.dumps(found, default=str)), sort_keys=False), end="")


@app.command()
def compare(first: Run, second: Run, store: StoreDir = Path("runs"), json: Json = False) -> None:
    """Where two runs differ: keys of their configs, and their numbers."""
    from analysis.export import compare as look

    found = look(store_at(store), first, second)
    if json:
        return emit(found)
    told_synthetic(store_at(store))
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

    rows = write(store_at(store), out)
    if json:
        return emit({"file": str(out), "rows": rows})
    told_synthetic(store_at(store))
    print(f"{rows} runs in {out}")


@app.command()
def check(
    store: StoreDir = Path("runs"),
    deep: Annotated[bool, typer.Option("--deep", help="Every checkpoint against its sha256: reads all of it.")] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Do what is safe: new index, no dead temporary files, torn files set aside."),
    ] = False,
    json: Json = False,
) -> None:
    """Names what is torn, orphaned, duplicate or stale, each with what to do next; exit 1 where something is."""
    from analysis.check import check as examine
    from analysis.check import lines, mend
    from slurm.ledger import Ledger

    folder = store_at(store, needed=True)
    report = examine(folder, deep, Ledger(folder).astray())
    if repair:
        mend(report["findings"])
    if json:
        emit(report | {"findings": [finding.to_dict() for finding in report["findings"]]})
    else:
        told_synthetic(folder)
        for line in lines(report["findings"]):
            say(line)
        counts = ", ".join(f"{n} {kind}" for kind, n in report["counts"].items() if n) or "nothing wrong"
        print(f"{store}: {report['runs']} runs, store format {report['format']}: {counts}")
    if not all(finding.repaired for finding in report["findings"]):
        raise typer.Exit(1)


@app.command()
def prune(
    artifacts: Annotated[
        list[str] | None, typer.Argument(help="YAML files of your own, whose runs stay beside the suite's.")
    ] = None,
    scale: ScaleName = "smoke",
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds that stay, e.g. 0,1,2; none: all.")] = None,
    store: StoreDir = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List only.")] = False,
    json: Json = False,
) -> None:
    """Removes what no artifact needs at a scale: runs, and weights of kept runs that nothing asks for. Asks first."""
    from analysis.prune import remove, survey
    from slurm.ledger import Ledger

    folder = store_at(store, needed=True)
    if not (yes or dry_run or sys.stdin.isatty()):
        raise UserError(
            "results prune: removes runs, and nobody can be asked here: --dry-run lists them, --yes does it"
        )

    def look() -> Prunable:
        held = Ledger(folder).waiting(folder)
        return survey(folder, artifacts or (), scale, seeds_or_all(seeds), held)

    found = look()
    if not json:
        told_synthetic(folder)
        rows = [[i.run, i.state, len(i.files) or "all", i.bytes, i.why] for i in (*found.runs, *found.files)]
        if rows:
            table(["run", "state", "files", "bytes", "why"], rows, str(store))
    told = f"{len(found.runs)} runs and weights of {len(found.files)} more, {found.bytes:,} bytes"
    if not (found.nothing or yes or dry_run):
        ask(f"Remove {told} from {store}?", "nothing was removed")
    gone, skipped = remove(found, look()) if not (found.nothing or dry_run) else ([], [])
    if json:
        return emit(found.to_dict() | {"removed": [item.run for item in gone], "skipped": skipped, "dry_run": dry_run})
    for identity in skipped:
        note(f"{identity}: not removed, somebody runs it now")
    print(f"{store}: nothing to remove" if found.nothing else f"{told}: {'would be removed' if dry_run else 'removed'}")
