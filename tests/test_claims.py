"""Claims against measured cells: verdicts on planted truths, what an undecided one needs, and a user's own claims."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from calling import call
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import fill

from ablations.planner import plan
from analysis.claims import Claim, Contrast, Interval, claims, target
from analysis.inference import ALPHA, MOST_SEEDS, Measured, holm, judge, seeds_needed
from analysis.paper import Printed, printed
from analysis.simulation import power, simulate
from analysis.statistics import Estimate, Pool
from analysis.study import study
from analysis.verdicts import judge_study, render
from sdae.errors import UserError
from sdae.store import Store

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
ONE = Fraction(1)
POOL = Pool(0.01, 20, 10)


def cell(mean: float, n: int = 3, arm: str = "", sd: float = 0.1) -> Measured:
    return Measured(Estimate(mean, n, sd / n**0.5, 20, "pooled", Pool(sd * sd, 20, 10)), arm or mean)


def claim(*contrasts: Contrast, kind: str = "greater") -> Claim:
    return Claim("mine", "a sentence", "here", kind, "", contrasts)


def difference(a: str, b: str, allowed: str = "> 0") -> Contrast:
    return Contrast({a: ONE, b: -ONE}, target(allowed))


def verdict(one: Claim, cells: dict[str, Measured], **further: object) -> str:
    return judge([one], cells, **further)[0].verdict  # type: ignore[arg-type]


# One claim
@pytest.mark.parametrize(
    ("allowed", "a", "b", "said"),
    [
        ("> 0", 84.0, 83.0, "supported"), ("> 0", 83.0, 84.0, "contradicted"), ("> 0", 84.0, 83.95, "undecided"),
        ("[-0.3, 0.3]", 84.0, 84.2, "undecided"), ("[-0.3, 0.3]", 84.0, 83.0, "contradicted"),
        ("[-0.5, 0.5]", 84.0, 84.01, "supported"), (">= 0.3", 84.0, 83.2, "supported"),
        (">= 0.3", 84.0, 83.9, "contradicted"), ("1.0", 84.0, 83.0, "undecided"), ("1.0", 84.0, 83.6, "contradicted"),
    ],
)  # fmt: skip
def test_a_difference(allowed: str, a: float, b: float, said: str) -> None:
    assert verdict(claim(difference("a", "b", allowed)), {"a": cell(a), "b": cell(b)}) == said


def test_the_interval_is_students() -> None:
    (found,) = judge([claim(difference("a", "b"))], {"a": cell(84.0), "b": cell(83.9)})
    (reading,) = found.readings
    half = 2.0859634 * 0.1 * (2 / 3) ** 0.5  # t of 20 degrees of freedom
    assert (reading.estimate, reading.low, reading.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-6)
    assert found.p == pytest.approx(0.2351, abs=1e-3)


def test_a_ratio_is_fiellers() -> None:
    """By the same numbers as in the interval's definition: (a - r b)^2 = t^2 (var a + r^2 var b)."""
    ratio = Contrast({"a": ONE}, target("1.5"), over="b")
    (found,) = judge([claim(ratio, kind="ratio")], {"a": cell(150.0, sd=2.0), "b": cell(100.0, sd=2.0)})
    (reading,) = found.readings
    assert reading.estimate == pytest.approx(1.5)
    for end in (reading.low, reading.high):
        assert end is not None
        assert (150 - end * 100) ** 2 == pytest.approx(2.0859634**2 * (1 + end**2) * 4 / 3, rel=1e-6)
    wide = judge([claim(ratio, kind="ratio")], {"a": cell(1.0, sd=2.0), "b": cell(0.1, sd=2.0)})[0]
    assert (wide.readings[0].low, wide.verdict) == (None, "undecided")


def test_all_contrasts_must_hold_and_one_is_enough_to_contradict() -> None:
    best = claim(difference("a", "b"), difference("a", "c"), kind="best among")
    cells = {"a": cell(84.0), "b": cell(83.0), "c": cell(83.99)}
    assert verdict(best, cells) == "undecided"
    assert verdict(best, cells | {"c": cell(83.1)}) == "supported"
    assert verdict(best, cells | {"c": cell(85.0)}) == "contradicted"
    assert verdict(best, {k: v for k, v in cells.items() if k != "c"}) == "undecided"
    assert verdict(best, {"a": cell(84.0), "b": cell(85.0)}) == "contradicted", "without c, too"


def test_sensitive_takes_one() -> None:
    pairs = claim(difference("a", "b", "> 0.3"), difference("b", "a", "> 0.3"), kind="sensitive")
    assert verdict(pairs, {"a": cell(84.0), "b": cell(83.0)}) == "supported"
    assert verdict(pairs, {"a": cell(83.0), "b": cell(84.0)}) == "supported"
    assert verdict(pairs, {"a": cell(83.0, 9), "b": cell(83.01, 9)}) == "contradicted"


def test_one_run_in_two_cells_is_one_number() -> None:
    same = claim(difference("a", "b", "[-0.3, 0.3]"), kind="comparable")
    assert verdict(same, {"a": cell(84.0, arm="x"), "b": cell(84.0, arm="x")}) == "supported"
    assert verdict(same, {"a": cell(84.0, 1, "x", 0.2), "b": cell(84.0, 1, "y", 0.2)}) == "undecided"


def test_a_printed_number_may_be_any_that_is_printed_so() -> None:
    over = claim(difference("a", "b"))
    stand_in = {"b": Printed(83.9, 1, "%", "Table 2")}
    sharp = {"a": cell(83.94, 100)}
    (found,) = judge([over], sharp, stand_in)
    assert (found.verdict, found.printed) == ("undecided", ["b"]), "83.94 may be below what rounds to 83.9"
    assert verdict(over, {"a": cell(84.0, 100)}, printed=stand_in) == "supported"
    assert verdict(over, {}, printed=stand_in | {"a": Printed(85.0, 1, "%", "")}) == "undecided", "nothing measured"


def test_a_sentence_with_a_number_waits_for_the_papers_scale() -> None:
    cells = {"a": cell(84.0), "b": cell(83.0)}
    assert verdict(claim(difference("a", "b", "1.2")), cells, absolute=False) == "undecided"
    assert verdict(claim(Contrast({"a": ONE}, target("20.0"))), cells, absolute=False) == "undecided"
    assert verdict(claim(difference("a", "b")), cells, absolute=False) == "supported"


def test_without_a_spread_nothing_is_definite() -> None:
    bare = {"a": Measured(Estimate(90.0, 1), "a"), "b": Measured(Estimate(10.0, 1), "b")}
    (found,) = judge([claim(difference("a", "b"))], bare)
    assert (found.verdict, found.readings[0].estimate, found.readings[0].low) == ("undecided", 80.0, None)


@given(st.floats(-2, 2), st.floats(0.01, 1), st.integers(2, 9))
def test_a_verdict_is_what_the_interval_says(gap: float, sd: float, n: int) -> None:
    """One claim of one contrast: definite exactly where its 95 % interval leaves the other side out."""
    (found,) = judge([claim(difference("a", "b"))], {"a": cell(50 + gap, n, "a", sd), "b": cell(50.0, n, "b", sd)})
    (reading,) = found.readings
    assert reading.low is not None and reading.high is not None
    if min(abs(reading.low), abs(reading.high)) > 1e-9:
        said = "supported" if reading.low > 0 else "contradicted" if reading.high < 0 else "undecided"
        assert found.verdict == said


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_that_of_statsmodels(values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1].tolist() if values else [])


def test_more_claims_ask_for_more() -> None:
    edge = {"a": cell(84.0), "b": cell(83.8)}
    assert verdict(claim(difference("a", "b")), edge) == "supported"
    many = [claim(difference("a", "b")), *[claim(difference("c", "d")) for _ in range(20)]]
    dull = edge | {"c": cell(50.0, arm="c"), "d": cell(50.01, arm="d")}
    assert judge(many, dull)[0].verdict == "undecided"


# What it would take
def test_seeds_needed_are_enough_four_times_in_five() -> None:
    seed = 20
    rng, sd, gap = np.random.default_rng(seed), 0.1, 0.1
    one = claim(difference("a", "b"))
    (found,) = judge([one], {"a": cell(84.0 + gap, arm="a"), "b": cell(84.0, arm="b")})
    n = seeds_needed(found, 1)
    assert n is not None and 14 <= n <= 18
    hits = 0
    for _ in range(400):
        a, b = (float(np.mean(rng.normal(mean, sd, n))) for mean in (84.0 + gap, 84.0))
        hits += verdict(one, {"a": cell(a, n, "a"), "b": cell(b, n, "b")}) == "supported"
    assert 0.72 <= hits / 400 <= 0.88
    (level,) = judge([one], {"a": cell(84.0, arm="a"), "b": cell(84.0, arm="b")})
    assert seeds_needed(level, 1) == MOST_SEEDS + 1


def test_power_is_what_judging_finds() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        spread = float(np.sqrt(0.01 * rng.chisquare(20) / 20))
        a, b = (float(np.mean(rng.normal(mean, 0.1, 3))) for mean in (0.2, 0.0))
        hits += (
            verdict(claim(difference("a", "b")), {"a": cell(a, 3, "a", spread), "b": cell(b, 3, "b", spread)})
            == "supported"
        )
    assert hits / 1000 == pytest.approx(power(2.0, 3, 20), abs=0.05)


# The ledger
@pytest.mark.slow
def test_planted_truths() -> None:
    """The promise of docs/claims.md, on fewer universes."""
    for arguments in ({"seeds": 2}, {"seeds": 3, "single": 0.5}, {"seeds": 10}):
        found = simulate(120, seed=1, **arguments).to_dict()  # type: ignore[arg-type]
        assert found["ledgers_with_a_wrong_verdict"] <= ALPHA, (arguments, found)
        assert 0.94 <= found["coverage_of_contrasts"] <= 0.96, (arguments, found)
        assert 0.93 <= found["coverage_of_cells"] <= 0.97, (arguments, found)
        assert found["definite"] > 0.3


@pytest.fixture(scope="module")
def paper_like(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three seeds about the paper's printed values, at the paper's scale."""
    store = Store(tmp_path_factory.mktemp("claims") / "runs")
    sweep = plan([], "paper", (0, 1, 2), content="made-up")
    fill(store, sweep, {name: value.value for name, value in printed().items()}, 0.02, default=83.5)
    return store


def test_the_papers_ledger(paper_like: Store) -> None:
    found = {entry["claim"]: entry for entry in judge_study(study(paper_like, (), "paper"))}
    assert list(found) == [one.id for one in claims()]
    said = {name: entry["verdict"] for name, entry in found.items()}
    assert said["pretraining-helps"] == said["normalized-targets"] == said["all-masked-degrades"] == "supported"
    assert said["linear-over-all"] == "contradicted", "SdAE's linear probe is below DINO's in the paper's own table"
    assert said["better-codebook"] == "supported"
    assert set(found["better-codebook"]["printed"]) == {
        "table2.beit-300.finetune", "table2.cae-300.finetune",
    }  # fmt: skip
    unpublished = ("moco-v3-300", "beit-300", "beit-800", "cae-300")
    assert set(found["ade-best"]["printed"]) == {f"table3.{row}.miou" for row in unpublished}
    assert found["every-20-epochs"]["needs"].startswith("nothing that a run could tell")
    assert any("GPU-hours" in (entry["needs"] or "") for entry in found.values())
    assert found["abstract-finetune"]["cells"] == {
        "table2.sdae-300.finetune": {"measured": pytest.approx(84.1, abs=0.05), "n": 3}
    }
    for entry in found.values():
        assert (entry["needs"] is None) == (entry["verdict"] != "undecided")
        if entry["low"] is not None:
            assert entry["low"] <= entry["estimate"] <= entry["high"]


def test_at_another_scale_no_number_of_the_paper_is_judged(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    fill(store, plan(["table2"], "smoke", (0, 1)), default=50.0)
    found = {entry["claim"]: entry for entry in judge_study(study(store, ["table2"], "smoke"))}
    assert found["abstract-finetune"]["needs"] == "the scale paper: the sentence gives a number"
    assert found["better-codebook"]["printed"] == []
    assert {entry["scale"] for entry in found.values()} == {"smoke"}


def test_an_empty_store_decides_nothing(tmp_path: Path) -> None:
    found = judge_study(study(Store(tmp_path / "none"), (), "smoke"))
    assert {entry["verdict"] for entry in found} == {"undecided"}
    assert {entry["estimate"] for entry in found} == {None}
    gain = next(entry for entry in found if entry["claim"] == "normalized-targets")
    assert gain["needs"] == "not measured: table5.full.top1, table5.full-raw.top1: 4 runs, less than 0.1 GPU-hours"


def test_formats(paper_like: Store) -> None:
    here = study(paper_like, ["table5"], "paper")
    entries = judge_study(here)
    text = render(entries, here)
    assert "SYNTHETIC" in text
    assert all(f"`{entry['claim']}`" in text for entry in entries)
    assert len(render(entries, here, "csv").splitlines()) == len(entries) + 1
    with pytest.raises(UserError, match="format 'latex': claims are printed as md, csv or json"):
        render(entries, here, "latex")


def test_the_command(paper_like: Store, tmp_path: Path) -> None:
    asked = ("paper", "claims", "table5", "--scale", "paper", "--store", paper_like.root)
    entries = json.loads(call(*asked, "--json").out)
    assert {"claim", "quote", "verdict", "estimate", "low", "high", "needs"} <= set(entries[0])
    shown = call(*asked).out
    assert "normalization-gain" in shown and "SYNTHETIC" in shown
    assert "abstract-miou" not in shown, "not about table5"


# A user's own: the example of ten lines, from plan to report with no line of Python
OWN = ROOT / "examples" / "decoder_depth.yaml"


def test_a_users_own_claims(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    means = {f"decoder_depth.depth-{n}.top1": value for n, value in ((1, 80.0), (2, 83.0), (4, 83.4), (8, 84.0))}
    fill(store, plan([str(OWN)], "smoke", (0, 1, 2)), means, 0.02)
    here = study(store, [OWN], "smoke")
    found = {entry["claim"]: entry for entry in judge_study(here)}
    assert {name: entry["verdict"] for name, entry in found.items()} == {
        "deep-is-best": "supported", "shallow-is-enough": "contradicted",
    }  # fmt: skip
    assert found["deep-is-best"]["where"] == "decoder_depth.yaml"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{id: a, quote: q, kind: greater, of: own.x.top1, than: own.b.top1}", r"claims: claim a: own.x.top1: no such"),
        ("{id: over-mae, quote: q, kind: greater, of: own.a.top1, than: own.b.top1}", "two claims have this id"),
        ("{id: a, quote: q, kind: bigger, of: own.a.top1, than: own.b.top1}", "claims: claim a: kind"),
        ("{id: a, quote: q, kind: equals, cells: {own.a.top1: lots}}", "claim a: value: 'lots'"),
    ],
)
def test_a_bad_claim_of_a_user(claim: str, message: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"""title: Own
columns: {{top1: {{run: finetune, metric: top1}}}}
runs: {{finetune: {{recipe: finetune, init: {{run: pretrain}}}}, pretrain: {{recipe: sdae}}}}
rows: {{a: {{runs: {{}}}}, b: {{runs: {{pretrain: {{recipe: mae}}}}}}}}
claims:
  - {claim}
""")
    told = call("paper", "claims", own, "--store", tmp_path / "runs")
    assert (told.code, told.out, len(told.err.strip().splitlines())) == (2, "", 1)
    with pytest.raises(UserError, match=message):
        judge_study(study(Store(tmp_path / "runs"), [own], "smoke"))


def test_the_page_says_what_the_code_does() -> None:
    from analysis.statistics import FEW

    page = (ROOT / "docs" / "claims.md").read_text()
    assert FEW == 10 and "fewer than ten seeds" in page
    assert "Interval" in Interval.__name__ and "[84.05, 84.15)" in page
