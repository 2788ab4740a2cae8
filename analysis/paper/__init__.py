"""The paper's own numbers, keyed by cell. `printed.yaml` beside this file holds them, and nothing else does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdae.yamls import read_yaml


@dataclass(frozen=True)
class Printed:
    """A printed number: 84.1 with one decimal stands for [84.05, 84.15). `unit`: %, s or GB (10^9 bytes)."""

    value: float
    decimals: int
    unit: str
    where: str

    @property
    def bounds(self) -> tuple[float, float]:
        """The half-open interval of the numbers that are printed so."""
        half = 0.5 * 10.0**-self.decimals
        return round(self.value - half, self.decimals + 1), round(self.value + half, self.decimals + 1)


def printed() -> dict[str, Printed]:
    """Every value that the paper prints, by cell name. Cells that are absent here are unknown or a dash."""
    return {cell: Printed(**entry) for cell, entry in _file()["cells"].items()}


def dashes() -> frozenset[str]:
    """Cells in which the paper prints a dash, or that mean nothing (MAE's overhead over MAE)."""
    return frozenset(_file()["dashes"])


@functools.cache
def _file() -> dict[str, Any]:
    values: dict[str, Any] = read_yaml(Path(__file__).with_name("printed.yaml"))
    return values
