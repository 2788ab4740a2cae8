"""An artifact file: the rows and columns of a table or figure, and for each cell the run that feeds it.

    title: Does the mask ratio matter?
    columns: {top1: {run: finetune, metric: top1}}
    runs: {finetune: {recipe: finetune, init: {run: pretrain}}}
    rows:
      "ratio-{mask_ratio}":
        grid: {mask_ratio: [0.5, 0.75, 0.9]}
        runs: {pretrain: {recipe: sdae, method: {mask_ratio: "{mask_ratio}"}}}

A run is a recipe's name and the keys that it changes, at the paper's scale; `init.run` names another run. A row sees
the file's runs and its own (null takes one away); a row without `runs` is a row that nothing here fills. `{key}` is
replaced by the grid's value: alone it is the value itself, inside a text its spelling.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ablations.scale import HERE, PAPER_TOKENS, Scale, load_scale, recipes, scale_epochs
from sdae.errors import UserError
from sdae.yamls import explain, read_yaml

NAME = r"[\w.+-]+"  # of rows and columns: they are written into pages, file names and comments
MOST_ROWS = 10_000
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Cell:
    """One place in an artifact, e.g. `table5.folds.top1`; `metric`: a key of a result, null where no run fills it."""

    name: str
    artifact: str
    row: str
    column: str
    metric: str | None


@dataclass(frozen=True)
class Row:
    """`meta` holds what the paper prints beside the label, or where a point lies in a figure."""

    name: str
    label: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    name: str
    label: str
    unit: str
    decimals: int
    higher_is_better: bool


@dataclass
class Artifact:
    """`paper`, `claims` (of a user's own artifact only): printed values by cell, and sentences to be tested.

    `specs`: a cell's run and those it may need.
    """

    name: str
    kind: str
    title: str
    rows: list[Row]
    columns: list[Column]
    cells: dict[str, Cell]
    notes: list[str]
    paper: dict[str, float]
    specs: dict[str, tuple[str, dict[str, dict[str, Any]]]] = field(default_factory=dict, repr=False)
    path: str = ""
    claims: list[dict[str, Any]] = field(default_factory=list, repr=False)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ColumnFile(_Strict):
    label: str | None = None
    unit: str = ""
    decimals: Annotated[int, Field(ge=0, le=6)] = 1
    better: Literal["higher", "lower"] = "higher"
    run: str | None = None
    metric: str | None = None


class RowFile(_Strict):
    label: str | None = None
    grid: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = {}
    meta: dict[str, Scalar] = {}
    runs: dict[str, dict[str, Any] | None] | None = None


class ArtifactFile(_Strict):
    title: str
    kind: Literal["table", "figure"] = "table"
    columns: Annotated[dict[str, ColumnFile], Field(min_length=1)]
    runs: dict[str, dict[str, Any]] = {}
    rows: Annotated[dict[str, RowFile], Field(min_length=1)]
    notes: list[str] = []
    paper: dict[str, float] = {}
    claims: list[dict[str, Any]] = []


METRICS = {
    "pretrain": ("loss", "target_std", "target_rank", "teacher_distance", "knn_top1", "images_per_s", "epochs"),
    "finetune": ("top1", "top5", "loss", "epochs"),
    "linprobe": ("top1", "top5", "loss", "epochs"),
    "segment": ("miou", "macc", "aacc", "loss", "steps"),
    "detect": ("apb", "apb50", "apb75", "apm", "apm50", "apm75", "loss", "steps"),
    "cost": ("time", "overhead", "memory", "images_per_s", "mfu", "gflop_per_image", "flop_counter_gflop"),
}


def available() -> list[str]:
    """The suite's own artifacts, in the paper's order: tables, then figures."""
    return sorted((p.stem for p in HERE.glob("*.yaml") if p.stem != "recipes"), key=lambda name: (name[0] != "t", name))


def _texts(values: Any, where: str) -> Any:
    """The same values. Raises UserError for a key that YAML does not take for text, as it does `on` and `3`."""
    for key, value in (
        values.items() if isinstance(values, dict) else enumerate(values if isinstance(values, list) else ())
    ):
        if isinstance(values, dict) and not isinstance(key, str):
            raise UserError(f"{where}: the key {key!r} is no text to YAML (allowed: put it in quotes)")
        _texts(value, where)
    return values


def load_artifact(name_or_path: str | Path, scale: str | Path | Scale = "paper") -> Artifact:
    """An artifact of the suite by name, or a user's own from its file. Its notes say what the scale does to it."""
    text = str(name_or_path)
    own = text not in available()
    path = Path(text) if own else HERE / f"{text}.yaml"
    if own and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"artifact {text!r} is unknown (allowed: {', '.join(available())}, or a YAML file of your own)")
    name = path.stem
    if own and ((taken := name in available()) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name)):
        reason = "is that of one of the suite's own" if taken else "has other signs than letters, digits, - and _"
        raise UserError(f"{path}: the file's name is the artifact's name, and {name!r} {reason}; rename it")
    try:
        file = ArtifactFile.model_validate(_texts(read_yaml(path), str(path)))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, ArtifactFile)}") from None
    if (file.paper or file.claims) and not own:
        raise UserError(f"{path}: printed values and claims of the suite's own artifacts live in analysis/paper")
    scale = load_scale(scale)
    artifact = Artifact(
        name, file.kind, file.title, [], [], {}, list(file.notes), {}, path=str(path), claims=file.claims
    )
    for key, column in file.columns.items():
        if not re.fullmatch(NAME, key):
            raise UserError(f"{path}: columns: {key!r}: a column's name may have letters, digits and . + - _")
        if (column.run is None) != (column.metric is None):
            raise UserError(f"{path}: columns.{key}: run and metric go together")
        better = column.better == "higher"
        artifact.columns.append(Column(key, column.label or key, column.unit, column.decimals, better))
    for template, row in file.rows.items():
        if (count := math.prod(map(len, row.grid.values()))) > MOST_ROWS:
            raise UserError(f"{path}: rows.{template}: its grid has {count:,} rows (allowed: {MOST_ROWS:,})")
        for combination in itertools.product(*row.grid.values()):
            _add_row(artifact, file, template, row, dict(zip(row.grid, combination, strict=True)))
    artifact.notes += _scale_notes(artifact, scale)
    for key, value in file.paper.items():
        cell = key if key in artifact.cells else f"{name}.{key}"
        if cell not in artifact.cells:
            raise UserError(f"{path}: paper.{key}: no such cell (e.g. {next(iter(artifact.cells))})")
        artifact.paper[cell] = value
    return artifact


def _scale_notes(artifact: Artifact, scale: Scale) -> list[str]:
    """What the scale does to the numbers that labels and names give as the paper has them."""
    specs = [spec for _, runs in artifact.specs.values() for spec in runs.values()]
    stages = {recipes().get(str(spec.get("recipe")), {}).get("stage") for spec in specs}
    notes = []
    factor, shorter = scale.epochs.pretrain, []
    if factor != 1 and "pretrain" in stages:
        shorter = [f"300 epochs of pre-training are {scale_epochs(300, factor)}"]
    for stage, what, length, unit in (
        ("finetune", "fine-tuning", 100, ""), ("segment", "segmentation", 160_000, " steps"),
        ("detect", "detection", 87_960, " steps"),
    ):  # fmt: skip
        if getattr(scale.epochs, stage) != 1 and stage in stages:
            shorter.append(f"{length:,}{unit} of {what} {scale_epochs(length, getattr(scale.epochs, stage)):,}")
    if shorter:
        note = f"At scale {scale.name} {', '.join(shorter)}"
        if factor != 1 and "pretrain" in stages:
            note += f"; an EMA momentum m per epoch is m^{1 / factor:g}, per iteration m^(steps in the paper / here)"
        notes.append(f"{note}.")
    views = [_below(_below(spec, "method"), "teacher") for spec in specs]
    crops = sorted({v["tokens"] for v in views if v.get("view") == "crop" and isinstance(v.get("tokens"), int)})
    if crops and scale.tokens != PAPER_TOKENS:
        here = ", ".join(f"{n}: {(2 * n * scale.tokens + PAPER_TOKENS) // (2 * PAPER_TOKENS)}" for n in crops)
        notes.append(f"Of the paper's {PAPER_TOKENS} patches and, at scale {scale.name}, of {scale.tokens}: {here}.")
    return notes


def _below(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _add_row(artifact: Artifact, file: ArtifactFile, template: str, row: RowFile, values: dict[str, Scalar]) -> None:
    where = f"{artifact.path}: rows.{template}"
    name = str(_fill(template, values, where, whole=False))
    if not re.fullmatch(NAME, name):
        raise UserError(f"{where}: {name!r}: a row's name may have letters, digits and . + - _")
    if any(name == other.name for other in artifact.rows):
        raise UserError(f"{where}: two rows are named {name!r} (does the name hold every key of the grid?)")
    label = str(_fill(row.label or name, values, where, whole=False))
    artifact.rows.append(Row(name, label, _fill(row.meta, values, where)))
    runs: dict[str, Any] = {}
    if row.runs is not None:
        merged = {**file.runs, **row.runs}
        runs = {k: _fill(v, values, f"{where}.runs.{k}") for k, v in merged.items() if v is not None}
    for key, column in file.columns.items():
        cell = f"{artifact.name}.{name}.{key}"
        run, metric = column.run, column.metric
        if row.runs is None or (run in row.runs and row.runs[run] is None):  # no row of runs, or taken away
            run = metric = None
        artifact.cells[cell] = Cell(cell, artifact.name, name, key, metric)
        if run is not None and metric is not None:
            if run not in runs:
                there = ", ".join(runs) or "none"
                raise UserError(f"{where}: columns.{key} wants the run {run!r} (there are: {there})")
            stage = recipes().get(str(runs[run].get("recipe")), {}).get("stage")
            if stage and metric not in METRICS[stage]:
                allowed = f"(allowed: {', '.join(METRICS[stage])})"
                raise UserError(f"{artifact.path}: columns.{key}.metric: {metric!r} is unknown for {stage} {allowed}")
            artifact.specs[cell] = (run, runs)


def _fill(value: Any, values: Mapping[str, Scalar], where: str, whole: bool = True) -> Any:
    """`value` with `{key}` replaced. `whole`: a text that is only `{key}` becomes the value ("0.90": 0.9)."""
    if isinstance(value, Mapping):
        return {k: _fill(v, values, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, values, where) for v in value]
    if not isinstance(value, str) or "{" not in value.replace("${", ""):
        return value
    keys = re.findall(r"(?<!\$)\{(\w+)\}", value)
    for key in keys:
        if key not in values:
            there = ", ".join(values) or "none"
            raise UserError(f"{where}: {{{key}}} is not a key of the row's grid (there are: {there})")
    if whole and len(keys) == 1 and value == f"{{{keys[0]}}}":
        found = values[keys[0]]
        return yaml.safe_load(found) if isinstance(found, str) else found
    return re.sub(r"(?<!\$)\{(\w+)\}", lambda match: str(values[match[1]]), value)
