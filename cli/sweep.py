"""sweep: plan runs, run them here or on a cluster, watch them, end them, run them again."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.output import (
    DataDir,
    Jobs,
    Json,
    Names,
    ScaleName,
    Seeds,
    StoreDir,
    ask,
    emit,
    note,
    parse_seeds,
    printable,
    say,
    seeds_or_all,
    store_at,
    table,
    told_synthetic,
)
from sdae.errors import UserError

if TYPE_CHECKING:
    from ablations.planner import PlannedRun, Sweep
    from sdae.store import Store
    from slurm.sweep import Outcome

app = typer.Typer(help="Plan the runs of artifacts, run them, watch them.", no_args_is_help=True)


class Place(StrEnum):
    """Where runs are run."""

    local = "local"
    slurm = "slurm"


On = Annotated[Place, typer.Option("--on", help="Where to run.")]
ProfileFile = Annotated[Path | None, typer.Option("--profile", help="What jobs ask Slurm for, YAML.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, each sbatch text, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AnySeeds = Annotated[str | None, typer.Option("--seeds", help="Seeds, e.g. 0,1,2; none: all handed to Slurm, else 0.")]
AnyScale = Annotated[str | None, typer.Option("--scale", help="A scale; none: what this store handed to Slurm.")]
Grace = Annotated[float, typer.Option("--grace", min=0, help="Seconds without a sign of life before a run is lost.")]
GRACE = 300.0


@app.command("list")
def list_(scale: ScaleName = "smoke", seeds: Seeds = "0", store: StoreDir = Path("runs"), json: Json = False) -> None:
    """The suite's artifacts: cells, runs, and how many of these are done."""
    from ablations.scale import load_scale
    from slurm.status import overview

    rows = overview(load_scale(scale), parse_seeds(seeds), store_at(store))
    if json:
        return emit(rows)
    told_synthetic(store_at(store))
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
    from ablations.planner import plan as make

    folder = store_at(store)
    planned = make(artifacts or (), scale, parse_seeds(seeds), data_path=data, content=folder.fingerprint)
    _tell_plan(planned, folder, json)


def _tell_plan(planned: Sweep, store: Store, json: bool) -> None:
    from ablations.cost import plan_document

    document = plan_document(planned, store)
    _tell_provisional(planned)
    if json:
        return emit(document)
    told_synthetic(store)
    rows = [[r["id"], r["state"], len(r["needs"]), r["feeds"][0], len(r["feeds"])] for r in document["runs"]]
    table(["run", "state", "needs", "feeds", "cells"], rows, planned.scale.title)
    hours = document["gpu_hours"]
    print(
        f"{planned.scale.title}\n{document['requested']} runs asked for, {document['unique']} to plan "
        f"({document['requested'] - document['unique']} saved by sharing), {document['done']} done; "
        f"the rest takes {hours['low']:.3g} to {hours['high']:.3g} GPU-hours"
    )
    for reason, number in Counter(blocked["reason"] for blocked in document["blocked"]).items():
        print(f"{number} more cells: {reason.removeprefix('blocked: ')} (docs/weights.md)")


def _tell_provisional(planned: Sweep) -> None:
    if planned.provisional:
        note("the pictures are not here: the ids are provisional, the runs' own will hold the pictures' fingerprint")


@app.command()
def submit(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    on: On = Place.local,
    profile: ProfileFile = None,
    jobs: Jobs = None,
    data: DataDir = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option("--max-gpu-hours", help="Refuse what may take more GPU-hours than that.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Not refuse: take the runs that fill the most cells.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run what is not done, here or on Slurm. Failed runs stay failed; see retry."""
    from ablations.planner import plan as make

    planned, folder = make(artifacts or (), scale, parse_seeds(seeds), data_path=data), store_at(store)
    planned = _affordable(planned, folder, max_gpu_hours, fit)
    _fits(on, profile, jobs)
    if on is Place.slurm:
        return _on_slurm(planned, folder, profile, dry_run, json, failed=False)
    if dry_run:
        return _tell_plan(planned, folder, json)
    _run(planned, folder, jobs, json, retry=False)


def _fits(on: Place, profile: Path | None, jobs: int | None) -> None:
    """Raises UserError for an option that means nothing at this place."""
    if on is Place.slurm and jobs is not None:
        raise UserError(f"--jobs {jobs}: only on this machine (on Slurm the profile's array_parallelism says it)")
    if on is Place.local and profile is not None:
        raise UserError(f"--profile {profile}: only with --on slurm (without it runs go on this machine)")


def _affordable(planned: Sweep, store: Store, hours: float | None, fit: bool) -> Sweep:
    """The sweep, or the part of it that a budget allows."""
    if hours is None:
        if fit:
            raise UserError("--fit: only with --max-gpu-hours")
        return planned
    from ablations.budget import within
    from ablations.cost import done_runs, hours_left

    done = done_runs(planned, store)
    high = {identity: bounds[1] for identity, bounds in hours_left(planned, store, done).items()}
    part = within(planned, hours, done, high)
    if part.unique == planned.unique:
        return part
    cells = sum(any(i in part.runs for _, i in entries) for entries in part.cells.values())
    what = f"{part.unique} of {planned.unique} runs, {cells} of {len(planned.cells)} cells"
    if not fit:
        raise UserError(
            f"--max-gpu-hours {hours:g}: what is not done may take {sum(high.values()):.3g}; --fit takes the part "
            f"that fills the most cells: {what}"
        )
    note(f"within {hours:g} GPU-hours: {what}")
    return part


@app.command()
def retry(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    seeds: Seeds = "0",
    store: StoreDir = Path("runs"),
    on: On = Place.local,
    profile: ProfileFile = None,
    jobs: Jobs = None,
    data: DataDir = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run the failed and lost runs again, and those that wait for them."""
    from ablations.planner import plan as make
    from slurm.local import failed_part

    planned, folder = make(artifacts or (), scale, parse_seeds(seeds), data_path=data), store_at(store)
    _fits(on, profile, jobs)
    if on is Place.slurm:
        return _on_slurm(planned, folder, profile, dry_run, json, failed=True)
    planned = failed_part(planned, folder)
    runs = ", ".join(planned.runs)
    note(f"to run again, with what waits for them: {runs}" if runs else "nothing has failed")
    if dry_run:
        return _tell_plan(planned, folder, json)
    _run(planned, folder, jobs, json, retry=True)


def _run(planned: Sweep, store: Store, jobs: int | None, json: bool, retry: bool) -> None:
    from cli.runs import INTERRUPTED, run_here

    summary = run_here(planned, store, jobs, retry)
    if json:
        states = [{"id": i, "state": s, "message": summary.messages.get(i)} for i, s in summary.states.items()]
        emit({"scale": planned.scale.name, "runs": states, "ran": summary.ran, "seconds": summary.seconds})
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(1)


def _on_slurm(planned: Sweep, store: Store, profile: Path | None, dry_run: bool, json: bool, failed: bool) -> None:
    from ablations.cost import forecast, total_gpu_hours
    from slurm.local import check_pictures, failed_part
    from slurm.look import survey
    from slurm.sweep import hand_over, look, preview, profile_of

    asked = profile_of(store, profile)
    if failed:
        runs = list(planned.runs.values())
        found = survey(runs, store) if dry_run else look(runs, store)  # which writes down what Slurm knows of lost runs
        planned = failed_part(planned, store, found.having("failed", "lost"))
        note(f"to run again, with what waits for them: {', '.join(planned.runs) or 'nothing'}")
    runs = list(planned.runs.values())
    if dry_run:
        _tell_provisional(planned)
        outcome = preview(runs, store, asked, failed=failed)
    else:
        check_pictures(planned)
        outcome = hand_over(runs, store, asked, planned.scale.name, failed=failed)
    rows, (low, high) = forecast(planned, store), total_gpu_hours(planned, store)
    if not json:
        for row in rows:
            hours = row["gpu_hours"]
            note(f"{row['artifact']}: {row['left']} of {row['runs']} runs left, {_hours(hours['low'], hours['high'])}")
        note(f"together, each run once: {_hours(low, high)}")
    _tell(outcome, dry_run, json, artifacts=rows, gpu_hours={"low": low, "high": high})


def _hours(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g} GPU-hours" if high >= 0.01 else "less than 0.01 GPU-hours"


def _runs_of(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _tell(outcome: Outcome, dry_run: bool, json: bool, **facts: Any) -> None:
    """What was submitted, or would be."""
    report = outcome.report
    if json:
        emit({**vars(report), "mended": outcome.mended, "dry_run": dry_run, **facts})
    else:
        for line in outcome.mended:
            note(line)
        for array in report.arrays:
            wait = f", {array['dependency'][:60]}" if array["dependency"] else ""
            if dry_run:
                print(f"{array['sbatch']}\n")
            print(f"{array['job']}: {array['tasks']} x {' and '.join(array['stages'])}, array {array['array']}{wait}")
        states = Counter(s.state for i, s in outcome.survey.standings.items() if i not in report.submitted)
        rest = ", ".join(f"{count} {state}" for state, count in states.items())
        would = "would be submitted" if dry_run else "submitted"
        arrays = f"{len(report.arrays)} array{'s' * (len(report.arrays) != 1)}"
        print(f"{_runs_of(len(report.submitted))} {would} in {arrays}" + (f"; {rest}" if rest else ""))
        if report.raced:
            print(f"{_runs_of(len(report.raced))} had just been submitted by somebody else")
        if report.later:
            print(f"{_runs_of(len(report.later))} must wait for needs that are not in the queue yet: submit again then")
        if report.left:
            print(f"{_runs_of(len(report.left))} more than the queue has room for: submit again once some have ended")
    for line in report.trouble:
        note(f"warning: {line}")
    if report.trouble:
        raise typer.Exit(1)


@app.command()
def heal(
    artifacts: Names = None,
    scale: AnyScale = None,
    seeds: AnySeeds = None,
    store: StoreDir = Path("runs"),
    profile: ProfileFile = None,
    data: DataDir = None,
    grace: Grace = GRACE,
    json: Json = False,
) -> None:
    """Put right what Slurm lost: adopt, release, end what waits in vain, submit lost runs again. For cron, too."""
    from slurm.look import last_submission, recorded, wanted
    from slurm.sweep import hand_over, profile_of

    folder = store_at(store)
    last = last_submission(folder)
    if last is None:
        note(f"{store}: nothing was handed to Slurm")
        return emit({}) if json else None
    held = {run.id for run in recorded(folder)}
    if not held:
        note(f"{store}: nothing to put right: no run in {folder.root / '.slurm/runs'} (a copy without its links?)")
        return emit({}) if json else None
    runs = [run for run in wanted(_runs(artifacts, scale, seeds, folder, data), folder) if run.id in held]
    _tell(hand_over(runs, folder, profile_of(folder, profile), scale or last.scale, grace=grace), False, json)


def _runs(
    artifacts: list[str] | None, scale: str | None, seeds: str | None, store: Store, data: str | None
) -> list[PlannedRun]:
    """The runs of a sweep; where none is named, those that this store handed to Slurm, if any."""
    from ablations.planner import plan as make
    from slurm.look import last_submission, recorded

    asked, runs = seeds_or_all(seeds), recorded(store)
    if not artifacts and scale is None and runs:
        if data is not None:
            raise UserError("--data: wants artifacts or a --scale: runs that were handed to Slurm have their pictures")
        return [run for run in runs if asked is None or run.config.seed in asked]
    if asked is None:
        asked = sorted({run.config.seed for run in runs}) or [0]
    last = last_submission(store) if scale is None else None
    scale = scale or (last.scale if last else "smoke")
    planned = make(artifacts or (), scale, asked, data_path=data, content=store.fingerprint)
    return list(planned.runs.values())


@app.command()
def cancel(
    artifacts: Names = None,
    scale: AnyScale = None,
    seeds: AnySeeds = None,
    store: StoreDir = Path("runs"),
    data: DataDir = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """End this store's queued and running tasks. Their runs can be submitted again, and go on where they were."""
    from slurm.sweep import end, take_back

    folder = store_at(store)
    found, identities = take_back(_runs(artifacts, scale, seeds, folder, data), folder)
    if identities and not yes:
        note(f"to be ended: {', '.join(identities[:8])}{', ..' if len(identities) > 8 else ''}")
        ask(f"End {_runs_of(len(identities))}?", "nothing was cancelled (--yes does not ask)")
    ended = end(identities, found) if identities else []
    if json:
        return emit({"cancelled": ended})
    print(f"{_runs_of(len(ended))} ended")


@app.command()
def status(
    artifacts: Names = None,
    scale: AnyScale = None,
    seeds: AnySeeds = None,
    store: StoreDir = Path("runs"),
    data: DataDir = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until all have ended.")] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="Seconds between two looks.")] = 10.0,
    grace: Grace = GRACE,
    json: Json = False,
) -> None:
    """How the runs stand: waiting, queued, running (epoch, images/s, time left), done, failed (with its last lines),
    lost (heal submits them again), new."""
    from cli.live import watched
    from slurm.status import status as describe
    from slurm.sweep import look

    if watch and json:
        raise UserError("--watch: not with --json, which is one document (call it again)")
    folder = store_at(store)
    runs = _runs(artifacts, scale, seeds, folder, data)

    def document() -> dict[str, Any]:
        return describe(runs, look(runs, folder, grace=grace))

    if watch:
        return watched(document, every)
    found = document()
    if json:
        return emit(found)
    told_synthetic(folder)
    _tell_status(found)


def _tell_status(document: dict[str, Any]) -> None:
    from cli.live import status_rows

    table(*status_rows(document))
    for row in document["runs"]:
        if row["state"] in ("failed", "lost"):
            failure = row["failure"]
            say(f"{row['id']}: {row['state']}: {failure.get('class')}: {failure.get('message')}")
            for line in row["last_lines"]:
                say(f"    {line}")
    print(", ".join(f"{count} {state}" for state, count in document["counts"].items()))
    if document["trouble"]:
        note(f"warning: {document['trouble']}")


@app.command()
def logs(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A run's id or the beginning of it.")],
    store: StoreDir = Path("runs"),
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of its last lines.")] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing until the run ends.")] = False,
) -> None:
    """What a run wrote to its log, or Slurm to its job's."""
    from slurm.local import followed, tail
    from slurm.look import find, log_of, queued

    folder = store_at(store)
    run = find(folder, identity)
    size = run.log.stat().st_size if run.log.exists() else 0
    for line in tail(log_of(folder, run.id), lines):
        say(line)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for text in followed(run, size, time.sleep, queued(folder, run.id)):
                print("\n".join(map(printable, text.split("\n"))), end="", flush=True)
