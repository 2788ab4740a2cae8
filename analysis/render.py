"""One `Table` as Markdown, LaTeX (booktabs), HTML, CSV or JSON: the paper's rows, then per metric paper | measured | n.

Empty means not run, `unknown` that the paper does not print the value. Bold: not statistically worse than the
column's best. Grey and †: stale. Every format names the cells that it shows, as `analysis.explain` takes them: HTML in
`data-cell`, LaTeX and Markdown in comments, of each row those of its columns from left to right.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablations.planner import Column
from analysis.table import STALE, Table, TableCell
from sdae.errors import UserError

FORMATS = ("md", "latex", "html", "csv", "json")
LEGEND = "Empty: not run. unknown: not printed in the paper. ±: 95 % interval of the mean over n seeds."
BOLD = "Bold: not statistically worse than the column's best."
WHY_STALE = "the code that makes this number has changed in substance since its runs"
PACKAGES = ("booktabs", "amssymb", "graphicx", "xcolor")
CSV_COLUMNS = (
    "artifact", "scale", "dataset", "model", "synthetic", "row", "label", "column", "cell", "paper",
    "paper_decimals", "measured", "low", "high", "seeds", "seeds_planned", "difference", "verdict", "state", "best",
    "stale", "interval", "runs",
)  # fmt: skip


def render(table: Table, format: str = "md") -> str:
    """`format`: md, latex, html, csv (one line per cell) or json. LaTeX is a `table` environment."""
    renderers: dict[str, Callable[[Table], str]] = dict(zip(FORMATS, (_md, _latex, _html, _csv, _json), strict=True))
    if format not in renderers:
        raise UserError(f"format {format!r} is unknown (allowed: {', '.join(FORMATS)})")
    return renderers[format](table)


def name_of(artifact: str) -> str:
    """`table5` -> Table 5, `figure4b` -> Figure 4(b); a user's own artifact keeps its name."""
    match = re.fullmatch(r"(table|figure)(\d+)([a-z]?)", artifact)
    return f"{match[1].title()} {match[2]}" + (f"({match[3]})" if match[3] else "") if match else artifact


@dataclass(frozen=True)
class _Entry:
    """`cell`: of a measured value, which it is."""

    text: str
    bold: bool = False
    stale: bool = False
    cell: str | None = None


@dataclass(frozen=True)
class _Grid:
    """The cells as text, alike for every format: leading columns (label, meta), then those of `below` per metric."""

    leading: list[str]
    metrics: list[Column]
    below: list[str]
    rows: list[list[_Entry]]

    def cells(self, row: list[_Entry]) -> str:
        return " ".join(entry.cell for entry in row if entry.cell)


def _grid(table: Table) -> _Grid:
    keys = table.meta_keys
    differences = any(cell.difference is not None for cell in table.cells())
    verdicts = any(cell.verdict for cell in table.cells())
    of_paper = name_of(table.artifact) != table.artifact or any(cell.paper is not None for cell in table.cells())
    below = ["paper"] * of_paper + ["measured", "n"] + ["Δ"] * differences + ["verdict"] * verdicts
    rows = []
    for row in table.rows:
        entries = [_Entry(row.label)] + [_Entry(_mark(row.meta.get(key, ""))) for key in keys]
        for column in table.columns:
            cell = row.cells.get(column.name)
            entries += _entries(cell, column, below) if cell else [_Entry("")] * len(below)
        rows.append(entries)
    return _Grid([""] + [key[:1].upper() + key[1:] for key in keys], table.columns, below, rows)


def _entries(cell: TableCell, column: Column, below: list[str]) -> list[_Entry]:
    n = cell.estimate.n if cell.estimate else 0
    seeds = "" if not n else str(n) if n == cell.planned else f"{n} of {cell.planned}"
    entries = {
        "paper": _Entry(paper_text(cell)),
        "measured": _Entry(measured_text(cell, column), cell.best, cell.stale, cell.cell), "n": _Entry(seeds),
        "Δ": _Entry(difference_text(cell, column), False, cell.stale and cell.difference is not None),
        "verdict": _Entry(cell.verdict or ""),
    }  # fmt: skip
    return [entries[name] for name in below]


def paper_text(cell: TableCell) -> str:
    if cell.paper is None:
        return "–" if cell.dash else "unknown"
    return f"{cell.paper:.{cell.paper_decimals or 0}f}"


def measured_text(cell: TableCell, column: Column) -> str:
    """One decimal more than the column prints, so that a reader can round himself."""
    if cell.estimate is None:
        return "" if cell.state in ("not run", "no value") else cell.state
    half = cell.estimate.half
    digits = column.decimals + 1
    return f"{cell.estimate.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def difference_text(cell: TableCell, column: Column) -> str:
    """Measured minus printed, with its sign."""
    return "" if cell.difference is None else f"{cell.difference:+.{column.decimals + 1}f}".replace("-", "−")


def _mark(value: Any) -> str:
    return {True: "✓", False: "×", None: "–"}[value] if value is None or isinstance(value, bool) else str(value)


def _label(
    column: Column, escape: Callable[[str], str], above: str = "<sup>{}</sup>", below: str = "<sub>{}</sub>"
) -> str:
    """The label of a column: `AP^b_50` with its b above and its 50 below."""
    if match := re.fullmatch(r"([A-Za-z]+)\^([A-Za-z])(?:_(\d+))?", column.label):
        return match[1] + above.format(match[2]) + (below.format(match[3]) if match[3] else "")
    return escape(column.label)


def _notes(table: Table) -> list[str]:
    cells = table.cells()
    legend = [LEGEND, *[BOLD] * any(c.best for c in cells)]
    legend += ["Δ: measured minus paper."] * any(c.difference is not None for c in cells)
    return [" ".join(legend), *table.notes]


def _unit(column: Column) -> str:
    return f"({column.unit})" if column.unit else ""


# Markdown
def _md(table: Table) -> str:
    grid = _grid(table)
    header = [_md_text(text) for text in grid.leading]
    for column in grid.metrics:
        label = (_label(column, _md_text), _md_text(_unit(column)), grid.below[0])
        header += [" ".join(filter(None, label)), *grid.below[1:]]
    lines = [f"**{_md_text(name_of(table.artifact))}.** {_md_text(table.caption)}", ""]
    lines += [_md_row(header), _md_row([":--"] + ["--:"] * (len(header) - 1))]
    lines += [_md_row([_md_entry(entry) for entry in row]) for row in grid.rows]
    lines += ["", *[f"- {_md_text(note)}" for note in _notes(table)], "", "<!-- cells, row by row:"]
    return "\n".join([*lines, *[grid.cells(row) for row in grid.rows], "-->"]) + "\n"


def _md_entry(entry: _Entry) -> str:
    text = _md_text(entry.text)
    return (f"**{text}**" if entry.bold and text else text) + (f" {STALE}" if entry.stale else "")


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_text(text: str) -> str:
    flat = re.sub(r"([\\`*_|~\[\]])", r"\\\1", " ".join(text.split()))
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# HTML
def _html(table: Table) -> str:
    grid = _grid(table)
    width = len(grid.leading) + len(grid.metrics) * len(grid.below)
    flag = ' data-synthetic="true"' if table.synthetic else ""
    title, caption = html.escape(name_of(table.artifact)), html.escape(table.caption)
    lines = [
        f'<table class="sdae"{flag}>',
        f"<caption><strong>{title}.</strong> {caption}</caption>",
        "<thead>",
        "<tr>",
    ]
    lines += [f'<th scope="col" rowspan="2">{html.escape(text)}</th>' for text in grid.leading]
    for column in grid.metrics:
        label = f"{_label(column, html.escape)} {html.escape(_unit(column))}"
        lines.append(f'<th scope="colgroup" colspan="{len(grid.below)}">{label}</th>')
    lines += [
        "</tr>",
        "<tr>",
        *[f'<th scope="col">{text}</th>' for text in grid.below * len(grid.metrics)],
        "</tr>",
        "</thead>",
        "<tbody>",
    ]
    for row in grid.rows:
        cells = [f'<th scope="row">{html.escape(row[0].text)}</th>']
        lines.append(f"<tr>{''.join(cells + [_html_entry(entry) for entry in row[1:]])}</tr>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(table))
    lines += ["</tbody>", f'<tfoot><tr><td colspan="{width}"><ul>{notes}</ul></td></tr></tfoot>', "</table>"]
    return "\n".join(lines) + "\n"


def _html_entry(entry: _Entry) -> str:
    text = html.escape(entry.text) + (f" {STALE}" if entry.stale else "")
    name = f' data-cell="{html.escape(entry.cell)}"' if entry.cell else ""
    stale = f' class="stale" title="{WHY_STALE}"' if entry.stale else ""
    return f"<td{name}{stale}>{f'<strong>{text}</strong>' if entry.bold else text}</td>"


# LaTeX
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "×": r"$\times$", "✓": r"$\checkmark$", "–": "--",
    "—": "---", "…": r"\dots{}", "²": "$^2$", "Θ": r"$\Theta$", "Δ": r"$\Delta$",
    "µ": r"$\mu$", "μ": r"$\mu$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\rightarrow$", "−": "$-$", "†": r"$\dagger$",
    "\u2019": "'", "`": r"\textasciigrave{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # each would be read as an argument of a row's end
}  # fmt: skip


def _tex(text: str) -> str:
    """Text that LaTeX sets as it stands: nothing in it is a command; characters without a glyph become their code."""
    apart = re.sub(r"([-',?!])(?=[-',`])", "\\1\0", " ".join(text.split()))  # no ligatures: -- stays two hyphens
    return "".join("{}" if char == "\0" else _tex_char(char) for char in apart)


def _tex_char(char: str) -> str:
    if char in _TEX:
        return _TEX[char]
    if " " <= char <= "~" or ("À" <= char <= "ÿ" and char != "÷"):
        return char
    plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    plain = "".join(c for c in plain if c.isprintable())
    return "".join(_TEX.get(c, c) for c in plain) if plain else f"{{[}}U+{ord(char):04X}{{]}}"


def _latex(table: Table) -> str:
    grid = _grid(table)
    per = len(grid.below)
    sides = "".join("l" if name == "verdict" else "r" for name in grid.below)
    alignment = "l" + "c" * (len(grid.leading) - 1) + sides * len(grid.metrics)
    first, rules = [""] * len(grid.leading), []
    for index, column in enumerate(grid.metrics):
        label = f"{_label(column, _tex, '$^{{{}}}$', '$_{{{}}}$')} {_tex(_unit(column))}"
        first.append(rf"\multicolumn{{{per}}}{{c}}{{{label}}}")
        start = len(grid.leading) + index * per + 1
        rules.append(rf"\cmidrule(lr){{{start}-{start + per - 1}}}")
    second = [_tex(text) for text in grid.leading] + [_tex(text) for text in grid.below] * len(grid.metrics)
    lines = [
        "% " + " ".join(rf"\usepackage{{{package}}}" for package in PACKAGES),
        *(["% SYNTHETIC RESULTS, made up to test this table"] if table.synthetic else []),
        r"\begin{table}[htbp]", r"\centering", r"\small",
        rf"\caption{{\textbf{{{_tex(name_of(table.artifact))} of the paper.}} {_tex(table.caption)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}", r"\toprule",
        " & ".join(first) + r" \\", "".join(rules), " & ".join(second) + r" \\", r"\midrule",
        *[" & ".join(map(_tex_entry, row)) + rf" \\ % {grid.cells(row)}" for row in grid.rows],
        r"\bottomrule", r"\end{tabular}}", r"\par\smallskip\raggedright\footnotesize",
        *[_tex(note) + r"\par" for note in _notes(table)],
        r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _tex_entry(entry: _Entry) -> str:
    text = _tex(entry.text)
    text = rf"\textbf{{{text}}}" if entry.bold and text else text
    return rf"\textcolor{{gray}}{{{text}\,{_tex(STALE)}}}" if entry.stale else text


# For machines
def _csv(table: Table) -> str:
    common = {k: getattr(table, k) for k in ("artifact", "scale", "dataset", "model", "synthetic")}
    rows = [
        common | {"row": row.name, "label": row.label, "column": n} | cell.to_dict() | {"runs": " ".join(cell.runs)}
        for row in table.rows
        for n, cell in row.cells.items()
    ]
    return csv_text(CSV_COLUMNS, rows)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """These columns of the rows, under their names."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _json(table: Table) -> str:
    return json.dumps(table.to_dict(), indent=2, allow_nan=False) + "\n"
