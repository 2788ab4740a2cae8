"""Bad input through the command line: one clear line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from calling import assert_refused, call, spawn
from conftest import DECODER, TINY, tiny
from PIL import Image

from sdae.run import execute
from sdae.store import Store
from sdae.yamls import merge


def write(path: Path, **changes: Any) -> Path:
    """A config file of a tiny run."""
    values = merge(TINY, {"stage": "pretrain"} | changes)
    if values["stage"] == "pretrain":
        values = merge(values, {"model": DECODER})
    path.write_text(yaml.safe_dump(values))
    return path


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# What needs no torch: each in a process of its own


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lr=1", ["optim.lr: unknown key", "base_lr"]),
        ("optim.epochs=ten", ["optim.epochs: 'ten'"]),
        ("method.teacher.folds=0", ["method.teacher.folds: 0"]),
        ("method.teacher.folds=13", ["method.teacher.folds: 13", "1 to 12"]),
        ("method.teacher={view: crop, tokens: 13}", ["method.teacher.tokens: 13", "1 to 12, or 16"]),
        ("method.mask_ratio=1.5", ["method.mask_ratio: 1.5"]),
        ("method.mask_ratio=0.99", ["method.mask_ratio: 0.99", "no visible patch"]),
    ],
)
def test_a_bad_value_in_a_config(override: str, parts: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    assert_refused(spawn("run", file, "-s", override, "--store", tmp_path / "store"), "run.yaml: ", *parts)
    assert below(tmp_path) == {file}


OWN = """
title: One of my own
columns: {top1: {run: finetune, metric: top1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain}}}
rows: {only: {runs: {pretrain: {recipe: sdae, optim: {epochs: 100}}}}}
"""
CYCLE = OWN.replace("{recipe: sdae,", "{recipe: finetune, init: {run: finetune},")


@pytest.mark.parametrize(
    ("words", "files", "parts"),
    [
        (["run", "tab.yaml"], {"tab.yaml": "stage: pretrain\noptim:\n\tepochs: 1\n"}, ["tab.yaml: line 3", "a tab"]),
        (["run", "twice.yaml"], {"twice.yaml": "seed: 1\nseed: 2\n"}, ["twice.yaml: line 2", "'seed' is given twice"]),
        (["run", "none.yaml"], {}, ["none.yaml: no such file"]),
        (["sweep", "plan", "tab.yaml"], {"tab.yaml": "name: x\nrows:\n\ta: 1\n"}, ["tab.yaml: line 3", "a tab"]),
        (["sweep", "plan", "--seeds", "0,1,0"], {}, ["seeds: 0 is given twice"]),
        (["sweep", "plan", "own.yaml", "a/own.yaml"], {"own.yaml": OWN, "a/own.yaml": OWN}, ["two artifacts", "'own'"]),
        (["sweep", "plan", "own.yaml"], {"own.yaml": CYCLE}, ["own.yaml", "need each other", "pretrain"]),
        (["sweep", "plan", "table9"], {}, ["artifact 'table9' is unknown", "table5"]),
        (["reproduce", "--scale", "big"], {}, ["scale 'big' is unknown", "smoke"]),
        (["results", "list", "--store", "tab.yaml"], {"tab.yaml": ""}, ["tab.yaml: the store must be a folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_files_and_words(words: list[str], files: dict[str, str], parts: list[str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = below(tmp_path)
    assert_refused(spawn(*words, cwd=tmp_path), *parts)
    assert below(tmp_path) == before


def test_the_artifacts_above_are_good_but_for_their_fault(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    assert "2 runs asked for" in spawn("sweep", "plan", "own.yaml", cwd=tmp_path).out


# What needs torch: the pictures


def pictures(root: Path) -> Path:
    """Two classes, four small pictures each, in both splits."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((40, 40), 80 + i).convert("RGB").save(root / split / name / f"{i}.png")
    return root


def data(path: object, **changes: Any) -> dict[str, Any]:
    return {"name": "imagefolder", "path": str(path), "train_pictures": None, "val_pictures": None, **changes}


def without(*names: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name)

    return remove


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (without("train", "val"), ["no folder train", "train/CLASS/*.jpg"]),
        (without("val"), ["no folder val"]),
        (without("train/ant", "train/bee"), ["no class folders"]),
        (without("val/bee"), ["val lacks the class bee"]),
        (lambda root: [p.unlink() for p in (root / "train" / "bee").iterdir()], ["bee: a class without pictures"]),
        (lambda root: shutil.rmtree(root), ["no such folder"]),
    ],
)
def test_folders_that_are_no_data_set(damage: Callable[[Path], None], parts: list[str], tmp_path: Path) -> None:
    root = pictures(tmp_path / "pictures")
    damage(root)
    file = write(tmp_path / "run.yaml", data=data(root))
    called = call("run", file, "--store", tmp_path / "store")
    assert_refused(called, "data.path: ", str(root), *parts)
    assert not (tmp_path / "store").exists()


def test_missing_pictures_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", data=data("${SDAE_NOT_SET}/imagenet"))
    called = spawn("run", file, "--store", tmp_path / "store")
    assert_refused(called, "data.path: ${SDAE_NOT_SET}/imagenet: the variable ${SDAE_NOT_SET} is not set")
    assert below(tmp_path) == {file}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": {"train_pictures": 9}}, "data.train_pictures: 9 were asked for, there are 8"),
        ({"data": {"classes": 3}}, "data.classes: 3 were asked for"),
        ({"data": {"fingerprint": "0" * 16}}, "data.fingerprint: 0000000000000000 is asked for"),
        ({"optim": {"batch_size": 9}}, "optim.batch_size: 9 is more than the 8 training pictures"),
        ({"stage": "finetune", "optim": {"batch_size": 5}}, "batches must be even"),
        ({"efficiency": {"device": "cuda"}}, "efficiency.device: cuda"),
    ],
)
def test_wishes_that_the_pictures_or_the_machine_do_not_grant(
    changes: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = write(tmp_path / "run.yaml", **merge({"data": data(pictures(tmp_path / "pictures"))}, changes))
    assert_refused(call("run", file, "--store", tmp_path / "store"), part)
    assert Store(tmp_path / "store").ids() == []


@pytest.mark.parametrize("name", ["imagefolder", "tiny-imagenet"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_a_corrupt_picture_is_named_and_recorded(name: str, how: str, tmp_path: Path) -> None:
    """The run did start, so it counts as failed, with its `failure.json`; yet the input is to blame."""
    broken = pictures(tmp_path / "pictures") / "train" / "bee" / "2.png"
    broken.write_bytes({"truncated": broken.read_bytes()[:200], "empty": b"", "text": b"hello"}[how])
    file = write(tmp_path / "run.yaml", data=data(tmp_path / "pictures", name=name))
    words = ("run", file, "--store", tmp_path / "store")
    called = spawn(*words) if (name, how) == ("imagefolder", "truncated") else call(*words)
    assert_refused(called, f"{broken}: broken picture")
    store = Store(tmp_path / "store")
    (identity,) = store.ids()
    failure = store.run(identity).failure()
    assert failure is not None
    assert (failure["class"], store.run(identity).state()) == ("BrokenInput", "failed")
    assert str(broken) in failure["message"]
    broken.write_bytes((broken.parent / "1.png").read_bytes())
    assert call(*words).code == 0  # mended and called again


# Checkpoints and stores


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("pretrained") / "store"
    return root, execute(tiny("pretrain", optim={"epochs": 1, "warmup_epochs": 0}), Store(root))["id"]


def test_checkpoints_that_cannot_be_used(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    root, identity = pretrained
    shutil.copytree(root, tmp_path / "store")
    store = tmp_path / "store"
    own = {"stage": "finetune", "init": {"run": identity}}
    files = {
        "depth": write(tmp_path / "depth.yaml", **own, model={"depth": 3}),
        "width": write(tmp_path / "width.yaml", **own, model={"width": 48}),
        "epoch": write(tmp_path / "epoch.yaml", stage="finetune", init={"run": identity, "epoch": 7}),
        "parent": write(tmp_path / "parent.yaml", stage="finetune", init={"run": "pretrain-0123456789abcdef"}),
        "torn": write(tmp_path / "torn.yaml", **own),
    }
    before = below(tmp_path)
    assert_refused(call("run", files["depth"], "--store", store), identity, "missing keys: blocks.2.attn.proj.bias")
    assert_refused(call("run", files["width"], "--store", store), identity, "another architecture", "(1, 1, 24)")
    assert_refused(call("run", files["epoch"], "--store", store), "epoch: 7 was not saved (allowed: last, 1)")
    assert_refused(call("run", files["parent"], "--store", store), "waits for pretrain-0123456789abcdef")
    weights = store / identity / "checkpoints" / "student-epoch-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert_refused(spawn("run", files["torn"], "--store", store), str(weights), "torn or changed")
    assert below(tmp_path) == before


def test_stores_that_cannot_be_written(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    before = below(tmp_path)
    assert_refused(call("run", file, "--store", file / "store"), "the store cannot be made")
    assert_refused(call("run", file, "--store", "/proc/store"), "the store cannot be made")
    assert_refused(call("run", file, "--store", file), "the store must be a folder")
    assert_refused(call("reproduce", "table5", "--store", file / "store", "--out", tmp_path / "paper"), "store")
    assert below(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("small_disk", "left"), [("48k", []), ("88k", []), ("240k", ["started"])], indirect=["small_disk"]
)
def test_a_full_store(small_disk: Path, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full at once, at the first weights, or at later ones; with room again the run goes on."""
    monkeypatch.setattr("sdae.provenance.DIFF_LIMIT", 0)  # else what is full depends on what is not committed
    file = write(tmp_path / "run.yaml", optim={"epochs": 1, "warmup_epochs": 0})
    store = small_disk / "store"
    assert_refused(call("run", file, "--store", store), str(small_disk), "No space left on device")
    assert [Store(store).run(identity).state() for identity in Store(store).ids()] == left
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert call("run", file, "--store", store).code == 0


@pytest.mark.parametrize("small_disk", ["48k"], indirect=True)
def test_an_export_to_a_full_disk(small_disk: Path, pretrained: tuple[Path, str]) -> None:
    out = small_disk / "student.safetensors"
    called = call("weights", "export", pretrained[1], "--out", out, "--store", pretrained[0])
    assert_refused(called, str(out), "No space left on device")
    assert not list(small_disk.iterdir())
