"""data, weights, doctor."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, ScaleName, StoreDir, emit, note, say, store_at, table
from sdae.errors import UserError

LINE_SECONDS = 5.0  # between two lines of progress in a pipe

data = typer.Typer(help="The pictures.", no_args_is_help=True)
weights = typer.Typer(help="Encoder weights: out of a run, or in from a released checkpoint.", no_args_is_help=True)


class Layout(StrEnum):
    """Whose checkpoint it is."""

    sdae = "sdae"
    mae = "mae"
    moco_v3 = "moco-v3"
    dino = "dino"
    deit = "deit"
    beit = "beit"
    cae = "cae"
    timm = "timm"


class PackedForm(StrEnum):
    shards = "shards"
    raw = "raw"


class OnError(StrEnum):
    """What an unreadable picture does."""

    stop = "raise"
    skip = "skip"


class Which(StrEnum):
    student = "student"
    teacher = "teacher"


@data.command("list")
def list_(json: Json = False) -> None:
    """The data sets of every scale: where they are looked for, and what is there."""
    from slurm.doctor import pictures

    rows = pictures()
    if json:
        return emit(rows)
    keys = ["scale", "stage", "name", "path", "image_size", "classes", "train", "val", "problem"]
    table(keys, [[row[key] for key in keys] for row in rows])


@data.command("prepare")
def prepare(
    folder: Annotated[Path, typer.Argument(help="Pictures in ImageNet's layout: train/CLASS/*.jpg, val/CLASS/*.jpg.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the same one goes on where it was stopped.")],
    form: Annotated[PackedForm, typer.Option("--form", help="shards: small JPEGs; raw: pixels of squashed pictures.")],
    side: Annotated[int, typer.Option("--side", help="Pixels of the shorter side; raw: of both.")] = 256,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; by default one for each core.")] = None,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="An unreadable picture: raise ends, skip leaves it out.")
    ] = OnError.stop,
    json: Json = False,
) -> None:
    """Packs pictures into few large files that are read without parsing: data.name packed."""
    from sdae.data.packing import prepare as pack
    from slurm.machine import cpus

    def announce(pictures: int, estimate: int, free: int) -> None:
        if not json:
            say(f"{pictures:,} pictures take about {estimate / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are to be had")
            sys.stdout.flush()

    processes = cpus() if workers is None else workers
    with progress("packing", "pictures") as tell:
        report = pack(folder, out, form.value, side, processes, on_error.value, tell, announce=announce)
    if json:
        return emit(report)
    print(
        f"{out}: {report['train']:,} + {report['val']:,} pictures of {report['classes']} classes as {form.value}, "
        f"{report['bytes'] / 1e9:,.3f} GB in {report['files']} files"
    )
    for name in report["skipped"]:
        say(f"left out, cannot be read: {name}")
    print(f"use it with data: {{name: packed, path: {out}}}")


@data.command("verify")
def verify_(
    folder: Annotated[Path, typer.Argument(help="A folder that data prepare has written.")], json: Json = False
) -> None:
    """Reads every packed file and compares its sha256; exit 1 where one is damaged."""
    from sdae.data.packing import verify
    from slurm.machine import cpus

    with progress("reading", "bytes") as tell:
        report = verify(folder, cpus(), tell)
    if json:
        emit(report)
    else:
        for damage in report["damaged"]:
            say(f"{damage['file']}: {damage['problem']}")
        cure = f"{len(report['damaged'])} damaged: delete {folder} and pack again"
        state = cure if report["damaged"] else "all as they were written"
        print(f"{folder}: {report['files']} files, {report['bytes'] / 1e9:,.3f} GB, {state}")
    if report["damaged"]:
        raise typer.Exit(1)


@contextlib.contextmanager
def progress(verb: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, in all) that draws a bar on a terminal, or writes a line every few seconds; on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as drawn:
            task = drawn.add_task(verb)
            yield lambda done, total: drawn.update(task, completed=done, total=total)
        return
    last: tuple[float, int] | None = None  # the line before: the rate since then is today's, whatever was there already

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None:
            last = (now, done) if done else None
        elif now - last[0] >= LINE_SECONDS and done > last[1]:
            left = (now - last[0]) * (total - done) / (done - last[1])
            note(f"{verb}: {done:,} of {total:,} {unit}, {timedelta(seconds=round(left))} left")
            last = now, done

    yield line


@weights.command("export")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A pre-training's id or the beginning of it.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    which: Annotated[Which, typer.Option("--weights", help="Which encoder.")] = Which.student,
    epoch: Annotated[str, typer.Option("--epoch", help="last, or a number of completed epochs.")] = "last",
    store: StoreDir = Path("runs"),
    json: Json = False,
) -> None:
    """An encoder that timm.create_model(.., num_classes=0, checkpoint_path=..) loads."""
    if epoch != "last" and not epoch.isdigit():
        raise UserError(f"--epoch {epoch!r}: expected last, or a number of completed epochs")
    from sdae.weights import export_weights

    number: int | str = epoch if epoch == "last" else int(epoch)
    report = export_weights(store_at(store), run, which.value, number, out)
    if json:
        return emit(report)
    for key, value in report.items():
        say(f"{key}: {value}")


@weights.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A released checkpoint.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write, .safetensors.")] = None,
    name: Annotated[
        str | None, typer.Option("--as", help="Name in the folder of weights, in place of --out, e.g. beit-300.")
    ] = None,
    layout: Annotated[Layout, typer.Option("--from", help="Whose checkpoint it is.")] = Layout.sdae,
    json: Json = False,
) -> None:
    """A released checkpoint, for `init: {weights: file:OUT}` or `file:NAME.safetensors`. Every odd key is named."""
    from sdae.weights import import_weights

    report = import_weights(file, layout.value, out, name)
    if json:
        return emit(report)
    say(f"{report['source']}: {report['layout']}, sha256 {report['sha256']}")
    for which, encoder in report["encoders"].items():
        say(f"{which}: {encoder['file']}, sha256 {encoder['sha256']}")
        facts = [key for key in encoder if key not in ("file", "sha256", "mapped", "filled")]
        say("  " + ", ".join(f"{key} {encoder[key]}" for key in facts))
        for rule, count in encoder["mapped"].items():
            say(f"  {count:4} {rule}")
        for key, why in encoder["filled"].items():
            say(f"  filled {key}: {why}")
    say(f"left out, {len(report['left_out'])}: {', '.join(report['left_out']) or 'nothing'}")


@weights.command("list")
def list_weights(json: Json = False) -> None:
    """The folder of imported weights, and the released encoders that Tables 2-4 want."""
    from sdae.released import inventory, wanted, weights_folder

    found, wishes = inventory(), wanted()
    if json:
        return emit({"folder": str(weights_folder()), "weights": found, "wanted": wishes})
    print(f"In {weights_folder()}:")
    keys = ["name", "layout", "width", "depth", "positions", "layer_scale", "bytes", "sha256", "problem"]
    table(keys, [[row[key] for key in keys] for row in found])
    print("\nWanted by Tables 2-4:")
    keys = ["name", "method", "epochs", "layout", "positions", "layer_scale", "state"]
    table(keys, [[row[key] for key in keys] for row in wishes])


def doctor(
    store: StoreDir = Path("runs"),
    profile: Annotated[
        Path | None, typer.Option("--profile", help="A Slurm profile: is it right for this cluster?")
    ] = None,
    bench_data: Annotated[
        bool, typer.Option("--bench-data", help="Only measure how many images/s this machine feeds, some 10 s.")
    ] = False,
    scale: ScaleName = "smoke",
    json: Json = False,
) -> None:
    """Whether this machine, and with --profile its Slurm cluster, can run the suite; or feed it with pictures."""
    from slurm.doctor import examine, feeding

    checks = feeding(store_at(store), scale) if bench_data else examine(store_at(store), profile)
    if json:
        emit(checks)
    else:
        marks = {True: "ok", False: "FAILED", None: "absent"}
        table(["", "check", "detail"], [[marks[c["ok"]], c["check"], c["detail"]] for c in checks])
    if any(c["ok"] is False for c in checks):
        raise typer.Exit(1)
