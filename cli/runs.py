"""The commands that compute: reproduce, run, parity."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.output import DataDir, Jobs, Json, Names, Seeds, StoreDir, emit, note, parse_seeds, store_at, table
from sdae.errors import UserError

if TYPE_CHECKING:
    from ablations.planner import Sweep
    from sdae.store import Store
    from slurm.local import Summary

INTERRUPTED = 130


def reproduce(
    artifacts: Names = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="smoke, mini, small, paper, or a YAML file.", show_default="smoke")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the run folders.", show_default="runs")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for tables and figures.", show_default="paper")
    ] = None,
    seeds: Seeds = "0",
    jobs: Jobs = None,
    data: DataDir = None,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic", help="Run nothing: results made up, at scale paper, runs-synthetic, paper-synthetic."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Plan, run here, collect, render: the main job. Call it again to go on; what is done is not run again."""
    from ablations.planner import plan

    numbers = parse_seeds(seeds)
    if synthetic:
        if jobs is not None or data is not None:
            raise UserError("--synthetic: runs nothing and reads no pictures, so it goes without --jobs and --data")
        made = store or Path("runs-synthetic"), out or Path("paper-synthetic")
        return _made_up(artifacts, scale or "paper", numbers, *made, json)
    scale, store, out = scale or "smoke", store or Path("runs"), out or Path("paper")
    planned = plan(artifacts or (), scale, numbers, data_path=data)
    folder = store_at(store)
    summary = run_here(planned, folder, jobs, retry=False)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    from analysis.publish import publish

    files = publish(folder, planned.artifacts, scale, numbers, out)
    counts = dict(Counter(summary.states.values()))
    if json:
        emit({"scale": planned.scale.name, "counts": counts, "messages": summary.messages, "files": files})
    else:
        print(f"{len(files)} files in {out}; start with {out / 'README.md'}")
    if not summary.ok:
        raise typer.Exit(1)


def _made_up(artifacts: list[str] | None, scale: str, seeds: list[int], store: Path, out: Path, json: bool) -> None:
    """`reproduce --synthetic`."""
    from ablations.planner import plan
    from analysis.publish import publish
    from analysis.universe import make
    from sdae.store import NO_PICTURES, SyntheticStore

    planned = plan(artifacts or (), scale, seeds, content=NO_PICTURES)
    folder = SyntheticStore(store)
    counts = make(folder, planned, tell=note)
    files = publish(folder, planned.artifacts, scale, seeds, out)
    if json:
        return emit({"scale": planned.scale.name, "synthetic": True, "counts": counts, "messages": {}, "files": files})
    print(f"{len(files)} files in {out}; start with {out / 'README.md'}")
    done = counts["done"] + counts["stale"]
    print(f"SYNTHETIC: the results in {store} were made up ({done} of {planned.unique} runs), none was run")


def run_here(planned: Sweep, store: Store, jobs: int | None, retry: bool) -> Summary:
    """Runs a sweep with a live display, and says on stderr how it ended."""
    from cli.live import Live
    from slurm.local import run_local, tail

    with Live(planned) as live:
        summary = run_local(planned, store, jobs=jobs, on_update=live, retry=retry)
    counts = Counter(summary.states.values())
    note(
        f"{planned.scale.title}: {counts['done']} of {planned.unique} runs done ({summary.ran} ran now, "
        f"{planned.requested - planned.unique} saved by sharing) in {summary.seconds:.0f} s"
    )
    for identity in summary.having("failed")[:5]:
        note(f"failed: {identity}: {summary.messages.get(identity, '')}")
        for line in tail(store.run(identity).log, 5):
            note(f"    {line}")
    if counts["failed"]:
        note(f"{counts['failed']} failed, {counts['waiting']} wait for them; `sdae-cli sweep retry` runs them again")
    if summary.interrupted:
        note("stopped; the runs have saved their state, and the same command goes on")
    return summary


def run(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    set_: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="key=value over the file's, repeatable.")
    ] = None,
    store: StoreDir = Path("runs"),
    json: Json = False,
) -> None:
    """One run, here; torchrun and srun start the same entry. Stopped by a signal it exits with 75: call it again."""
    from sdae.config import load

    loaded = load(config, set_)
    from sdae.run import execute

    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    with progress_bar(first and sys.stderr.isatty()) as tell:
        result = execute(loaded, store_at(store), progress=tell if first else None)
    if first and json:
        emit(result)
    elif first:
        numbers = {k: v for k, v in result["metrics"].items() if isinstance(v, (int, float))}
        print(result["id"], *(f"{key}={value:.6g}" for key, value in numbers.items()))


@contextlib.contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives the function that takes a run's progress: a bar on a terminal, else nothing."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from cli.live import epoch, speed

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starts", total=None)

        def tell(told: dict[str, Any]) -> None:
            loss = f"  loss {told['loss']:.4f}" if isinstance(told.get("loss"), float) else ""
            text = f"{told.get('id', '')}  epoch {epoch(told)}{loss}  {speed(told)} images/s"
            bar.update(task, description=text, completed=told.get("step"), total=told.get("steps"))

        yield tell


def parity(files: Annotated[list[Path], typer.Argument(help="Golden steps, safetensors.")], json: Json = False) -> None:
    """Replay golden steps through the training code and report how far the numbers are apart."""
    from sdae.parity import replay

    found = [replay(path) for path in files]
    if json:
        emit(found)
    else:
        keys = [key for key in found[0] if key.endswith("_error")]
        cells = [[f"{r[k]:.1e}" if r[k] is not None else None for k in keys] for r in found]
        verdicts = ["passed" if r["passed"] else "FAILED" for r in found]
        rows = [[r["file"], *c, v] for r, c, v in zip(found, cells, verdicts, strict=True)]
        table(["file", *(key.removesuffix("_error") for key in keys), ""], rows)
    if not all(r["passed"] for r in found):
        raise typer.Exit(1)
