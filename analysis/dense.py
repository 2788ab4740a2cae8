"""What segmentation and detection leave beside their scores: per class, confusion, precision over recall, pictures."""

from __future__ import annotations

import base64
import io
import stat
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, ValidationError

from analysis.curves import finish, styled
from analysis.study import Study
from sdae.errors import UserError
from sdae.files import LARGEST, read_json
from sdae.store import RunFolder
from sdae.yamls import explain

MOST_CLASSES = 40  # bars; of more classes those with the most pixels or the highest AP are shown
TARGETS = {"0.5": "IoU 0.5", "0.75": "IoU 0.75", "mean": "mean of 0.5 to 0.95"}


class _Segmented(BaseModel, strict=True):
    classes: list[str] = Field(min_length=1)
    iou: list[float | None]
    confusion: list[list[float]]


class _Detected(BaseModel, strict=True):
    classes: list[str] = Field(min_length=1)
    ap_box: list[float | None]
    ap_mask: list[float | None]
    precision: dict[str, dict[str, list[float]]]


def evaluation_of(run: RunFolder) -> dict[str, Any]:
    """What the run's last evaluation found, class by class. UserError where it has none, or it cannot be drawn."""
    path = run.path / "evaluation.json"
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("classes"), list):
        raise UserError(f"{run.id}: no evaluation.json (runs of segment and detect leave one when they end)")
    model = _Segmented if "iou" in found else _Detected
    try:
        model.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, model)}") from None
    matrix, curves = found.get("confusion", []), found.get("precision", {})
    by_class = [found["iou"], matrix, *matrix] if model is _Segmented else [found["ap_box"], found["ap_mask"]]
    if any(len(values) != len(found["classes"]) for values in by_class):
        raise UserError(f"{path}: not one value for each of its {len(found['classes'])} classes")
    if model is _Detected and any(not TARGETS.keys() <= curves.get(kind, {}).keys() for kind in ("bbox", "segm")):
        raise UserError(f"{path}: precision: expected bbox and segm, each with {', '.join(TARGETS)}")
    return found


def first_run(study: Study, cell: str) -> RunFolder:
    """The run of the first seed behind a cell. UserError where it has none."""
    if cell not in study.cells:
        study.place(cell)  # says which names come near
    if not study.cells[cell].runs:
        raise UserError(f"{cell}: {study.cells[cell].state}")
    return study.store.run(study.cells[cell].runs[0])


def pictures_of(run: RunFolder) -> list[Path]:
    """Validation pictures with the truth at the left and the prediction at the right. No links: a page that shows them
    would carry away what a stranger's run folder leads to."""
    folder = run.path / "pictures"
    return [] if folder.is_symlink() else sorted(path for path in folder.glob("*.jpg") if _is_picture(path))


def _is_picture(path: Path) -> bool:
    try:
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST
    except OSError:
        return False


@styled
def plot_evaluation(found: dict[str, Any], title: str = "") -> Figure:
    """Per class: IoU and the confusion matrix, or AP and precision over recall."""
    shown = _largest(found)
    height = max(2.6, 0.9 + 0.155 * len(shown))
    figure = Figure(figsize=(7.4, height), layout="constrained")
    bars, other = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    if "iou" in found:
        _bars(bars, found, shown, {"iou": "IoU"}, "IoU (%)")
        _confusion(other, found, shown)
    else:
        _bars(bars, found, shown, {"ap_box": "box", "ap_mask": "mask"}, "AP (%)")
        _precision(other, found["precision"])
    return finish(figure, title, False)


@styled  # for the salt of its ids: the same numbers give the same bytes
def svg(found: dict[str, Any], title: str = "") -> bytes:
    buffer = io.BytesIO()
    plot_evaluation(found, title).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def summary(found: dict[str, Any]) -> str:
    """In words: the best and the worst classes. What the figure's alternative text says."""
    key, what = ("iou", "IoU") if "iou" in found else ("ap_box", "AP of boxes")
    known = sorted(((v, n) for v, n in zip(found[key], found["classes"], strict=True) if v is not None), reverse=True)
    if not known:
        return f"{what}: no class occurs"
    best, worst = ([f"{name} {value:.1f}" for value, name in part] for part in (known[:3], known[-3:]))
    return f"{what} in percent of {len(known)} classes, the best {', '.join(best)}; the worst {', '.join(worst)}"


def views(study: Study) -> list[dict[str, Any]]:
    """For each row of a dense task, its first finished run: title, words, figure and pictures as data addresses."""
    entries = []
    for table in study.tables.values():
        for row in table.rows:
            runs = [run for cell in row.cells.values() for run in cell.runs]
            if not runs or str(study.frame.at[runs[0], "stage"]) not in ("segment", "detect"):
                continue
            folder = study.store.run(runs[0])
            try:
                found = evaluation_of(folder)
            except UserError:
                continue  # made-up runs have scores only
            title = f"{row.label}, {row.meta['epochs']} epochs" if row.meta.get("epochs") else row.label
            entries.append({
                "run": folder.id, "title": f"{title}: {folder.id}", "alt": summary(found),
                "image": data_uri(svg(found), "image/svg+xml"),
                "pictures": [data_uri(path.read_bytes(), "image/jpeg") for path in pictures_of(folder)],
            })  # fmt: skip
    return entries


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def _largest(found: dict[str, Any]) -> list[int]:
    """Which classes are shown, in their order."""
    if "iou" in found:
        weight = np.asarray(found["confusion"]).sum(1)
    else:
        weight = np.array([-1.0 if value is None else value for value in found["ap_box"]])
    return sorted(np.argsort(-weight, kind="stable")[:MOST_CLASSES].tolist())


def _bars(ax: Axes, found: dict[str, Any], shown: list[int], keys: dict[str, str], label: str) -> None:
    place, thick = np.arange(len(shown)), 0.8 / len(keys)
    for n, (key, name) in enumerate(keys.items()):
        values = [found[key][i] for i in shown]
        ax.barh(place + (n - (len(keys) - 1) / 2) * thick, [v or 0.0 for v in values], thick, label=name)
        for y, value in enumerate(values):
            if value is None:
                ax.text(1, y, "does not occur", va="center", fontsize=6, color="0.4")
    ax.set(yticks=place, xlim=(0, 100), xlabel=label)
    ax.set_yticklabels([found["classes"][i] for i in shown], fontsize=6.5)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if len(keys) > 1:
        ax.legend(loc="lower right", fontsize=7)


def _confusion(ax: Axes, found: dict[str, Any], shown: list[int]) -> None:
    """Rows: the true class; columns: how its pixels were called, in percent of the row."""
    matrix = np.asarray(found["confusion"], float)[np.ix_(shown, shown)]
    total = np.asarray(found["confusion"], float).sum(1)[shown, None]
    image = ax.imshow(100 * matrix / np.maximum(total, 1), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    names = [found["classes"][i] for i in shown]
    ax.set(xticks=range(len(shown)), yticks=range(len(shown)), xlabel="called", ylabel="is")
    ax.set_xticklabels(names, rotation=90, fontsize=6.5)
    ax.set_yticklabels([])
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="% of the class's pixels", shrink=0.8)


def _precision(ax: Axes, precision: dict[str, dict[str, list[float]]]) -> None:
    for line, (kind, name) in zip(("-", "--"), (("bbox", "box"), ("segm", "mask")), strict=True):
        for colour, (key, words) in zip(("C0", "C1", "C2"), TARGETS.items(), strict=True):
            values = precision[kind][key]
            ax.plot(np.linspace(0, 1, len(values)), values, line, color=colour, label=f"{name}, {words}")
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(fontsize=6.5)
