"""LaTeX from a template: whatever it fills in is escaped, but for tables that are LaTeX already."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.render import _tex as escaped
from analysis.render import render


class Latex(str):
    """Text that is LaTeX already."""


def environment(folder: Path) -> Environment:
    """`\\VAR{..}` and `\\BLOCK{..}` in place of braces, which LaTeX needs itself."""
    made = Environment(
        block_start_string=r"\BLOCK{", block_end_string="}", variable_start_string=r"\VAR{", variable_end_string="}",
        comment_start_string=r"\#{", comment_end_string="}", trim_blocks=True, lstrip_blocks=True,
        loader=FileSystemLoader(folder), undefined=StrictUndefined, finalize=text, autoescape=False,
    )  # fmt: skip  # `text` escapes all, for LaTeX  # nosec B701
    made.filters["latex"] = lambda table: Latex(render(table, "latex"))
    made.filters["file"] = lambda name: Latex(rf"\detokenize{{{name}}}")
    return made


def text(value: Any) -> str:
    """Escaped. Names of cells may break after their dots."""
    if isinstance(value, Latex):
        return value
    return re.sub(r"(?<=[A-Za-z])\.(?=\w)|(?<=\d)\.(?=[A-Za-z])", r".\\allowbreak{}", escaped(str(value)))
