"""The paper's sentences as tests over cells, and what the paper's own printed numbers say of them.

Every claim of `paper/claims.yaml`, whatever its kind, is a few contrasts: a weighted sum of cells, or a ratio of two,
that lies in an interval. Measured cells are held against the same contrasts. A printed number is an interval too, so
arithmetic here is exact and that of intervals with open and closed ends.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ablations.artifact import Artifact, available, load_artifact
from analysis.paper import HERE, Printed, counts, dashes
from sdae.errors import UserError
from sdae.yamls import SHOWN, explain, read_yaml, shown

MARGIN = Fraction("0.3")  # percentage points: what is still comparable; the head of claims.yaml says why
SPELLED = 4  # terms or contrasts that a line has room for
PLACE = re.compile(r"\{\d?\}", re.ASCII)  # for an entry of `each`
WEIGHT = re.compile(r"-?\d{1,9}(/[1-9]\d{0,8}|(\.\d{1,17})?(e-\d\d)?)", re.ASCII)


@dataclass(frozen=True)
class Interval:
    """`low` to `high`, either infinite; an open end is not part of it."""

    low: Fraction | float
    high: Fraction | float
    open_low: bool = False
    open_high: bool = False

    def holds(self, other: Interval) -> bool:
        """Whether all of `other` lies within."""
        low = other.low > self.low or (other.low == self.low and (other.open_low or not self.open_low))
        high = other.high < self.high or (other.high == self.high and (other.open_high or not self.open_high))
        return low and high

    def meets(self, other: Interval) -> bool:
        low, high = max(self.low, other.low), min(self.high, other.high)
        return low < high or (low == high and all(one.holds(Interval(low, low)) for one in (self, other)))

    def times(self, weight: Fraction) -> Interval:
        if weight < 0:
            return Interval(self.high * weight, self.low * weight, self.open_high, self.open_low)
        return Interval(self.low * weight, self.high * weight, self.open_low, self.open_high)

    def plus(self, other: Interval) -> Interval:
        ends = self.open_low or other.open_low, self.open_high or other.open_high
        return Interval(self.low + other.low, self.high + other.high, *ends)

    def over(self, other: Interval) -> Interval:
        """The ratio of two positive intervals."""
        ends = self.open_low or other.open_high, self.open_high or other.open_low
        return Interval(self.low / other.high, self.high / other.low, *ends)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'>' if self.open_low else '≥'} {number(self.low)}"
        return f"{'[('[self.open_low]}{number(self.low)}, {number(self.high)}{'])'[self.open_high]}"


def number(value: Fraction | float) -> str:
    return f"{float(value):.5g}".replace("-", "−")


def interval(printed: Printed) -> Interval:
    """All numbers that are printed so."""
    low, high = (Fraction(str(bound)) for bound in printed.bounds)
    return Interval(low, high, open_high=not printed.exact)


def target(text: str, ratio: bool = False) -> Interval:
    """What a claim's VALUE allows (the head of claims.yaml has the spellings); percent only of a ratio, as cells may be
    in percent themselves. ValueError if it is none."""
    if len(text) > SHOWN:  # no float
        raise ValueError(f"value: {shown(text)} (allowed: {SHOWN} characters)")
    match = re.fullmatch(r"(about )?(?:(\+)?(?=.*%))?(-?\d+(?:\.(\d+))?)(%)?", text)
    if match and (ratio or not match[5]):
        about, plus, digits, decimals, percent = match.groups()
        value, last = Fraction(digits), Fraction(1, 10 ** len(decimals or ""))
        reach, share = max(last, abs(value) / 10) if about else last / 2, 100 if percent else 1
        low, high = (bool(plus) + (value + side * reach) / share for side in (-1, 1))
        return Interval(low, high, open_high=not about)
    if match := re.fullmatch(r"(>=?) (-?[\d.]+)", text):
        return Interval(Fraction(match[2]), math.inf, open_low=match[1] == ">")
    if match := re.fullmatch(r"([\[(])(-?[\d.]+), (-?[\d.]+)([\])])", text):
        return Interval(Fraction(match[2]), Fraction(match[3]), match[1] == "(", match[4] == ")")
    allowed = '"1.2", "about 18", "> 0", ">= 0.3", "[45, 50)", and of a ratio "about 18%", "+49.9%"'
    raise ValueError(f"value: {text!r} (allowed: {allowed})")


@dataclass(frozen=True)
class Contrast:
    """A claim's number, the sum of weight x cell over `terms` (divided by the cell `over`), and where it is to lie."""

    terms: Mapping[str, Fraction]
    target: Interval
    over: str | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        return (*self.terms, *([self.over] if self.over else []))

    def value(self, values: Mapping[str, float]) -> float:
        """The number, from the value of each cell."""
        total = math.fsum(float(weight) * values[cell] for cell, weight in self.terms.items())
        return total / values[self.over] if self.over else total

    def found(self, numbers: Mapping[str, Printed]) -> tuple[Fraction, Interval]:
        """The number as printed numbers give it, and all that it may be, as each of them is rounded."""
        total, spread = Fraction(0), Interval(Fraction(0), Fraction(0))
        for cell, weight in self.terms.items():
            total += weight * Fraction(str(numbers[cell].value))
            spread = spread.plus(interval(numbers[cell]).times(weight))
        if self.over:
            return total / Fraction(str(numbers[self.over].value)), spread.over(interval(numbers[self.over]))
        return total, spread

    def agrees(self, numbers: Mapping[str, Printed]) -> bool | None:
        """True: all that the number may be is as claimed; or the claim gives a value, and the number as printed has it.

        False: nothing that it may be is. Null: rounding leaves it open.
        """
        point, spread = self.found(numbers)
        gives_value = not math.isinf(self.target.high)
        if self.target.holds(spread) or (gives_value and self.target.holds(Interval(point, point))):
            return True
        return None if self.target.meets(spread) else False

    def slack(self, numbers: Mapping[str, Printed]) -> float:
        """How far within its target the number is."""
        point, _ = self.found(numbers)
        return float(min(point - self.target.low, self.target.high - point))

    def arithmetic(self, numbers: Mapping[str, Printed]) -> str:
        """`84.1 − 82.9 = 1.2 (1.1, 1.3)`."""
        point, spread = self.found(numbers)
        text = self.formula(lambda cell: f"{numbers[cell].value:.{numbers[cell].decimals}f}")
        text += f" = {number(point)}" if len(self.cells) > 1 else ""
        return text if spread.low == spread.high else f"{text} {spread}"

    def formula(self, written: Callable[[str], str] = str) -> str:
        parts = []
        for cell, weight in self.terms.items():
            factor = "" if abs(weight) == 1 else f"{number(abs(weight))} × "
            parts.append(f"{'−' if weight < 0 else '+'} {factor}{written(cell)}")
        shown = parts if len(parts) <= SPELLED else [*parts[:2], f".. {parts[-1]} ({len(parts)} terms)"]
        return " ".join(shown).removeprefix("+ ") + (f" / {written(self.over)}" if self.over else "")

    def __str__(self) -> str:
        low, high = self.target.low, self.target.high
        relation = f"= {number(low)}" if low == high else f"{'' if math.isinf(high) else 'in '}{self.target}"
        return f"{self.formula()} {relation}"


@dataclass(frozen=True)
class Claim:
    """A sentence. It holds if all of its contrasts do, or, with `some`, if one does; without any, cells cannot tell.

    Names in contrasts are cells of artifacts or of `counts()`; the latter are not measured.
    """

    id: str
    quote: str
    where: str
    kind: str
    note: str
    contrasts: tuple[Contrast, ...]

    @property
    def some(self) -> bool:
        return self.kind == "sensitive"

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(cell for contrast in self.contrasts for cell in contrast.cells))

    @property
    def expected(self) -> str:
        texts = [str(contrast) for contrast in self.contrasts]
        if len(texts) > SPELLED:
            texts = [*texts[:2], f".. {texts[-1]} ({len(texts)} in all)"]
        return ("one of: " if self.some else "") + "; ".join(texts)

    def agrees(self, verdicts: Collection[bool | None]) -> bool | None:
        """Of the claim, from one verdict on each contrast."""
        if self.some in verdicts:
            return self.some
        return None if None in verdicts or not verdicts else not self.some


_PAIR = {"of", "than"}
_NEEDS = {
    "equals": {"cells"}, "within": {"cells"}, "sum": {"terms", "value"}, "monotone": {"of"}, "stated": {"note"},
    "difference": _PAIR | {"value"}, "ratio": _PAIR | {"value"}, "greater": _PAIR, "best among": _PAIR,
    "margin": _PAIR, "comparable": _PAIR, "sensitive": _PAIR,
}  # fmt: skip
_ABOVE = Interval(0, math.inf, open_low=True)
_IMPLIED = {
    "greater": _ABOVE, "best among": _ABOVE, "monotone": _ABOVE, "margin": Interval(MARGIN, math.inf),
    "comparable": Interval(-MARGIN, MARGIN), "sensitive": Interval(MARGIN, math.inf, open_low=True),
}  # fmt: skip
_Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class ClaimFile(BaseModel):
    """One entry of a claims file, whose head says what the keys mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    quote: str
    where: str = ""
    kind: Literal[
        "equals", "within", "difference", "ratio", "sum", "greater", "best among", "monotone", "margin", "comparable",
        "sensitive", "stated",
    ]  # fmt: skip
    cells: dict[str, str] = {}
    of: _Names = []
    than: _Names = []
    terms: dict[str, float | str] = {}
    value: str = ""
    each: list[Any] = [""]
    note: str = ""


@functools.cache
def known() -> frozenset[str]:
    """What a claim may name: the cells of the suite's own artifacts, and the paper's counts."""
    return frozenset({cell for name in available() for cell in load_artifact(name).cells} | set(counts()))


@functools.cache
def claims() -> tuple[Claim, ...]:
    """The paper's claims, in its order."""
    return load(HERE / "claims.yaml")


def load(path: str | Path) -> tuple[Claim, ...]:
    """The claims of a file. UserError names the claim and what is wrong with it."""
    entries = read_yaml(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of claims")
    return _parsed(entries, str(path), "", known())


def of_artifact(artifact: Artifact) -> tuple[Claim, ...]:
    """The claims in a user's own artifact file; they may name its cells and those of the suite."""
    return _parsed(artifact.claims, f"{artifact.path}: claims", Path(artifact.path).name, known() | set(artifact.cells))


def _parsed(entries: Sequence[Any], path: str, where: str, names: Collection[str]) -> tuple[Claim, ...]:
    found: dict[str, Claim] = {}
    for place, entry in enumerate(entries, 1):
        here = f"{path}: claim {entry.get('id', place) if isinstance(entry, dict) else place}"
        try:
            file = ClaimFile.model_validate(entry)
            given = {key for key in ("cells", "of", "than", "terms", "value", "note") if getattr(file, key)}
            if file.id in found or (where and file.id in {claim.id for claim in claims()}):
                raise UserError("two claims have this id")
            if given - {"note"} != (needed := _NEEDS[file.kind]) - {"note"} or not needed <= given:
                raise UserError(f"kind {file.kind!r} takes {', '.join(sorted(needed))}, got {', '.join(sorted(given))}")
            contrasts = tuple(_contrasts(file, names))
        except ValidationError as error:
            raise UserError(f"{here}: {explain(error, ClaimFile)}") from None
        except (ValueError, LookupError, UserError) as error:
            raise UserError(f"{here}: {error}") from None
        quote = " ".join(file.quote.split())
        found[file.id] = Claim(file.id, quote, file.where or where, file.kind, file.note, contrasts)
    return tuple(found.values())


def _contrasts(file: ClaimFile, names: Collection[str]) -> Iterator[Contrast]:
    one = Fraction(1)
    for entry in file.each:
        for cell, text in file.cells.items():
            yield Contrast({_matching([cell], entry, names)[0]: one}, target(text))
        if file.terms:
            yield Contrast(_weighted(file.terms, entry, names), target(file.value))
        of = _matching(file.of, entry, names)
        than = _matching(file.than, entry, names, without=of)
        for a, b in itertools.pairwise(of) if file.kind == "monotone" else itertools.product(of, than):
            if a == b:
                raise UserError(f"{a}: is compared with itself")
            allowed = _IMPLIED.get(file.kind) or target(file.value, file.kind == "ratio")
            yield Contrast({a: one}, allowed, over=b) if file.kind == "ratio" else Contrast({a: one, b: -one}, allowed)
            if file.kind == "sensitive":
                yield Contrast({b: one, a: -one}, allowed)


def _filled(template: str, entry: Any) -> str:
    """The template with the entry's values in place of its braces. Nothing else that `str.format` can do: a stranger's
    file would have it fill the memory."""
    values = [str(value) for value in (entry if isinstance(entry, list) else [entry])]
    rest = PLACE.sub("", template)
    if "{" in rest or "}" in rest:
        raise UserError(f"{shown(template)}: only {{}} or {{0}}, {{1}}, .. may stand in braces")
    if too_long := [text for text in (template, *values) if len(text) > SHOWN]:
        raise UserError(f"{shown(too_long[0])}: too long (allowed: {SHOWN} characters)")
    return template.format(*values)


def _weight(text: str) -> Fraction:
    if not WEIGHT.fullmatch(text):
        raise UserError(f"terms: {shown(text)} is no weight (allowed: a number below 10^9, e.g. -1, 0.5, 1/3)")
    return Fraction(text)


def _weighted(terms: Mapping[str, float | str], entry: Any, names: Collection[str]) -> dict[str, Fraction]:
    found: dict[str, Fraction] = {}
    for template, weight in terms.items():
        cells = _matching([template], entry, names)
        for cell in cells:
            found[cell] = found.get(cell, Fraction(0)) + _weight(_filled(str(weight), entry)) / len(cells)
    return found


def _matching(templates: list[str], entry: Any, names: Collection[str], without: Collection[str] = ()) -> list[str]:
    """The names that templates stand for, each once; an unknown one is an error. `*` passes over dashes."""
    found: dict[str, None] = {}
    for name in [_filled(template, entry) for template in templates]:
        all_but = dashes().union(without) if "*" in name else ()
        cells = [cell for cell in fnmatch.filter(sorted(names), name) if cell not in all_but]
        if not cells:
            near = difflib.get_close_matches(name, sorted(names), 3) or sorted(names)[:1]
            raise UserError(f"{name}: no such cell (e.g. {', '.join(near)})")
        found |= dict.fromkeys(cells)
    return list(found)
