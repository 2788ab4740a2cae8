"""What of a store no artifact needs, at one scale: whole runs, and of kept ones the weights that nobody asks for.

Invariant: tables of a pruned store are those of the whole one, byte for byte. A run whose number counts beside the plan
(the variance of its arm is pooled, its seed is the only one of its kind) therefore keeps its result and loses its
weights only. Never touched: runs of other scales, runs that somebody has, what a kept run starts from, folders that
are links, torn and unknown folders (`results check` speaks of those), and the file SYNTHETIC.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.planner import Sweep, available, plan
from ablations.scale import load_scale
from analysis import frame as frames
from analysis.study import contents
from sdae.errors import UserError
from sdae.store import RunFolder, Store
from sdae.upkeep import DISCARDED, discard, encoder, forget_discarded
from sdae.upkeep import prune as prune_files

ENCODER = re.compile(r"(student|teacher)-epoch-(\d+)\.safetensors")


@dataclass(frozen=True)
class Superfluous:
    """A whole run (`files` none), or files of its checkpoints by name with their bytes."""

    run: str
    state: str
    why: str
    bytes: int
    files: dict[str, int] = field(default_factory=dict, hash=False)


@dataclass
class Prunable:
    """`left`: bytes that an interrupted prune has not removed yet."""

    store: Store
    scale: str
    runs: list[Superfluous]
    files: list[Superfluous]
    left: int = 0

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do, not even to end what an interrupted prune began."""
        return not (self.runs or self.files or (self.store.root / DISCARDED).exists())

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in (*self.runs, *self.files)) + self.left

    def to_dict(self) -> dict[str, Any]:
        values = {"store": str(self.store.root), "scale": self.scale, "synthetic": self.store.synthetic}
        lists = {"runs": [asdict(item) for item in self.runs], "files": [asdict(item) for item in self.files]}
        return {**values, **lists, "left": self.left, "bytes": self.bytes}


def survey(
    store: Store,
    artifacts: Sequence[str | Path] = (),
    scale: str | Path = "smoke",
    seeds: Sequence[int] | None = None,
    held: Collection[str] = (),
) -> Prunable:
    """What the built-in artifacts and these, a user's own, do not need.

    seeds: null for all that the store holds. held: runs that somebody may start at any time (Slurm's queue).
    """
    frame = frames.collect(store).set_index("id")
    loaded = load_scale(scale)
    here = frame[(frame["scale"] == loaded.name).fillna(False).to_numpy(bool)]
    sweeps = list(_sweeps(frame, here, artifacts, loaded, seeds))
    planned = {identity: run for sweep in sweeps for identity, run in sweep.runs.items()}
    states = {str(i): str(state) for i, state in frame["state"].items()}
    busy = {i for i, state in states.items() if state == "running"} | set(held)
    kept = {i for i in states if i in planned or i in busy} | (set(states) - set(map(str, here.index)))
    needs = {str(i): str(need) for i, need in frame["need"].dropna().items()}
    for identity in (*kept, *planned):
        kept.add(needs.get(identity, identity))
        kept.update(planned[identity].needs if identity in planned else ())
    runs = list(_runs(store, here, kept, keep_all=len(sweeps) > 1, seeds=seeds))
    asked = {
        (init.run, init.weights, init.epoch) for run in planned.values() if (init := getattr(run.config, "init", None))
    }
    asked |= {
        (need, weights, "last" if pd.isna(epoch) else int(epoch))
        for need, weights, epoch in zip(frame["need"], frame["weights"], frame["init_epoch"], strict=True)
        if not pd.isna(need)
    }
    done = [i for i in map(str, here.index) if i in kept and i not in busy and states[i] == "done"]
    files = [item for i in done if (item := _unasked(store.run(i), asked))]
    return Prunable(store, loaded.name, runs, files, _bytes(store.root / DISCARDED))


def remove(found: Prunable, again: Prunable) -> tuple[list[Superfluous], list[str]]:
    """Removes what was found and is so still, runs before those that they start from; what went, and what somebody has.

    Stopped at any point, the store is whole, and the next prune goes on.
    """
    forget_discarded(found.store)
    gone, skipped = [], []
    for item in [i for i in (*found.files, *found.runs) if i in (*again.files, *again.runs)]:
        folder = found.store.run(item.run)
        if item.files and item.state == "done":
            prune_files(folder, item.files)
        else:
            try:
                with folder.claim() as mine:
                    if not mine:
                        skipped.append(item.run)
                        continue
                    prune_files(folder, item.files) if item.files else discard(found.store, item.run)
            except OSError as error:
                raise UserError(f"{folder.path}: cannot be removed: {error.strerror or error}") from error
        gone.append(item)
    frames.collect(found.store)
    return gone, skipped


def _sweeps(
    frame: pd.DataFrame, here: pd.DataFrame, artifacts: Sequence[str | Path], scale: Any, seeds: Sequence[int] | None
) -> Iterator[Sweep]:
    """The plan that tables are made of; where the store has several sets of pictures or weights, one of each."""
    mine = frame[(frame["scale"].isna() | frame.index.isin(here.index)).to_numpy(bool)]
    wanted = seeds if seeds is not None else sorted({int(seed) for seed in mine["seed"].dropna()}) or [0]
    names = [*available(), *(name for name in artifacts if str(name) not in available())]
    known = contents(mine)
    likely = {key: next(iter(values)) for key, values in known.items()}
    yield plan(names, scale, wanted, content=likely)
    for key, values in known.items():
        for value in list(values)[1:]:
            yield plan(names, scale, wanted, content=likely | {key: value})


def _runs(
    store: Store, here: pd.DataFrame, kept: set[str], keep_all: bool, seeds: Sequence[int] | None
) -> Iterator[Superfluous]:
    """Runs that no artifact needs, those that start from others first. keep_all: no result goes."""
    done = here[(here["state"] == "done").to_numpy(bool)]
    several = set(done["arm"].value_counts().loc[lambda n: n >= 2].index)
    seen = {int(seed) for seed in here.loc[[str(i) in kept for i in here.index], "seed"].dropna()}
    rest = here.loc[[str(i) not in kept for i in here.index]]
    for identity, row in rest.assign(first=rest["need"].isna()).sort_values("first", kind="stable").iterrows():
        folder = store.run(str(identity))
        if folder.path.is_symlink():
            continue
        lone = seeds is None and not pd.isna(row["seed"]) and int(row["seed"]) not in seen
        if keep_all or lone or (row["state"] == "done" and row["arm"] in several):
            files = {name: size for name, size in _files(folder).items() if name[0] != "."}
            if files:
                why = "no artifact needs it; its result stays, since its variance or its seed counts in tables"
                yield Superfluous(str(identity), str(row["state"]), why, sum(files.values()), files)
        else:
            yield Superfluous(str(identity), str(row["state"]), "no artifact needs it", _bytes(folder.path))


def _unasked(folder: RunFolder, asked: Collection[tuple[str, str, int | str]]) -> Superfluous | None:
    """Of a finished run the states that it could go on from, and the encoders but for the last that nobody asks for."""
    sizes = _files(folder)
    saved = [name for name in sizes if ENCODER.fullmatch(name)]
    keep = {encoder(saved, which) for which in ("student", "teacher")}
    for run, which, epoch in asked:
        if run == folder.id:
            keep.add(encoder(saved, which, None if epoch == "last" else epoch))
    leftovers = [name for name in sizes if name.startswith(("state-", "nonfinite-"))]
    files = {name: sizes[name] for name in (*leftovers, *(name for name in saved if name not in keep))}
    why = "no run of any artifact starts from these"
    return Superfluous(folder.id, "done", why, sum(files.values()), files) if files else None


def _files(folder: RunFolder) -> dict[str, int]:
    """Bytes by name of the plain files in its checkpoints, sorted; none where the folders are links to elsewhere."""
    if folder.path.is_symlink() or folder.checkpoints.is_symlink():
        return {}
    try:
        with os.scandir(folder.checkpoints) as entries:
            found = {e.name: e.stat().st_size for e in entries if e.is_file(follow_symlinks=False)}
    except OSError:
        return {}
    return dict(sorted(found.items()))


def _bytes(folder: Path) -> int:
    """Of all files below; links count as nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            total += 0 if os.path.islink(path) else os.path.getsize(path)
    return total
