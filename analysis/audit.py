"""The paper's sentences against the paper's own printed numbers, and its release against the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.claims import Claim, Contrast, claims
from analysis.paper import HERE, Printed, counts, printed
from sdae.yamls import read_yaml

SHOWN = 3  # contrasts of a claim that are told one by one


def audit(numbers: Mapping[str, Printed] | None = None) -> list[dict[str, Any]]:
    """Every claim against `numbers` (default: what the paper prints): claim, quote, where, expected, found, agrees.

    `agrees`: true, false, or null where the printed numbers cannot tell; `found` has the arithmetic or the reason.
    """
    known = {**printed(), **counts()} if numbers is None else numbers
    return [_entry(claim, known) for claim in claims()]


def release() -> list[dict[str, Any]]:
    """The authors' released programme against the paper: setting, paper, release, where, agrees (null: not printed)."""
    entries: list[dict[str, Any]] = read_yaml(HERE / "recipes.yaml")
    return entries


def _entry(claim: Claim, numbers: Mapping[str, Printed]) -> dict[str, Any]:
    verdicts = [_verdict(claim, contrast, numbers) for contrast in claim.contrasts]
    agrees = claim.agrees(verdicts)
    deciding = [c for c, v in zip(claim.contrasts, verdicts, strict=True) if v is agrees]
    return {
        "claim": claim.id,
        "quote": claim.quote,
        "where": claim.where,
        "expected": claim.expected,
        "found": _found(claim, deciding, numbers) if deciding else claim.note,
        "agrees": agrees,
    }


def _verdict(claim: Claim, contrast: Contrast, numbers: Mapping[str, Printed]) -> bool | None:
    if not set(contrast.cells) <= set(numbers) or _here_only(claim, contrast, numbers):
        return None
    return contrast.agrees(numbers)


def _here_only(claim: Claim, contrast: Contrast, numbers: Mapping[str, Printed]) -> bool:
    """Whether the number is known from this very sentence: nothing else in the paper confirms or refutes it."""
    return claim.kind == "equals" and all(numbers[cell].where == claim.where for cell in contrast.cells)


def _found(claim: Claim, deciding: list[Contrast], numbers: Mapping[str, Printed]) -> str:
    """The arithmetic of the contrasts that decide, the closest one where they are many, or what keeps it open."""
    missing = dict.fromkeys(cell for contrast in deciding for cell in contrast.cells if cell not in numbers)
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        return f"not printed: {', '.join(list(missing)[:SHOWN])}{more}"
    first, *rest = sorted(deciding, key=lambda contrast: contrast.slack(numbers))
    shown = [first] if len(rest) >= SHOWN else [first, *rest]
    labels = [f"{contrast.formula()}: " if len(claim.contrasts) > 1 else "" for contrast in shown]
    text = "; ".join(label + contrast.arithmetic(numbers) for label, contrast in zip(labels, shown, strict=True))
    if _here_only(claim, first, numbers):
        return f"{text}: printed in this sentence only"
    if first.agrees(numbers) is None:
        return f"{text}: rounding leaves it open"
    return text if len(shown) > len(rest) else f"{text}, the closest of {len(deciding)}"
