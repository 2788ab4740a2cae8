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

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import fill

from ablations.planner import Column, available, plan
from analysis.render import CSV_COLUMNS, FORMATS, _tex, document, name_of, render
from analysis.statistics import Estimate
from analysis.table import Table, TableCell, TableRow, build
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
    fill(store, plan((), "smoke", (0, 1), fingerprint="feed"), {"table5.folds.top1": 99.0}, skip=("table5.masked",))
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
    fill(paper, plan(["table5"], "paper", (0, 1, 2), fingerprint="feed"), default=10.0)
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
    symbols = r"\$(\\(pm|times|checkmark|Theta|mu|geq|leq|rightarrow)|\^2)\$"
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
    (tmp_path / "all.tex").write_text(document("\n".join(parts)), encoding="utf-8")
    flags = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"] if "pdflatex" in str(TEX) else []
    ran = subprocess.run(
        [str(TEX), *flags, "all.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (tmp_path / "all.pdf").stat().st_size > 10_000
    assert "Overfull" not in ran.stdout
