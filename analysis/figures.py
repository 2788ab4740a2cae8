"""Figure 4 of the paper, as three panels or one by one, and any artifact of kind figure, from a store.

Points are means over seeds, bars and bands their 95 % intervals. Series differ in marker and line style as well as in
colour (Okabe and Ito's, told apart by the colour-blind). The paper's printed values are hollow diamonds at the
paper's scale, and a note beneath the panel at any other. The files are the same at every drawing: no date, no random
ids.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.render import name_of, paper_text
from analysis.study import build
from analysis.table import Table, TableCell, TableRow
from sdae.errors import UserError
from sdae.files import make_folder, write_atomically
from sdae.store import Store

FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None}, "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}  # fmt: skip
PANELS = ("figure4a", "figure4b", "figure4c")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = (
    ("o", "s", "^", "D", "v", "P", "X"),
    ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))),
)
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False, "lines.markersize": 5,
    "text.parse_math": False,  # dollars in a user's label are text
    "errorbar.capsize": 2.5, "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "sdae", "savefig.dpi": 200,
    "savefig.bbox": "tight", "savefig.pad_inches": 0.1,
}  # fmt: skip


@dataclass
class Series:
    """Points at `x` with their cells; `line` connects neighbours that both have a value."""

    label: str
    x: list[float]
    cells: list[TableCell]
    line: bool = True
    band: bool = False


@dataclass
class Panel:
    table: Table
    series: list[Series]
    xlabel: str
    ticks: dict[float, str] | None = None
    turned: bool = False


def draw(
    store: Store, name: str, scale: str | Path = "smoke", out: Path = Path("."), seeds: Sequence[int] | None = None
) -> list[Path]:
    """Writes OUT/FIGURE.png, .svg and .pdf. `name`: 4 (three panels), 4a or figure4a .., or a user's YAML file."""
    full = f"figure{name}" if name in ("4", "4a", "4b", "4c") else name
    tables = [build(store, panel, scale, seeds) for panel in (PANELS if full == "figure4" else (full,))]
    if any(table.kind != "figure" for table in tables):
        raise UserError(
            f"{full} is a table, not a figure (allowed: 4, {', '.join(PANELS)}, or a YAML file of kind figure)"
        )
    return save(tables, Path(out), "figure4" if full == "figure4" else tables[0].artifact)


def save(tables: Sequence[Table], out: Path, stem: str, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Writes OUT/STEM.png, .svg and .pdf, or those of them that are asked for."""
    make_folder(out)
    paths = []
    for suffix, content in drawn(tables, formats).items():
        paths.append(out / f"{stem}.{suffix}")
        write_atomically(paths[-1], content)
    return paths


def drawn(tables: Sequence[Table], formats: Iterable[str] = FORMATS) -> dict[str, bytes]:
    """A figure with these tables as its panels, as the bytes of a file of each format."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = paint([panel_of(table) for table in tables])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all formats
        files = {}
        for suffix in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, metadata=FORMATS[suffix])
            files[suffix] = buffer.getvalue()
    return files


def alternative(table: Table) -> str:
    """A figure in words, for those who do not see it: what stands over what, how much of it is measured, its ends."""
    panel, column = panel_of(table), table.columns[0]
    points = [
        (cell.estimate.mean, row.label)
        for row in table.rows
        if (cell := row.cells.get(column.name)) is not None and cell.estimate
    ]
    words = [f"{name_of(table.artifact)}: {column.label}{f' ({column.unit})' * bool(column.unit)}"]
    words[0] += f" over {panel.xlabel}." if panel.xlabel else "."
    if len(panel.series) > 1:
        words.append(f"Series: {', '.join(series.label for series in panel.series)}.")
    words.append(f"{len(points)} of {len(table.rows)} points measured.")
    if points:
        (low, least), (high, most) = min(points), max(points)
        digits = column.decimals + 1
        words.append(f"Lowest {low:.{digits}f} ({least}), highest {high:.{digits}f} ({most}).")
    if table.synthetic:
        words.insert(0, "Synthetic results.")
    return " ".join(words)


# What is in a panel
def panel_of(table: Table) -> Panel:
    """The paper's arrangement for Figure 4's panels; rows side by side, a series per column, for others."""
    makers = {"figure4a": _momentum, "figure4b": _tokens, "figure4c": _epochs}
    return makers.get(table.artifact, _plain)(table)


def _momentum(table: Table) -> Panel:
    """(a): momentum values of both update rules side by side, a line per rule and length."""
    groups: dict[tuple[str, int], list[TableRow]] = {}
    for row in table.rows:
        groups.setdefault((str(row.meta["every"]), int(row.meta["epochs"])), []).append(row)
    values = sorted({(str(r.meta["every"]), float(r.meta["momentum"])) for r in table.rows})  # per epoch first: e < i
    place = {key: float(n) + (key[0] == "iteration") for n, key in enumerate(values)}
    series, ticks = [], {}
    for (every, epochs), rows in sorted(groups.items()):
        x = [place[every, float(row.meta["momentum"])] for row in rows]
        series.append(Series(f"per {every}, {epochs} epochs", x, _cells(table, rows)))
        for at, row in zip(x, rows, strict=True):
            here = row.meta.get("momentum here")
            ticks[at] = f"{row.meta['momentum']:.4f}".rstrip("0").ljust(4, "0") + (
                f" ({here:.2g})" if here is not None else ""
            )
    scaled = " (here)" if any("momentum here" in row.meta for row in table.rows) else ""
    return Panel(table, series, f"momentum of the teacher{scaled}", dict(sorted(ticks.items())), turned=True)


def _tokens(table: Table) -> Panel:
    """(b): one crop of ever more patches up to the full image, then the folds."""
    label = {"crop": "teacher crop", "masked": "all masked patches", "full": "full image", "folds": "multi-fold"}
    series = {view: Series(text, [], []) for view, text in label.items()}
    ticks = {}
    for n, row in enumerate(table.rows):
        view = str(row.meta["view"])
        at = n + 0.6 * (view == "folds")
        series[view].x.append(at)
        series[view].cells += _cells(table, [row])
        here = row.meta.get("tokens here")
        ticks[at] = row.label.replace(" x ", "×") + (f"\n({here})" if here else "")
    scaled = " (here)" if any("tokens here" in row.meta for row in table.rows) else ""
    return Panel(table, [s for s in series.values() if s.x], f"patches that the teacher sees{scaled}", ticks)


def _epochs(table: Table) -> Panel:
    """(c): student and teacher along the pre-training."""
    series: dict[str, Series] = {}
    for row, cell in zip(table.rows, _cells(table, table.rows), strict=True):
        line = series.setdefault(str(row.meta["weights"]), Series(str(row.meta["weights"]), [], [], band=True))
        line.x.append(float(row.meta["epoch"]))
        line.cells.append(cell)
    scaled = " (the paper's count)" if any("epoch here" in row.meta for row in table.rows) else ""
    return Panel(table, list(series.values()), f"completed epochs of pre-training{scaled}")


def _plain(table: Table) -> Panel:
    series = []
    for column in table.columns:
        rows = [(float(n), row.cells[column.name]) for n, row in enumerate(table.rows) if column.name in row.cells]
        series.append(Series(column.label, [x for x, _ in rows], [cell for _, cell in rows], line=False))
    return Panel(
        table, series, "", {float(n): row.label for n, row in enumerate(table.rows)}, turned=len(table.rows) > 6
    )


def _cells(table: Table, rows: list[TableRow]) -> list[TableCell]:
    return [row.cells[table.columns[0].name] for row in rows]


# Drawing
def paint(panels: list[Panel]) -> Figure:
    """One row of panels under one line that says scale, dataset and model."""
    first = panels[0].table
    figure = Figure(figsize=(5.2, 4.4) if len(panels) == 1 else (4.6 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    synthetic = any(panel.table.synthetic for panel in panels)
    for ax, panel in zip(axes, panels, strict=True):
        _paint_panel(ax, panel)
        if panel.table.synthetic:
            across(ax, "SYNTHETIC", rotation=25, fontsize=30, color="0.88", zorder=0)
    known = sorted({text for panel in panels for text in (panel.table.dataset, panel.table.model) if text})
    lines = [f"Scale {first.scale_title}"] + ([f"measured on {', '.join(known)}"] if known else [])
    if synthetic:
        lines.insert(0, "SYNTHETIC RESULTS, made up to test this figure")
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, 78 * len(panels)))
    figure.suptitle(text, fontsize=7.5, color="#B00000" if synthetic else "black")
    return figure


def across(ax: Axes, text: str, **style: Any) -> None:
    """Text over the middle of a panel."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", **style)


def _paint_panel(ax: Axes, panel: Panel) -> None:
    table, column = panel.table, panel.table.columns[0]
    drawn = sum(_paint_series(ax, series, index, table.comparable) for index, series in enumerate(panel.series))
    cells = [cell for series in panel.series for cell in series.cells]
    positions = [x for series in panel.series for x in series.x]
    margin = 0.04 * (max(positions) - min(positions)) or 0.5
    ax.set_xlim(min(positions) - margin, max(positions) + margin)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(column.label + (f" ({column.unit})" if column.unit else ""))
    if panel.ticks is not None:
        ax.set_xticks(list(panel.ticks), list(panel.ticks.values()), rotation=90 if panel.turned else 0)
        ax.grid(axis="x", visible=False)
    ax.set_title(name_of(table.artifact), fontsize=9, fontweight="bold", loc="left")
    if drawn:
        entries = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == "paper")
        ax.legend(
            [handle for handle, _ in entries], [label for _, label in entries], fontsize=6.5,
            ncols=2 if len(entries) > 2 else 1, loc="lower right", bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
    else:
        ax.set_yticks([])
        across(ax, "not run", color="0.5", fontsize=12)
    ax.annotate(
        "\n".join(_remarks(panel, cells)), (0, 0), xycoords=("axes fraction", ax.xaxis.label), xytext=(0, -6),
        textcoords="offset points", va="top", fontsize=6, color="0.35",
    )  # fmt: skip


def _paint_series(ax: Axes, series: Series, index: int, comparable: bool) -> int:
    """Draws what has a value; how many points that were, the paper's included."""
    colour, marker, line = COLOURS[index % 7], MARKERS[index % 7], LINES[index % 7]
    nan = float("nan")
    # NaN breaks the line: no bridge over gaps
    means = [cell.estimate.mean if cell.estimate else nan for cell in series.cells]
    halves = [(cell.estimate.half or 0.0) if cell.estimate else 0.0 for cell in series.cells]
    drawn = sum(cell.estimate is not None for cell in series.cells)
    if drawn:
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": line if series.line else "none",
            "label": series.label,
        }
        if series.band:
            ax.plot(series.x, means, linewidth=1.2, **style)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            ax.fill_between(
                series.x,
                low,
                high,
                color=colour,
                alpha=0.18,
                linewidth=0,
                hatch=("", "////")[index % 2],
                edgecolor=colour,
            )
        else:
            ax.errorbar(series.x, means, yerr=[h or nan for h in halves], linewidth=1.2, **style)
    places = zip(series.x, series.cells, strict=True)
    printed = [(x, cell.paper) for x, cell in places if cell.paper is not None and comparable]
    if printed:
        known = "paper" in ax.get_legend_handles_labels()[1]
        ax.plot(
            *zip(*printed, strict=True), linestyle="none", marker="D", markersize=8, markerfacecolor="none",
            markeredgecolor="black", label=None if known else "paper", zorder=4,
        )  # fmt: skip
    return drawn + len(printed)


def _remarks(panel: Panel, cells: list[TableCell]) -> list[str]:
    """What a reader must know to read the panel: bars, gaps, and the paper's values where they are not comparable."""
    lines = []
    if any(cell.estimate and cell.estimate.half is not None for cell in cells):
        seeds = sorted({cell.estimate.n for cell in cells if cell.estimate})
        n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        borrowed = any(cell.estimate and cell.estimate.source == "pooled" for cell in cells)
        pooled = ", one seed: pooled variance" if borrowed else ""
        drawn = "Bands" if any(series.band for series in panel.series) else "Bars"
        lines.append(f"{drawn}: 95 % interval of the mean, n = {n}{pooled}.")
    elif any(cell.estimate for cell in cells):
        lines.append("One seed, no interval.")
    if missing := sum(cell.estimate is None for cell in cells):
        lines.append(f"Not run: {missing} of {len(cells)} points, left empty.")
    if not panel.table.comparable and any(cell.paper is not None for cell in cells):
        names = {cell.cell: row.label for row in panel.table.rows for cell in row.cells.values()}
        values = "; ".join(f"{names[cell.cell]}: {paper_text(cell)}" for cell in cells if cell.paper is not None)
        lines.append(f"Printed in the paper, at another scale, not comparable: {values}.")
    return lines
