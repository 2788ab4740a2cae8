"""The paper as data: `printed.yaml` has its numbers, `claims.yaml` its sentences, `recipes.yaml` its settings beside
those of its release. Nothing else in the suite holds a number of the paper's results."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdae.yamls import read_yaml

HERE = Path(__file__).parent
DASH = "–"


@dataclass(frozen=True)
class Printed:
    """A printed number: 84.1 with one decimal stands for [84.05, 84.15). `unit`: %, s or GB (10^9 bytes).

    `exact`: a count (epochs, patches), which stands for itself alone.
    """

    value: float
    decimals: int
    unit: str
    where: str
    exact: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The half-open interval of the numbers that are printed so; of a count, the number twice."""
        if self.exact:
            return self.value, self.value
        half = 0.5 * 10.0**-self.decimals
        return round(self.value - half, self.decimals + 1), round(self.value + half, self.decimals + 1)


@functools.cache
def printed() -> Mapping[str, Printed]:
    """Every value that the paper prints, by cell name. Cells that are absent here are unknown or a dash."""
    found = {cell: _number(text, unit, where) for cell, text, unit, where in _places() if text != DASH}
    for where, values in _file()["figures"].items():
        found |= {cell: _number(text, "%", where) for cell, text in values.items()}
    return found


@functools.cache
def dashes() -> frozenset[str]:
    """Cells in which the paper prints a dash, or that mean nothing (MAE's overhead over MAE)."""
    return frozenset(cell for cell, text, _, _ in _places() if text == DASH)


@functools.cache
def rows() -> Mapping[str, Mapping[str, Any]]:
    """What the paper prints beside a row's values (method, epochs, crops, supervised ..), by `table2.sdae-300`."""
    return {
        f"{name}.{row}": {key: value for key, value in values.items() if key not in table["units"]}
        for name, table in _file()["tables"].items()
        for row, values in table["rows"].items()
    }


@functools.cache
def counts() -> Mapping[str, Printed]:
    """Exact numbers that are no cell: `table2.sdae-300.epochs`, `table2.dino-400.crops`, `text.patches`."""
    found = {
        f"{row}.{key}": Printed(values[key], 0, key, _file()["tables"][row.partition(".")[0]]["where"], True)
        for row, values in rows().items()
        for key in ("epochs", "crops")
        if values.get(key) is not None
    }
    for where, numbers in _file()["counts"].items():
        found |= {f"text.{name}": Printed(value, 0, "", where, True) for name, value in numbers.items()}
    return found


def _number(text: str, unit: str, where: str) -> Printed:
    return Printed(float(text), len(text.partition(".")[2]), unit, where)


def _places() -> Iterator[tuple[str, str, str, str]]:
    """Cell, printed text, unit and table of every place of the tables."""
    for name, table in _file()["tables"].items():
        for row, values in table["rows"].items():
            for column, unit in table["units"].items():
                yield f"{name}.{row}.{column}", values[column], unit, table["where"]


@functools.cache
def _file() -> dict[str, Any]:
    values: dict[str, Any] = read_yaml(HERE / "printed.yaml")
    return values
