"""Stores, checkpoints and folders that hold what the suite never wrote there, by accident or on purpose."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad import makers
from calling import call
from conftest import tiny
from PIL import Image

import slurm.worker
from sdae.config import dump, run_id
from sdae.data.coco import parsed
from sdae.data.datasets import UnreadableError, read
from sdae.data.packing import prepare, verify
from sdae.data.scenes import read_labels
from sdae.errors import UserError
from sdae.files import forget_dead, read_json
from sdae.store import Store, migrate
from sdae.training.checkpoints import load_state, save_state
from sdae.weights import read_any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.good(tmp_path_factory.mktemp("made"))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made / "store", tmp_path / "store")
    return Store(tmp_path / "store")


def run_in(store: Store, stage: str = "pretrain") -> Path:
    (path,) = store.root.glob(f"{stage}-*")
    return path


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# States


def test_states_that_are_not_whole_do_not_push_out_those_that_are(tmp_path: Path) -> None:
    """Two attempts were killed before their states had a checksum; the third went on from the last whole one."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (50, 100, 150, 200):
        save_state(folder, step, {"w": torch.full((2,), float(step))}, {})
    for step in (50, 100):
        save_state(folder, step, {"w": torch.full((2,), float(step))}, {})
        for killed in (150, 200):
            shutil.copy(folder / f"state-{step:08d}.safetensors", folder / f"state-{killed:08d}.safetensors")
    save_state(folder, 130, {"w": torch.full((2,), 130.0)}, {})
    found = load_state(folder)
    assert found is not None
    assert found[1]["step"] == 130
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors") == [
        "state-00000100.safetensors", "state-00000130.safetensors",
    ]  # fmt: skip
    (folder / "state-00000130.sha256.json").write_text("[1]")
    found = load_state(folder)
    assert found is not None
    assert found[1]["step"] == 100


# Names that are not UTF-8


def test_a_run_folder_whose_name_no_terminal_takes(store: Store) -> None:
    odd = os.fsencode(store.root) + b"/x-\xff"
    os.mkdir(odd)
    shutil.copy(run_in(store) / "config.yaml", odd + b"/config.yaml")
    listed, checked = (call("results", *words, "--store", store.root) for words in (["list"], ["check"]))
    assert (listed.code, listed.err, len(listed.out.splitlines())) == (0, "", 3)
    assert (checked.code, checked.err) == (1, "")
    assert "x-\\udcff: no run's folder: its name has characters that cannot be shown" in checked.out


def test_packing_names_a_class_that_is_not_utf8_and_takes_such_pictures(made: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(made / "pictures", source)
    (source / "train" / "ant" / os.fsdecode(b"caf\xe9.png")).write_text("no picture")
    shutil.copy(source / "train" / "ant" / "0.png", source / "train" / "ant" / os.fsdecode(b"th\xe9.png"))
    report = prepare(source, out, "shards", 32, on_error="skip")
    assert report["skipped"] == ["train/ant/caf\\xe9.png"]
    assert verify(out)["damaged"] == []
    assert prepare(source, out, "shards", 32, on_error="skip")["skipped"] == report["skipped"]
    for split in ("train", "val"):
        (source / split / "ant").rename(source / split / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match=r"a class folder with a name that is not UTF-8: caf\\xe9 \(rename it\)"):
        prepare(source, tmp_path / "again", "shards", 32)
    assert not (tmp_path / "again").exists()


# Writing elsewhere


@pytest.mark.parametrize("what", ["folder", "log.txt"])
def test_a_worker_writes_no_log_through_a_link(what: str, tmp_path: Path) -> None:
    config, outside = tiny("pretrain"), tmp_path / "outside"
    folder = tmp_path / "store" / run_id(config)
    folder.parent.mkdir()
    if what == "folder":
        outside.mkdir()
        folder.symlink_to(outside)
    else:
        outside.write_text("mine\n")
        folder.mkdir()
        (folder / what).symlink_to(outside)
    store = Store(tmp_path / "store")
    told = slurm.worker.run(None, store.run(folder.name), store, dump(config), None)
    assert told["outcome"] == "refused"
    assert "a link; what a run writes must lie in the store itself" in told["message"]
    assert list(outside.iterdir()) == [] if what == "folder" else outside.read_text() == "mine\n"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_migration_changes_no_mode_through_a_link(what: str, store: Store, tmp_path: Path) -> None:
    run, secret = run_in(store), tmp_path / "outside" / "key.safetensors"
    secret.parent.mkdir()
    secret.write_text("mine")
    secret.chmod(0o600)
    (run / "config.yaml").chmod(0o666)
    if what == "file":
        (run / "checkpoints" / "a.safetensors").symlink_to(secret)
    else:
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").symlink_to(secret.parent)
    (store.root / "FORMAT").unlink()
    migrate(store)
    assert (store.root / "FORMAT").exists()
    assert secret.stat().st_mode & 0o777 == 0o600


def test_only_the_suite_s_own_temporary_files_go(tmp_path: Path) -> None:
    own = [".index.parquet.0123abcd.tmp", ".claim.0123456789abcdef0123456789abcdef.tmp"]
    others = [".mytool.tmp", ".x-cache.tmp", "mine.0123abcd.tmp"]
    for name in (*own, *others):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    forget_dead(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_packing_that_goes_on_leaves_what_others_put_there(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(made / "pictures", tmp_path / "whole", "shards", 32)
    with pytest.raises(RuntimeError, match="stopped"):
        prepare(made / "pictures", out, "shards", 32, progress=_stop)
    (out / "README").write_text("mine")
    (out / "train-00000-0123456789abcdef.shard").write_text("half")
    prepare(made / "pictures", out, "shards", 32)
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found.pop("README") == b"mine"
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def _stop(done: int, total: int) -> None:
    raise RuntimeError("stopped")


# Checks and lists


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.yaml", "seed: 0\nx: " + 50_000 * "[", "config.yaml: not a run's whole config"),
        ("config.yaml", "seed: 0\na: !!bool 3\n", "config.yaml: not a run's whole config"),
        ("config.yaml", "seed: " + 5000 * "9" + "\n", "config.yaml: not a run's whole config"),
        ("metrics.jsonl", 100_000 * "[" + "\n", "metrics.jsonl: line 1 is not whole JSON"),
        ("result.json", 600 * '{"a":' + "1" + 600 * "}", "result.json: not a whole JSON document"),
    ],
)
def test_a_check_names_what_others_choke_on(file: str, content: str, told: str, store: Store) -> None:
    (run_in(store) / file).write_text(content)
    checked = call("results", "check", "--deep", "--store", store.root)
    assert (checked.code, checked.err) == (1, "")
    assert told in checked.out
    assert call("results", "show", "pretrain-", "--store", store.root).code in (0, 2)


def test_results_of_other_shapes_are_shown_and_compared(store: Store) -> None:
    run = run_in(store)
    result = json.loads((run / "result.json").read_text())
    (run / "config.yaml").unlink()
    for change in (
        {"weights": ["a"]}, {"config": [1]}, {"metrics": {"loss": 10**401}}, {"metrics": {"loss": 1.5, "top1": 1e999}},
        {"id": "\x1b[2Jx\nfake: line"}, {"metrics": {"\x1b[2J": 1.0}},
    ):  # fmt: skip
        (run / "result.json").write_text(json.dumps(result | change))
        for words in (["check", "--deep"], ["show", run.name], ["compare", "pretrain-", "finetune-"], ["list"]):
            called = call("results", *words, "--store", store.root)
            assert called.code in (0, 1), (words, change, called)
            assert "\x1b" not in called.out + called.err
            assert "\nfake: line" not in called.out


def test_what_a_run_failed_of_moves_no_cursor(tmp_path: Path) -> None:
    from ablations.planner import plan

    (run, *_) = plan(["table5"], "smoke").runs.values()
    folder = tmp_path / "store" / run.id
    folder.mkdir(parents=True)
    evil = "\x1b]0;owned\x07\x1b[2J"
    (folder / "config.yaml").write_text(f"# {run.id}\n")
    (folder / "failure.json").write_text(json.dumps({"class": evil, "message": f"a\n{evil}", "attempt": None}))
    (folder / "log.txt").write_text(f"one\n{evil}\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state-old.sha256.json").write_text("{}")
    (folder / "heartbeat.json").write_text('{"time": null}')
    called = call("sweep", "status", "table5", "--store", tmp_path / "store")
    assert (called.code, called.err) == (0, "")
    assert r"failed: \x1b]0;owned\x07\x1b[2J: a \x1b]0;owned" in called.out
    assert "\x1b" not in called.out
    assert "\x1b" not in call("sweep", "logs", run.id, "--store", tmp_path / "store").out
    Store(tmp_path / "store").run(run.id).fail("Lost", "again")
    assert (read_json(folder / "failure.json") or {})["attempt"] == 1


# Pipes and devices


def within_seconds(work: Callable[[], Any]) -> None:
    """A file that nobody writes to would hold the reader for ever."""
    began = time.monotonic()
    work()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "metrics.jsonl", "heartbeat.json", "failure.json"])
def test_pipes_in_a_store_hold_nobody(name: str, store: Store) -> None:
    run = run_in(store)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for words in (["list"], ["check", "--deep"], ["show", run.name]):
        within_seconds(lambda words=words: call("results", *words, "--store", store.root))  # type: ignore[misc]
    with pytest.raises(UserError, match="a pipe or a device; what a run writes must be a file"):
        store.run(run.name).refuse_links()


def test_what_goes_while_a_run_looks_at_its_folder_is_no_link(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others prune, or rename their temporary files, meanwhile; and NFS may know a folder and not its names."""
    run = store.run(run_in(store).name)
    listed = os.listdir(run.path)
    monkeypatch.setattr(os, "listdir", lambda path: [*listed, ".result.json.renamed.tmp"])
    run.refuse_links()

    def refused(path: Any) -> list[str]:
        raise error

    monkeypatch.setattr(os, "listdir", refused)
    error = FileNotFoundError(2, "No such file or directory")
    run.refuse_links()
    error = PermissionError(13, "Permission denied")  # type: ignore[assignment]
    with pytest.raises(UserError, match="cannot be looked into: Permission denied"):
        run.refuse_links()


def test_pipes_and_devices_in_place_of_pictures_and_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "x.pth")
    os.mkfifo(tmp_path / "x.safetensors")
    for name in ("x.png", "y.png"):
        for reader in (read, lambda path: read_labels(path, 3)):
            with pytest.raises(UnreadableError, match="Not a plain file"):
                within_seconds(lambda reader=reader, name=name: reader(str(tmp_path / name)))  # type: ignore[misc]
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(UserError, match="Not a plain file"):
            within_seconds(lambda name=name: read_any(tmp_path / name))  # type: ignore[misc]


# Pictures and checkpoints


@pytest.mark.parametrize("labels", [False, True])
def test_no_picture_starts_a_program(labels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow calls Ghostscript for what begins as PostScript, whatever the file's name."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    with pytest.raises(UnreadableError, match="not a picture"):
        read_labels(str(tmp_path / "x.jpg"), 3) if labels else read(str(tmp_path / "x.jpg"))
    assert not (tmp_path / "ran").exists()


def test_label_maps_in_colour_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40)).save(tmp_path / "x.png")
    with pytest.raises(UnreadableError, match="this one is RGBA"):
        read_labels(str(tmp_path / "x.png"), 3)


def test_one_long_name_takes_no_memory_for_all(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 9, "width": 9} for n in range(20)]
    images[3]["file_name"] = 100_000 * "x"
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    with pytest.raises(UserError, match=r"image 3: a file_name of 100,000 bytes \(allowed: 1,024\)"):
        parsed(str(file), (0, 0), False)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many small lies in the directory of an archive: each entry is said to be the one large part of the file."""
    torch.save({"w": torch.zeros(50_000)}, tmp_path / "good.pth")
    assert set(read_any(tmp_path / "good.pth")) == {"w"}
    file = tmp_path / "x.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", bytes(100_000))
        (one,) = archive.infolist()
        for number in range(1, 40):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            twin.header_offset, twin.CRC = one.header_offset, one.CRC
            twin.file_size = twin.compress_size = one.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    with pytest.raises(UserError, match=r"entries of 4,000,000 bytes in 1\d\d,\d\d\d"):
        read_any(file)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "complex64", "meta", "itself"])
def test_checkpoints_of_other_kinds_are_named(kind: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    if kind == "itself":
        content["model"] = content
    elif kind == "meta":
        content["w"] = torch.empty(3, device="meta")
    else:
        content["w"] = torch.zeros(3, dtype=torch.float32).to(getattr(torch, kind))
    torch.save(content, tmp_path / "x.pth")
    called = call("weights", "import", tmp_path / "x.pth", "--out", tmp_path / "y.safetensors")
    assert called.code == 2
    assert called.err.startswith(f"error: {tmp_path}/x.pth: ")
    assert len(called.err.splitlines()) == 1
