"""Packing: the same pictures come out, whatever interrupts it; what is not whole is never read, and is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import ROOT, Called, assert_refused, call
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdae.data import Loader, crop, feed, fingerprint, open_dataset, packing
from sdae.data.datasets import read, subset
from sdae.data.packed import Mapped, Shards
from sdae.errors import BrokenInput, UserError
from sdae.run import execute
from sdae.sections import Data
from sdae.store import Store
from slurm.doctor import advice

SIZES = [(90, 60), (64, 48), (50, 110), (30, 40), (80, 80)]  # width, height; the fourth is smaller than the side
SIDE = 48


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_folder(root: Path, counts: dict[str, tuple[int, int]]) -> Path:
    """Class -> number of pictures in train and val: smooth JPEGs of several shapes, one of them a PNG."""
    generator = np.random.default_rng(0)
    for name, pair in counts.items():
        for split, n in zip(("train", "val"), pair, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                picture = coarse.resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC)
                picture.save(root / split / name / f"{i:03d}.{'png' if i == 4 else 'jpg'}", quality=92)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "set", {"ant": (7, 3), "bee": (5, 2), "cat": (6, 4)})


def pack(folder: Path, out: Path, form: Any = "shards", **more: Any) -> dict[str, Any]:
    return packing.prepare(folder, out, form, **{"side": SIDE, "part_bytes": 6_000, **more})


def of(folder: Path, name: str = "packed", **more: Any) -> Data:
    return Data.model_validate({"name": name, "path": str(folder), "image_size": 32, **more})


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def batches(data: Data, train: bool = True, epoch: int = 3, **more: Any) -> list[Any]:
    loader = Loader(open_dataset(data, "train" if train else "val"), data, seed=5, batch_size=6, train=train, **more)
    return list(loader.epoch(epoch))


# What comes out


def test_shards_hold_the_pictures_at_a_smaller_side(folder: Path, tmp_path: Path) -> None:
    report = pack(folder, tmp_path / "out")
    assert {k: report[k] for k in ("form", "side", "classes", "train", "val", "skipped")} == {
        "form": "shards", "side": SIDE, "classes": 3, "train": 18, "val": 9, "skipped": [],
    }  # fmt: skip
    assert report["bytes"] == sum(len(b) for name, b in content(tmp_path / "out").items() if name != "manifest.json")
    files, packed = open_dataset(of(folder, "imagefolder"), "train"), open_dataset(of(tmp_path / "out"), "train")
    assert isinstance(packed, Shards)
    assert packed.classes == files.classes
    assert packed.labels.tolist() == files.labels.tolist()
    for i in range(len(files)):
        whole, small = read(files.path_of(i)), packed.read(i)
        assert packed.path_of(i).endswith(os.path.relpath(files.path_of(i), folder / "train"))
        if min(whole.shape[1:]) <= SIDE:
            assert torch.equal(whole, small)
            continue
        assert min(small.shape[1:]) == SIDE
        with Image.open(files.path_of(i)) as picture:
            size = small.shape[2], small.shape[1]
            expected = np.array(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), float)
        assert np.abs(small.permute(1, 2, 0).numpy() - expected).mean() < 2


def test_raw_holds_squashed_pixels_and_the_shape_that_they_had(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", "raw")
    files, packed = open_dataset(of(folder, "imagefolder"), "val"), open_dataset(of(tmp_path / "out"), "val")
    assert isinstance(packed, Mapped)
    images = packed.gather(np.arange(len(packed)))
    assert images.shape == (9, 3, SIDE, SIDE)
    for i in range(len(files)):
        assert packed.sizes[i].tolist() == list(read(files.path_of(i)).shape[1:])
        with Image.open(files.path_of(i)) as picture:
            expected = np.array(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
        assert np.abs(images[i].permute(1, 2, 0).numpy() - expected).mean() < 2


@pytest.mark.parametrize("form", ["shards", "raw"])
@pytest.mark.parametrize("train", [True, False])
def test_crops_show_what_crops_of_the_files_show(folder: Path, tmp_path: Path, form: str, train: bool) -> None:
    """The same draws in the same geometry: the batches look alike, up to the resolution that packing costs."""
    pack(folder, tmp_path / "out", form)
    augment = {"scale": [0.5, 1.0]}
    theirs, mine = (
        batches(of(*where, image_size=24, augment=augment), train)
        for where in ((folder, "imagefolder"), (tmp_path / "out",))
    )
    assert len(theirs) == len(mine) >= 2
    for a, b in zip(theirs, mine, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        distance = (a.images - b.images).abs().mean((1, 2, 3))
        spread = (a.images - a.images.roll(1, 0)).abs().mean((1, 2, 3))
        assert (distance < 0.25 * spread).all(), (distance, spread)


def test_the_processor_cuts_raw_pictures_as_other_devices_do(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", "raw")
    data = of(tmp_path / "out")
    dataset = open_dataset(data, "train")
    assert isinstance(dataset, Mapped)
    loader = Loader(dataset, data, seed=5, batch_size=18, train=True)
    at = np.arange(18)
    images = dataset.gather(at)
    here = loader._cut(images, 2, at)
    box, flip = dataset.boxes(5, 2, at, (0.2, 1.0)), torch.from_numpy(crop.flips(5, 2, at))
    assert 0 < flip.sum() < 18
    distance = (here - crop.resized_crop(images, box, flip, 32)).abs()
    assert distance.max() < 2, "levels: uint8 is rounded after each of the two passes"
    assert distance.mean() < 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=6), st.integers(0, 99))
def test_crops_of_any_shape_stay_in_the_square(sizes: list[tuple[int, int]], seed: int) -> None:
    mapped = Mapped.__new__(Mapped)
    mapped.sizes, mapped.side = np.array(sizes), 32
    at = np.arange(len(sizes))
    for box in (mapped.boxes(seed, 0, at, (0.08, 1.0)), mapped.middles(at, 24)):
        assert (box >= 0).all()
        assert (box[:, 2:] > 0).all()
        assert (box[:, :2] + box[:, 2:] <= 32).all()
        picture = torch.full((len(sizes), 1, 32, 32), 99, dtype=torch.uint8)
        cut = crop.resized_crop(picture, box, torch.zeros(len(sizes), dtype=torch.bool), 16)
        assert torch.allclose(cut, torch.tensor(99.0), atol=1e-2)


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_workers_ranks_and_resumes_change_no_number(folder: Path, tmp_path: Path, form: str) -> None:
    pack(folder, tmp_path / "out", form)
    data = of(tmp_path / "out")
    alone, two = batches(data), batches(data, workers=2)
    assert len(alone) == len(two) == 3
    for a, b in zip(alone, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    ranks = [batches(data, rank=rank, world=2) for rank in range(2)]
    for a, b, c in zip(alone, *ranks, strict=True):
        assert torch.equal(a.images, torch.cat([b.images, c.images]))
    loader = Loader(open_dataset(data, "train"), data, seed=5, batch_size=6, train=True, workers=2)
    for _ in loader.epoch(2):
        break
    assert torch.equal(next(loader.epoch(3, first_step=2)).images, alone[2].images)


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_parts_of_a_packed_set(folder: Path, tmp_path: Path, form: str) -> None:
    pack(folder, tmp_path / "out", form)
    part = open_dataset(of(tmp_path / "out", classes=2, train_pictures=7), "train")
    same = open_dataset(of(folder, "imagefolder", classes=2, train_pictures=7), "train")
    assert part.classes == ["ant", "bee"]
    assert part.labels.tolist() == same.labels.tolist() == [0] * 4 + [1] * 3
    assert [Path(part.path_of(i)).name for i in range(7)] == [Path(same.path_of(i)).name for i in range(7)]
    fewer, sent = subset(part, 3), pickle.loads(pickle.dumps(part))
    assert len(fewer) == 3
    assert sent.path_of(6) == part.path_of(6)
    if isinstance(part, Shards):
        assert torch.equal(sent.read(6), part.read(6))
    else:
        assert torch.equal(sent.gather(np.arange(7)), part.gather(np.arange(7)))
    with pytest.raises(UserError, match=r"data.train_pictures: 99 were asked for, there are 18"):
        open_dataset(of(tmp_path / "out", train_pictures=99), "train")


def test_ids_tell_packed_pictures_from_files(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a")
    pack(folder, tmp_path / "b", side=40)
    pack(folder, tmp_path / "c", "raw")
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    found = [fingerprint(of(tmp_path / name)) for name in "abc"]
    assert len({*found, fingerprint(of(folder, "imagefolder")), fingerprint(of(tmp_path / "a", train_pictures=9))}) == 5
    assert fingerprint(of(tmp_path / "moved")) == found[0]
    assert fingerprint(of(tmp_path / "absent")) is None
    code = "import sys; from sdae.data import fingerprint; from sdae.sections import Data; "
    code += f"print(fingerprint(Data(name='packed', path={str(tmp_path / 'a')!r})), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.split() == [found[0], "False"]


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_a_run_trains_on_packed_pictures(folder: Path, tmp_path: Path, form: str) -> None:
    pack(folder, tmp_path / "out", form)
    store, results = Store(tmp_path / "runs"), []
    for name, path in (("imagefolder", folder), ("packed", tmp_path / "out")):
        data = {"name": name, "path": str(path), "image_size": 32, "train_pictures": None, "val_pictures": None}
        optim = {"epochs": 2, "batch_size": 6, "warmup_epochs": 1}
        results.append(execute(tiny(data=data, optim=optim, probe={"knn_every": 2}), store))
    files, packed = results
    assert files["id"] != packed["id"]
    assert packed["metrics"]["loss"] == pytest.approx(files["metrics"]["loss"], rel=0.2)
    tuned = execute(tiny("finetune", data=data, optim=optim, init={"weights": "random"}), store)
    assert 0 <= tuned["metrics"]["top1"] <= 100
    assert tuned["dataset"]["train"] == 18


# What interrupts it


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_processes_change_no_byte(folder: Path, tmp_path: Path, form: str) -> None:
    pack(folder, tmp_path / "one", form)
    seen: list[tuple[int, int]] = []
    pack(folder, tmp_path / "two", form, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert seen[-1] == (27, 27)
    assert seen == sorted(seen)


def killed_at(folder: Path, out: Path, workers: int, parts: int, later: float) -> bool:
    """Packs in a process of its own, which is killed `later` seconds after so many parts are there; whether it was."""

    def work() -> None:
        server = forkserver._forkserver  # type: ignore[attr-defined]
        server._forkserver_pid = server._forkserver_fd = server._forkserver_alive_fd = None  # the parent's, if any
        pack(folder, out, workers=workers, progress=lambda done, total: time.sleep(0.01))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while process.is_alive() and len(list(out.glob("*.shard"))) < parts:
        time.sleep(0.001)
    time.sleep(later)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_at_any_moment_change_no_byte(tmp_path: Path, workers: int) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    folder = make_folder(tmp_path / "set", dict.fromkeys(("ant", "bee", "cat"), (60, 20)))
    pack(folder, tmp_path / "whole")
    kills = 0
    for _ in range(6):
        have = len(list((tmp_path / "out").glob("*.shard")))
        if killed_at(folder, tmp_path / "out", workers, have + draw.randrange(12), 0.05 * draw.random() * (kills > 1)):
            if (tmp_path / "out" / "manifest.json").exists():  # killed between the last byte and the end
                break
            kills += 1
            with pytest.raises(UserError, match=r"no such folder|no manifest\.json"):
                open_dataset(of(tmp_path / "out"), "train")
    assert kills > 1
    time.sleep(2 * (workers > 1))  # workers of a killed packer may live: they end with their next picture
    pack(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_only_what_is_not_whole_is_packed_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(folder, tmp_path / "whole")
    names, made = [], packing._packed_bytes

    def until(limit: int) -> None:
        def counted(job: Any, path: str) -> Any:
            if len(names) == limit:
                raise KeyboardInterrupt
            names.append(path)
            return made(job, path)

        monkeypatch.setattr(packing, "_packed_bytes", counted)

    until(27 + 12)  # the sample takes all 27 once
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out")
    parts = sorted((tmp_path / "out").glob("*.shard"))
    assert parts
    with open(parts[0], "r+b") as file:  # damaged on the disk meanwhile
        file.write(b"\0\0\0\0")
    (tmp_path / "out" / ".train-00002.77.tmp").write_bytes(b"half")
    names.clear()
    until(-1)
    pack(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    per_part = json.loads((tmp_path / "whole" / "manifest.json").read_text())["parts"]
    assert len(names) < 27, "everything was packed again"
    assert len(per_part["train"]) > 2
    names.clear()
    pack(folder, tmp_path / "out")
    assert names == []


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_a_full_disk_leaves_nothing_half_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pack(folder, tmp_path / "whole", form)
    real, room = os.fsync, [3]

    def full(descriptor: int) -> None:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device") as caught:
            pack(folder, tmp_path / "out", form)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "out") in str(caught.value)
    assert not list((tmp_path / "out").glob(".*")), "half a file is left"
    with pytest.raises(UserError, match=r"no manifest.json"):
        fingerprint(of(tmp_path / "out"))
    pack(folder, tmp_path / "out", form)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_too_little_room_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 50_000, 50_000))
    called = call("data", "prepare", folder, "--out", tmp_path / "deep" / "out", "--form", "raw", "--workers", 1)
    assert_refused(called, str(tmp_path / "deep" / "out"), "27 pictures", "0.005 GB", "another disk")
    assert not (tmp_path / "deep").exists()


# What is wrong with the source


@pytest.mark.parametrize("change", ["more", "class", "gone", "touched"])
def test_a_folder_that_changes_is_named(folder: Path, tmp_path: Path, change: str) -> None:
    victim = folder / "train" / "bee" / "002.jpg"

    def alter(done: int, total: int) -> None:
        if done == total:
            if change == "more":
                shutil.copy(victim, folder / "train" / "bee" / "new.jpg")
            elif change == "class":
                for split in ("train", "val"):
                    shutil.copytree(folder / split / "bee", folder / split / "cow", dirs_exist_ok=True)
            elif change == "gone":
                victim.unlink(missing_ok=True)
            else:
                os.utime(victim, (1, 1))

    name = {"more": "train/bee/new.jpg is new", "class": "class cow is new"}.get(change, "train/bee/002.jpg")
    with pytest.raises(UserError, match=name) as caught:
        pack(folder, tmp_path / "out", progress=alter)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = "train/cow is new" if change == "class" else "train/bee has changed"
    with pytest.raises(UserError, match=f"{again} since it began to be packed: delete"):
        pack(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    pack(folder, tmp_path / "out")


def test_a_source_that_has_changed_since_it_was_packed(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out")
    os.utime(folder / "train" / "bee" / "002.jpg", (1, 1))  # copied, say
    pack(folder, tmp_path / "out")
    shutil.copy(folder / "train" / "bee" / "002.jpg", folder / "train" / "bee" / "new.jpg")
    with pytest.raises(UserError, match=f"train/bee has changed.*delete {tmp_path / 'out'} and pack again"):
        pack(folder, tmp_path / "out")
    shutil.rmtree(folder)
    assert pack(folder, tmp_path / "out")["train"] == 18


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    """As the kernel ends one when memory is short."""
    folder = make_folder(tmp_path / "set", {"ant": (600, 3)})
    pack(folder, tmp_path / "whole")

    def strike(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(UserError, match=r"a packing process was killed.*fewer --workers than 2") as caught:
        pack(folder, tmp_path / "out", workers=2, progress=strike)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob(".*")), "half a file is left"
    pack(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_small_sets_have_parts_to_share(tmp_path: Path) -> None:
    """Below the size of one part, too: several processes are of use, and a resume has whole parts."""
    folder = make_folder(tmp_path / "set", {"ant": (150, 3)})
    pack(folder, tmp_path / "out", part_bytes=packing.PART_BYTES)
    assert len(list((tmp_path / "out").glob("train-*.shard"))) == 3


@pytest.mark.parametrize("target", ["nowhere.jpg", "link.jpg"], ids=["dangling", "looping"])
def test_a_link_to_nowhere_is_an_unreadable_picture(folder: Path, tmp_path: Path, target: str) -> None:
    (folder / "train" / "bee" / "link.jpg").symlink_to(target)
    with pytest.raises(UserError, match=r"bee/link\.jpg.*--on-error skip"):
        pack(folder, tmp_path / "out")
    assert pack(folder, tmp_path / "out", on_error="skip")["skipped"] == ["train/bee/link.jpg"]


def test_a_picture_that_changes_before_its_turn(folder: Path, tmp_path: Path) -> None:
    def alter(done: int, total: int) -> None:
        if done == 1:
            (folder / "val" / "cat" / "001.jpg").write_bytes(b"other")

    with pytest.raises(UserError, match=r"val/cat/001.jpg has changed"):
        pack(folder, tmp_path / "out", progress=alter)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_picture_is_named_or_left_out(folder: Path, tmp_path: Path, workers: int) -> None:
    broken = folder / "train" / "bee" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train/bee/001\.jpg: broken picture.*--on-error skip"):
        pack(folder, tmp_path / "out", workers=workers)
    report = pack(folder, tmp_path / "out", workers=workers, on_error="skip")
    assert report["skipped"] == ["train/bee/001.jpg"]
    assert report["train"] == 17
    packed = open_dataset(of(tmp_path / "out"), "train")
    assert packed.labels.tolist() == [0] * 7 + [1] * 4 + [2] * 6
    assert [Path(packed.path_of(i)).name for i in (7, 8)] == ["000.jpg", "002.jpg"]
    with pytest.raises(UserError, match=r"without train/bee/001\.jpg"):
        pack(folder, tmp_path / "out")
    for file in (folder / "val" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="val/bee: no readable picture"):
        pack(folder, tmp_path / "none", on_error="skip")


# What is wrong with the packed folder


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_flipped_bits_are_named(folder: Path, tmp_path: Path, form: str) -> None:
    pack(folder, tmp_path / "out", form)
    good = call("data", "verify", tmp_path / "out", "--json")
    assert (good.code, json.loads(good.out)["damaged"]) == (0, [])
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    victims = draw.sample(sorted(p for p in (tmp_path / "out").iterdir() if p.name != "manifest.json"), 2)
    for file in victims:
        bits = bytearray(file.read_bytes())
        bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
        file.write_bytes(bits)
    called = call("data", "verify", tmp_path / "out")
    assert called.code == 1
    assert {line.split(":")[0] for line in called.out.splitlines()[:-1]} == {file.name for file in victims}
    assert "2 damaged" in called.out


@pytest.mark.parametrize("name", ["train.npy", "val-00000*", "manifest.json"])
@pytest.mark.parametrize("damage", ["shorter", "absent"])
def test_torn_folders_are_refused(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    pack(folder, tmp_path / "out")
    (file,) = (tmp_path / "out").glob(name)
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        open_dataset(of(tmp_path / "out"), "train")
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    called = call("data", "verify", tmp_path / "out")
    if file.name == "manifest.json":
        assert_refused(called, "manifest.json")
    else:
        assert called.code == 1
        assert file.name in called.out


def test_a_manifest_with_other_values_is_refused(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    file.write_text(file.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        fingerprint(of(tmp_path / "out"))
    with pytest.raises(UserError, match=r"data.path: packed needs a folder that `sdae-cli data prepare`"):
        open_dataset(Data(name="packed"), "train")


# The command


def prepare(folder: Path, out: Path, *words: object) -> Called:
    return call("data", "prepare", folder, "--out", out, "--workers", 1, *words)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    called = prepare(folder, tmp_path / "out", "--form", "shards", "--side", SIDE)
    assert called.code == 0, called.err
    assert "27 pictures take about 0.000 GB" in called.out.splitlines()[0]
    assert "18 + 9 pictures of 3 classes as shards" in called.out
    assert f"data: {{name: packed, path: {tmp_path / 'out'}}}" in called.out
    again = json.loads(prepare(folder, tmp_path / "out", "--form", "shards", "--side", SIDE, "--json").out)
    assert again["train"] == 18
    refused = prepare(folder, tmp_path / "out", "--form", "raw", "--side", SIDE)
    assert_refused(refused, "form shards, not raw")
    assert_refused(prepare(folder, folder / "out", "--form", "raw"), "lies in the folder that is packed")
    assert_refused(prepare(folder, tmp_path / "new", "--form", "raw", "--side", 7), "--side 7", "32 to 4096")
    assert_refused(prepare(tmp_path / "no", tmp_path / "new", "--form", "raw"), "no such folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert_refused(prepare(folder, tmp_path / "mine", "--form", "raw"), "holds something else")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_one_packer_at_a_time(folder: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        if done == 1:
            assert_refused(prepare(folder, tmp_path / "out", "--form", "raw", "--side", SIDE), "another process")

    pack(folder, tmp_path / "out", "raw", progress=second)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_progress_in_a_pipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.machine.LINE_SECONDS", 0.0)
    called = prepare(folder, tmp_path / "out", "--form", "raw", "--side", SIDE, "--json")
    assert "packing: 5 of 27 pictures" in called.err
    json.loads(called.out)


# What the machine feeds


def test_what_a_machine_feeds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = feed.bench(of(folder, "imagefolder"), 0, 0.6)
    assert (found["source"], found["made"]) == ("files", None)
    assert set(found["rates"]) == {"files", "shards", "raw"}
    assert all(rate > 0 for form in found["rates"].values() for rate in form.values())
    pack(folder, tmp_path / "out", "raw")
    assert set(feed.bench(of(tmp_path / "out"), 0, 0.2)["rates"]) == {"raw"}
    monkeypatch.setattr(feed, "SAMPLE", 8)
    made = feed.bench(of(tmp_path / "nothing", "imagefolder", image_size=224), 0, 0.3)
    assert "no such folder" in made["made"]


def test_a_broken_picture_is_named_where_it_lies(folder: Path) -> None:
    """Not in the sample, which is gone by then."""
    (folder / "train" / "ant" / "000.jpg").write_bytes(b"junk")
    with pytest.raises(BrokenInput, match=str(folder / "train" / "ant" / "000.jpg")):
        feed.bench(of(folder, "imagefolder"), 0, 0.6)


def test_the_doctor_measures_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = feed.bench
    monkeypatch.setattr(feed, "bench", lambda data, workers, seconds: real(data, workers, 0.3))
    called = call("doctor", "--bench-data", "--json", "--store", tmp_path / "runs")
    assert called.code == 0, called.err
    rows = {row["check"]: row for row in json.loads(called.out)}
    assert set(rows) == {"feeds from memory", "model takes", "input"}
    assert "images/s are wanted" in rows["input"]["detail"]


@pytest.mark.parametrize(
    ("wanted", "ok", "says"),
    [
        (900, True, "nothing to do"),
        (4000, None, "efficiency.workers: 8"),
        (9000, None, "--form shards, then data: {name: packed, path: DIR} and efficiency.workers: 9"),
        (50_000, None, "--form raw, then data: {name: packed, path: DIR} and efficiency.workers: 2"),
        (10**6, False, "even raw feeds 30,000 per core, and there are 16"),
    ],
)
def test_what_the_doctor_advises(wanted: float, ok: bool | None, says: str) -> None:
    rates = {"files": (500, 950), "shards": (1000, 1900), "raw": (30_000, 55_000)}
    by_form = {form: {"per_core": one, "all": all_} for form, (one, all_) in rates.items()}
    found = {"source": "files", "device": "cuda", "rates": by_form}
    told = advice(found, wanted, 16, 2)
    assert told[0] is ok
    assert says in told[1]


def test_the_doctor_promises_no_form_that_it_has_measured_to_be_too_slow() -> None:
    rates = {"files": (500, 950), "shards": (1000, 1900), "raw": (30_000, 4_000)}
    by_form = {form: {"per_core": one, "all": all_} for form, (one, all_) in rates.items()}
    told = advice({"source": "files", "device": "cpu", "rates": by_form}, 20_000, 16, 2)
    assert told == (False, "raw feeds 4,000: cutting and normalizing on cpu is what takes the time")


# Odd notes


def interrupt(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1:],
        lambda rows: [[*rows[0][:1], rows[0][1] + 1, *rows[0][2:]], *rows[1:]],
        lambda rows: [[500, *rows[0][1:]], *rows[1:]],
        lambda rows: [rows[0], *rows[:-1]],
        lambda rows: [[1], *rows[1:]],
    ],
    ids=["fewer", "longer", "no picture", "twice", "torn"],
)
def test_a_part_with_odd_rows_is_packed_again(change: Any, folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "whole")
    note = tmp_path / "out" / "unfinished" / "train-00000.json"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out", progress=lambda done, total: interrupt(note.exists(), total))
    values = json.loads(note.read_text())
    note.write_text(json.dumps({**values, "rows": change(values["rows"])}))
    pack(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("note", ["[1]", '{"a": 1}', '{"file": 3, "skipped": [], "rows": []}', '{"file": "../x"}'])
def test_a_part_with_an_odd_note_is_packed_again(note: str, folder: Path, tmp_path: Path) -> None:
    """And nothing that the note names is read."""
    pack(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out", progress=interrupt)
    (tmp_path / "out" / "unfinished" / "train-00000.json").write_text(note)
    pack(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
