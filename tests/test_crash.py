"""Faults of disk, power and clock under real processes: the model of the disk, what cleans up after the dead, and cases
of the campaign (`crash_campaign.py` has them by the hundred)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny
from crash.commands import commands
from crash.disk import Disk, Style, read_tree
from crash.harness import FAULTS, Yard, compiler
from crash_campaign import main as campaign
from safetensors import safe_open

from sdae.errors import UserError
from sdae.files import checksum, written
from sdae.run import execute
from sdae.store import Store
from sdae.training import checkpoints

needs_layer = pytest.mark.skipif(compiler() is None, reason="the fault layer needs Linux and a C compiler")
SEED = int(os.environ.get("SDAE_SEED", "0"))  # the same cases each time; `make trust` draws others


# The model of the disk


def entry(kind: str, path: Path, other: str = "", content: bytes = b"", offset: int = 0) -> bytes:
    """A line of the layer's log."""
    first, second = os.fsencode(path), os.fsencode(other)
    return f"1 {kind} {len(content)} {offset} {len(first)} {len(second)}\n".encode() + first + second + content


@pytest.mark.parametrize(
    ("flushed", "left"),
    [
        ((), {"strict": b"old", "names": b""}),
        (("file",), {"strict": b"old", "names": b"new"}),
        (("folder",), {"strict": b"", "names": b""}),
        (("file", "folder"), {"strict": b"new", "names": b"new"}),
    ],
)
def test_what_a_power_cut_leaves_of_a_replaced_file(
    flushed: tuple[str, ...], left: dict[Style, bytes], tmp_path: Path
) -> None:
    """Without the file's flush a rename may bring an empty file, without the folder's the old one may come back."""
    for style, content in left.items():
        root = tmp_path / style
        root.mkdir()
        target, half = root / "target", root / "half"
        target.write_bytes(b"old")
        disk = Disk(root)
        half.write_bytes(b"new")
        lines = [entry("open", half), entry("write", half, content=b"new")]
        lines += [entry("fsync", half)] if "file" in flushed else []
        half.replace(target)
        lines += [entry("rename", half, str(target))]
        lines += [entry("fsync", root)] if "folder" in flushed else []
        (tmp_path / "log").write_bytes(b"".join(lines))
        disk.replay(tmp_path / "log")
        assert disk.now() == read_tree(root)
        disk.cut(style, random.Random(0))
        assert target.read_bytes() == content, style


# What is cleaned up


def test_what_the_dead_leave_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    target = tmp_path / "file"
    dead = "import os, sys; from pathlib import Path; from sdae.files import written\n"
    dead += "with written(Path(sys.argv[1])) as file: file.write(b'half'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", dead, str(target)], cwd=Path(__file__).parents[1]).returncode == 9
    foreign = tmp_path / ".file.00000000-1-1.00000000.tmp"  # of another machine: may be alive
    foreign.touch()
    assert len(os.listdir(tmp_path)) == 2
    with written(target) as file:
        file.write(b"whole")
        with written(target) as first:
            first.write(b"first")
        assert target.read_bytes() == b"first"
        assert len(os.listdir(tmp_path)) == 3  # ours is still being written
    assert target.read_bytes() == b"whole"
    os.utime(foreign, (1.0, 1.0))
    with written(target) as file:
        file.write(b"again")
    assert os.listdir(tmp_path) == ["file"]


def write_half(path: Path, error: BaseException) -> None:
    with written(path) as file:
        file.write(b"half")
        raise error


def test_a_write_that_fails_or_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), UserError)):
        with pytest.raises(seen):
            write_half(tmp_path / "file", error)
        assert os.listdir(tmp_path) == []


def test_a_run_killed_after_its_result_is_tidied_by_the_next_call(tmp_path: Path) -> None:
    config, store = (
        tiny("linprobe", optim={"epochs": 1, "warmup_epochs": 0}, init={"weights": "random"}),
        Store(tmp_path),
    )
    folder = store.run(execute(config, store)["id"])
    before = sorted(folder.path.rglob("*"))
    dead = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": "1", "time": 0.0, "token": "dead"}
    (folder.path / "claim.json").write_text(json.dumps(dead))
    (folder.path / "failure.json").write_text("{}")
    (folder.checkpoints / "state-00000010.sha256.json").write_text("{}")
    (folder.checkpoints / "state-00000020.safetensors").touch()
    execute(config, store)
    assert sorted(folder.path.rglob("*")) == before


# Weights as files


def test_weights_are_the_same_bytes_each_time_and_safetensors_reads_them(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {f"t{n}": (torch.randn(3, n + 1) * 9).to(kind) for n, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 5).T}
    facts = {"run": "x", "epoch": 3, "classes": ["ö", "b"], "weights": "student"}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    digest = checkpoints.save_weights(first, tensors, facts)
    shuffled = dict(sorted(tensors.items(), key=lambda item: hash(item[0])))
    assert checkpoints.save_weights(second, shuffled, dict(reversed(facts.items()))) == digest
    assert checksum(first) == checksum(second) == digest
    found, said = checkpoints.load_weights(first, digest)
    assert said == facts
    with safe_open(first, "pt") as file:
        assert set(file.keys()) == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# Cases


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with Yard(tmp_path_factory.mktemp("yard")) as found:
        yield found


@needs_layer
@pytest.mark.parametrize(
    "fault", ["kill", "power", "power-after", "term", "full", "io-once", "read-only", "clock-back"]
)
def test_a_fault_at_some_operation_of_an_export(fault: str, yard: Yard) -> None:
    print("seed", SEED)
    command, draw = commands()["export"], random.Random(f"{SEED} {fault}")
    at = draw.randint(1, yard.prepare(command))
    assert yard.case(command, [(FAULTS[fault], at)], draw) == [], f"{fault} at operation {at}"


@needs_layer
@pytest.mark.parametrize("fault", ["kill", "power", "full"])
def test_a_fault_at_some_operation_of_a_submission(fault: str, yard: Yard) -> None:
    print("seed", SEED)
    command, draw = commands()["submit"], random.Random(f"{SEED} {fault}")
    at = draw.randint(1, yard.prepare(command))
    assert yard.case(command, [(FAULTS[fault], at)], draw) == [], f"{fault} at operation {at}"


@needs_layer
@pytest.mark.slow
def test_fifty_kills_of_the_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--out", tmp_path / "crash.json", "--kills", 50, "--seed", SEED)
    only = ("--only", *(name for name, command in commands().items() if not command.several))
    failed = campaign([str(word) for word in (*words, *only)])
    print(capsys.readouterr())
    assert not failed
    found = json.loads((tmp_path / "crash.json").read_text())
    assert found["kills"] >= 50
    again = campaign([str(word) for word in (*words, *only)])  # done cases are not run again
    assert not again
    assert json.loads((tmp_path / "crash.json").read_text()) == found
