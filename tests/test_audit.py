"""The paper as data: its numbers, its sentences as claims, and what its own tables say of them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.artifact import load_artifact
from analysis.audit import audit, release
from analysis.claims import Contrast, Interval, claims, interval, known, load, target
from analysis.paper import Printed, counts, printed, rows
from sdae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT.parent / "shared/paper/sdae-paper.md"
sys.path.insert(0, str(ROOT / "docs"))
needs_paper = pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
ONE = Fraction(1)


def rounded(value: Decimal, decimals: int) -> Printed:
    text = value.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    return Printed(float(text), decimals, "%", "a table")


def agreement(changes: dict[str, float]) -> dict[str, bool | None]:
    """What the audit says of each claim when some printed values are others."""
    numbers = {**printed(), **counts()}
    numbers |= {cell: replace(numbers[cell], value=value) for cell, value in changes.items()}
    return {entry["claim"]: entry["agrees"] for entry in audit(numbers)}


# The numbers
@needs_paper
@pytest.mark.parametrize("row", rows())
def test_a_row_is_the_papers(row: str) -> None:
    """Its values, and what it says beside them, stand in one line of the paper's text in this order."""
    table, values = row.partition(".")[0], rows()[row]
    artifact = load_artifact(table)
    cells = [printed().get(f"{row}.{column.name}") for column in artifact.columns]
    texts = [f"{cell.value:.{cell.decimals}f}" if cell else "_" for cell in cells]
    marks = [["×", "✓"][value] for value in values.values() if isinstance(value, bool)]
    if table == "table1":
        time, overhead, memory = texts
        texts = [f"{time}s" + (f"(+{overhead}%)" if overhead != "_" else ""), f"{memory}G"]
    elif table == "table5":
        texts = [*marks, *texts]
    else:
        marks = [*marks, "✓" if marks == ["×"] else "×"] if marks else []
        crops = [str(values["crops"] or "_")] if "crops" in values else []
        texts = [str(values["epochs"]), *crops, *marks, *texts]
    lines = PAPER.read_text().replace("$\\checkmark$", "✓").replace("<b>√</b>", "✓").splitlines()
    assert [line for line in lines if line.endswith("\t".join(texts))], texts


@pytest.mark.parametrize("row", rows())
def test_a_row_is_the_artifacts(row: str) -> None:
    table, _, name = row.partition(".")
    meta = next(one.meta for one in load_artifact(table).rows if one.name == name)
    assert {key: rows()[row][key] for key in meta} == dict(meta)


# Arithmetic
@given(st.decimals(10, 100, places=4), st.decimals(10, 100, places=4), st.integers(0, 2), st.integers(0, 2))
def test_a_sound_sentence_is_never_flagged(one: Decimal, other: Decimal, decimals: int, said: int) -> None:
    """Whatever lies behind the printed numbers: a difference, ratio, value or order that is told rightly stands."""
    a, b = max(one, other), min(one, other)
    numbers = {"a": rounded(a, decimals), "b": rounded(b, decimals)}
    difference = {"a": ONE, "b": -ONE}

    def spelled(value: Decimal) -> str:
        return f"{rounded(value, said).value:.{said}f}"

    sentences = {
        Fraction(a): Contrast({"a": ONE}, target(spelled(a))),
        Fraction(a - b): Contrast(difference, target(spelled(a - b))),
        Fraction(a) / Fraction(b): Contrast({"a": ONE}, target(spelled(a / b)), over="b"),
    }
    for truth, contrast in sentences.items():
        _, spread = contrast.found(numbers)
        assert spread.holds(Interval(truth, truth)), "the number is not among those that it may be"
        assert contrast.agrees(numbers) is not False, contrast.arithmetic(numbers)
    order = Contrast(difference, target("> 0" if a > b else ">= 0"))
    assert order.agrees(numbers) is (True if numbers["a"].value > numbers["b"].value else None)
    units = Decimal(1).scaleb(-said) + 2 * Decimal(1).scaleb(-decimals)
    assert Contrast(difference, target(spelled(a - b + 2 * units))).agrees(numbers) is False


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("84.1", ["84.05", "84.1499"], ["84.15", "84.04"]),
        ("5", ["4.5", "5.49"], ["5.5", "4.4"]),
        ("0.23", ["0.225", "0.23"], ["0.235"]),
        ("25%", ["0.245", "0.25"], ["0.255", "25"]),
        ("+49.9%", ["1.4985", "1.499"], ["1.4995", "0.499"]),
        ("about 18%", ["0.162", "0.198"], ["0.161", "0.199"]),
        ("about 2", ["1", "3"], ["0.9", "3.1"]),
        ("> 0", ["0.001", "1000"], ["0", "-1"]),
        (">= 0.3", ["0.3", "1"], ["0.29"]),
        ("[45, 50)", ["45", "49.9"], ["50", "44.9"]),
        ("[0, 0]", ["0"], ["0.01", "-0.01"]),
    ],
)
def test_values(text: str, inside: list[str], outside: list[str]) -> None:
    allowed = target(text, ratio="%" in text)
    assert all(allowed.holds(Interval(Fraction(x), Fraction(x))) for x in inside)
    assert not any(allowed.meets(Interval(Fraction(x), Fraction(x))) for x in outside)


def test_rounding_leaves_open_what_it_leaves_open() -> None:
    """Two equal printed numbers may hide either order; open ends that touch do not meet."""
    numbers = {"a": Printed(84.1, 1, "%", ""), "b": Printed(84.1, 1, "%", ""), "c": Printed(84.0, 1, "%", "")}
    assert Contrast({"a": ONE, "b": -ONE}, target("> 0")).agrees(numbers) is None
    assert Contrast({"a": ONE, "c": -ONE}, target("> 0")).agrees(numbers) is True
    assert Contrast({"c": ONE, "a": -ONE}, target("> 0")).agrees(numbers) is False
    assert Contrast({"a": ONE, "c": -ONE}, target("0.2")).agrees(numbers) is None, "84.149 - 83.951 is told as 0.2"
    assert Contrast({"a": ONE, "c": -ONE}, target("0.3")).agrees(numbers) is False
    assert str(interval(numbers["a"])) == "[84.05, 84.15)"


# The claims
@needs_paper
def test_every_quote_is_the_papers() -> None:
    """To the letter, and in the section that the claim names."""
    text = PAPER.read_text()
    pieces = re.split(r"^#+ (\d(?:\.\d)?) ", text, flags=re.M)
    parts = {
        "Abstract": pieces[0],
        **{f"Section {n}": part for n, part in zip(pieces[1::2], pieces[2::2], strict=True)},
    }
    for claim in claims():
        part = text if claim.where.startswith("Table") else parts[claim.where]
        assert claim.quote in " ".join(part.split()), claim.id


def test_claims_are_whole() -> None:
    assert len(claims()) >= 60
    assert len({claim.id for claim in claims()}) == len(claims())
    for claim in claims():
        assert set(claim.cells) <= known()
        assert bool(claim.contrasts) == (claim.kind != "stated")
    tables = {cell for cell in known() if cell.startswith("table")} - set(counts())
    told = {cell.partition(".")[0] for claim in claims() for cell in claim.cells}
    assert told == {cell.partition(".")[0] for cell in tables} | {"figure4a", "figure4b", "figure4c", "text"}


def test_claims_stand_on_measured_values_too() -> None:
    found = {claim.id: claim for claim in claims()}
    (contrast,) = found["over-mae"].contrasts
    value = contrast.value({"table2.sdae-300.finetune": 84.0, "table2.mae-300.finetune": 82.5})
    assert (value, str(contrast.target)) == (1.5, "[1.15, 1.25)")
    (mean,) = found["epoch-long-training"].contrasts
    flat = dict.fromkeys(mean.cells, 80.0)
    longer = {cell: value + ("epoch" in cell and "-300" in cell) for cell, value in flat.items()}
    assert mean.value(flat) == pytest.approx(0)
    assert mean.value(longer) == pytest.approx(1)
    (folds,) = [c for c in found["five-times"].contrasts if c.over]
    assert folds.value({"text.patches": 200, "text.crop-36": 40}) == 5
    sensitive = found["iteration-0.001"]
    assert sensitive.agrees([False, None, True]) is True
    assert sensitive.agrees([False, None]) is None
    assert sensitive.agrees([False, False]) is False
    assert found["over-mae"].agrees([True, False]) is False


GOOD = "id: mine, quote: q, where: Section 9"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("kind: greater, of: table5.fold.top1, than: table5.full.top1", r"claim mine: table5.fold.top1: no such cell"),
        ("kind: greater, of: table5.folds.top1, than: table9.*.top1", r"claim mine: table9.\*.top1: no such cell"),
        ("kind: difference, of: table5.folds.top1, than: table5.full.top1", r"claim mine: kind 'difference' takes of,"),
        ("kind: equals, cells: {table5.folds.top1: some}", r"claim mine: value: 'some' \(allowed: \"1.2\""),
        ("kind: biggest, of: table5.folds.top1", r"claim mine: kind: 'biggest': input should be 'equals', "),
        ("kind: monotone, of: [table5.folds.top1], cell: x", r"claim mine: cell: unknown key \(allowed: id, "),
        ("kind: monotone, of: 'table5.{1}.top1', each: [folds]", r"claim mine: "),
        ("kind: stated", r"claim mine: kind 'stated' takes note, got "),
    ],
)
def test_bad_claims_are_named(entry: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"- {{{GOOD}, {entry}}}\n")
    with pytest.raises(UserError, match=rf"^{path}: {message}"):
        load(path)


def test_a_claim_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"- {{{GOOD}, kind: stated, note: n}}\n" * 2)
    with pytest.raises(UserError, match="claim mine: two claims have this id"):
        load(path)


# The audit
DISAGREE = {
    "table1-memory": "16.01 − 16.02 = −0.01 (−0.02, 0)",
    "linear-over-all": "64.9 − 76.2 = −11.3 (−11.4, −11.2)",
    "ade-over-cae": "48.6 − 47.7 = 0.9 (0.8, 1)",
    "ablations-100-epochs": "84.1 − 83.5 = 0.6 (0.5, 0.7)",
    "two-folds": "147 − 2 × 79 = −11",
}


def test_the_audit_finds_what_disagrees_and_nothing_else() -> None:
    found = audit()
    assert {entry["claim"] for entry in found if entry["agrees"] is False} == set(DISAGREE)
    for entry in found:
        assert list(entry) == ["claim", "quote", "where", "expected", "found", "agrees"]
        assert all(isinstance(entry[key], str) for key in entry if key != "agrees")
        assert entry["found"]
        assert DISAGREE.get(entry["claim"], "") in entry["found"]


def test_what_cannot_be_told_says_why() -> None:
    """The text prints two values of Figure 4: no claim that rests on others is judged."""
    found = {entry["claim"]: entry for entry in audit()}
    for claim in claims():
        unknown = [cell for cell in claim.cells if cell.startswith("figure4") and cell not in printed()]
        if unknown:
            assert found[claim.id]["agrees"] is None
            assert found[claim.id]["found"].startswith("not printed: ")
    assert "printed in this sentence only" in found["crop-36-accuracy"]["found"]
    assert "not in the text at hand" in found["factor-t"]["found"]


@pytest.mark.parametrize(
    ("cell", "value", "fall"),
    [
        ("table2.sdae-300.finetune", 84.4, {"abstract-finetune", "over-mae", "over-beit", "over-cae", "conclusion"}),
        ("table2.mae-300.finetune", 82.5, {"over-mae"}),
        ("table3.mae-1600.miou", 48.8, {"ade-best", "ade-over-mae-1600", "abstract-margin-miou"}),
        ("table4.cae-300.apm50", 66.3, {"coco-best"}),
        ("table5.masked.top1", 83.9, {"masked-loss", "folds-gain"}),
        ("table1.full.time", 836, {"table1-overhead-full"}),
        ("table1.crop.time", 611, {"table1-overhead-crop"}),
        ("figure4b.full.top1", 83.14, {"full-over-crop-36"}),
        ("table2.dino-400.crops", 11, {"dino-crops"}),
        ("text.folds-3", 50, {"three-folds", "fold-as-long-as-student", "almost-all-masked"}),
    ],
)
def test_a_changed_number_is_noticed(cell: str, value: float, fall: set[str]) -> None:
    before, after = agreement({}), agreement({cell: value})
    assert {claim for claim in before if before[claim] is True and after[claim] is False} >= fall
    assert all(after[claim] is False for claim in DISAGREE)


def test_a_mended_number_is_no_longer_flagged() -> None:
    assert agreement({"table3.cae-300.miou": 46.7})["ade-over-cae"] is True
    assert agreement({"text.folds-2": 73})["two-folds"] is True
    assert agreement({"table1.folds.memory": 15.9})["table1-memory"] is True


def test_the_release_beside_the_paper() -> None:
    for entry in release():
        assert list(entry) == ["setting", "paper", "release", "where", "agrees"]
        assert entry["agrees"] in (True, False, None)
        assert entry["agrees"] is None or entry["where"] != "nowhere"
    assert {entry["setting"] for entry in release() if entry["agrees"] is False} == {
        "Length of two folds", "Similarity, the axis for the full image", "Code of Tables 3 and 4",
    }  # fmt: skip


def test_the_page_is_what_the_data_give() -> None:
    import make_audit

    assert make_audit.page() == make_audit.PAGE.read_text()
