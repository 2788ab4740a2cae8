"""sweep: plan runs, run them, watch them."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.output import DataDir, Jobs, Json, Names, ScaleName, Seeds, StoreDir, emit, note, parse_seeds, table

app = typer.Typer(help="Plan the runs of artifacts, run them, watch them.", no_args_is_help=True)


class Place(StrEnum):
    """Where runs are run."""

    local = "local"


@app.command("list")
def list_(scale: ScaleName = "smoke", seeds: Seeds = "0", store: StoreDir = Path("runs"), json: Json = False) -> None:
    """The suite's artifacts: cells, runs, and how many of these are done."""
    from ablations.scale import load_scale
    from sdae.store import Store
    from slurm.status import overview

    rows = overview(load_scale(scale), parse_seeds(seeds), Store(store))
    if json:
        return emit(rows)
    keys = ["artifact", "kind", "cells", "filled", "runs", "done", "title"]
    table(keys, [[row[key] for key in keys] for row in rows], scale)


@app.command()
def plan(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    data: DataDir = None,
    json: Json = False,
) -> None:
    """What would be run: every run once, needs first, with the cells that it feeds."""
    from ablations.cost import plan_document
    from ablations.planner import plan as make
    from sdae.store import Store

    planned = make(artifacts or (), scale, parse_seeds(seeds), data_path=data)
    document = plan_document(planned, Store(store))
    if planned.provisional:
        note("the pictures are not here: the ids are provisional, the runs' own will hold the pictures' fingerprint")
    if json:
        return emit(document)
    rows = [[r["id"], r["state"], len(r["needs"]), r["feeds"][0], len(r["feeds"])] for r in document["runs"]]
    table(["run", "state", "needs", "feeds", "cells"], rows, planned.scale.title)
    hours = document["gpu_hours"]
    print(
        f"{planned.scale.title}\n{document['requested']} runs asked for, {document['unique']} to plan "
        f"({document['requested'] - document['unique']} saved by sharing), {document['done']} done; "
        f"the rest takes {hours['low']:.3g} to {hours['high']:.3g} GPU-hours"
    )


@app.command()
def submit(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    on: Annotated[Place, typer.Option("--on", help="Where to run.")] = Place.local,
    jobs: Jobs = None,
    data: DataDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    json: Json = False,
) -> None:
    """Run what is not done. Failed runs stay failed; see retry."""
    if dry_run:
        return plan(artifacts, scale, seeds, store, data, json)
    _run(artifacts, scale, seeds, store, jobs, data, json, retry=False)


@app.command()
def retry(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    jobs: Jobs = None,
    data: DataDir = None,
    json: Json = False,
) -> None:
    """Run the failed runs again, and those that wait for them."""
    _run(artifacts, scale, seeds, store, jobs, data, json, retry=True)


def _run(
    artifacts: list[str] | None, scale: str, seeds: str, store: Path, jobs: int | None, data: str | None, json: bool,
    retry: bool,
) -> None:  # fmt: skip
    from ablations.planner import plan as make
    from cli.runs import INTERRUPTED, run_here
    from sdae.store import Store
    from slurm.local import failed_part

    planned, folder = make(artifacts or (), scale, parse_seeds(seeds), data_path=data), Store(store)
    if retry:
        planned = failed_part(planned, folder)
        note(
            f"to run again, with what waits for them: {', '.join(planned.runs)}"
            if planned.runs
            else "nothing has failed"
        )
    summary = run_here(planned, folder, jobs, retry)
    if json:
        states = [{"id": i, "state": s, "message": summary.messages.get(i)} for i, s in summary.states.items()]
        emit({"scale": planned.scale.name, "runs": states, "ran": summary.ran, "seconds": summary.seconds})
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(1)


@app.command()
def status(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    data: DataDir = None,
    json: Json = False,
) -> None:
    """How the runs stand: done, running (with epoch and images/s), failed (with its last lines), waiting, new."""
    from ablations.planner import plan as make
    from cli.live import epoch, speed
    from sdae.store import Store
    from slurm.status import status as look

    document = look(make(artifacts or (), scale, parse_seeds(seeds), data_path=data), Store(store))
    if json:
        return emit(document)
    rows = [[r["id"], r["state"], epoch(r), speed(r), r["feeds"][0]] for r in document["runs"] if r["state"] != "new"]
    table(["run", "state", "epoch", "images/s", "feeds"], rows)
    for row in document["runs"]:
        if row["state"] == "failed":
            print(f"{row['id']}: {row['failure']['class']}: {row['failure']['message']}")
            print("".join(f"    {line}\n" for line in row["last_lines"]), end="")
    print(", ".join(f"{count} {state}" for state, count in document["counts"].items()))


@app.command()
def logs(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A run's id or the beginning of it.")],
    store: StoreDir = Path("runs"),
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of its last lines.")] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing until the run ends.")] = False,
) -> None:
    """What a run wrote to its log."""
    from sdae.store import Store
    from slurm.local import followed, tail

    run = Store(store).find(identity)
    size = run.log.stat().st_size if run.log.exists() else 0
    print("".join(f"{line}\n" for line in tail(run.log, lines)), end="")
    if follow:
        for text in followed(run, size, time.sleep):
            print(text, end="", flush=True)
