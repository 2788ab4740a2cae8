"""data, weights, doctor."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import Json, StoreDir, emit, table
from sdae.errors import UserError

data = typer.Typer(help="The pictures.", no_args_is_help=True)
weights = typer.Typer(help="Encoder weights: out of a run, or in from a released checkpoint.", no_args_is_help=True)


class Layout(StrEnum):
    """Whose checkpoint it is."""

    sdae = "sdae"
    mae = "mae"
    timm = "timm"


class Which(StrEnum):
    student = "student"
    teacher = "teacher"


@data.command("list")
def list_(json: Json = False) -> None:
    """The data set of every scale: where it is looked for, and what is there."""
    from slurm.doctor import pictures

    rows = pictures()
    if json:
        return emit(rows)
    keys = ["scale", "name", "path", "image_size", "classes", "train", "val", "problem"]
    table(keys, [[row[key] for key in keys] for row in rows])


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
    from sdae.store import Store
    from sdae.weights import export_weights

    number: int | str = epoch if epoch == "last" else int(epoch)
    _report(export_weights(Store(store), run, which.value, number, out), json)


@weights.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A released checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    layout: Annotated[Layout, typer.Option("--from", help="Whose checkpoint it is.")] = Layout.sdae,
    json: Json = False,
) -> None:
    """A checkpoint of the authors', of MAE's or of timm's, for `init: {weights: file:OUT}`. Every odd key is named."""
    from sdae.weights import import_weights

    _report(import_weights(file, layout.value, out), json)


def _report(report: dict[str, Any], json: bool) -> None:
    if json:
        return emit(report)
    for key, value in report.items():
        print(f"{key}: {value}")


def doctor(
    store: StoreDir = Path("runs"),
    profile: Annotated[
        Path | None, typer.Option("--profile", help="A Slurm profile: is it right for this cluster?")
    ] = None,
    json: Json = False,
) -> None:
    """Whether this machine, and with --profile its Slurm cluster, can run the suite."""
    from sdae.store import Store
    from slurm.doctor import examine

    checks = examine(Store(store), profile)
    if json:
        emit(checks)
    else:
        marks = {True: "ok", False: "FAILED", None: "absent"}
        table(["", "check", "detail"], [[marks[c["ok"]], c["check"], c["detail"]] for c in checks])
    if any(c["ok"] is False for c in checks):
        raise typer.Exit(1)
