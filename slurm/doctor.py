"""Whether this machine can run the suite, check by check."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ablations.cost import MFU, SPREAD, calibrate, network
from ablations.scale import DENSE, load_scale, recipes, scales
from sdae.config import Config, parse
from sdae.data.fingerprint import SPLITS, cache_folder, listing
from sdae.errors import UserError
from sdae.models.flops import per_image
from sdae.sections import Data
from sdae.store import Store
from sdae.yamls import merge
from slurm.doctor_cluster import examine_cluster, finding
from slurm.machine import cpus
from slurm.profile import load_profile

ORDER = ["smoke", "mini", "small", "paper"]
RESERVE = 1.2  # times what the model takes: so much is to be fed
NEEDED = {"torch": (2, 11), "torchvision": (0, 26), "timm": (1, 0)}


def examine(store: Store, profile: Path | None = None) -> list[dict[str, Any]]:
    """[{"check", "ok": true | false | null (cannot be used, and need not be), "detail"}]. profile: a Slurm profile's
    file, to be checked against this machine's cluster as well."""
    asked = load_profile(profile) if profile else None
    checks = [
        finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer)"),
        *packages(),
        _devices(),
        finding("cores", True, f"{cpus()} usable, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"),
        _store("store", store),
        _store("cache", Store(cache_folder())),
    ]
    for row in pictures():
        detail = row["problem"] or f"{row['train']:,} + {row['val']:,} pictures, {row['classes']} classes"
        what = f"pictures of scale {row['scale']}" + (f", {row['stage']}" if row["stage"] != "pretrain" else "")
        checks.append(finding(what, None if row["problem"] else True, detail))
    return checks + (examine_cluster(asked, store.root) if asked else [])


def packages() -> list[dict[str, Any]]:
    """Rows of `examine`: whether the packages are there, and new enough."""
    return [_package(name, least) for name, least in NEEDED.items()]


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


def feeding(store: Store, scale: str, seconds: float = 10.0) -> list[dict[str, Any]]:
    """How many images/s this machine feeds at a scale, how many the model takes, and what to do: rows as `examine`'s.

    The model's are those of a cost run in `store` where there is one of its shape, else by FLOP at an assumed part of
    this device's measured peak.
    """
    from sdae.data.feed import bench

    config, cores = _pretraining(scale), cpus()
    assert isinstance(config.data, Data)
    found = bench(config.data, config.efficiency.workers, seconds)
    made = f"made pictures of 500 x 375, as the scale's cannot be used: {found['made']}"
    pictures = made if found["made"] else "the scale's pictures"
    rows = []
    for form, rate in found["rates"].items():
        text = f"{rate['per_core']:,.0f} images/s per core up to the device, {rate['all']:,.0f} in all, cut and "
        text += f"normalized on {found['device']}, with efficiency.workers {found['workers']}"
        rows.append(finding(f"feeds from {form}", True, text + (f" ({pictures})" if form == found["source"] else "")))
    low, high, how = _taken(config, store, found["device"])
    rows.append(finding("model takes", True, f"{_rate(low)} to {_rate(high)} images/s ({how})"))
    enough, what = advice(found, RESERVE * high, cores, config.efficiency.workers)
    rows.append(finding("input", enough, f"{_rate(RESERVE * high)} images/s are wanted; {what}"))
    return rows


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.2g}"


def advice(found: dict[str, Any], wanted: float, cores: int, workers: int) -> tuple[bool | None, str]:
    """Whether the pictures as they lie are fed fast enough (null: not as configured, but they can be), what to do."""
    source, rates = found["source"], found["rates"]
    if rates[source]["all"] >= wanted:
        return True, f"{source} feeds {rates[source]['all']:,.0f}: nothing to do"
    if source == "memory":
        return None, f"memory feeds {rates[source]['all']:,.0f}: cropping on {found['device']} is what takes the time"
    if found["device"] == "cpu" and rates[source]["all"] < wanted <= rates[source]["per_core"]:
        return None, f"{source} feeds enough, cutting and normalizing on the processor does not"
    slow: list[str] = []
    for form in ("files", "shards", "raw")[("files", "shards", "raw").index(source) :]:
        if form not in rates:
            continue
        need = math.ceil(wanted / rates[form]["per_core"])
        if need > cores:
            continue
        if form != source and rates[form]["all"] < wanted and max(workers, 1) >= need:
            slow.append(form)  # measured with enough workers: the processor is not what it waits for
            continue
        if form == source:
            idle = f"{need} of {cores} cores suffice, if they are idle"
            return None, f"efficiency.workers: {need}" if need > workers else idle
        command = f"sdae-cli data prepare FOLDER --out DIR --form {form}"
        return None, f"{command}, then data: {{name: packed, path: DIR}} and efficiency.workers: {need}"
    if slow:
        fed = f"{slow[-1]} feeds {rates[slow[-1]]['all']:,.0f}"
        return False, f"{fed}: cutting and normalizing on {found['device']} is what takes the time"
    best = max(rates, key=lambda form: rates[form]["per_core"])
    most = f"even {best} feeds {rates[best]['per_core']:,.0f} per core"
    return False, f"{most}, and there are {cores}: more cores for each GPU"


def _pretraining(scale: str) -> Config:
    """The method's pre-training at a scale, as its recipe says."""
    chosen = load_scale(scale)
    values = merge(merge(recipes()["sdae"], chosen.part("pretrain")), chosen.recipes.get("sdae", {}))
    return parse(merge(values, {"optim": {"warmup_epochs": 0}}))


def _taken(config: Config, store: Store, device: str) -> tuple[float, float, str]:
    """Low and high images/s of a training step, and how they are known."""
    from sdae.training.telemetry import peak_flops

    flop = per_image(config)
    if measured := calibrate(store).get(network(config)):
        return SPREAD[0] * measured / flop, SPREAD[1] * measured / flop, "by a cost run of this store"
    peak = peak_flops(device, config.precision)
    how = f"{flop / 1e9:,.3g} GFLOP each at {100 * MFU[0]:.0f} to {100 * MFU[1]:.0f} % of this {device}'s"
    return MFU[0] * peak / flop, MFU[1] * peak / flop, f"{how} {peak / 1e12:,.2f} TFLOP/s, {config.precision}"


def _package(name: str, least: tuple[int, int]) -> dict[str, Any]:
    wanted = ".".join(map(str, least))
    try:
        found = version(name)
    except PackageNotFoundError:
        return finding(name, False, f"not installed ({wanted} or newer)")
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    return finding(name, numbers >= least, f"{found} ({wanted} or newer)")


def _devices() -> dict[str, Any]:
    try:
        from sdae.provenance import environment

        found = environment()
    except (ImportError, AttributeError) as error:
        return finding("devices", False, f"torch cannot be imported: {error}")
    return finding("devices", True, f"{', '.join(found['gpus']) or 'no GPU'}; {found['cpu']}")


def _store(name: str, store: Store) -> dict[str, Any]:
    existed = store.root.exists()
    try:
        store.open()
    except UserError as error:
        return finding(name, False, str(error))
    if not existed:
        store.root.rmdir()
    return finding(name, True, f"{store.root} can be written")
