"""How many pictures a second this machine feeds, from files and packed: measured in seconds, on the pictures at hand.

`per_core`: what one core does for a batch before the device has it (reading, decoding, cutting of files; copying out of
a memory map). `all`: whole batches, ready for the model, with all workers.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdae.data import builtin
from sdae.data.datasets import Dataset, Files, Resident, open_dataset, subset
from sdae.data.fingerprint import SPLITS
from sdae.data.loader import Loader
from sdae.data.packed import Mapped, Shards
from sdae.data.packing import prepare
from sdae.errors import UserError
from sdae.sections import Data

MADE = (500, 375)  # width and height of a usual picture of ImageNet's
SAMPLE = 96  # pictures that are packed to try it
BATCH = 32
FORMS = ("files", "shards", "raw")


def bench(data: Data, workers: int, seconds: float = 10.0) -> dict[str, Any]:
    """{"source": files | shards | raw | memory, "made": why pictures had to be made up, or null, "device",
    "workers", "rates": {form: {"per_core", "all"}} in images/s}. Files are tried in the packed forms as well."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="sdae-feed-") as scratch:
        folder, made = Path(scratch), None
        try:
            dataset = open_dataset(data, "train")
        except UserError as error:
            if data.name not in ("imagefolder", "packed"):
                raise
            made = str(error)
            data = _plain(data, "imagefolder", make_pictures(folder / "made", SAMPLE))
            dataset = open_dataset(data, "train")
        source = form_of(dataset)
        sets: dict[str, tuple[Data, Dataset]] = {source: (data, dataset)}
        if source == "files":
            assert isinstance(dataset, Files)
            link_sample(dataset, folder / "sample")
            for form in ("shards", "raw"):
                prepare(folder / "sample", folder / form, form, on_error="skip")  # type: ignore[arg-type]
                there = _plain(data, "packed", folder / form)
                sets[form] = (there, open_dataset(there, "train"))
        each = seconds / (2 * len(sets))
        rates = {}
        for form, (section, pictures) in sets.items():
            batch = min(BATCH, len(pictures))
            one = Loader(pictures, section, seed=0, batch_size=batch, train=True)
            rates[form] = {"per_core": per_core(one, each)}
            many = Loader(pictures, section, seed=0, batch_size=batch, train=True, device=device, workers=workers)
            endless = (len(batch.images) for epoch in itertools.count() for batch in many.epoch(epoch))
            rates[form]["all"] = speed(endless, each)
    return {"source": source, "made": made, "device": device, "workers": workers, "rates": rates}


def form_of(dataset: Dataset) -> str:
    """memory | files | shards | raw: how a set's pictures are held."""
    if isinstance(dataset, Resident):
        return "memory"
    return "raw" if isinstance(dataset, Mapped) else "shards" if isinstance(dataset, Shards) else "files"


def per_core(loader: Loader, seconds: float) -> float:
    """Images/s of `loader.fetch` with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return speed((len(at) for epoch in itertools.count() for *_, at in loader.fetch(epoch)), seconds)
    finally:
        torch.set_num_threads(threads)


def speed(counts: Iterable[int], seconds: float) -> float:
    """Sum of `counts` per second, after the first of them, for so long."""
    counted, counts = 0, iter(counts)
    next(counts)
    began = now = time.perf_counter()
    while now < began + seconds:
        counted += next(counts)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
    return counted / (now - began)


def link_sample(dataset: Files, folder: Path) -> None:
    """A folder in ImageNet's layout with links to some of the files, of one class."""
    some = subset(dataset, SAMPLE)
    for split in SPLITS:  # all in both: a few may be unreadable
        (folder / split / "some").mkdir(parents=True)
        for i in range(len(some)):
            path = Path(some.path_of(i)).absolute()
            (folder / split / "some" / f"{i:04d}{path.suffix}").symlink_to(path)


def make_pictures(folder: Path, count: int, size: tuple[int, int] = MADE) -> Path:
    """JPEGs of about 100 kB at 500 x 375, as ImageNet has them: built-in pictures and noise of several scales."""
    width, height = size
    generator = np.random.default_rng(0)
    drawn = builtin.render(range(min(count, 16)), "train", 256, 10, instances=False).images
    for split, numbers in (("train", range(count)), ("val", range(1))):
        (folder / split / "made").mkdir(parents=True)
        for i in numbers:
            pixels = 0.5 * _resized(drawn[i % len(drawn)].transpose(1, 2, 0), size)
            for grain, weight in ((64, 0.2), (16, 0.1), (4, 0.1), (1, 0.1)):
                shape = (height // grain + 2, width // grain + 2, 3)
                pixels += weight * _resized(generator.integers(0, 256, shape, dtype=np.uint8), size)
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / split / "made" / f"{i:04d}.jpg", quality=96)
    return folder


def _resized(pixels: Any, size: tuple[int, int]) -> Any:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC), float)


def _plain(data: Data, name: str, path: Path) -> Data:
    """`data` with all pictures of another place."""
    values = {"name": name, "path": str(path), "classes": None, "train_pictures": None, "val_pictures": None}
    return data.model_copy(update={**values, "fingerprint": None})
