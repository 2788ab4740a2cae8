"""What is put right in run folders afterwards: torn files set aside, weights that nobody asks for removed.

Beside `sdae.store`, and by its rules: what is removed is noted before or out of sight first, so that a process that is
killed leaves a whole store, and the same command goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdae.errors import UserError
from sdae.files import flush, read_record
from sdae.store import RunFolder, Store

PRUNED = "pruned.json"  # beside a result: the files of checkpoints/ that `results prune` has removed
DISCARDED = ".pruned"  # in the store: run folders that are being removed
TORN = ".torn"  # ending of a file that was set aside


def set_aside(run: RunFolder, name: str) -> None:
    """A torn file gets another name, so that it is missing and nobody takes it for one. UserError."""
    try:
        os.replace(run.path / name, run.path / (name + TORN))
        flush(run.path)
    except OSError as error:
        raise UserError(f"{run.path / name}: cannot be set aside: {error.strerror or error}") from error


def pruned(run: RunFolder) -> dict[str, int]:
    """Bytes by name of the files that were removed from `checkpoints` because nothing asks for them."""
    return read_record(run.path / PRUNED) or {}


def prune(run: RunFolder, sizes: Mapping[str, int]) -> None:
    """Removes files of `checkpoints`, noted before, so that whoever misses one is told why. UserError."""
    run.write(PRUNED, pruned(run) | dict(sizes))
    remove(*(run.checkpoints / name for name in sizes))


def remove(*paths: Path) -> None:
    """Files, or folders with all that is in them; links themselves. UserError where one cannot be removed."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be removed: {error.strerror or error}") from error


def discard(store: Store, identity: str) -> None:
    """Removes a run folder, out of sight first: who looks meanwhile or after a crash sees no half of it. UserError."""
    try:
        (store.root / DISCARDED).mkdir(exist_ok=True)
        os.rename(store.run(identity).path, store.root / DISCARDED / f"{identity}.{uuid.uuid4().hex[:8]}")
        flush(store.root / DISCARDED)
        flush(store.root)  # else a power cut may bring the folder back with half of its files
    except OSError as error:
        raise UserError(f"{store.root / identity}: cannot be removed: {error.strerror or error}") from error
    forget_discarded(store)


def forget_discarded(store: Store) -> None:
    """Ends what an interrupted `discard` began."""
    if (store.root / DISCARDED).exists():
        remove(store.root / DISCARDED)


def encoder(names: Iterable[str], which: Any, epoch: Any = None) -> str | None:
    """Of the names of a pre-training's files the one of an encoder: student's or teacher's, epoch (None: the last)."""
    saved = sorted(name for name in names if re.fullmatch(rf"{re.escape(str(which))}-epoch-\d+\.safetensors", name))
    if epoch is not None:
        saved = [name for name in saved if int(name.split("-")[2].split(".")[0]) == epoch]
    return saved[-1] if saved else None
