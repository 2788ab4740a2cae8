"""paper: the paper's tables and figures from the store, the printed value beside the measured one."""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, ScaleName, StoreDir, emit, parse_seeds
from cli.output import table as table_of

app = typer.Typer(help="The paper's tables and figures, from the store.", no_args_is_help=True)
SeedsOrAll = Annotated[str | None, typer.Option("--seeds", help="Seeds, e.g. 0,1,2; default: all in the store.")]


class Format(StrEnum):
    """How a table is printed."""

    md = "md"
    latex = "latex"
    html = "html"
    csv = "csv"
    json = "json"


@app.command()
def table(
    name: Annotated[str, typer.Argument(metavar="N", help="1 .. 5, table1 .. figure4c, or a YAML file of your own.")],
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    format: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.md,
    json: Json = False,
) -> None:
    """A table: the paper's value, the measured one, its interval, the number of seeds."""
    from analysis.render import render
    from analysis.table import build
    from sdae.store import Store

    full = f"table{name}" if name.isdigit() else name
    built = build(Store(store), full, scale, parse_seeds(seeds) if seeds else None)
    print(render(built, "json" if json else format.value).rstrip("\n"))


@app.command()
def figure(
    name: Annotated[str, typer.Argument(metavar="NAME", help="4 (three panels), 4a, 4b, 4c, or a YAML file.")],
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNG, SVG and PDF.")] = Path("paper"),
    format: Annotated[Format | None, typer.Option("--format", help="Print its numbers instead of drawing it.")] = None,
    json: Json = False,
) -> None:
    """A figure as PNG, SVG and PDF, or its numbers."""
    from sdae.store import Store

    full = f"figure{name}" if re.fullmatch(r"\d[a-z]?", name) else name
    chosen = parse_seeds(seeds) if seeds else None
    if not json and format is None:
        from analysis.figures import draw

        for path in draw(Store(store), full, scale, out, chosen):
            print(path)
        return
    from analysis.figures import PANELS
    from analysis.render import render
    from analysis.table import build

    panels = [build(Store(store), panel, scale, chosen) for panel in (PANELS if full == "figure4" else (full,))]
    if json or format is Format.json:
        documents = [panel.to_dict() for panel in panels]
        return emit(documents if full == "figure4" else documents[0])
    assert format is not None
    print("\n\n".join(render(panel, format.value).rstrip("\n") for panel in panels))


@app.command()
def audit(json: Json = False) -> None:
    """The paper's sentences against its own tables, and its settings against the release's; what disagrees first."""
    from analysis.audit import audit as examine
    from analysis.audit import release

    found = examine()
    if json:
        return emit(found)
    verdicts = {False: "DISAGREES", None: "cannot be told", True: "agrees"}
    order = list(verdicts)
    for title, rows, keys in (
        ("sentences", found, ["claim", "where", "found"]),
        ("settings", release(), ["setting", "paper", "release"]),
    ):
        rows = sorted(rows, key=lambda row: order.index(row["agrees"]))
        table_of(["", *keys], [[verdicts[row["agrees"]], *(row[key] for key in keys)] for row in rows], title)
        counts = Counter(verdicts[row["agrees"]] for row in rows)
        print(f"{len(rows)} {title}: {', '.join(f'{count} {what}' for what, count in counts.items())}\n")
