"""Whether this machine can run the suite, check by check."""

from __future__ import annotations

import itertools
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ablations.scale import DENSE, load_scale, scales
from sdae.data.fingerprint import SPLITS, cache_folder, listing
from sdae.errors import UserError
from sdae.store import Store
from slurm.doctor_cluster import examine_cluster
from slurm.machine import cpus
from slurm.profile import load_profile

ORDER = ["smoke", "mini", "small", "paper"]
NEEDED = {"torch": (2, 11), "torchvision": (0, 26), "timm": (1, 0)}


def examine(store: Store, profile: Path | None = None) -> list[dict[str, Any]]:
    """[{"check", "ok": true | false | null (cannot be used, and need not be), "detail"}]. profile: a Slurm profile's
    file, to be checked against this machine's cluster as well."""
    asked = load_profile(profile) if profile else None
    checks = [
        _check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer)"),
        *(_package(name, least) for name, least in NEEDED.items()),
        _devices(),
        _check("cores", True, f"{cpus()} usable, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"),
        _store("store", store),
        _store("cache", Store(cache_folder())),
    ]
    for row in pictures():
        detail = row["problem"] or f"{row['train']:,} + {row['val']:,} pictures, {row['classes']} classes"
        what = f"pictures of scale {row['scale']}" + (f", {row['stage']}" if row["stage"] != "pretrain" else "")
        checks.append(_check(what, None if row["problem"] else True, detail))
    return checks + (examine_cluster(asked, store.root) if asked else [])


def pictures() -> list[dict[str, Any]]:
    """The data sets of every scale, pre-training's (and classification's) and those of the dense tasks: where they are
    looked for, their classes and counts, or what is wrong with them."""
    rows = []
    for name, stage in itertools.product(sorted(scales(), key=ORDER.index), ("pretrain", *DENSE)):
        data = load_scale(name).pictures_of(stage)
        row: dict[str, Any] = {"scale": name, "stage": stage, "name": data.name, "path": data.path}
        row |= {"image_size": data.image_size} | dict.fromkeys(("classes", *SPLITS, "problem"))
        try:
            found = listing(data)
            row |= {"classes": len(found.classes), **{split: sum(found.counts[split]) for split in SPLITS}}
        except UserError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _check(name: str, ok: bool | None, detail: str) -> dict[str, Any]:
    return {"check": name, "ok": ok, "detail": detail}


def _package(name: str, least: tuple[int, int]) -> dict[str, Any]:
    wanted = ".".join(map(str, least))
    try:
        found = version(name)
    except PackageNotFoundError:
        return _check(name, False, f"not installed ({wanted} or newer)")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return _check(name, numbers >= least, f"{found} ({wanted} or newer)")


def _devices() -> dict[str, Any]:
    try:
        from sdae.provenance import environment

        found = environment()
    except ImportError as error:
        return _check("devices", False, f"torch cannot be imported: {error}")
    return _check("devices", True, f"{', '.join(found['gpus']) or 'no GPU'}; {found['cpu']}")


def _store(name: str, store: Store) -> dict[str, Any]:
    existed = store.root.exists()
    try:
        store.open()
    except UserError as error:
        return _check(name, False, str(error))
    if not existed:
        Path(store.root).rmdir()
    return _check(name, True, f"{store.root} can be written")
