"""Good things to be damaged, and what cannot be said as text: each maker writes into the case's folder.

A maker is called with that folder and the words behind its name.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 40  # of the good pictures
GOLDEN = Path(__file__).parents[1] / "golden" / "mae-64tokens-normpix.safetensors"


# Good things


def good(root: Path) -> Path:
    """A store with a pre-training and a fine-tuning, and pictures for each kind of data set."""
    from conftest import tiny

    from sdae.data.packing import prepare
    from sdae.run import execute
    from sdae.store import Store

    once = {"epochs": 1, "warmup_epochs": 0}
    store = Store(root / "store")
    need = execute(tiny("pretrain", optim=once), store)["id"]
    execute(tiny("finetune", optim=once, init={"run": need}), store)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(4):
                _noise(i).save(root / "pictures" / split / name / f"{i}.png")
    prepare(root / "pictures", root / "packed", "shards", 32)
    shutil.rmtree(root / "packed" / "unfinished", ignore_errors=True)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / "scenes" / kind / split).mkdir(parents=True)
        for i in range(2):
            _noise(i).save(root / "scenes" / "images" / split / f"{i}.jpg")
            label_map(root, f"scenes/annotations/{split}/{i}.png")
    (root / "scenes" / "classes.txt").write_text("1\tsky\n2\tsea\n")
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "coco" / f"{split}2017").mkdir()
        for i in range(2):
            _noise(i).save(root / "coco" / f"{split}2017" / f"{i}.png")
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(_coco()))
    return root


def _noise(seed: int, size: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def _coco() -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(2)]
    annotations = [
        {
            "id": i, "image_id": i, "category_id": 1 + i, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0,
            "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]],
        }
        for i in range(2)
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2)]}


def _found(folder: Path, pattern: str) -> Path:
    """The one file of this name, which may have stars in it; a new one where there is none."""
    above, _, name = pattern.rpartition("/")
    parent = next(iter(sorted(folder.glob(above))), folder / above) if above else folder
    return next(iter(sorted(folder.glob(pattern))), parent / name)


# Files and folders


def a_file(folder: Path) -> None:
    (folder / "a-file").write_text("")


def folder(folder: Path, name: str) -> None:
    parent, _, last = name.rpartition("/")
    (_found(folder, parent) if parent else folder).joinpath(last).mkdir()


def dangling(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere.png")


def class_folders(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / "in" / split / "ant").mkdir(parents=True)
        _noise(0).save(folder / "in" / split / "ant" / "0.png")


def class_folders_and_other(folder: Path) -> None:
    class_folders(folder)
    (folder / "other").mkdir()
    (folder / "other" / "mine.txt").write_text("")


def digits(folder: Path, name: str) -> None:
    (folder / name).write_text(5000 * "1")


# YAML


def laughs(folder: Path) -> None:
    """Nine lists of nine times the one before: 400 million words in a few lines."""
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 9)]
    lines += ["seed: *a8"]
    (folder / "bad.yaml").write_text("\n".join(lines) + "\n")


def large(folder: Path) -> None:
    (folder / "bad.yaml").write_text("".join(f"key{i}: {i}\n" for i in range(400_000)))


def endless(folder: Path) -> None:
    (folder / "bad.yaml").write_text(f'time: "{5000 * "9"}"\n')


def grid(folder: Path) -> None:
    """A grid of 20^8 rows."""
    numbers = ", ".join(map(str, range(20)))
    keys = ", ".join(f"k{i}: [{numbers}]" for i in range(8))
    name = "-".join(f"{{k{i}}}" for i in range(8))
    (folder / "own.yaml").write_text(
        "title: x\ncolumns: {top1: {run: pretrain, metric: loss}}\n"
        f'rows:\n  "{name}":\n    grid: {{{keys}}}\n    runs: {{pretrain: {{recipe: sdae}}}}\n'
    )


def deep_yaml(folder: Path, name: str) -> None:
    _found(folder, name).write_text(3000 * "[")


def newer_config(folder: Path) -> None:
    file = _found(folder, "store/pretrain-*/config.yaml")
    file.write_text(file.read_text() + "schedule: {warm: 3}\n")


# JSON


def deep_json(folder: Path, name: str) -> None:
    _found(folder, name).write_text(200_000 * "[")


def sign(folder: Path) -> None:
    """The manifest's digest is right again."""
    from sdae.data.fingerprint import manifest_digest

    file = folder / "packed" / "manifest.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"digest": manifest_digest(values)}))


def surrogate_name(folder: Path) -> None:
    file = folder / "coco" / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"0.png"', r'"\ud800.png"'))


def huge_box(folder: Path) -> None:
    file = folder / "coco" / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace("[5, 5, 20, 20]", f"[5, 5, 20, {400 * '9'}]"))


# Pictures and label maps


def png(folder: Path, name: str) -> None:
    _noise(0).save(folder / name, "PNG")


def jpeg(folder: Path, name: str) -> None:
    _noise(0).save(folder / name, "JPEG")


def label_map(folder: Path, name: str, size: str = str(SIDE), highest: str = "2") -> None:
    labels = np.random.default_rng(0).integers(0, int(highest) + 1, (int(size), int(size)), np.uint8)
    labels[0, 0] = int(highest)
    Image.fromarray(labels).save(folder / name, "PNG")


def png_of(folder: Path, name: str, width: str, height: str) -> None:
    """A head that promises so many pixels, and almost none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", int(width), int(height), 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    (folder / name).write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def huge_png(folder: Path, name: str) -> None:
    png_of(folder, name, "40000", "30000")


def huge_jpeg(folder: Path, name: str) -> None:
    buffer = io.BytesIO()
    _noise(0).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    (folder / name).write_bytes(content)


def huge_gif(folder: Path, name: str) -> None:
    buffer = io.BytesIO()
    _noise(0).convert("P").save(buffer, "GIF")
    content = bytearray(buffer.getvalue())
    content[6:10] = struct.pack("<HH", 60_000, 60_000)
    (folder / name).write_bytes(content)


def huge_bmp(folder: Path, name: str) -> None:
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 1 << 30, 0, 0, 54, 40, 40_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / name).write_bytes(head + bytes(1000))


def huge_tiff(folder: Path, name: str) -> None:
    entries = {256: 40_000, 257: 30_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 1000}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    (folder / name).write_bytes(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + rows + bytes(1000))


def huge_ppm(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"P6 40000 30000 255\n" + bytes(1000))


def classes_of_digits(folder: Path, name: str) -> None:
    (folder / name).write_text(f"1\tsky\n{5000 * '2'}\tsea\n")


def many_classes(folder: Path, name: str) -> None:
    (folder / name).write_text("".join(f"{i}\tclass {i}\n" for i in range(1, 300)))


# Packed folders


def _index(folder: Path) -> tuple[Path, Any]:
    file = folder / "packed" / "train.npy"
    return file, np.load(file)


def _saved(folder: Path, index: Any) -> None:
    """The index of the training pictures, and the manifest says its size."""
    file = folder / "packed" / "train.npy"
    np.save(file, index, allow_pickle=True)
    manifest = folder / "packed" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["files"]["train.npy"]["bytes"] = file.stat().st_size
    manifest.write_text(json.dumps(values))
    sign(folder)


def pickled_index(folder: Path) -> None:
    _saved(folder, np.array([Evil(), Evil()], dtype=object))


def alien_index(folder: Path) -> None:
    _saved(folder, np.zeros(8))


def index_beyond(folder: Path) -> None:
    _, index = _index(folder)
    index["offset"] += 1 << 40
    _saved(folder, index)


def index_of_huge_pictures(folder: Path) -> None:
    _, index = _index(folder)
    index["part"] = 7
    _saved(folder, index)


def flipped_bit(folder: Path) -> None:
    file = _found(folder, "packed/train-*.shard")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


# Checkpoints


class Evil:
    """Unpickled, it makes the file `ran`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def evil(folder: Path, name: str) -> None:
    import torch

    torch.save({"model": {"norm.weight": torch.zeros(3)}, "epoch": Evil()}, folder / name)


def evil_old(folder: Path, name: str) -> None:
    import torch

    torch.save({"model": Evil()}, folder / name, _use_new_zipfile_serialization=False)


def evil_class(folder: Path, name: str) -> None:
    """A plain pickle whose class is looked up by name: what is found must not be called."""
    (folder / name).write_bytes(b'cbuiltins\nexec\n(S\'open("ran", "w")\'\ntR.')


def _encoder() -> dict[str, Any]:
    from sdae.models.encoder import Encoder
    from sdae.sections import Model

    return dict(Encoder(Model(width=24, depth=2, heads=2, patch_size=8), 32).state_dict())


def released(folder: Path, without: str = "-", extra: str = "-", kind: str = "tensor") -> None:
    """MAE's layout: without one key, or with one more."""
    import torch

    tensors = _encoder()
    tensors.pop(without, None)
    if extra == "line-break":
        extra = "blocks.0.a\nb\x1b[2J"
    if extra != "-":
        tensors[extra] = {"tensor": torch.zeros(3), "number": 3, "wide": torch.zeros(99)}[kind]
    torch.save({"model": tensors}, folder / "bad.pth")


def saved(folder: Path, name: str, what: str) -> None:
    import torch

    torch.save({"list": [torch.zeros(3)], "tensor": torch.zeros(3), "nothing": {}}[what], folder / name)


def encoder(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in _encoder().items()}, folder / "bad.safetensors")


def header(folder: Path, size: str) -> None:
    """A head that says it is so long; the file has blanks for up to 100 MB of it."""
    with open(folder / "bad.safetensors", "wb") as file:
        file.write(struct.pack("<Q", int(size)) + b"{")
        file.truncate(min(int(size), 100_000_000) + 8)


def tensors(folder: Path, how: str) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    other = one | {"data_offsets": [8, 16]}
    odd = {
        "overlap": {"data_offsets": [4, 12]}, "beyond": {"data_offsets": [8, 1 << 50]},
        "falling": {"data_offsets": [16, 8]}, "huge": {"shape": [1 << 60, 1 << 60]}, "negative": {"shape": [-2]},
        "type": {"dtype": "PICKLE"}, "fine": {},
    }  # fmt: skip
    values = {} if how == "none" else {"a": one, "b": other | odd[how]}
    text = json.dumps(values).encode()
    (folder / "bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(0 if how == "none" else 16))


def alien_weights(folder: Path, how: str = "network") -> None:
    """The classifier's file holds something else; the result knows its checksum."""
    import torch

    from sdae.training.checkpoints import load_weights, save_weights

    run = _found(folder, "store/finetune-*")
    file = run / "checkpoints" / "model.safetensors"
    found, metadata = load_weights(file)
    if how == "classes":
        metadata = {}
    else:
        found = {"head.weight": torch.zeros(3)}
    result = json.loads((run / "result.json").read_text())
    result["weights"]["model.safetensors"] = save_weights(file, found, metadata)
    (run / "result.json").write_text(json.dumps(result))


def golden(folder: Path, change: str = "") -> None:
    """-key: without this key of the config; --name: without these tensors; key=value: another value."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(GOLDEN, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config: Any = json.loads(file.metadata()["config"])
    if change.startswith("--"):
        found.pop(change[2:])
    elif change.startswith("-"):
        del config[change[1:]]
    elif "=" in change:
        key, _, value = change.partition("=")
        config[key] = value if value.isalpha() else int(value)
    text = {"list": "[1]", "deep": 200_000 * "["}.get(change, json.dumps(config))
    save_file(found, folder / "bad.safetensors", metadata={"config": text})


# Stores


def _wanted(folder: Path) -> Path:
    """The folder of the run that bad.yaml asks for."""
    from sdae.config import load, run_id
    from sdae.run import with_content

    return folder / "store" / run_id(with_content(load(folder / "bad.yaml", ["seed=1"])))


def linked_run(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    _wanted(folder).symlink_to(folder / "elsewhere")
    _reseed(folder)


def run_a_file(folder: Path) -> None:
    _wanted(folder).write_text("")
    _reseed(folder)


def run_of_another(folder: Path) -> None:
    _wanted(folder).mkdir()
    (_wanted(folder) / "config.yaml").write_text("stage: cost\n")
    _reseed(folder)


def alien_claim(folder: Path) -> None:
    _wanted(folder).mkdir()
    (_wanted(folder) / "claim.json").write_text('["mine"]')
    _reseed(folder)


def _reseed(folder: Path) -> None:
    file = folder / "bad.yaml"
    file.write_text(file.read_text() + "seed: 1\n")


def slurm(folder: Path, how: str) -> None:
    """What a sweep on Slurm has left, with one thing wrong in it."""
    home = folder / "store" / ".slurm"
    token = {"escape": "../../../secret"}.get(how, "0123456789ab")
    for name in ("runs", "code", f"jobs/{token if how != 'escape' else 'x'}"):
        (home / name).mkdir(parents=True)
    identity = "pretrain-0123456789abcdef"
    (home / "runs" / (f"{identity}.one" if how == "link" else f"{identity}.1")).symlink_to(token)
    job = home / "jobs" / token if how != "escape" else folder / "secret"
    job.mkdir(exist_ok=True)
    record = {
        "token": token, "runs": {"0": identity}, "time": 1.7e9, "minutes": 60, "warn_seconds": 60, "processes": 1,
        "code": "x", "target": "sdae.run:execute", "scale": "smoke", "job": "1", "user": "nobody", "host": "h",
        "pid": 1, "started": None,
    }  # fmt: skip
    text = json.dumps(record)
    orders: Any = {identity: {"config": {"stage": "pretrain"}, "needs": [], "feeds": []}}
    if how == "torn":
        text = text[:50]
    elif how == "alien":
        text = '{"runs": [1]}'
    elif how == "newer":
        text = json.dumps(record | {"priority": 3})
    elif how == "orders":
        orders = {identity: [1]}
    (job / "submission.json").write_text(text)
    (job / "runs.json").write_text(json.dumps(orders))
