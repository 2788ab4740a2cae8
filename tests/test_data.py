"""Datasets, fingerprints, the loader: real files, exact tails, ranks that partition, one clear line for bad input."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import assert_ends
from conftest import PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdae.data import Loader, datasets, fingerprint, open_dataset, resolve
from sdae.data.fingerprint import balanced
from sdae.errors import RunFailed, UserError
from sdae.sections import Augment, Data

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_folder(root: Path, counts: dict[str, tuple[int, int]], size: tuple[int, int] = (64, 64)) -> Path:
    """Class -> number of pictures in train and val; smooth JPEGs with a class's colour."""
    for c, (name, pair) in enumerate(counts.items()):
        for split, n in zip(("train", "val"), pair, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                ramp = np.linspace(0, 200, size[0] * size[1]).reshape(size[1], size[0])
                pixels = np.stack([ramp, np.full_like(ramp, 40 * c + 20), np.roll(ramp, 7 * i, 0)], 2).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "set", {"ant": (5, 2), "bee": (4, 3), "cat": (6, 2)})


def of(folder: Path, name: str = "tiny-imagenet", **more: Any) -> Data:
    return Data.model_validate({"name": name, "path": str(folder), "image_size": 64, **more})


# --- which pictures


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_balanced_is_a_round_robin(counts: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, sum(counts)))
    taken = [0] * len(counts)
    while sum(taken) < n:
        for c in range(len(counts)):
            if taken[c] < counts[c] and sum(taken) < n:
                taken[c] += 1
    assert balanced(counts, n) == tuple(taken)


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagefolder"])
def test_subsets_are_balanced_and_agree_with_the_fingerprint(folder: Path, name: str) -> None:
    whole = open_dataset(of(folder, name), "train")
    assert whole.classes == ["ant", "bee", "cat"]
    assert whole.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 6
    assert whole.labels.dtype == torch.int64
    assert whole.path_of(5) == str(folder / "train" / "bee" / "000.jpg")
    part = open_dataset(of(folder, name, train_pictures=7, classes=2), "train")
    assert part.labels.tolist() == [0] * 4 + [1] * 3
    assert part.classes == ["ant", "bee"]
    changes: list[dict[str, int]] = [{}, {"classes": 2}, {"train_pictures": 7}, {"val_pictures": 3}]
    assert len({fingerprint(of(folder, name, **change)) for change in changes}) == 4
    assert fingerprint(of(folder, name, train_pictures=15, classes=3)) == fingerprint(of(folder, name))
    assert fingerprint(of(folder, "imagefolder")) == fingerprint(of(folder, "tiny-imagenet"))


def test_fingerprint_needs_no_torch_and_follows_the_disk(folder: Path) -> None:
    old = time.time() - 100
    for path in folder.rglob("*"):
        os.utime(path, (old, old))
    first = fingerprint(of(folder))
    kept = next((Path(os.environ["XDG_CACHE_HOME"]) / "sdae" / "folders").glob("*.json"))
    assert first == fingerprint(of(folder))
    for damaged in (
        "{ torn",
        "[]",
        '{"train/ant": 1}',
        *(kept.read_text().replace("[", x) for x in ('["5", ', "{}, [")),
    ):
        kept.write_text(damaged)
        assert first == fingerprint(of(folder))
    (folder / "train" / "ant" / "004.jpg").unlink()
    assert fingerprint(of(folder)) != first
    code = "import sys; from sdae.data import fingerprint; from sdae.config import Data; "
    code += "print(fingerprint(Data(name='builtin', image_size=32)), 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert answer == [fingerprint(Data(name="builtin", image_size=32)), "False"]


def test_frozen_fingerprints() -> None:
    """A changed one would orphan every stored run."""
    found = {name: fingerprint(Data.model_validate({"name": name, "image_size": 32})) for name in FROZEN}
    assert found == FROZEN


FROZEN = {
    "builtin": "0c40ff458110777a",
    "cifar10": "20555ab1dc8dc5c0",
    "cifar100": "bce3909ba18a1e4c",
    "stl10": "ab1b53206cb4e379",
}


def test_resolve(folder: Path) -> None:
    data = resolve(of(folder))
    assert data.fingerprint == fingerprint(data)
    assert resolve(data) == data
    with pytest.raises(UserError, match="other classes or numbers"):
        resolve(data.model_copy(update={"fingerprint": "0" * 16}))
    absent = of(folder / "nowhere", fingerprint="0" * 16)
    assert resolve(absent) == absent
    assert fingerprint(absent) is None
    assert fingerprint(of(Path("${SURELY_NOT_SET}/x"))) is None


def test_bad_folders_are_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(data: Data, *words: str, split: Any = "train") -> None:
        with pytest.raises(UserError) as caught:
            open_dataset(data, split)
        text = str(caught.value)
        assert "\n" not in text
        for word in words:
            assert word in text, text

    says(of(tmp_path / "none"), str(tmp_path / "none"), "train/CLASS/*.jpg")
    says(Data(name="imagefolder"), "data.path", "train/CLASS/*.jpg")
    says(of(Path("${SURELY_NOT_SET}/x")), "${SURELY_NOT_SET} is not set")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    says(of(tmp_path / "empty"), "no class folders", "train/CLASS/*.jpg")
    says(of(folder, train_pictures=99), "data.train_pictures: 99", "15")
    says(of(folder, val_pictures=99), "data.val_pictures: 99", "7")
    says(of(folder, classes=4), "data.classes: 4", "3")
    says(Data(name="builtin", image_size=32, classes=21), "data.classes", "20")
    (folder / "val" / "dog").mkdir()
    says(of(folder), "dog")
    (folder / "val" / "dog").rmdir()
    (folder / "train" / "dog").mkdir()
    says(of(folder), "dog")
    (folder / "val" / "dog").mkdir()
    says(of(folder), "dog", "without pictures")
    monkeypatch.setenv("SDAE_TEST_DATA", str(folder))
    assert len(open_dataset(of(Path("${SDAE_TEST_DATA}"), classes=3), "val")) == 7
    make_folder(tmp_path / "half", {"ant": (1, 1)})
    shutil.rmtree(tmp_path / "half" / "val")
    says(of(tmp_path / "half"), "no folder val")


def test_torchvision_sets_say_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.stl10.download_and_extract_archive", refuse)
    for name, part in datasets.PARTS.items():
        with pytest.raises(UserError, match=rf"{name} .*{part}"):
            open_dataset(Data.model_validate({"name": name, "path": str(tmp_path), "image_size": 32}), "train")


def test_cifar_and_stl_subsets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            n = 50000 if train else 10000
            self.targets = (np.arange(n) * 7 % 10).tolist()
            self.data = np.repeat(np.array(self.targets, np.uint8), 32 * 32 * 3).reshape(n, 32, 32, 3)
            self.classes = list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = Data(name="cifar10", path=str(tmp_path), image_size=32, classes=3, train_pictures=8)
    found = open_dataset(data, "train")
    assert isinstance(found, datasets.Resident)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert found.images[:, 0, 0, 0].tolist() == found.labels.tolist()
    assert found.classes == ["a", "b", "c"]


# --- reading files


def save_odd_pictures(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Pictures in every mode, and what Pillow makes of them."""
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    rgb = Image.fromarray(np.stack([ramp, ramp.T, np.full_like(ramp, 90)], 2))
    made = {
        "grey.jpg": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"), "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.convert("P"), "grey.png": rgb.convert("L"), "deep.png": rgb.convert("L").convert("I;16"),
        "plain.bmp": rgb, "plain.tif": rgb, "plain.webp": rgb,
    }  # fmt: skip
    pixels = {}
    for name, picture in made.items():
        picture.save(folder / name)
        pixels[name] = np.array(Image.open(folder / name).convert("RGB"))
    return pixels


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for name, pixels in save_odd_pictures(tmp_path).items():
        found = datasets.read(str(tmp_path / name))
        assert found.shape == (3, 64, 64), name
        assert found.dtype == torch.uint8
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - pixels)
        assert difference.max() <= 6, name  # JPEG decoders differ by a few levels
        assert difference.mean() < 1.5, name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagefolder"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_picture_is_named_or_skipped(folder: Path, name: str, damage: str) -> None:
    broken = folder / "train" / "bee" / "001.jpg"
    if damage == "truncated":
        truncate(broken)
    else:
        broken.write_bytes(b"no picture" if damage == "text" else b"")
    data = of(folder, name)
    with pytest.raises(RunFailed, match=r"bee/001\.jpg: broken picture") as caught:
        list(Loader(open_dataset(data, "train"), data, seed=0, batch_size=15, train=True).epoch(0))
    assert "\n" not in str(caught.value)
    data = of(folder, name, on_error="skip", augment={"scale": [1, 1], "flip": False})
    loader = Loader(open_dataset(data, "train"), data, seed=0, batch_size=15, train=True)
    batch = next(loader.epoch(0))
    assert loader.skipped == {6: str(broken)}
    images = dict(zip(batch.indices.tolist(), batch.images, strict=True))
    assert sorted(images) == list(range(15))
    assert torch.allclose(images[6].mean((1, 2)), images[7].mean((1, 2)), atol=0.05)


def test_nothing_readable(folder: Path) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    for name in ("tiny-imagenet", "imagefolder"):
        data = of(folder, name, on_error="skip")
        with pytest.raises(RunFailed, match="no readable picture"):
            list(Loader(open_dataset(data, "train"), data, seed=0, batch_size=15, train=True).epoch(0))


# --- the loader


AUGMENT = Augment(scale=(0.2, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25)
BUILTIN = Data(name="builtin", image_size=32, train_pictures=70, val_pictures=50, augment=AUGMENT)


def test_a_tail_is_a_tail_and_ranks_partition() -> None:
    dataset = open_dataset(BUILTIN, "train")
    loader = Loader(dataset, BUILTIN, seed=3, batch_size=16, train=True)
    assert loader.steps_per_epoch == 4
    whole = list(loader.epoch(5))
    assert len(whole) == 4
    assert whole[0].images.shape == (16, 3, 32, 32)
    assert whole[0].images.dtype == torch.float32
    assert whole[0].images.is_contiguous()
    for a, b in zip(whole[2:], loader.epoch(5, first_step=2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
    ranks = [Loader(dataset, BUILTIN, seed=3, batch_size=16, train=True, rank=r, world=4).epoch(5) for r in range(4)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))
        assert torch.equal(batch.labels, torch.cat([p.labels for p in parts]))
        assert torch.equal(batch.labels, dataset.labels[batch.indices])
    indices = torch.cat([b.indices for b in whole])
    assert len(indices.unique()) == 64
    other = next(loader.epoch(6))
    assert not torch.equal(other.indices, whole[0].indices)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5))
def test_evaluation_takes_every_picture_once(batch_size: int, world: int) -> None:
    dataset = open_dataset(BUILTIN, "val")
    seen: list[int] = []
    for rank in range(world):
        loader = Loader(dataset, BUILTIN, seed=0, batch_size=batch_size, train=False, rank=rank, world=world)
        assert loader.steps_per_epoch == -(-50 // batch_size)
        seen += [int(i) for part in loader.order.parts(0) for i in part]
    assert sorted(seen) == list(range(50))


def test_evaluation_changes_nothing_but_normalizes() -> None:
    dataset = open_dataset(BUILTIN, "val")
    assert isinstance(dataset, datasets.Resident)
    batch = next(Loader(dataset, BUILTIN, seed=0, batch_size=50, train=False).epoch(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(batch.images * std + mean, dataset.images / 255, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels(channels: int) -> None:
    loader = Loader(open_dataset(BUILTIN, "val"), BUILTIN, seed=0, batch_size=50, train=False, channels=channels)
    images = next(loader.epoch(0)).images
    assert images.shape[1] == channels
    if channels == 5:
        assert torch.equal(images[:, 3:], images[:, :2])


def test_too_few_pictures_and_uneven_ranks() -> None:
    dataset = open_dataset(BUILTIN, "train")
    with pytest.raises(UserError, match=r"128 is more than the 70"):
        Loader(dataset, BUILTIN, seed=0, batch_size=128, train=True)
    with pytest.raises(UserError, match=r"15 cannot be shared evenly by 2"):
        Loader(dataset, BUILTIN, seed=0, batch_size=15, train=True, rank=0, world=2)


@pytest.fixture
def files(tmp_path: Path) -> Data:
    root = make_folder(tmp_path / "big", {"ant": (8, 5), "bee": (8, 4)}, size=(90, 70))
    return of(root, "imagefolder", image_size=32, augment=AUGMENT.model_dump())


def run(data: Data, epochs: tuple[int, ...] = (0, 1), train: bool = True, **more: Any) -> Iterator[Any]:
    split: Any = "train" if train else "val"
    loader = Loader(open_dataset(data, split), data, seed=1, batch_size=4, train=train, **more)
    for epoch in epochs:
        yield from loader.epoch(epoch)


def test_workers_change_no_number(files: Data) -> None:
    alone, two = list(run(files, workers=0)), list(run(files, workers=2))
    assert len(alone) == len(two) == 8
    for a, b in zip(alone, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)


def test_streaming_tail_after_a_broken_off_epoch(files: Data) -> None:
    loader = Loader(open_dataset(files, "train"), files, seed=1, batch_size=4, train=True, workers=1)
    whole = list(loader.epoch(3))
    for _ in loader.epoch(2):
        break
    for a, b in zip(whole[1:], loader.epoch(3, first_step=1), strict=True):
        assert torch.equal(a.images, b.images)
    start = time.monotonic()
    del loader
    assert time.monotonic() - start < 120, "the workers did not end when they were told to"
    halves = [list(run(files, (3,), rank=r, world=2)) for r in range(2)]
    for a, b, c in zip(whole, *halves, strict=True):
        assert torch.equal(a.images, torch.cat([b.images, c.images]))


def test_streaming_evaluation(files: Data) -> None:
    """Resize the short side to 256/224 of the size, then the middle."""
    batches = list(run(files, (0,), train=False))
    assert [len(b.images) for b in batches] == [4, 4, 1]
    with Image.open(open_dataset(files, "val").path_of(0)) as picture:
        short = picture.resize((round(90 * 37 / 70), 37), Image.Resampling.BICUBIC)
    left = (short.width - 32) // 2
    expected = torch.from_numpy(np.array(short.crop((left, 2, left + 32, 34)))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert (batches[0].images[0] * std + mean - expected).abs().mean() < 0.01


def test_global_random_state_is_left_alone(files: Data) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
    list(run(files))
    list(run(BUILTIN))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_files_can_be_sent_to_a_spawned_worker(files: Data) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(files, "train")))
    assert dataset.read(3).shape == (3, 70, 90)


def test_sets_in_memory_are_opened_once(folder: Path) -> None:
    assert open_dataset(BUILTIN, "train") is open_dataset(BUILTIN, "train")
    assert open_dataset(of(folder), "train") is open_dataset(of(folder, image_size=32), "train")


# --- real pictures, where they are


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Three classes of the real set: from $SDAE_DATA, or unpacked from the archive beside the repository."""
    unpacked = Path(os.environ.get("SDAE_DATA", "/nonexistent")) / "tiny-imagenet-200"
    if unpacked.is_dir():
        return unpacked
    archive = SHARED / "tiny-imagenet-200.tar.gz"
    if not archive.is_file():
        pytest.skip("no Tiny-ImageNet: set SDAE_DATA to a folder with tiny-imagenet-200 in it")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.split("/")[2:3] in (["n01443537"], ["n01629819"], ["n01641577"]):
                tar.extract(member, tmp_path, **PLAIN)
    return tmp_path / "tiny-imagenet-200"


def test_real_pictures(tiny_imagenet: Path) -> None:
    data = resolve(of(tiny_imagenet, classes=3, train_pictures=300))
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    assert train.classes == ["n01443537", "n01629819", "n01641577"]
    assert train.labels.bincount().tolist() == [100] * 3
    assert len(val) > 0
    batch = next(Loader(train, data, seed=0, batch_size=300, train=True).epoch(0))
    assert batch.images.mean().abs() < 1
    assert 0.5 < batch.images.std() < 1.5
    streamed = data.model_copy(update={"name": "imagefolder"})
    other = next(Loader(open_dataset(streamed, "train"), streamed, seed=0, batch_size=300, train=True).epoch(0))
    assert torch.equal(batch.indices, other.indices)
    difference = (batch.images - other.images).abs() * 0.225 * 255  # two ways to the same crops
    assert difference.mean() < 0.5
    assert (difference > 3).float().mean() < 5e-3  # theirs rounds and clips between the two passes


def test_an_error_ends_the_program_though_workers_read_ahead(tmp_path: Path) -> None:
    """They do not heed SIGTERM, with which Python ends its children."""
    program = f"""
from pathlib import Path
from sdae.data import Loader, open_dataset
from sdae.data.feed import make_pictures
from sdae.sections import Data
def main():
    folder = make_pictures(Path({str(tmp_path)!r}), 16, (64, 48))
    data = Data(name="imagefolder", path=str(folder), image_size=32)
    loader = Loader(open_dataset(data, "train"), data, seed=0, batch_size=4, train=True, workers=2)
    for batch in loader.epoch(0):
        raise RuntimeError("in the middle of an epoch")
main()
"""
    assert_ends(program, "in the middle of an epoch")
