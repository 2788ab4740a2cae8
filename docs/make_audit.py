"""Writes docs/audit.md: the paper's sentences against its own numbers, and its release against the paper.

python docs/make_audit.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from analysis.audit import audit, release
from analysis.claims import claims

PAGE = Path(__file__).with_name("audit.md")
WORD = {True: "agrees", False: "**disagrees**", None: "cannot be told"}
INTRO = """# Does the paper agree with itself?

Written by `python docs/make_audit.py` from the paper's numbers, its sentences and its settings, which are in
[`analysis/paper/`](../analysis/paper). Nothing here was measured. Every quantitative sentence of the abstract, of
sections 1 to 4 and of the captions (and the conclusion's) is a claim over printed numbers, each of which stands for all
that is rounded to it: 84.1 for [84.05, 84.15). A claim

- **agrees** where all that its number may be is as claimed, or where it gives a value and the printed numbers do too;
- **disagrees** where nothing that its number may be is as claimed;
- **cannot be told** where the paper does not print what it rests on (of Figure 4 the text has two values), prints it in
  that sentence only, or where rounding leaves it open.

"Comparable" is a difference of at most 0.3 points, "by a margin" one of at least 0.3: the four published seeds of the
fine-tuning recipe have a standard deviation of 0.094, so two of them differ by chance by up to 0.27. "About" and
"roughly" allow one unit of the last digit or 10 %, whichever is wider.
"""


def page() -> str:
    entries, notes = audit(), {claim.id: claim.note for claim in claims()}
    tally, settings = (Counter(entry["agrees"] for entry in found) for found in (entries, release()))
    parts = [
        INTRO,
        "## In short\n",
        f"{len(entries)} claims: {tally[True]} agree, {tally[False]} disagree, {tally[None]} cannot be told.",
        f"{settings.total()} settings of the release: {settings[True]} as the paper says, {settings[False]} not, "
        f"{settings[None]} that the paper does not print or not clearly.\n",
        "## What disagrees\n",
    ]
    for entry in entries:
        if entry["agrees"] is False:
            parts.append(f"**{entry['where']}** (`{entry['claim']}`)\n\n> {entry['quote']}\n")
            parts.append(f"It says: {entry['expected']}.\nFound: {entry['found']}.\n\n{notes[entry['claim']]}\n")
    rows = []
    for entry in entries:
        keys = ("where", "quote", "expected", "found")
        note = notes[entry["claim"]]
        rows.append([WORD[entry["agrees"]], *(entry[key] for key in keys), "" if note == entry["found"] else note])
    parts += ["## Every claim\n", table(["", "where", "quote", "it says", "found", "remark"], rows)]
    parts += ["## The release against the paper\n", "What the authors' programme for pre-training does.\n"]
    keys = ("setting", "paper", "release", "where")
    rows = [[WORD[entry["agrees"]], *(entry[key] for key in keys)] for entry in release()]
    parts += [table(["", "setting", "the paper", "the release", "where in the paper"], rows)]
    return "\n".join(parts)


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, [":--"] * len(heads), *rows]
    return "".join("| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
