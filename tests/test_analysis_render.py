"""One table in five formats: what they hold, and that no text of a user's breaks one of them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import fill

from ablations.planner import Column, available, plan
from analysis.explain import explain
from analysis.render import CSV_COLUMNS, FORMATS, PACKAGES, _tex, measured_text, name_of, render
from analysis.statistics import Estimate
from analysis.study import Study, build, study
from analysis.table import Table, TableCell, TableRow
from sdae.errors import UserError
from sdae.store import Store

TEX = shutil.which("pdflatex") or shutil.which("tectonic")
NASTY = r'50 % of $x_1^2$ & #3 {a} \input{b} ~ <b> |p| "q" ``r\'\' -- --- [1] * ✓ é Θ 漢 \n' + "\nnew line"
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


def table_of(label: str, note: str = "", title: str = "A title", column: str = "Top-1") -> Table:
    shown = TableCell(
        "own.row.top1", 84.1, 1, False, "measured", 3, ["finetune-0"], Estimate(84.25, 3, 0.1, 2, "seeds"), None, True
    )
    columns = [Column("top1", column, "%", 1, True)]
    rows = [TableRow("row", label, {f"{label} ": label, "flag": True, "none": None}, {"top1": shown})]
    return Table(
        "own",
        "table",
        title,
        "smoke",
        "smoke: builtin",
        label,
        None,
        columns,
        rows,
        [0, 1, 2],
        3,
        ["c0ffee"],
        True,
        [note],
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store") / "runs")
    fill(store, plan((), "smoke", (0, 1), content="feed"), {"table5.folds.top1": 99.0}, skip=("table5.masked",))
    return store


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("artifact", available())
def test_every_format_says_scale_dataset_model_and_synthetic(store: Store, artifact: str, format: str) -> None:
    table = build(store, artifact, "smoke")
    text = render(table, format)
    assert text == render(build(store, artifact, "smoke"), format)
    assert "smoke" in text
    if table.runs:
        assert ("generated pictures of 32 px" if artifact == "table1" else "builtin") in text
        assert "vit_tiny" in text.replace("\\_", "_")
        assert re.search("synthetic", text, re.IGNORECASE)


def test_markdown(store: Store) -> None:
    lines = render(build(store, "table5", "smoke"), "md").splitlines()
    assert lines[0].startswith("**Table 5.** SYNTHETIC RESULTS")
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    assert rows[0][1:] == [
        "Full image",
        "Only masked",
        "Multi fold",
        "Teacher normalize",
        "Accuracy (%) paper",
        "measured",
        "n",
    ]
    assert {len(row) for row in rows} == {8}
    assert [row[5] for row in rows[2:]] == ["83.7", "84.0", "83.5", "84.1"]
    assert rows[4][6:] == ["", ""]
    assert re.fullmatch(r"\*\*9\d\.\d\d ± \d+\.\d\d\*\*", rows[5][6])
    assert rows[5][7] == "2"
    figure = render(build(store, "figure4b", "smoke"), "md")
    assert figure.count("unknown |") == 7
    assert "| 82.81 |" in figure


def test_verdicts_are_shown_at_the_papers_scale_only(store: Store, tmp_path: Path) -> None:
    assert "verdict |" not in render(build(store, "table5", "smoke"), "md")
    paper = Store(tmp_path)
    fill(paper, plan(["table5"], "paper", (0, 1, 2), content="feed"), default=10.0)
    assert render(build(paper, "table5", "paper"), "md").count("| below |") == 4


def test_names_and_formats() -> None:
    assert [name_of(n) for n in ("table5", "figure4b", "figure4", "own")] == [
        "Table 5",
        "Figure 4(b)",
        "Figure 4",
        "own",
    ]
    with pytest.raises(UserError, match="allowed: md, latex, html, csv, json"):
        render(table_of("a"), "docx")


def test_powers_of_a_label(store: Store) -> None:
    table = build(store, "table4", "smoke")
    assert "AP<sup>b</sup><sub>50</sub> (%)" in render(table, "html")
    assert r"AP$^{b}$$_{50}$ (\%)" in render(table, "latex")


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


@given(texts)
def test_html_shows_text_as_text(text: str) -> None:
    parser, plain = Text(), Text()
    parser.feed(render(table_of(text, text, text, text), "html"))
    plain.feed(render(table_of("plain", "plain", "plain", "plain"), "html"))
    assert parser.tags == plain.tags
    assert text in parser.cells


@given(texts, texts)
def test_csv_comes_back(label: str, title: str) -> None:
    rows = list(csv.DictReader(io.StringIO(render(table_of(label, title=title), "csv"))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 1
    assert rows[0]["label"] == label
    assert (rows[0]["measured"], rows[0]["synthetic"], rows[0]["verdict"]) == ("84.25", "True", "")


@given(texts)
def test_markdown_keeps_its_columns(text: str) -> None:
    lines = [line for line in render(table_of(text, text, text, text), "md").splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {8}


@given(texts)
def test_latex_is_safe_text(text: str) -> None:
    set_ = _tex(text)
    assert all(" " <= c <= "~" or "À" <= c <= "ÿ" for c in set_)
    names = "textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|textquotedbl|textasciigrave|dots"
    commands = rf"\\({names})\{{\}}"
    symbols = r"\$(\\(pm|times|checkmark|Theta|Delta|dagger|mu|geq|leq|rightarrow)|\^2|-)\$"
    rest = re.sub(rf"{commands}|{symbols}|\\[{{}}$&#%_]|\{{[\[\]*]?\}}", "", set_)
    assert not re.search(r"[\\{}$&#%_^~]", rest)


@given(texts)
def test_json_comes_back(text: str) -> None:
    found = json.loads(render(table_of(text, text), "json"))
    assert found["rows"][0]["label"] == text
    assert found["notes"] == [text]


@pytest.mark.skipif(TEX is None, reason="neither pdflatex nor tectonic is installed")
def test_latex_compiles(store: Store, tmp_path: Path) -> None:
    parts = [render(build(store, artifact, "smoke"), "latex") for artifact in available()]
    parts.append(render(table_of(NASTY, NASTY, NASTY, NASTY), "latex"))
    head = [r"\documentclass{article}", r"\usepackage[T1]{fontenc}", *(rf"\usepackage{{{name}}}" for name in PACKAGES)]
    lines = [*head, r"\begin{document}", *parts, r"\end{document}", ""]
    (tmp_path / "all.tex").write_text("\n".join(lines), encoding="utf-8")
    flags = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"] if "pdflatex" in str(TEX) else []
    ran = subprocess.run(
        [str(TEX), *flags, "all.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (tmp_path / "all.pdf").stat().st_size > 10_000
    assert "Overfull" not in ran.stdout


# Every format parsed back


def made_at(scale: str, root: Path) -> Study:
    """All artifacts of the suite with two seeds; some runs missing, some made by other code than today's."""
    store = Store(root)
    sweep = plan((), scale, (0, 1), content="feed")
    fill(store, sweep, skip=("table5.masked",))
    for cell in ("table5.full.top1", "table1.crop.time", "figure4a.epoch-0.90-300.top1", "figure4b.crop-49.top1"):
        file = store.run(sweep.cells[cell][0][1]).path / "result.json"
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"provenance": {"substance": "0" * 16}}))
    return study(store, (), scale)


@pytest.fixture(scope="module", params=["smoke", "paper"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return made_at(request.param, tmp_path_factory.mktemp("made") / "runs")


Shown = dict[str, tuple[str, str, str, str, bool]]  # by cell: paper, mean, half its interval, n, stale


def shown(measured: str, paper: str, n: str, stale: bool) -> tuple[str, str, str, str, bool]:
    mean, _, half = measured.partition(" ± ")
    return paper, mean, half, n.partition(" ")[0], stale


def in_rows(rows: list[tuple[list[str], list[str]]], header: list[str]) -> Shown:
    """Rows as (cell names, texts); texts behind the leading columns come in equal groups, one per name."""
    found: Shown = {}
    for names, texts in rows:
        if not names:
            continue
        width = header[::-1].index("paper") + 1 if "paper" in header else 2
        for name, start in zip(names, range(len(texts) - width * len(names), len(texts), width), strict=True):
            paper, measured, n = texts[start : start + 3]
            found[name] = shown(measured.removesuffix("†").rstrip(), paper, n, measured.endswith("†"))
    return found


def from_markdown(text: str) -> Shown:
    lines = text.splitlines()
    plain = [re.sub(r"\\(.)", r"\1", line.replace("**", "")) for line in lines if line.startswith("|")]
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in plain]
    names = lines[lines.index("<!-- cells, row by row:") + 1 : -1]
    return in_rows(
        [(n.split(), c) for n, c in zip(names, cells[2:], strict=True)], [c.split(" ")[-1] for c in cells[0]]
    )


def from_latex(text: str) -> Shown:
    lines = text.splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    header = [part.removesuffix(r" \\") for part in lines[lines.index(r"\midrule") - 1].split(" & ")]
    rows = []
    for line in body:
        row, _, names = line.partition(r" \\ % ")
        row = re.sub(r"\\textcolor\{gray\}\{(.*?)\\,\$\\dagger\$\}", r"\1†", row)
        row = re.sub(r"\\textbf\{(.*?)\}", r"\1", row).replace(r"$\pm$", "±").replace("$-$", "−").replace("--", "–")
        rows.append((names.split(), [part.strip() for part in row.split(" & ")]))
    return in_rows(rows, header)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[list[str], list[str]]] = []
        self.header: list[str] = []
        self.inside, self.stale = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.inside = tag if tag in ("thead", "tbody", "tfoot") else self.inside
        if self.inside == "tbody" and tag == "tr":
            self.rows.append(([], []))
        if self.inside == "tbody" and tag in ("td", "th"):
            self.rows[-1][1].append("")
            if name := values.get("data-cell"):
                self.rows[-1][0].append(name)
            self.stale += values.get("class") == "stale" and "data-cell" in values
        if self.inside == "thead" and tag == "tr":
            self.header = []

    def handle_data(self, data: str) -> None:
        if self.inside == "tbody" and data.strip():
            self.rows[-1][1][-1] += data
        if self.inside == "thead" and data.strip():
            self.header.append(data)


def from_html(text: str) -> Shown:
    parser = Cells()
    parser.feed(text)
    found = in_rows([(names, [t.strip() for t in texts]) for names, texts in parser.rows], parser.header)
    assert parser.stale == sum(entry[-1] for entry in found.values())
    return found


def from_numbers(rows: list[dict[str, Any]], table: Table) -> Shown:
    """CSV and JSON hold all digits: as they are printed in the others."""
    digits = {column.name: column.decimals + 1 for column in table.columns}
    dashes = {cell.cell for cell in table.cells() if cell.dash}
    states = {cell.cell: measured_text(cell, table.columns[0]) for cell in table.cells() if not cell.estimate}
    found = {}
    for row in rows:
        cell, width = row["cell"], digits[row["cell"].rpartition(".")[2]]
        paper = "–" if cell in dashes else "unknown"
        if row["paper"] not in (None, ""):
            paper = f"{float(row['paper']):.{int(row['paper_decimals'])}f}"
        if row["measured"] in (None, ""):
            found[cell] = (paper, states[cell], "", "", False)
            continue
        mean, low, high = (float(row[key]) for key in ("measured", "low", "high"))
        assert mean == pytest.approx((low + high) / 2)
        half = f"{(high - low) / 2:.{width}f}"
        found[cell] = (paper, f"{mean:.{width}f}", half, str(row["seeds"]), str(row["stale"]) == "True")
    return found


@pytest.mark.parametrize("artifact", available())
def test_all_formats_say_the_same_numbers(made: Study, artifact: str) -> None:
    table = made.tables[artifact]
    texts = {format: render(table, format) for format in FORMATS}
    cells = [{**cell, "row": row["row"]} for row in json.loads(texts["json"])["rows"] for cell in row["cells"].values()]
    expected = from_numbers(cells, table)
    assert set(expected) == {cell.cell for cell in table.cells()}
    assert from_numbers(list(csv.DictReader(io.StringIO(texts["csv"]))), table) == expected
    assert from_markdown(texts["md"]) == expected
    assert from_html(texts["html"]) == expected
    assert from_latex(texts["latex"]) == expected
    assert any(entry[1] for entry in expected.values())
    stale = {"table1": 3, "table5": 1, "figure4a": 1, "figure4b": 1}.get(artifact, 0)
    assert sum(entry[-1] for entry in expected.values()) == stale
    for cell in expected:
        assert explain(made, cell)["cell"] == cell


def test_stale_cells_are_greyed_and_said_to_be(made: Study) -> None:
    table = made.tables["table5"]
    (cell,) = (cell for cell in table.cells() if cell.stale)
    assert cell.cell == "table5.full.top1"
    note = "†: the code that makes these numbers has changed in substance since their runs."
    assert note in table.notes
    assert f"- {note}" in render(table, "md")
    html = render(table, "html")
    assert html.count('class="stale"') == (2 if made.scale.name == "paper" else 1)
    assert r'<td data-cell="table5.full.top1" class="stale" title="the code' in html
    assert r"\textcolor{gray}{" in render(table, "latex")
    assert not any("†" in note for note in made.tables["figure4c"].notes)
    empty = [row for row in render(made.tables["figure4b"], "md").splitlines() if re.search(r"\| +† \|", row)]
    assert not empty, "a cell without a number has no mark"


def test_differences_at_the_papers_scale_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    means = {"table5.full.top1": 84.5, "table5.folds.top1": 83.0}
    fill(store, plan(["table5"], "paper", (0, 1, 2), content="feed"), means, noise=0.0)
    table = build(store, "table5", "paper")
    assert table.rows[1].cells["top1"].difference == pytest.approx(0.5)
    text = render(table, "md")
    assert "| Δ |" in text
    assert "| +0.50 |" in text
    assert "| −1.10 |" in text
    assert r"$-$1.10" in render(table, "latex")
    rows = {row["cell"]: row for row in csv.DictReader(io.StringIO(render(table, "csv")))}
    assert float(rows["table5.folds.top1"]["difference"]) == pytest.approx(-1.1)
    smoke = Store(tmp_path / "smoke")
    fill(smoke, plan(["table5"], "smoke", (0, 1), content="feed"))
    assert "Δ" not in render(build(smoke, "table5", "smoke"), "md")
    assert build(smoke, "table5", "smoke").rows[0].cells["top1"].difference is None
