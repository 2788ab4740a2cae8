"""What the notebooks draw of pictures, from the arrays of `sdae.inspect`: views, maps of similarity, neighbours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.curves import finish, panels_of, styled

if TYPE_CHECKING:
    from sdae.inspect import Maps, Neighbours, Pixels, Views

UNSEEN = 214  # the grey of patches that are not seen


def photograph() -> Path:
    """The picture of $SDAE_PICTURE; without it the portrait of Grace Hopper that comes with matplotlib."""
    given = os.environ.get("SDAE_PICTURE")
    return Path(given) if given else Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@styled
def plot_views(views: Views, title: str = "") -> Figure:
    """The paper's Figure 3 on a picture: what the student sees, and each sequence that the teacher sees; grey: not."""
    shown = [("picture", views.picture), (f"student: {len(views.student)} patches", _only(views, views.student))]
    for name, sight in views.teachers.items():
        for n, ids in enumerate(sight.sees, 1):
            which = f" {n} of {len(sight.sees)}" if len(sight.sees) > 1 else ""
            shown.append((f"teacher, {name}{which}: {len(ids)}", _only(views, ids)))
    figure, axes = panels_of(len(shown), 1.85, 2.0, 4)
    for ax, (name, picture) in zip(axes, shown, strict=True):
        _picture(ax, picture, name)
    return finish(figure, title, False)


@styled
def plot_maps(maps: Maps, title: str = "") -> Figure:
    """For each picture: itself, what the student saw of it, and the number of each predicted patch laid over it."""
    number, size = len(maps.pictures), maps.pictures.shape[1]
    patch = size // maps.values.shape[1]
    figure, axes = panels_of(3 * number, 1.35, 1.45, number)
    # A cosine is shown on the scale from 0 to 1 unless it goes below, so that pictures and runs can be set side by side
    cosine = maps.what.startswith("cosine")
    low = min(0.0, float(np.nanmin(maps.values))) if cosine else 0.0
    high = 1.0 if cosine else float(np.nanmax(maps.values))
    for n, picture in enumerate(maps.pictures):
        seen = maps.visible[n].repeat(patch, 0).repeat(patch, 1)
        _picture(axes[n], picture, "" if n else "picture")
        _picture(axes[number + n], np.where(seen[..., None], picture, UNSEEN), "" if n else "student sees")
        ax = axes[2 * number + n]
        _picture(ax, picture.mean(2), f"mean {np.nanmean(maps.values[n]):.3f}", cmap="gray", vmin=0, vmax=255)
        drawn = ax.imshow(
            np.ma.masked_invalid(maps.values[n]), extent=(-0.5, size - 0.5, size - 0.5, -0.5), alpha=0.75,
            cmap="viridis", vmin=low, vmax=high, interpolation="nearest",
        )  # fmt: skip
    figure.colorbar(drawn, ax=axes[2 * number :], label=maps.what, shrink=0.9, aspect=12)
    return finish(figure, title, False)


@styled
def plot_neighbours(near: Neighbours, title: str = "") -> Figure:
    """A query a row, its nearest training pictures beside it with the cosine; a tick marks those of the same class."""
    queries, k = near.similarity.shape
    figure, axes = panels_of(queries * (k + 1), 1.15, 1.3, k + 1)
    for n in range(queries):
        own = near.query_labels[n]
        _picture(axes[n * (k + 1)], near.queries[n], f"query: {own}" if own else "query")
        for j in range(k):
            tick = " ✓" if own == near.labels[n][j] else ""
            _picture(axes[n * (k + 1) + 1 + j], near.pictures[n, j], f"{near.similarity[n, j]:.3f}{tick}")
    return finish(figure, title, False)


def _only(views: Views, ids: Any) -> Pixels:
    """The picture with every other patch grey."""
    side = views.picture.shape[0] // views.patch
    seen = np.isin(np.arange(side * side), ids).reshape(side, side).repeat(views.patch, 0).repeat(views.patch, 1)
    return np.where(seen[..., None], views.picture, UNSEEN).astype(np.uint8)


def _picture(ax: Axes, picture: Any, title: str, **how: Any) -> None:
    ax.imshow(picture, interpolation="nearest", **how)
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()
