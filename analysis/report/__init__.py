"""The report: every table, figure, claim and run of a study as one self-contained HTML page, and as LaTeX.

Both say the same: they are filled from one dictionary (`page.contents`). The files are a function of the store alone:
no current time, no random ids.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.dense import data_uri, views
from analysis.figures import drawn
from analysis.render import render
from analysis.report import pdf
from analysis.report.page import contents, embedded, newest
from analysis.report.provenance import explanations
from analysis.report.tex import environment as tex_environment
from analysis.study import Study
from analysis.verdicts import judge_study
from sdae.files import make_folder, write_atomically

HERE = Path(__file__).parent


def report(
    study: Study,
    verdicts: Sequence[dict[str, Any]],
    out: Path,
    figures: Mapping[str, Mapping[str, bytes]] | None = None,
) -> list[Path]:
    """Writes OUT/report.html, OUT/report.tex and the PDFs of its figures; returns their paths.

    `verdicts`: as `analysis.verdicts.judge_study` gives them. `figures`: SVG and PDF, by name, of those drawn before.
    """
    out = Path(out)
    make_folder(out)
    found = contents(study, verdicts)
    if figures is None:
        figures = {n: drawn([table], ["svg", "pdf"]) for n, table in study.tables.items() if table.kind == "figure"}
    files: dict[str, str | bytes] = {
        "report.html": html(study, found, {name: drawing["svg"] for name, drawing in figures.items()}),
        "report.tex": latex(study, found),
    }
    files |= {f"{name}.pdf": drawing["pdf"] for name, drawing in figures.items()}
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def write(study: Study, out: Path) -> list[Path]:
    """`report` with the claims judged, and OUT/report.pdf where a LaTeX engine is installed."""
    paths = report(study, judge_study(study), out)
    if program := pdf.engine():
        ended = newest(study)
        paths.append(pdf.typeset(paths[1], int(ended.timestamp()) if ended is not None else 0, program))
    return paths


def html(study: Study, found: dict[str, Any], figures: dict[str, bytes]) -> str:
    """The page; `figures` as SVG. Its policy lets nothing be loaded, and only this style and this script be run."""
    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digits = [column["digits"] for column in found["runs"]["columns"]]
    return environment.get_template("page.html.j2").render(
        found,
        html={name: Markup(render(table, "html")) for name, table in study.tables.items()},  # nosec B704
        dense=views(study),
        images={name: data_uri(svg, "image/svg+xml") for name, svg in figures.items()},
        run_rows=Markup("\n".join(_row(row, digits) for row in found["runs"]["rows"])),  # nosec B704
        style=Markup(style),  # nosec B704
        script=Markup(script),  # nosec B704
        hashes={"style": _hash(style), "script": _hash(script)},
        data=Markup(embedded({"cells": explanations(study), "runs": found["runs"]})),  # nosec B704
    )


def latex(study: Study, found: dict[str, Any]) -> str:
    """A document that compiles on its own, beside the PDFs of its figures."""
    return tex_environment(HERE).get_template("document.tex.j2").render(found, built=study.tables)


def _row(values: list[Any], digits: list[int | None]) -> str:
    """Of the list that readers without scripts get."""
    numbers = [f"{v:.{d}f}" if d is not None and v is not None else v for v, d in zip(values, digits, strict=True)]
    first, *rest = ("" if value is None else escape(str(value)) for value in numbers)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in rest)}</tr>'


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
