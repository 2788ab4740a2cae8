"""paper: the paper's tables and figures from the store, the printed value beside the measured one."""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, Names, ScaleName, StoreDir, emit, note, seeds_or_all, store_at, tell
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
    from analysis.study import build

    full = f"table{name}" if name.isdigit() else name
    built = build(store_at(store), full, scale, seeds_or_all(seeds))
    tell(render(built, "json" if json else format.value))


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

    full = f"figure{name}" if re.fullmatch(r"\d[a-z]?", name) else name
    chosen = seeds_or_all(seeds)
    if not json and format is None:
        from analysis.figures import draw

        for path in draw(store_at(store), full, scale, out, chosen):
            print(path)
        return
    from analysis.figures import PANELS
    from analysis.render import render
    from analysis.study import build

    panels = [build(store_at(store), panel, scale, chosen) for panel in (PANELS if full == "figure4" else (full,))]
    if json or format is Format.json:
        documents = [panel.to_dict() for panel in panels]
        return emit(documents if full == "figure4" else documents[0])
    assert format is not None
    tell("\n\n".join(render(panel, format.value).rstrip("\n") for panel in panels))


@app.command()
def claims(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    format: Annotated[Format | None, typer.Option("--format", help="md, csv or json; default: a short table.")] = None,
    json: Json = False,
) -> None:
    """The paper's sentences, and your own, against what was measured: supported, contradicted or undecided."""
    from analysis.study import study
    from analysis.verdicts import found, judge_study, render

    measured = study(store_at(store), artifacts or (), scale, seeds_or_all(seeds))
    entries = judge_study(measured)
    if json or format is Format.json:
        return emit(entries)
    if format is not None:
        return tell(render(entries, measured, format.value))
    order = ["contradicted", "supported", "undecided"]
    rows = [[e["verdict"], e["claim"], found(e), e["target"], e["needs"]] for e in entries]
    rows.sort(key=lambda row: order.index(row[0]))
    table_of(["", "claim", "estimate", "says", "needs"], rows, measured.scale.title)
    tally = Counter(row[0] for row in rows)
    made_up = "SYNTHETIC RESULTS, made up: " if measured.synthetic else ""
    print(f"{made_up}{len(rows)} claims: {', '.join(f'{tally[verdict]} {verdict}' for verdict in order)}")


@app.command()
def report(
    artifacts: Names = None,
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("paper"),
    json: Json = False,
) -> None:
    """Everything on one page that needs no network, report.html, and the same as LaTeX and, where it is there, PDF."""
    from analysis.report import pdf, write
    from analysis.study import study

    paths = write(study(store_at(store), artifacts or (), scale, seeds_or_all(seeds)), out)
    if not any(path.name == "report.pdf" for path in paths):
        debian = "Debian: texlive-latex-recommended texlive-latex-extra lmodern"
        note(f"no report.pdf: none of {', '.join(pdf.ENGINES)} is installed ({debian})")
    if json:
        return emit({"files": [str(path) for path in paths]})
    for path in paths:
        print(path)


@app.command()
def explain(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A cell's name, e.g. table5.folds.top1.")],
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    artifact: Annotated[Path | None, typer.Option("--artifact", help="The YAML file of your own it is in.")] = None,
    json: Json = False,
) -> None:
    """All that is behind one cell: paper, measurement, runs, configs, code, machines, checkpoints, logs."""
    from analysis.explain import explain_cell, text

    found = explain_cell(store_at(store), cell, artifact, scale, seeds_or_all(seeds))
    emit(found) if json else tell(text(found))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A store's folder, or a time: runs of --store until then.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    scale: ScaleName = "smoke",
    store: StoreDir = Path("runs"),
    seeds: SeedsOrAll = None,
    artifact: Annotated[list[str] | None, typer.Option("--artifact", help="Only this one; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """What changed from A to B: cells that moved, verdicts that flipped, and by which runs."""
    from analysis.diff import diff as compare
    from analysis.diff import side, text
    from analysis.verdicts import judge_study

    chosen = seeds_or_all(seeds)
    before, after = (side(one, store_at(store), artifact or (), scale, chosen) for one in (a, b))
    found = compare(before, after, judge_study(before), judge_study(after))
    emit(found) if json else tell(text(found))


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
