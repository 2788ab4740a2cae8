"""Images per second of the input pipelines, per core: PIL's, ours from JPEG, from packed shards, from a raw map.

    python benchmarks/input.py                          # made JPEGs of 500 x 375
    python benchmarks/input.py --pictures DIR           # a folder in ImageNet's layout
    python benchmarks/input.py --workers 16             # and in all, with so many processes at once

`pil` is torchvision's v1 pipeline from the file to the normalized tensor: open, convert, RandomResizedCrop (bicubic),
flip, ToTensor, Normalize. `jpeg`, `shards`, `raw` are what a core does here before the device has the batch: files and
shards are read, decoded, cut and flipped to uint8; the raw map's pictures are copied out (the device cuts them). With
`+cpu` everything is done by the core, down to the normalized float32 batch. All take turns in one process, repeat by
repeat; ratios are those of neighbours in one repeat. Per core means per second of processor time, so that others on the
machine count little; files lie in the page cache, and nothing waits for a disk. `total` is by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sdae.data import Loader, open_dataset
from sdae.data.datasets import Files
from sdae.data.feed import link_sample, make_pictures
from sdae.data.loader import MEAN, STD
from sdae.data.packing import prepare
from sdae.errors import UserError
from sdae.files import write_atomically
from sdae.provenance import origin
from sdae.sections import Data

GOALS = {"jpeg": 1.7, "shards": 3.5, "raw": 50.0}  # times the PIL pipeline, per core
TOTALS = 3  # repeats of all processes at once
SECONDS = {"pil": 0.6, "raw": 0.2}  # that a repeat takes; the others': 0.4
VARIANTS = ("pil", "jpeg", "shards", "raw", "jpeg+cpu", "shards+cpu", "raw+cpu")


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sdae-input-") as scratch:
        sections, files = pictures(options, Path(scratch))
        pipelines = {name: pipeline(name, sections, options) for name in options.variants}
        rates: dict[str, list[float]] = {name: [] for name in pipelines}
        for name, run in pipelines.items():  # warm-up: pages, allocator, kernels
            repeat(run, seconds(name) / 2)
        rows: list[dict[str, Any]] = []
        for _ in range(options.repeats):
            for name, run in pipelines.items():
                rates[name].append(repeat(run, seconds(name)))
            rows = [row(name, rates) for name in rates]
            save(rows, rates, files, options)
        if options.workers > 1:
            together(rows, sections, options)
            save(rows, rates, files, options)
        report(rows, files, options.size)


def pictures(options: argparse.Namespace, scratch: Path) -> tuple[dict[str, Data], dict[str, Any]]:
    """The `data` section of each form, of the same pictures; and what they are."""
    folder = scratch / "files"
    if options.pictures:
        link_sample(_dataset(Data(name="imagefolder", path=str(options.pictures))), folder)
    else:
        make_pictures(folder, options.count)
    sections = {"jpeg": Data(name="imagefolder", path=str(folder), image_size=options.size)}
    for name in ("shards", "raw"):
        prepare(folder, scratch / name, name, side=options.side, on_error="skip")  # type: ignore[arg-type]
        sections[name] = Data(name="packed", path=str(scratch / name), image_size=options.size)
    sizes = [path.stat().st_size for path in (folder / "train").rglob("*.*")]
    shapes = sorted(tuple(image.shape[:0:-1]) for image in map(_dataset(sections["jpeg"]).read, range(len(sizes))))
    facts = {"count": len(sizes), "made": not options.pictures, "mean_kb": round(statistics.mean(sizes) / 1e3, 1)}
    return sections, facts | {"median_shape": shapes[len(shapes) // 2]}


def _dataset(section: Data) -> Files:
    dataset = open_dataset(section, "train")
    assert isinstance(dataset, Files)
    return dataset


def pipeline(name: str, sections: dict[str, Data], options: argparse.Namespace) -> Iterator[int]:
    """An endless iterator; each step makes one batch and yields its size."""
    if name == "pil":
        return reference(_dataset(sections["jpeg"]), options)
    form, _, whole = name.partition("+")
    section = sections[form]
    dataset = open_dataset(section, "train")
    loader = Loader(dataset, section, seed=0, batch_size=min(options.batch, len(dataset)), train=True)
    make: Callable[[int], Iterator[Any]] = loader.epoch if whole else loader.fetch
    return (len(batch[1]) for epoch in itertools.count() for batch in make(epoch))


def reference(dataset: Files, options: argparse.Namespace) -> Iterator[int]:
    from PIL import Image
    from torchvision import transforms as v1

    bicubic = v1.InterpolationMode.BICUBIC
    steps = [v1.RandomResizedCrop(options.size, (0.2, 1.0), interpolation=bicubic), v1.RandomHorizontalFlip()]
    transform = v1.Compose([*steps, v1.ToTensor(), v1.Normalize(MEAN, STD)])

    def load(i: int) -> torch.Tensor:
        with open(dataset.path_of(i), "rb") as file:
            return transform(Image.open(file).convert("RGB"))  # type: ignore[no-any-return]

    for start in itertools.count(0, options.batch):
        indices = [i % len(dataset) for i in range(start, start + options.batch)]
        yield len(torch.stack([load(i) for i in indices]))


def seconds(name: str) -> float:
    return SECONDS.get(name, 0.4)


def repeat(batches: Iterator[int], least: float, clock: Callable[[], float] = time.process_time) -> float:
    """Images/s over whole batches of at least so many seconds, by `clock`."""
    count, began = 0, clock()
    while (took := clock() - began) < least:
        count += next(batches)
    return count / took


def together(rows: list[dict[str, Any]], sections: dict[str, Data], options: argparse.Namespace) -> None:
    """Adds `total`: images/s of all processes at once, each with one thread, the median of repeats in turns, and the
    part of perfect scaling."""
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for each in [*rows] * TOTALS:
            words = (each["pipeline"], sections, options)
            found = pool.map(in_a_process, *([word] * options.workers for word in words))
            each.setdefault("total_repeats", []).append(round(sum(found), 1))
            each["total"] = round(statistics.median(each["total_repeats"]), 1)
            each["scaling"] = round(each["total"] / (options.workers * each["images_per_s"]), 3)


def in_a_process(name: str, sections: dict[str, Data], options: argparse.Namespace) -> float:
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
    torch.set_num_threads(1)
    run = pipeline(name, sections, options)
    repeat(run, 1.0, time.perf_counter)  # until the others are at it as well
    found = repeat(run, 2.0, time.perf_counter)
    repeat(run, 1.0, time.perf_counter)  # and while they are
    return found


def row(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(rates[name], rates.get("pil", []), strict=False)]
    found = {"pipeline": name, "images_per_s": round(statistics.median(rates[name]), 1)}
    found |= {"low": round(min(rates[name]), 1), "high": round(max(rates[name]), 1)}
    if ratios:
        found |= {"ratio": round(statistics.median(ratios), 3), "ratio_low": round(min(ratios), 3)}
        found |= {"ratio_high": round(max(ratios), 3), "goal": GOALS.get(name)}
    return found


def report(rows: list[dict[str, Any]], files: dict[str, Any], size: int) -> None:
    made = "made" if files["made"] else "real"
    shape = " x ".join(map(str, files["median_shape"]))
    print(f"{files['count']} {made} pictures, {shape}, {files['mean_kb']} kB; to {size} px; one thread")
    print(f"{'pipeline':11} {'images/s':>10} {'low':>10} {'high':>10} {'x PIL':>8} {'goal':>6} {'total':>10}")
    for r in rows:
        goal, total = r.get("goal") or "", r.get("total", "")
        print(
            f"{r['pipeline']:11} {r['images_per_s']:10.1f} {r['low']:10.1f} {r['high']:10.1f} "
            f"{r.get('ratio', 0):8.2f} {goal:>6} {total:>10}"
        )


def save(
    rows: list[dict[str, Any]], rates: dict[str, list[float]], files: dict[str, Any], options: argparse.Namespace
) -> None:
    """What is known so far: a program that is killed has not worked in vain."""
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "pictures")}
        repeats = {name: [round(rate, 2) for rate in found] for name, found in rates.items()}
        found = {"benchmark": "input", "rows": rows, "repeats": repeats, "pictures": files, "settings": settings}
        write_atomically(Path(options.json), json.dumps(found | origin(), indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder in ImageNet's layout, in place of made pictures")
    parser.add_argument("--count", type=int, default=256, help="made pictures")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--side", type=int, default=256, help="of the packed pictures")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1, help="also with so many processes at once")
    parser.add_argument("--json", help="also write rows, raw repeats, versions and hardware to this file")
    options = parser.parse_args()
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        sys.exit(f"--variants: {', '.join(unknown)} unknown (allowed: {', '.join(VARIANTS)})")
    return options


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
