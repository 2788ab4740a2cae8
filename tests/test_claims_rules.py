"""Claims, rule by rule: how a sentence becomes contrasts, what each is worth, and how it is written."""

from __future__ import annotations

import csv
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from synthetic import fill
from test_claims import cell, claim, difference

from ablations.planner import plan
from analysis.claims import MARGIN, Claim, Contrast, Interval, known, load, number, target
from analysis.inference import ALPHA, MOST_SEEDS, Measured, judge, names_a_value, seeds_needed
from analysis.paper import Printed, counts
from analysis.statistics import Estimate
from analysis.study import study
from analysis.verdicts import _hours, _Price, found, judge_study, ledger, measured, render
from sdae.errors import UserError
from sdae.store import Store, SyntheticStore

ONE = Fraction(1)
A, B, C = "table5.folds.top1", "table5.full.top1", "table5.masked.top1"
RAW = "table5.full-raw.top1"


def claims_of(tmp_path: Path, text: str) -> tuple[Claim, ...]:
    file = tmp_path / "claims.yaml"
    file.write_text(text)
    return load(file)


def one_of(tmp_path: Path, keys: str) -> Claim:
    (found,) = claims_of(tmp_path, f"- {{id: x, quote: it  is\n    so, where: Table 5, {keys}}}\n")
    return found


# From a file
@pytest.mark.parametrize(
    ("keys", "contrasts"),
    [
        (f"kind: greater, of: {A}, than: [{B}, {C}]", [({A: 1, B: -1}, "> 0"), ({A: 1, C: -1}, "> 0")]),
        (f"kind: best among, of: {A}, than: [{B}]", [({A: 1, B: -1}, "> 0")]),
        (f"kind: monotone, of: [{A}, {B}, {C}]", [({A: 1, B: -1}, "> 0"), ({B: 1, C: -1}, "> 0")]),
        (f"kind: margin, of: {A}, than: {B}", [({A: 1, B: -1}, ">= 0.3")]),
        (f"kind: comparable, of: {A}, than: {B}", [({A: 1, B: -1}, "[-0.3, 0.3]")]),
        (f"kind: sensitive, of: {A}, than: {B}", [({A: 1, B: -1}, "> 0.3"), ({B: 1, A: -1}, "> 0.3")]),
        (f'kind: difference, of: {A}, than: {B}, value: "1.2"', [({A: 1, B: -1}, "[1.15, 1.25)")]),
        (f'kind: equals, cells: {{{A}: "84.1", {B}: "> 5"}}', [({A: 1}, "[84.05, 84.15)"), ({B: 1}, "> 5")]),
        (f'kind: within, cells: {{{A}: "[1, 2)"}}', [({A: 1}, "[1, 2)")]),
        (f'kind: sum, terms: {{{A}: 2, {B}: "-0.5"}}, value: "> 0"', [({A: 2, B: Fraction("-0.5")}, "> 0")]),
        (f'kind: sum, terms: {{{A}: 1, "table5.full*.top1": -1}}, value: "> 0"',
         [({A: 1, RAW: Fraction(-1, 2), B: Fraction(-1, 2)}, "> 0")]),
        ("kind: stated, note: who knows", []),
        ("kind: greater, each: [folds, full], of: 'table5.{}.top1', than: table5.masked.top1",
         [({A: 1, C: -1}, "> 0"), ({B: 1, C: -1}, "> 0")]),
        ("kind: greater, each: [[folds, masked]], of: 'table5.{0}.top1', than: 'table5.{1}.top1'",
         [({A: 1, C: -1}, "> 0")]),
        (f"kind: greater, of: {A}, than: 'table5.*.top1'",
         [({A: 1, other: -1}, "> 0") for other in (B, RAW, C)]),
    ],
)  # fmt: skip
def test_a_sentence_as_contrasts(keys: str, contrasts: list[tuple[dict[str, Any], str]], tmp_path: Path) -> None:
    one = one_of(tmp_path, keys)
    assert (one.id, one.quote, one.where) == ("x", "it is so", "Table 5")
    assert one.some == (one.kind == "sensitive")
    wanted = [Contrast({c: Fraction(w) for c, w in terms.items()}, target(text)) for terms, text in contrasts]
    assert sorted(map(str, one.contrasts)) == sorted(map(str, wanted))
    assert all(contrast in wanted for contrast in one.contrasts)
    assert sorted(one.cells) == sorted({name for contrast in wanted for name in contrast.terms})
    assert one.note == ("who knows" if one.kind == "stated" else "")


def test_a_ratio(tmp_path: Path) -> None:
    ratio = one_of(tmp_path, f'kind: ratio, of: {A}, than: {B}, value: "about 2"').contrasts
    assert ratio == (Contrast({A: ONE}, Interval(Fraction(1), Fraction(3)), over=B),)
    assert ratio[0].cells == (A, B)
    assert ratio[0].value({A: 6.0, B: 2.0}) == 3.0
    assert Contrast({A: ONE, B: -2 * ONE}, target("> 0")).value({A: 6.0, B: 2.0}) == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1}", "claims.yaml: expected a list of claims"),
        ("- 1", "claim 1: "),
        ("- {id: x, quote: q, kind: stated}", "claim x: kind 'stated' takes note, got "),
        ("- {id: x, quote: q, kind: stated, note: n, value: '1'}", "kind 'stated' takes note, got note, value"),
        (f"- {{id: x, quote: q, kind: greater, of: {A}}}", "claim x: kind 'greater' takes of, than, got of"),
        (f"- {{id: x, quote: q, kind: equals, cells: {{{A}: '1'}}, than: {B}}}", "takes cells, got cells, than"),
        ("- {id: x, quote: q, kind: greater, of: table5.fold.top1, than: table5.full.top1}",
         "claim x: table5.fold.top1: no such cell (e.g. table5.folds.top1, "),
        (f"- {{id: x, quote: q, kind: equals, cells: {{{A}: 1.5x}}}}", "claim x: value: '1.5x' (allowed: "),
        (2 * "- {id: x, quote: q, kind: stated, note: n}\n", "claim x: two claims have this id"),
        (f"- {{id: x, quote: q, kind: greater, of: {A}, than: {A}}}", f"claim x: {A}: is compared with itself"),
        (f"- {{id: x, quote: q, kind: greater, each: [a], of: 'table5.{{1}}.top1', than: {A}}}", "claim x: "),
        (f"- {{id: x, quote: q, kind: greater, near: {A}}}", "claim x: near: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        claims_of(tmp_path, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_any_claim_may_have_a_note(tmp_path: Path) -> None:
    assert one_of(tmp_path, f"kind: greater, of: {A}, than: {B}, note: beside").note == "beside"
    assert {A, B, *counts()} <= known()


# Values and how they are written
@pytest.mark.parametrize(
    ("text", "low", "high", "shown"),
    [
        ("84.1", "84.05", "84.15", "[84.05, 84.15)"), ("-1", "-1.5", "-0.5", "[−1.5, −0.5)"),
        ("about 18", "16.2", "19.8", "[16.2, 19.8]"), ("about 2.0", "1.8", "2.2", "[1.8, 2.2]"),
        ("about 2", "1", "3", "[1, 3]"), ("about 18%", "0.162", "0.198", "[0.162, 0.198]"),
        ("+49.9%", "1.4985", "1.4995", "[1.4985, 1.4995)"), ("+50%", "1.495", "1.505", "[1.495, 1.505)"),
        ("(1, 2]", "1", "2", "(1, 2]"), ("[45, 50)", "45", "50", "[45, 50)"),
        ("[-0.3, 0.3]", "-0.3", "0.3", "[−0.3, 0.3]"),
    ],
)  # fmt: skip
def test_a_value(text: str, low: str, high: str, shown: str) -> None:
    found = target(text, ratio="%" in text)
    assert (found.low, found.high, str(found)) == (Fraction(low), Fraction(high), shown)


def test_half_lines() -> None:
    assert target("> 0") == Interval(Fraction(0), math.inf, open_low=True) and str(target("> 0")) == "> 0"
    assert target(">= -0.3") == Interval(Fraction("-0.3"), math.inf) and str(target(">= -0.3")) == "≥ −0.3"
    assert (number(1234.5678), number(-0.000123456), number(Fraction(1, 3))) == ("1234.6", "−0.00012346", "0.33333")
    for wrong in ("", "x1", "1.2.", "[1,2]", "1 ", " 1", "[1, 2", "about +", "> x", "5 %"):
        with pytest.raises(ValueError, match="value: "):
            target(wrong)
    assert Fraction("0.3") == MARGIN


def test_intervals_and_their_ends() -> None:
    closed, half, opened = (Interval(Fraction(1), Fraction(2), *ends) for ends in ((), (False, True), (True, True)))
    assert closed.holds(half) and half.holds(opened) and closed.holds(opened)
    assert not half.holds(closed) and not opened.holds(half) and not opened.holds(closed)
    beyond = Interval(Fraction(2), Fraction(3))
    assert closed.meets(beyond) and beyond.meets(closed)
    assert not half.meets(beyond) and not beyond.meets(half) and not opened.meets(beyond)
    assert not closed.meets(Interval(Fraction(3), Fraction(4)))
    assert half.times(Fraction(-2)) == Interval(Fraction(-4), Fraction(-2), True, False)
    assert half.times(Fraction(2)) == Interval(Fraction(2), Fraction(4), False, True)
    assert opened.plus(closed) == closed.plus(opened) == Interval(Fraction(2), Fraction(4), True, True)
    assert half.plus(closed) == Interval(Fraction(2), Fraction(4), False, True)
    assert half.over(closed) == Interval(Fraction(1, 2), Fraction(2), False, True)
    assert closed.over(half) == Interval(Fraction(1, 2), Fraction(2), True, False)


PRINTED = {
    "a": Printed(84.1, 1, "%", "t"), "b": Printed(82.9, 1, "%", "t"), "n": Printed(300, 0, "epochs", "t", exact=True)
}  # fmt: skip


def test_arithmetic_of_printed_numbers() -> None:
    gap = Contrast({"a": ONE, "b": -ONE}, target("1.2"))
    assert gap.found(PRINTED) == (Fraction("1.2"), Interval(Fraction("1.1"), Fraction("1.3"), True, True))
    assert gap.arithmetic(PRINTED) == "84.1 − 82.9 = 1.2 (1.1, 1.3)"
    assert gap.agrees(PRINTED) is True, "the number as printed is within, though its rounding is not"
    assert gap.slack(PRINTED) == pytest.approx(0.05)
    assert Contrast({"a": ONE}, target("> 84")).slack(PRINTED) == pytest.approx(0.1)
    assert Contrast({"a": ONE}, target("> 84.07")).agrees(PRINTED) is None, "a half-line gives no value"
    assert Contrast({"a": ONE}, target("84.1")).arithmetic(PRINTED) == "84.1 [84.05, 84.15)"
    assert Contrast({"n": ONE}, target("300")).arithmetic(PRINTED) == "300"
    ratio = Contrast({"n": ONE}, target("3.6"), over="b")
    assert ratio.found(PRINTED)[0] == Fraction(300) / Fraction("82.9")
    assert ratio.arithmetic(PRINTED) == "300 / 82.9 = 3.6188 (3.6166, 3.621]"
    assert ratio.agrees(PRINTED) is True
    assert Contrast({"a": ONE}, target("85.0")).agrees(PRINTED) is False


def test_formulas() -> None:
    assert Contrast({"a": ONE, "b": -ONE}, target("> 0")).formula() == "a − b"
    assert Contrast({"a": -ONE, "b": Fraction(1, 2)}, target("> 0")).formula() == "− a + 0.5 × b"
    assert Contrast({"a": Fraction(2)}, target("> 0"), over="b").formula(str.upper) == "2 × A / B"
    many = dict.fromkeys("abcdef", ONE)
    assert Contrast(many, target("> 0")).formula() == "a + b .. + f (6 terms)"
    assert Contrast(dict.fromkeys("abcd", ONE), target("> 0")).formula() == "a + b + c + d"
    assert str(Contrast({"a": ONE}, target("> 0"))) == "a > 0"
    assert str(Contrast({"a": ONE}, target("[300, 300]"))) == "a = 300"
    assert str(Contrast({"a": ONE}, target("84.1"))) == "a in [84.05, 84.15)"


def test_what_a_claim_expects() -> None:
    pair = [difference("a", "b"), difference("a", "c")]
    assert claim(*pair).expected == "a − b > 0; a − c > 0"
    assert claim(*pair, kind="sensitive").expected == "one of: a − b > 0; a − c > 0"
    assert claim(*[difference("a", name) for name in "bcde"]).expected.count(";") == 3
    assert (
        claim(*[difference("a", name) for name in "bcdef"]).expected == "a − b > 0; a − c > 0; .. a − f > 0 (5 in all)"
    )
    every, some = claim(*pair), claim(*pair, kind="sensitive")
    for verdicts, all_hold, one_holds in (
        ([True, True], True, True), ([True, None], None, True), ([True, False], False, True),
        ([None, False], False, None), ([False, False], False, False), ([None, None], None, None), ([], None, None),
    ):  # fmt: skip
        assert (every.agrees(verdicts), some.agrees(verdicts)) == (all_hold, one_holds), verdicts


# Judged by measured cells
def test_which_contrasts_give_a_number() -> None:
    for text, gives in (
        ("> 0", False), (">= 0.3", False), ("> 1", False), ("> 1.5", True), ("84.1", True), ("[-0.3, 0.3]", False),
        ("[-0.3, 0.4]", True), ("about 2", True),
    ):  # fmt: skip
        assert names_a_value(Contrast({"a": ONE}, target(text))) == gives, text
    assert names_a_value(Contrast({"a": ONE}, target("> 0"), over="b"))


def test_the_reading_that_decides() -> None:
    cells = {"a": cell(84.0, 9, "a"), "b": cell(83.0, 9, "b"), "c": cell(83.99, 9, "c")}
    pair = [difference("a", "b"), difference("a", "c")]
    (best,) = judge([claim(*pair)], cells)
    assert best.deciding is not None and best.deciding.contrast == pair[1], "the weakest of those that must all hold"
    (worse,) = judge([claim(*pair)], cells | {"a": cell(82.0, 9, "a")})
    assert worse.deciding is not None and worse.deciding.contrast == pair[1], "the strongest of those that contradict"
    (some,) = judge([claim(*pair, kind="sensitive")], cells)
    assert some.deciding is not None and some.deciding.contrast == pair[0]
    (none,) = judge([claim(*pair, kind="sensitive")], cells | {"a": cell(82.0, 9, "a")})
    assert none.deciding is not None and none.deciding.contrast == pair[0] if none.deciding else False
    (nothing,) = judge([claim(*pair)], {})
    assert (nothing.holds, nothing.fails) == (1.0, 1.0)
    assert (nothing.deciding, nothing.p, nothing.p_holm, nothing.missing) == (None, None, None, ["a", "b", "c"])


def test_p_values_of_a_claim() -> None:
    """Supported takes the weakest contrast; contradicted the strongest, by the number of contrasts."""
    cells = {"a": cell(84.0, arm="a"), "b": cell(83.9, arm="b"), "c": cell(83.8, arm="c")}
    alone = [judge([claim(difference("a", name))], cells)[0] for name in "bc"]
    (both,) = judge([claim(difference("a", "b"), difference("a", "c"))], cells)
    assert both.holds == pytest.approx(max(one.holds for one in alone))
    assert both.fails == pytest.approx(min(1.0, 2 * min(one.fails for one in alone)))
    (three,) = judge([claim(difference("a", "b"), difference("a", "c"), difference("a", "d"))], cells)
    assert (three.holds, three.missing) == (1.0, ["d"])
    assert three.fails == pytest.approx(min(1.0, 3 * min(one.fails for one in alone)))
    assert three.p == three.p_holm == 1.0, "no p is above 1"
    far = cells | {"a": cell(83.7, arm="a")}  # contradicted, by how many contrasts there are
    one, two = (judge([claim(difference("a", "b"), *[difference("a", "d")] * more)], far)[0].fails for more in (0, 1))
    assert two == pytest.approx(2 * one) and two < 0.5
    (some,) = judge([claim(difference("a", "b"), difference("a", "c"), kind="sensitive")], cells)
    assert some.holds == pytest.approx(min(1.0, 2 * min(one.holds for one in alone)))
    assert some.fails == pytest.approx(max(one.fails for one in alone))
    assert some.p == pytest.approx(min(1.0, 2 * min(some.holds, some.fails)))


def test_settings_decide_at_once() -> None:
    settings = {"n": Printed(300, 0, "epochs", "t", exact=True), "m": Printed(100, 0, "epochs", "t", exact=True)}
    cells = {"a": cell(84.0, arm="a"), "b": cell(83.0, arm="b")}
    right, wrong = (Contrast({"n": ONE}, target(text)) for text in ("[300, 300]", "[200, 200]"))
    (found,) = judge([claim(difference("a", "b"), right)], cells, counts=settings)
    assert found.verdict == "supported"
    (found,) = judge([claim(difference("a", "b"), wrong)], cells, counts=settings)
    assert found.verdict == "contradicted" and (found.holds, found.fails) == (1.0, 0.0)
    (found,) = judge([claim(right, difference("a", "b"))], cells, counts=settings)
    assert len(found.readings) == 1 and found.verdict == "supported", "settings first"
    (found,) = judge([claim(difference("b", "a"), right, kind="sensitive")], cells, counts=settings)
    assert found.verdict == "supported" and (found.holds, found.fails) == (0.0, 1.0)
    (found,) = judge([claim(right)], cells, counts=settings)
    assert (found.p, found.verdict) == (None, "undecided"), "no cell: the audit judges it"
    per = Contrast({"a": ONE, "n": Fraction(-1, 100)}, target("> 80"))
    (found,) = judge([claim(per)], cells, counts=settings)
    assert found.readings[0].estimate == pytest.approx(81.0) and found.printed == []


def test_one_arm_in_many_cells_and_one_pool() -> None:
    """Two cells of one arm count with their summed weights; own variances combine by Welch and Satterthwaite."""
    mean = Contrast({"a": Fraction(1, 2), "b": Fraction(1, 2), "c": -ONE}, target("> 0"))
    same = {"a": cell(84.0, arm="x"), "b": cell(84.0, arm="x"), "c": cell(83.0, arm="c")}
    (one,) = judge([claim(mean)], same)
    (two,) = judge([claim(difference("a", "c"))], same)
    assert (one.readings[0].low, one.p) == (pytest.approx(two.readings[0].low), pytest.approx(two.p))
    assert one.readings[0].spread == pytest.approx(two.readings[0].spread) == {"x": 0.01, "c": 0.01}
    own = {name: Measured(Estimate(m, 3, e, 2, "seeds"), name) for name, m, e in (("a", 84.0, 0.3), ("b", 83.0, 0.1))}
    (found,) = judge([claim(difference("a", "b"))], own)
    df = (0.09 + 0.01) ** 2 / (0.09**2 / 2 + 0.01**2 / 2)
    from scipy.stats import t

    half = float(t.ppf(0.975, df)) * 0.1**0.5
    assert found.readings[0].low == pytest.approx(1.0 - half) and found.readings[0].high == pytest.approx(1.0 + half)
    assert found.p == pytest.approx(2 * float(t.sf(1 / 0.1**0.5, df)))


def test_a_ratio_that_holds_its_divisor_and_printed_numbers() -> None:
    """(a + b) / b is beyond a bound as far as a / b is beyond the bound less one; printed numbers are intervals."""
    cells = {"a": cell(6.0, arm="a", sd=0.1), "b": cell(2.0, arm="b", sd=0.1)}
    sums = Contrast({"a": ONE, "b": ONE}, target("> 3.98"), over="b")
    plain = Contrast({"a": ONE}, target("> 2.98"), over="b")
    (one,), (other,) = (judge([claim(contrast)], cells) for contrast in (sums, plain))
    assert (one.holds, one.fails) == (pytest.approx(other.holds), pytest.approx(other.fails))
    first, second = one.readings[0], other.readings[0]
    assert first.estimate == pytest.approx(second.estimate + 1) == pytest.approx(4.0)
    assert first.high is not None and first.low is not None and first.low < 4.0 < first.high
    printed = {"b": Printed(2.0, 1, "s", "t")}  # [1.95, 2.05)
    (found,) = judge([claim(plain)], {"a": cells["a"]}, printed)
    assert found.readings[0].estimate == pytest.approx(3.0) and found.printed == ["b"]
    assert 0.0 < found.holds < 1.0
    (found,) = judge([claim(difference("a", "b"))], {"a": cells["a"]}, printed)
    (sure,) = judge([claim(Contrast({"a": ONE}, target("> 2")))], {"a": cells["a"]})
    half = (sure.readings[0].high - sure.readings[0].low) / 2  # type: ignore[operator]
    assert found.readings[0].low == pytest.approx(6.0 - 2.05 - half)
    assert found.readings[0].high == pytest.approx(6.0 - 1.95 + half)
    near = {"a": cell(2.0, arm="a", sd=0.1)}
    (found,) = judge([claim(difference("a", "b"))], near, printed)
    above, below = (judge([claim(Contrast({"a": ONE}, target(f"> {b}")))], near)[0] for b in (2.05, 1.95))
    assert (found.holds, found.fails) == (pytest.approx(above.holds), pytest.approx(below.fails)), "whatever it was"


def test_a_ratio_whose_divisor_may_be_nothing_has_no_interval() -> None:
    ratio = Contrast({"a": ONE}, target("> 0.5"), over="b")
    for sd, told in ((0.7, True), (1.0, False), (3.0, False)):  # of 1: 0 is outside, inside, far inside
        (found,) = judge([claim(ratio)], {"a": cell(2.0, arm="a"), "b": cell(1.0, arm="b", sd=sd)})
        assert (found.readings[0].low is not None) == told, sd


def test_a_spread_of_nothing_is_certain() -> None:
    sure = {name: Measured(Estimate(mean, 3, 0.0, 2, "seeds"), name) for name, mean in (("a", 84.0), ("b", 83.0))}
    (found,) = judge([claim(difference("a", "b"))], sure)
    assert (found.verdict, found.holds, found.fails) == ("supported", 0.0, 1.0)
    (level,) = judge([claim(difference("a", "b"))], sure | {"b": sure["a"]})
    assert level.holds == 1.0
    (half,) = judge([claim(difference("a", "b"))], sure | {"b": cell(83.0, arm="b")})
    assert half.readings[0].spread == pytest.approx({"a": 0.0, "b": 0.01})


def test_a_cell_over_itself_is_one() -> None:
    cells = {name: cell(2.0, arm="x", sd=0.1) for name in "ab"}
    (found,) = judge([claim(Contrast({"a": ONE}, target("> 0.5"), over="b"))], cells)
    assert (found.readings[0].estimate, found.readings[0].low, found.readings[0].high) == (1.0, 1.0, 1.0)


def test_seeds_that_decide() -> None:
    def needed(gap: float, allowed: str = "> 0", tests: int = 1, **keys: Any) -> int | None:
        cells = {"a": cell(84 + gap, arm="a"), "b": cell(84.0, arm="b")}
        return seeds_needed(judge([claim(difference("a", "b", allowed), **keys)], cells)[0], tests)

    few, many = needed(0.2), needed(0.1)
    quantiles = (1.959964 + 0.841621) ** 2 * 0.02
    assert (few, many) == (math.ceil(quantiles / 0.04), math.ceil(quantiles / 0.01)) == (4, 16)
    assert needed(-0.1) == many, "to contradict it takes as many"
    assert needed(5.0) == 2
    assert needed(0.0) == needed(1e-4) == MOST_SEEDS + 1
    assert needed(0.1, tests=10) > many and needed(0.1, tests=0) == many
    assert needed(0.1, "[-0.3, 0.3]") == needed(0.2, "> 0") == needed(0.1, "(-9, 0.3)")
    cells = {"a": cell(84.1, arm="a"), "b": cell(84.0, arm="b"), "c": cell(83.9, arm="c")}
    pair = [difference("a", "b"), difference("a", "c")]
    assert seeds_needed(judge([claim(*pair)], cells)[0], 1) == many, "all of them must hold"
    assert seeds_needed(judge([claim(*pair, kind="sensitive")], cells)[0], 1) == few, "one is enough"
    under = cells | {"a": cell(83.8, arm="a")}
    assert seeds_needed(judge([claim(*pair)], under)[0], 1) == few, "one is enough to contradict"
    between = cells | {"a": cell(83.98, arm="a")}
    assert seeds_needed(judge([claim(*pair)], between)[0], 1) == needed(-0.02), "one that fails is enough"
    for error, df in ((0.1, None), (None, 2)):
        half = {"a": Measured(Estimate(84.0, 3, error, df), "a"), "b": cell(80.0, arm="b")}
        assert judge([claim(difference("a", "b"))], half)[0].readings[0].low is None
    bare = {name: Measured(Estimate(84.0, 1), name) for name in "ab"}
    assert seeds_needed(judge([claim(difference("a", "b"))], bare)[0], 1) is None
    assert seeds_needed(judge([claim(difference("a", "b"))], {})[0], 1) is None
    assert pytest.approx(0.05) == ALPHA


# As told
def test_hours_and_numbers_as_told() -> None:
    assert _hours(0.01, 0.09) == "less than 0.1 GPU-hours"
    assert (_hours(0.05, 0.1), _hours(9.96, 20.04)) == ("0.1 to 0.1 GPU-hours", "10.0 to 20.0 GPU-hours")
    assert (_hours(10.0, 1234.5), _hours(1.26, 3.14)) == ("10 to 1,234 GPU-hours", "1.3 to 3.1 GPU-hours")
    assert found({"estimate": None, "low": None, "high": None}) == ""
    assert found({"estimate": 1.15, "low": None, "high": None}) == "1.15"
    assert found({"estimate": 1.15, "low": -0.99, "high": 1.32}) == "1.15 (−0.99, 1.32)"


OWN = """title: Own
columns: {top1: {run: finetune, metric: top1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain}}, pretrain: {recipe: sdae}}
rows:
  a: {runs: {}}
  b: {runs: {pretrain: {recipe: mae}}}
  c: {runs: {pretrain: {recipe: sdae, method: {mask_ratio: 0.5}}}}
  d: {runs: {pretrain: {recipe: sdae, method: {mask_ratio: 0.6}}}}
  none: {}
claims:
  - {id: near, quote: "a | near", kind: greater, of: own.a.top1, than: own.b.top1}
  - {id: far, quote: far, kind: greater, of: own.c.top1, than: own.b.top1}
  - {id: level, quote: level, kind: greater, of: own.d.top1, than: own.a.top1, note: as good}
  - {id: absent, quote: absent, kind: greater, of: own.a.top1, than: [own.none.top1, table5.full.top1]}
  - {id: said, quote: said, kind: stated, note: nobody knows}
  - {id: value, quote: value, kind: difference, of: own.a.top1, than: own.b.top1, value: "0.1"}
  - {id: settings, quote: settings, kind: equals, cells: {table2.sdae-300.epochs: "[300, 300]"}}
"""


def test_what_an_undecided_claim_needs(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    store = Store(tmp_path / "runs")
    means = {"own.a.top1": 84.05, "own.b.top1": 84.0, "own.c.top1": 90.0, "own.d.top1": 84.05}
    fill(store, plan([own], "smoke", (0, 1, 2)), means, 0.1)
    here = study(store, [own], "smoke", (0, 1, 2))
    entries = judge_study(here)
    told = {entry["claim"]: entry for entry in entries}
    assert list(told)[-7:] == ["near", "far", "level", "absent", "said", "value", "settings"]
    assert [one.id for one in ledger(here)] == list(told), "the paper's, of which it has no cell, are left out"
    needs = {name: entry["needs"] for name, entry in told.items()}
    assert (told["far"]["verdict"], needs["far"]) == ("supported", None)
    assert told["far"]["seeds"] == 3 and set(told["far"]["cells"]) == {"own.c.top1", "own.b.top1"}
    near = needs["near"].split(" ", 2)
    seeds = int(near[0])
    assert seeds > 3 and needs["near"].startswith(
        f"{seeds} seeds of each arm, {seeds - 3} more: {4 * (seeds - 3)} runs, "
    )
    (judged,) = [one for one in judge(ledger(here), measured(here), absolute=False) if one.claim.id == "near"]
    assert seeds == seeds_needed(judged, 2) > seeds_needed(judged, 1), "two undecided claims share the level"  # type: ignore[operator]
    assert re.fullmatch(r"(more than 1000 seeds: \S+ is at the edge|\d+ seeds of each arm, .*)", needs["level"])
    assert needs["absent"] == "not measured: own.none.top1, table5.full.top1 (not asked for)"
    assert needs["said"] == "nothing that a run could tell: nobody knows"
    assert needs["value"] == "the scale paper: the sentence gives a number"
    assert needs["settings"] == "nothing that a run could tell: it is about settings"
    assert told["near"]["target"] == "> 0" and told["near"]["contrast"] == "own.a.top1 − own.b.top1"
    assert (told["near"]["scale"], told["near"]["synthetic"], told["near"]["kind"]) == ("smoke", True, "greater")
    text = render(entries, here)
    head, blank, tally, space, elsewhere, gap, columns, rule, *body = text.split("\n")
    assert head == f"**Claims.** Scale {here.scale.title}. SYNTHETIC RESULTS, made up."
    assert tally == "7 claims: 1 supported, 0 contradicted, 6 undecided." and (blank, space, gap) == ("", "", "")
    assert columns == "| verdict | claim | the sentence | estimate | says | needs |"
    assert rule == "| :-- | :-- | :-- | --: | :-- | :-- |"
    assert (
        len(body) == 8 and body[-1] == "" and all(line.startswith("| ") and line.endswith(" |") for line in body[:-1])
    )
    assert "| undecided | `said` | said |  |  | nothing that a run could tell: nobody knows |" in body
    assert elsewhere.startswith("Measured at another scale than the paper's: ")
    assert "| undecided | `near` | a \\| near | " in text
    head, first, *_ = render(entries, here, "csv").splitlines()
    assert head == (
        "claim,verdict,estimate,low,high,target,contrast,seeds,p,p_holm,needs,where,quote,scale,synthetic,printed"
    )
    values = dict(zip(head.split(","), next(csv.reader([first])), strict=True))
    assert values["claim"] == "near" and values["seeds"] == "3"
    for key in ("estimate", "low", "high", "p", "p_holm"):
        assert float(values[key]) == told["near"][key], key
    *_, last = render([entries[0] | {"printed": ["table2.x.y", "table2.x.z"]}], here, "csv").splitlines()
    assert last.endswith(",table2.x.y table2.x.z")
    marked = render([entries[0] | {"quote": "L<sup>2</sup>, x<sub>i</sub> <b>bold</b>"}], here)
    assert "L<sup>2</sup>, x<sub>i</sub> &lt;b>bold&lt;/b>" in marked


def test_numbers_of_sentences_count_at_the_papers_scale(tmp_path: Path) -> None:
    own, store = tmp_path / "own.yaml", SyntheticStore(tmp_path / "runs")
    own.write_text(OWN)
    fill(store, plan([own], "paper", (0, 1, 2), content="synthetic"), {"own.a.top1": 84.1, "own.b.top1": 84.0})
    here = study(store, [own], "paper", (0, 1, 2, 3))
    told = {entry["claim"]: entry for entry in judge_study(here)}
    assert told["value"]["estimate"] == pytest.approx(0.1, abs=0.5) and told["value"]["needs"] != (
        "the scale paper: the sentence gives a number"
    )
    low, high = re.search(r"([\d,.]+) to ([\d,.]+) GPU-hours", told["near"]["needs"]).groups()  # type: ignore[union-attr]
    assert 0 < float(low.replace(",", "")) < float(high.replace(",", ""))
    assert "another scale" not in render([*told.values()], here)


def test_what_seeds_cost(tmp_path: Path) -> None:
    """Four seeds take four times what one takes; what is planned for one seed and not done takes as much as one."""
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    price = _Price(study(SyntheticStore(tmp_path / "runs"), [own], "paper", (0,)))
    one, four = (
        [float(n.replace(",", "")) for n in re.findall(r"[\d,.]*\d", price.of(["own.a.top1"], n))] for n in (1, 4)
    )
    assert four == pytest.approx([4 * n for n in one], rel=0.01)
    assert price.of(["own.a.top1"]) == price.of(["own.a.top1"], 1)


def many_of(tmp_path: Path) -> Path:
    """A claim over five cells."""
    file = tmp_path / "many.yaml"
    rows = "".join(f"  {row}: {{runs: {{pretrain: {{recipe: sdae, optim: {{epochs: {n}}}}}}}}}\n"
                   for row, n in zip("abcde", (100, 120, 140, 160, 180), strict=True))  # fmt: skip
    than = ", ".join(f"many.{row}.top1" for row in "bcde")
    claim = f"claims: [{{id: best, quote: q, kind: best among, of: many.a.top1, than: [{than}]}}]\n"
    file.write_text(OWN.partition("rows:")[0] + f"rows:\n{rows}{claim}")
    return file


def test_what_is_not_run_yet(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN)
    store = Store(tmp_path / "runs")
    fill(store, plan([own], "smoke", (0,)), noise=0.1, skip=("own.c",), synthetic=False)
    here = study(store, [own], "smoke", (0,))
    told = {entry["claim"]: entry for entry in judge_study(here)}
    assert render([*told.values()], here).startswith(f"**Claims.** Scale {here.scale.title}.\n\n7 claims: ")
    assert told["far"]["needs"] == "not measured: own.c.top1: 1 run, less than 0.1 GPU-hours", "its need is done"
    assert told["near"]["needs"] == "a second seed of some arm of the stage: nothing tells the spread yet"
    assert told["near"]["low"] is None and told["near"]["seeds"] == 1
    (many,) = judge_study(study(Store(tmp_path / "none"), [many_of(tmp_path)], "smoke", (0,)))
    assert many["needs"].startswith("not measured: many.a.top1, many.b.top1, many.c.top1 and 2 more: ")
    empty = {entry["claim"]: entry for entry in judge_study(study(Store(tmp_path / "none"), [own], "smoke", (0, 1)))}
    assert empty["far"]["needs"] == "not measured: own.c.top1, own.b.top1: 8 runs, less than 0.1 GPU-hours"
    assert (empty["far"]["estimate"], empty["far"]["p"], empty["far"]["target"], empty["far"]["seeds"]) == (
        None,
    ) * 3 + (0,)


def test_terms_that_overlap_are_added(tmp_path: Path) -> None:
    """A cell against the mean of all, itself among them."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "- {id: x, quote: x, where: x, kind: sum, value: '> 0', terms: {table1.mae.time: 1, 'table1.*.time': -1}}\n"
    )
    (found,) = load(file)
    terms = found.contrasts[0].terms
    assert terms["table1.mae.time"] == 1 - Fraction(1, len(terms))
    assert sum(terms.values()) == 0


@pytest.mark.parametrize(("text", "ratio"), [("+1.2", False), ("+1.2", True), ("1.2%", False), ("+49.9%", False)])
def test_values_that_would_mean_something_else(text: str, ratio: bool) -> None:
    with pytest.raises(ValueError, match="and of a ratio"):
        target(text, ratio)
