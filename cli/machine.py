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
    moco_v3 = "moco-v3"
    dino = "dino"
    deit = "deit"
    beit = "beit"
    cae = "cae"
    timm = "timm"


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
    print(f"{report['source']}: {report['layout']}, sha256 {report['sha256']}")
    for which, encoder in report["encoders"].items():
        print(f"{which}: {encoder['file']}, sha256 {encoder['sha256']}")
        facts = [key for key in encoder if key not in ("file", "sha256", "mapped", "filled")]
        print("  " + ", ".join(f"{key} {encoder[key]}" for key in facts))
        for rule, count in encoder["mapped"].items():
            print(f"  {count:4} {rule}")
        for key, why in encoder["filled"].items():
            print(f"  filled {key}: {why}")
    print(f"left out, {len(report['left_out'])}: {', '.join(report['left_out']) or 'nothing'}")


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
