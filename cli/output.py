"""What commands share: options, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdae.errors import UserError

if TYPE_CHECKING:
    from sdae.store import Store

StoreDir = Annotated[Path, typer.Option("--store", help="Folder of the run folders.")]
ScaleName = Annotated[str, typer.Option("--scale", help="smoke, mini, small, paper, or a YAML file.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, e.g. 0,1,2.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DataDir = Annotated[str | None, typer.Option("--data", help="Folder of the pictures, in place of the scale's.")]
Names = Annotated[list[str] | None, typer.Argument(help="table1 .. figure4c or a YAML file of your own; none: all.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Runs at a time.")]


def parse_seeds(text: str) -> list[int]:
    """`0,1,2`."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        from sdae.yamls import shown

        raise UserError(f"--seeds {shown(text)}: expected whole numbers with commas between them, e.g. 0,1,2") from None
    if min(seeds) < 0:
        raise UserError(f"--seeds {text!r}: seeds are 0 or more")
    return seeds


def seeds_or_all(text: str | None) -> list[int] | None:
    """`0,1,2`; None, where the option was not given, means all."""
    return None if text is None else parse_seeds(text)


def store_at(folder: Path, needed: bool = False) -> Store:
    """A command's store; UserError where it is `needed`, as there is nothing to do without one, and absent."""
    from sdae.store import Store

    store = Store(folder)
    if needed and not store.root.is_dir():
        raise UserError(_absent(store))
    return store


def emit(value: Any) -> None:
    """The one JSON document. NaN is null: not every reader knows it."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def told_synthetic(store: Store) -> None:
    """Where the store's results are made up, the first line on stdout says so; where there is none, stderr."""
    if not store.root.exists():
        note(_absent(store))
    elif not store.ids() and (others := [below for below in _folders(store.root) if _holds_runs(below)]):
        note(f"{store.root}: no runs in it; --store {others[0]} has some")
    if store.synthetic:
        print(f"SYNTHETIC: the results in {store.root} are made up, no model was trained")


def _absent(store: Store) -> str:
    return f"{store.root}: there is no such folder in {Path.cwd()}; --store DIR names another"


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _holds_runs(folder: Path) -> bool:
    with contextlib.suppress(OSError, UserError):  # another's, or of a later version: nobody asked for it
        return bool(store_at(folder).ids())
    return False


MOVES = re.compile(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """One line without what moves a cursor or cannot be encoded: names come from files of others."""
    flat = " ".join(text.expandtabs().splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)


def ask(question: str, refused: str) -> None:
    """Asks on stderr; a no ends the command, and `refused` says so."""
    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort:
        note(refused)
        raise typer.Exit(1) from None


def tell(text: str) -> None:
    """A whole text on stdout, its lines and columns as they are, without what moves a cursor in what others named."""
    print(MOVES.sub(lambda found: found[0].encode("unicode_escape").decode(), text.rstrip("\n")))


def say(text: str) -> None:
    """One line on stdout, with what others have named in it."""
    print(printable(text))


def note(text: str) -> None:
    """One line on stderr, likewise."""
    print(printable(text), file=sys.stderr)


def table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    """Rows on stdout: a rich table on a terminal, columns with spaces between them in a pipe."""
    columns = [printable(column) for column in columns]
    texts = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*columns, title=title)
        for row in texts:
            drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
        Console().print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in [columns, *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
