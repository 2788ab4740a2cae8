"""Writes docs/claims.md and docs/figures/power.svg: how claims are judged, and how often that is right.

python docs/make_claims.py [--universes 400] [--seed 0] [--check]

With --check nothing is written; exit code 1 where the promises of the page do not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from analysis.figures import COLOURS, LINES, STYLE
from analysis.inference import ALPHA
from analysis.simulation import SPREAD, power, simulate

PAGE = Path(__file__).with_name("claims.md")
FIGURE = PAGE.parent / "figures" / "power.svg"
CASES: list[tuple[str, dict[str, Any], bool]] = [  # name, arguments of `simulate`, whether the promise covers it
    ("one seed an arm", {"seeds": 1}, True),
    ("two seeds", {"seeds": 2}, True),
    ("three seeds", {"seeds": 3}, True),
    ("three seeds, half of the arms with one", {"seeds": 3, "single": 0.5}, True),
    ("five seeds", {"seeds": 5}, True),
    ("ten seeds", {"seeds": 10}, True),
    ("three seeds, spreads of arms differ by a factor of about 1.35", {"seeds": 3, "unequal": 0.3}, False),
    ("ten seeds, the same", {"seeds": 10, "unequal": 0.3}, False),
]
EFFECTS = [step / 20 for step in range(101)]
DF = 40  # degrees of freedom of a pooled variance: 20 arms with three seeds
TESTS = 60  # claims that a ledger of the paper tests, about
INTRO = """# Does what was measured bear the paper out?

`sdae-cli paper claims` holds every quantitative sentence of the paper (97 claims, [docs/audit.md](audit.md)) against
the cells that a store has measured:

```bash
sdae-cli paper claims --scale paper                      # all of them
sdae-cli paper claims table5 --scale small --json        # those over some artifacts
```

- **supported**: the tests say that what the sentence claims is so; **contradicted**: that it is not; **undecided**:
  neither, and then `needs` says what it would take: seeds, runs and GPU-hours, or why no run could tell.
- `estimate` with its 95 % interval is that of the contrast that decides: of the sentence's comparisons the one that is
  weakest.

## How

A claim is one contrast or several: a weighted sum of cells, or a ratio, that is to lie in an interval. A printed number
is an interval too: "84.1" asks for a mean in [84.05, 84.15), and "1.2 higher" for a difference in [1.15, 1.25).

- **Spread.** Cells with fewer than ten seeds take the variance that the arms of their stage have in common (so that
  one seed has an interval as soon as some arm has two); with ten or more their own. Costs take the spread of the
  repeats within a run.
- **Tests.** Student's t on the contrast, degrees of freedom by Welch and Satterthwaite; for a ratio the linear form
  that Fieller's interval comes from. Supported means that both ends of the claimed interval are excluded (two
  one-sided tests), contradicted that the measured interval lies beyond.
- **Several contrasts.** "Best among" is supported when every comparison is (no correction needed), contradicted when
  one is (Bonferroni's). "Sensitive to" is the other way round.
- **Many claims.** Holm's method over the ledger: of all definite verdicts together at least one is wrong in at most 5 %
  of the ledgers. Claims that share cells are not independent, which Holm's method allows for.
- **Other groups' methods.** Where no run of the suite fills a row (DINO, BEiT, CAE), its printed value stands in, at
  the paper's scale only, as any number that is printed so; `printed` names such cells.
- **Other scales.** A sentence that only orders arms is tested at any scale, and the verdict is about that scale. A
  sentence that gives a number waits for the paper's.

What it assumes: seeds are independent, normal, and arms of one stage have one variance. The last two rows below show
what the intervals do when the last of these is not so. Cells of Figure 4(c) that come from one pre-training are taken
as independent, which makes differences between them look less certain than they are.

"""


OUTCOME = """## How often that is right

Written by `python docs/make_claims.py` from {universes} made-up ledgers a row (seed {seed}): true means planted near
the paper's numbers, seeds drawn around them with a standard deviation of {spread} points, verdicts marked against what
was planted.

{table}
Promised: at most 5 % of ledgers with a wrong verdict, and 94 to 96 % coverage where the assumptions hold. The first is
kept with room to spare: most truths are far from where a claim turns, and Holm's method does not know how claims hang
together.

## What it takes

![The chance that a true difference between two arms is found, over its size, for one to ten seeds](figures/power.svg)

The chance that "A exceeds B" is supported, over the true difference in standard deviations between seeds, with a
variance pooled on {df} degrees of freedom: for a claim by itself (solid) and for one that must pass Holm's method as
the first of {tests} (dashed). By itself, 80 % are found from {small} on. At the published spread of {spread} points
between seeds, a difference of 0.1 is {tenth:.1f} standard deviations.
"""
HEADS = (
    "", "ledgers with a wrong verdict", "wrong of the definite", "definite", "95 % intervals of contrasts that cover",
    "of cells",
)  # fmt: skip


def page(universes: int, seed: int) -> tuple[str, bool]:
    rows, kept = [], True
    for name, arguments, promised in CASES:
        found = simulate(universes, seed=seed, **arguments).to_dict()
        wrong, coverage = found["ledgers_with_a_wrong_verdict"], found["coverage_of_contrasts"]
        has = coverage == coverage  # NaN: one seed an arm has no interval
        if promised:
            kept &= wrong <= ALPHA and (not has or 0.94 <= coverage <= 0.96)
        texts = [f"{wrong:.1%}", f"{found['wrong_of_definite']:.2%}", f"{found['definite']:.0%}"]
        for key in ("coverage_of_contrasts", "coverage_of_cells"):
            texts.append(f"{found[key]:.1%}" if has else "none")
        rows.append([name, *(text.replace("%", " %") for text in texts)])
    table = "".join("| " + " | ".join(line) + " |\n" for line in [HEADS, [":--"] + ["--:"] * 5, *rows])
    small = {n: min(e for e in EFFECTS if power(e, n, DF) >= 0.8) for n in (1, 3, 5)}
    outcome = OUTCOME.format(
        universes=universes, seed=seed, spread=SPREAD, table=table, df=DF, tests=TESTS, tenth=0.1 / SPREAD,
        small=", ".join(f"{effect:.1f} with {n} seed{'s' * (n > 1)}" for n, effect in small.items()),
    )  # fmt: skip
    return INTRO + outcome, kept


def draw() -> None:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(6.0, 3.4), layout="constrained")
        ax = figure.subplots()
        for colour, n in zip(COLOURS, (1, 2, 3, 5, 10), strict=False):
            for tests, line in ((1, LINES[0]), (TESTS, LINES[1])):
                chances = [100 * power(effect, n, DF, tests) for effect in EFFECTS]
                label = f"{n} seed{'s' * (n > 1)}" if tests == 1 else None
                ax.plot(EFFECTS, chances, color=colour, linestyle=line, label=label)
        ax.axhline(80, color="0.6", linewidth=0.8)
        ax.set(
            xlabel="true difference / standard deviation between seeds", ylabel="found (%)", xlim=(0, 5), ylim=(0, 102)
        )
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(FIGURE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How claims are judged, and how often that is right.")
    parser.add_argument("--universes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a promise is not kept")
    options = parser.parse_args()
    text, kept = page(options.universes, options.seed)
    if options.check:
        print(text[text.index("## How often") :])
    else:
        PAGE.write_text(text, encoding="utf-8")
        draw()
    sys.exit(0 if kept else 1)
