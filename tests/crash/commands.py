"""The commands that are disturbed, each with the smallest input that takes it through all it does; and what of the
files that they leave must be equal, disturbed or not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from PIL import Image

from crash.cluster import ARTIFACT, handed_over
from crash.disk import Tree, read_tree

HOUR = 3600  # a reservation whose submitter died is believed for some minutes
EFFICIENCY = {
    "compile": False, "workers": 0, "threads": 1, "log_every": 4, "checkpoint_minutes": 0, "device": "cpu",
}  # fmt: skip
BASE = {"precision": "fp32", "efficiency": EFFICIENCY}
MODEL = {"width": 12, "depth": 1, "heads": 2, "patch_size": 8, "drop_path": 0.2}
DECODER = {"decoder_depth": 1, "decoder_dim": 8, "decoder_heads": 2}
DATA = {"name": "builtin", "image_size": 16, "train_pictures": 44, "val_pictures": 8}
OPTIM = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1}  # 22 steps: states are saved at 10 and 20
OWN = """
title: One of my own
columns: {top1: {run: linprobe, metric: top1}}
runs: {linprobe: {recipe: linprobe, init: {run: pretrain, weights: student}}}
rows: {sdae: {runs: {pretrain: {recipe: sdae, method: {mask_ratio: 0.6}}}}, mae: {runs: {pretrain: {recipe: mae}}}}
"""
RANDOM = {"init": {"weights": "random"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "pretrain": {**BASE, "model": MODEL | DECODER, "data": DATA, "optim": OPTIM},
    "finetune": {**BASE, **RANDOM, "model": MODEL, "data": DATA, "optim": OPTIM},
    "linprobe": {**BASE, **RANDOM, "model": MODEL, "data": DATA, "optim": OPTIM},
    "cost": {
        **BASE, "model": MODEL | DECODER, "data": {"image_size": 16},
        "cost": {"batch_size": 4, "repeats": 2, "steps": 1},
    },
    "segment": {
        **BASE, **RANDOM, "model": MODEL | {"depth": 4}, "head": {"channels": 4, "aux_channels": 4},
        "data": {"name": "builtin", "image_size": 32, "train_pictures": 8, "val_pictures": 3},
        "optim": {"steps": 12, "batch_size": 2, "warmup_steps": 2, "lr": 1e-3},
    },
    "detect": {
        **BASE, **RANDOM, "model": MODEL | {"depth": 4, "width": 16},
        "head": {"channels": 8, "hidden": 16, "rpn_sampled": 16, "sampled": 16, "proposals": 20},
        "data": {
            "name": "builtin", "image_size": 64, "longest": 96, "classes": 4, "train_pictures": 8, "val_pictures": 3,
            "augment": {"sides": [48, 64], "crop": [24, 40], "crop_sides": [40, 56]},
        },
        "optim": {"steps": 12, "batch_size": 2, "warmup_steps": 2, "milestones": [10]},
    },
}  # fmt: skip
STAGES = tuple(CONFIGS)

# What may differ. Whole files: logs, and what says when, where and by which process something was done.
DIFFERS = {"provenance.json", "heartbeat.json", "log.txt"}
HISTORY = {"failure.previous.json"}  # of an attempt that failed: may be there or not
TIMING = re.compile(  # numbers of a row or a result that are measured on the machine
    r"images_per_s|mfu|data_wait|peak_memory|memory|time|overhead|peak_tflops|(time|images_per_s|overhead)_repeats"
)
CLOCK = ("time", "provenance")  # keys of result.json


@dataclass(frozen=True)
class Command:
    """words: after sdae-cli, in the folder that `make` has filled. torch: its process has it imported.

    cache: files that it may silently not write where the disk does not let it. weight: how often it is chosen.
    """

    name: str
    words: tuple[str, ...]
    make: Callable[[Path], None]
    torch: bool
    cache: tuple[str, ...] = ()
    weight: int = 1
    later: int = 0  # seconds after which it is given again
    look: Callable[[Path, Path], dict[str, Any]] | None = None  # what is left (root, queue), in place of `comparable`
    several: bool = False  # it starts processes: struck at a millisecond, all of them, and not at an operation


def commands() -> dict[str, Command]:
    every = [_stage(stage) for stage in STAGES]
    store = ("--store", "runs")
    every += [
        Command("collect", ("results", "collect", *store), _results, False, cache=("runs/index.parquet",), weight=2),
        Command("export", ("results", "export", "--out", "out/new/runs.csv", *store), _results, False,
                cache=("runs/index.parquet",), weight=2),
        Command("report", ("paper", "report", "table5", "--out", "paper", *store), _results, False,
                cache=("runs/index.parquet",), weight=2),
        Command("weights", ("weights", "export", "pretrain-", "--out", "student.safetensors", *store), _pretrained,
                True, weight=2),
    ]  # fmt: skip
    submit = ("sweep", "submit", ARTIFACT, "--on", "slurm", "--profile", "profile.yaml", *store)
    every.append(Command("submit", submit, _profile, False, later=HOUR, look=handed_over, weight=3))
    every += [
        Command("prune", ("results", "prune", "--yes", *store), _grown, False, cache=("runs/index.parquet",), weight=2),
        Command("repair", ("results", "check", "--repair", *store), _damaged, False, weight=2, look=_without_index),
        Command("sweep", ("sweep", "submit", "own.yaml", "--on", "local", "--jobs", "2", *store), _own, False,
                several=True),
    ]  # fmt: skip
    for form in ("shards", "raw"):
        pack = ("data", "prepare", "pictures", "--out", "packed/here", "--form", form, "--side", "32", "--workers")
        every.append(Command(f"prepare-{form}", (*pack, "1"), _pictures, True, weight=2))
    every.append(Command("prepare-workers", (*pack, "2"), _pictures, False, several=True))
    return {command.name: command for command in every}


def _stage(stage: str) -> Command:
    def make(root: Path) -> None:
        (root / "run.yaml").write_text(yaml.safe_dump({"stage": stage, **CONFIGS[stage]}))

    return Command(stage, ("run", "run.yaml", "--store", "runs"), make, torch=True)


def _results(root: Path) -> None:
    """A store of eight runs in every state, with results that are taken for real ones."""
    from synthetic import fill

    from ablations.planner import plan
    from sdae.store import Store

    sweep, store = plan(["table5"], "smoke"), Store(root / "runs")
    fill(store, sweep, synthetic=False)
    failed, torn = sorted(sweep.runs)[-2:]
    store.run(failed).path.joinpath("result.json").unlink()
    store.run(failed).create(sweep.runs[failed].config)
    store.run(failed).write("failure.json", {"class": "Lost", "message": "gone", "attempt": 1, "time": 1.7e9})
    store.run(torn).path.joinpath("result.json").write_text("{")


def _grown(root: Path) -> None:
    """A store that has more runs and more weights than any artifact needs."""
    from synthetic import fill

    from ablations.planner import plan
    from sdae.store import Store

    (root / "own.yaml").write_text(OWN)
    head = b'{"nothing":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    sweep, store = plan(["table5", root / "own.yaml"], "smoke"), Store(root / "runs")
    fill(store, sweep, synthetic=False)
    for identity in sweep.runs:
        store.run(identity).checkpoints.mkdir()
        for name in ("student-epoch-00001", "student-epoch-00002", "state-00000010", "model"):
            file = store.run(identity).checkpoints / f"{name}.safetensors"
            file.write_bytes(len(head).to_bytes(8, "little") + head)


def _damaged(root: Path) -> None:
    """A store with what `--repair` mends; its temporary files are those of a process that is no more."""
    from sdae.files import temporary_of
    from sdae.store import Store

    _results(root)
    store = Store(root / "runs")
    identity = next(i for i in store.ids() if store.run(i).done)
    for name in ("", f"{identity}/", f"{identity}/checkpoints/"):
        (store.root / name).mkdir(exist_ok=True)
        mine = temporary_of(store.root / name / "file")
        mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")).write_text("half")
    (store.root / "index.parquet").write_text("torn")
    (store.run(identity).path / "provenance.json").write_text("{")
    gone = store.root / ".pruned" / "finetune-x.1" / "log.txt"
    gone.parent.mkdir(parents=True)
    gone.touch()


def _own(root: Path) -> None:
    (root / "own.yaml").write_text(OWN)


def _pretrained(root: Path) -> None:
    """A pre-training, made by the harness: its template is what the command `pretrain` leaves."""
    raise NotImplementedError


def _profile(root: Path) -> None:
    (root / "profile.yaml").write_text("partition: main\ntime: '10'\n")


def _pictures(root: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                size, noise = (40 + i, 36), Image.frombytes("L", (40 + i, 36), draw.randbytes((40 + i) * 36))
                assert noise.size == size
                noise.convert("RGB").save(root / "pictures" / split / name / f"{i}.jpg")


def left(command: Command, root: Path, queue: Path) -> dict[str, Any]:
    return command.look(root, queue) if command.look else comparable(root)


def _without_index(root: Path, _: Path) -> dict[str, Any]:
    """All but the index, which a repair removes where it is torn, and makes anew if the disk lets it."""
    return {path: facts for path, facts in comparable(root).items() if path != "runs/index.parquet"}


def comparable(root: Path) -> dict[str, Any]:
    """By path: what of a file must be the same however often its command was disturbed."""
    tree, found = read_tree(root), {}
    for path in filter(_counts, sorted(tree)):
        try:
            found[path] = _facts(path, tree)
        except (ValueError, KeyError, OSError):  # torn, as one of the template of results is
            found[path] = tree[path]
    return found


def _counts(path: str) -> bool:
    return Path(path).name not in HISTORY and not (path.startswith("cache") and ".tmp" not in path)


def _facts(path: str, tree: Tree) -> Any:
    name, content = Path(path).name, tree[path]
    if not isinstance(content, bytes):
        return content
    if name in DIFFERS:
        return "there"
    if name == "result.json" and "config" in (result := json.loads(content)) and "skipped" in result:
        folder = str(Path(path).parent / "checkpoints")
        for file, digest in result["weights"].items():
            saved = tree.get(f"{folder}/{file}")
            if not isinstance(saved, bytes) or hashlib.sha256(saved).hexdigest() != digest:
                return f"{file} is not the file that result.json tells of"
        result = {key: value for key, value in result.items() if key not in CLOCK}
        return result | {"metrics": _untimed(result["metrics"])}
    if name == "metrics.jsonl":
        return [_untimed(json.loads(line)) for line in content.decode().splitlines()]
    if name == "index.parquet":  # its stamps are of the files' times and inodes
        return pq.read_table(io.BytesIO(content), use_threads=False).drop_columns(["stamp"]).to_pylist()
    return hashlib.sha256(content).hexdigest()


def _untimed(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: None if TIMING.fullmatch(key) else value for key, value in numbers.items()}


def whole(root: Path, template: Path) -> list[str]:
    """Files that hold half of something, and did not before."""
    wrong, before = [], read_tree(template)
    for path, content in read_tree(root).items():
        if not isinstance(content, bytes) or ".tmp/" in f"{path}/" or path.startswith("cache"):
            continue
        if content == before.get(path):
            continue
        try:
            if path.endswith(".json"):
                json.loads(content)
            elif path.endswith(".yaml"):
                assert yaml.safe_load(content)
            elif path.endswith(".safetensors"):
                size = int.from_bytes(content[:8], "little")
                ends = [v["data_offsets"][1] for k, v in json.loads(content[8 : 8 + size]).items() if k[0] != "_"]
                assert len(content) == 8 + size + max(ends)
            elif path.endswith(".npy"):
                assert content[:6] == b"\x93NUMPY"
            elif path.endswith(".parquet"):
                pq.read_table(io.BytesIO(content), use_threads=False)
        except Exception as error:
            wrong.append(f"{path} is half written: {type(error).__name__} {error}")
    return wrong


def copy(template: Path, root: Path) -> None:
    """Names of the same files: what is read only costs nothing, and times and inodes are the same each time."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root, copy_function=_link, symlinks=True)


def _link(source: str, target: str) -> None:
    os.link(source, target)
