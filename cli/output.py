"""What commands share: options, JSON on stdout, everything else on stderr."""

from __future__ import annotations

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


def emit(value: Any) -> None:
    """The one JSON document. NaN is null: not every reader knows it."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def told_synthetic(store: Store) -> Store:
    """The store; where its results are made up, the first line on stdout says so; where there is none, stderr."""
    if not store.root.exists():
        note(_absent(store))
    elif not store.ids() and (others := [below for below in _folders(store.root) if type(store)(below).ids()]):
        note(f"{store.root}: no runs in it; --store {others[0]} has some")
    if store.synthetic:
        print(f"SYNTHETIC: the results in {store.root} are made up, no model was trained")
    return store


def existing(store: Store) -> Store:
    """The store of a command that has nothing to do without one. UserError."""
    if not store.root.is_dir():
        raise UserError(_absent(store))
    return store


def _absent(store: Store) -> str:
    return f"{store.root}: there is no such folder in {Path.cwd()}; --store DIR names another"


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


MOVES = re.compile(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """One line without what moves a cursor or cannot be encoded: names come from files of others."""
    flat = " ".join(text.expandtabs().splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)


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
