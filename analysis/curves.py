"""What the notebooks draw of numbers, beside tables and Figure 4: curves over epochs, costs.

Figures are in the style of `analysis.figures`. A figure of made-up runs says so across every panel; made-up and real
runs are never drawn together. What is not there is drawn as `not run`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import frame as frames
from analysis.figures import COLOURS, LINES, MARKERS, PANELS, STYLE, across, paint, panel_of
from analysis.statistics import estimate
from analysis.study import Study
from analysis.table import Table
from sdae.errors import UserError
from sdae.store import RunFolder, Store, number

LABELS = {
    "loss": "training loss", "lr": "learning rate", "momentum": "momentum of the teacher",
    "target_std": "std of the targets", "target_rank": "effective rank of the targets",
    "teacher_distance": "|teacher - student| / |student|", "knn_top1": "kNN top-1 (%)",
    "images_per_s": "pictures per second", "mfu": "model FLOPs utilization", "top1": "top-1 after fine-tuning (%)",
}  # fmt: skip
P = ParamSpec("P")
R = TypeVar("R")
COLUMNS = ["id", "arm", "label", "seed", "synthetic", "step", "epoch", "key", "value"]
FACTS = {  # of a run's row in the frame, named in a label where the drawn runs differ in them
    "epochs": "{:.0f} epochs", "mask_ratio": "mask ratio {:g}", "similarity": "similarity over {}",
    "ema_every": "EMA per {}", "momentum": "momentum {:.4g}", "image_size": "{} px", "model": "{}", "scale": "{}",
}  # fmt: skip


def attempt(make: Callable[[], Any]) -> Any:
    """What `make` gives; where it says no (a run that is not there), the reason in one line, and nothing is drawn."""
    try:
        return make()
    except UserError as error:
        print(error)
        return None


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draws, or writes what is drawn, in the style of `analysis.figures`."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcParams.update(STYLE | {"figure.dpi": 110})
            return draw(*args, **kwargs)

    return inner


# Which runs
def summary(study: Study) -> str:
    """One line: where, which scale, how much of it is there."""
    planned = study.frame[study.frame.index.isin(list(study.sweep.runs))]
    done, where = int((planned["state"] == "done").sum()), f"{study.store.root}, scale {study.scale.title}"
    made_up = "SYNTHETIC RESULTS, made up. " if study.synthetic else ""
    if not done:
        where = f"{study.store.root.resolve()}, scale {study.scale.title}"
        return f"{where}: no run is done; nothing below is measured. Make some with sdae-cli reproduce."
    return f"{made_up}{where}: {done} of {study.sweep.unique} runs done, seeds {', '.join(map(str, study.seeds))}."


def pretrainings(study: Study, name: str) -> list[str]:
    """Ids of the finished pre-trainings behind cells: `table5`, `table5.folds`, `figure4a.epoch-*`; else UserError."""
    cells = [cell for cell in study.sweep.cells if fnmatch(cell, name) or cell.startswith(f"{name}.")]
    if not cells:
        study.place(name)  # says which names come near
    planned = dict.fromkeys(identity for cell in cells for _, identity in study.sweep.cells[cell])
    wanted = dict.fromkeys(need for i in planned for need in (study.sweep.runs[i].needs or [i]))
    wanted = dict.fromkeys(i for i in wanted if i.startswith("pretrain"))
    found = [i for i in wanted if i in study.frame.index and study.frame.at[i, "state"] == "done"]
    if not found:
        where = f"in {study.store.root} at scale {study.scale.name}"
        raise UserError(f"{name}: not run: none of its {len(wanted)} pre-trainings is done {where}")
    return found


def folder_of(study: Study, name: str) -> RunFolder:
    """The first of `pretrainings`."""
    return study.store.run(pretrainings(study, name)[0])


def curves(store: Store, ids: Sequence[str], keys: Sequence[str] | None = None) -> pd.DataFrame:
    """The rows of several runs' metrics.jsonl, one number a row, in `COLUMNS`; keys: null for all that there are.

    Runs of one arm differ in the seed only. UserError for an unknown run, and where real and made-up runs would mix.
    """
    rows = _rows(frames.collect(store).set_index("id"), ids)
    rows = rows.assign(label=pd.Series(labels(rows), dtype=object))
    found = []
    for identity, run in rows.iterrows():
        for row in store.run(str(identity)).metrics():
            facts = [identity, *run[["arm", "label", "seed", "synthetic"]], int(number(row, "step")), row.get("epoch")]
            wanted = [k for k in (row if keys is None else keys) if k not in ("step", "epoch")]
            values = [(key, row.get(key)) for key in wanted]
            found += [[*facts, k, float(v)] for k, v in values if isinstance(v, (int, float)) and not abs(v) > 1e300]
    return pd.DataFrame(found, columns=COLUMNS)


def student_teacher(store: Store, ids: Sequence[str]) -> pd.DataFrame:
    """Top-1 of fine-tunings of some pre-trainings' students and teachers over the epochs of pre-training; as `curves`.

    Of several lengths of fine-tuning the one that was done after the most epochs is taken.
    """
    frame = frames.collect(store).set_index("id")
    pre = _rows(frame, ids)
    tuned = frame[frame["need"].isin(list(pre.index)) & (frame["stage"] == "finetune") & (frame["state"] == "done")]
    tuned = tuned.assign(epoch=tuned["init_epoch"].fillna(tuned["need"].map(pre["epochs"])))
    if len(tuned):
        tuned = tuned[tuned["epochs"] == tuned.groupby("epochs")["epoch"].nunique().idxmax()]
    names = labels(pre) if pre["arm"].nunique() > 1 else {}
    label = [f"{names[i]}: {w}" if names else w for i, w in zip(tuned["need"], tuned["weights"], strict=True)]
    tuned = tuned.assign(label=label, step=tuned["epoch"], key="top1", value=tuned["top1"])
    return tuned.reset_index()[COLUMNS].sort_values(["label", "epoch"], ignore_index=True)


def _rows(frame: pd.DataFrame, ids: Sequence[str]) -> pd.DataFrame:
    for identity in sorted(set(ids) - set(frame.index)):
        raise UserError(frames.unknown("run", identity, frame.index))
    rows = frame.loc[list(ids)]
    rows = rows.assign(synthetic=rows["synthetic"].fillna(False).astype(bool))
    if rows["synthetic"].nunique() > 1:
        raise UserError(f"{', '.join(ids)}: some are synthetic: not mixed with real ones")
    return rows


def labels(rows: pd.DataFrame) -> dict[Any, str]:
    """A name for each run: its method and view, and what else the runs differ in, the seed apart."""
    out = {}
    differ = [key for key in FACTS if rows[key].nunique() > 1]
    for identity, run in rows.iterrows():
        view = {"folds": f"{run['folds']} folds", "crop": f"crop of {run['tokens']}"}.get(run["view"], run["view"])
        stage = "MAE" if not pd.isna(run["method"]) and run["method"] == "mae" else run["stage"]
        first = stage if pd.isna(view) else f"SdAE, {view}"
        raw = ["raw targets"] if not pd.isna(run["normalize"]) and not run["normalize"] else []
        out[identity] = ", ".join([first, *raw, *(FACTS[k].format(run[k]) for k in differ if not pd.isna(run[k]))])
    arms = rows.groupby(pd.Series(out, dtype=object))["arm"].nunique()
    return {i: name if arms[name] == 1 else f"{name} ({str(rows.at[i, 'arm'])[:4]})" for i, name in out.items()}


# Curves
@styled
def plot_curves(frame: pd.DataFrame, keys: Sequence[str], title: str = "") -> Figure:
    """A panel for each key over the epochs, a line for each arm, with the 95 % interval of its mean over seeds."""
    names, most = list(dict.fromkeys(frame["label"])), 0
    figure, axes = panels_of(len(keys), 3.4, 2.6, foot=0.2 * math.ceil(len(names) / 3))
    for ax, key in zip(axes, keys, strict=True):
        part = frame[frame["key"] == key]
        for index, name in enumerate(names):
            if not len(arm := part[part["label"] == name]):
                continue
            points = {x: estimate(list(values)) for x, values in arm.groupby("epoch")["value"]}
            mean = np.array([point.mean for point in points.values()])
            half = np.array([point.half or 0.0 for point in points.values()])
            most, round_ = max(most, *(point.n for point in points.values())), index // 7
            colour, marker = COLOURS[index % 7], MARKERS[(index + 2 * round_) % 7]  # no two of 49 arms look alike
            style = {"color": colour, "linestyle": LINES[(index + round_) % 7], "linewidth": 1.2, "label": name}
            ax.plot(list(points), mean, marker=marker, markersize=4, markevery=len(points) // 20 + 1, **style)
            ax.fill_between(list(points), mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        ax.set(xlabel="epoch of pre-training", ylabel=LABELS.get(key, key))
        if not len(part):
            empty(ax)
    handles = next((ax.get_legend_handles_labels() for ax in axes if ax.lines), ([], []))
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7)
    bands = f"Bands: 95 % interval over up to {most} seeds" if most > 1 else "One seed, no bands" if most else ""
    return finish(figure, ". ".join(filter(None, [title, bands])), bool(frame["synthetic"].any()))


@styled
def plot_figure4(study: Study, panels: Sequence[str] = PANELS) -> Figure:
    """Figure 4 as `sdae-cli paper figure 4` draws it."""
    return paint([panel_of(study.tables[name]) for name in panels])


@styled
def plot_costs(table: Table) -> Figure:
    """The columns of Table 1 as bars; the paper's values are hollow diamonds at its own scale, absent at any other."""
    figure, axes = panels_of(len(table.columns), 3.0, 2.4)
    for index, (ax, column) in enumerate(zip(axes, table.columns, strict=True)):
        cells = {row.label: row.cells[column.name] for row in table.rows if column.name in row.cells}
        known = {n: cell.estimate for n, cell in enumerate(cells.values()) if cell.estimate}
        halves = [e.half or float("nan") for e in known.values()]
        ax.barh(list(known), [e.mean for e in known.values()], 0.6, xerr=halves, color=COLOURS[index], alpha=0.75)
        if table.comparable:
            printed = [(cell.paper, n) for n, cell in enumerate(cells.values()) if cell.paper is not None]
            ax.plot(*zip(*printed, strict=True), "D", markersize=7, mfc="none", mec="black", label="paper")
        ax.set_yticks(range(len(cells)), list(cells) if index == 0 else [""] * len(cells))
        ax.set_ylim(len(cells) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(column.label + (f" ({column.unit})" if column.unit else ""))
        if not known:
            empty(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return finish(figure, table.caption, table.synthetic)


def spent(study: Study) -> pd.DataFrame:
    """By stage: how many runs of this scale are done, hours of all, seconds of the median run."""
    frame = study.frame[study.frame.index.isin(list(study.sweep.runs)) & (study.frame["state"] == "done")]
    seconds = frame.groupby("stage")["seconds"]
    columns = {"runs": seconds.size(), "hours": seconds.sum() / 3600, "median seconds": seconds.median()}
    return marked(study, pd.DataFrame(columns))


def tally(study: Study) -> pd.DataFrame:
    """By artifact: how many cells are in which state."""
    states = {name: Counter(cell.state for cell in table.cells()) for name, table in study.tables.items()}
    return marked(study, pd.DataFrame(states).T.fillna(0).astype(int))


def marked(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame, with SYNTHETIC over its index where the results were made up."""
    return frame.rename_axis(columns="SYNTHETIC") if study.synthetic else frame


def panels_of(number: int, width: float, height: float, columns: int = 4, foot: float = 0) -> tuple[Figure, list[Axes]]:
    across, down = min(number, columns), math.ceil(number / columns)
    figure = Figure(figsize=(width * across, height * down + foot), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in axes[number:]:
        ax.remove()
    return figure, axes[:number]


def empty(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    across(ax, "not run", color="0.5", fontsize=12)


def finish(figure: Figure, title: str, synthetic: bool) -> Figure:
    """Title, and the mark of made-up results on every panel."""
    for ax in figure.axes if synthetic else []:
        across(ax, "SYNTHETIC", rotation=25, fontsize=22, color="0.88", zorder=0)
    if synthetic and not title.startswith("SYNTHETIC"):
        title = f"SYNTHETIC RESULTS, made up to test this figure. {title}"
    figure.suptitle(title, fontsize=7.5, color="#B00000" if synthetic else "black", wrap=True)
    return figure
