"""Two processes under torchrun (gloo) give the numbers of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from test_trainer import MIXING

from sdae.config import Config, dump, run_id
from sdae.errors import Interrupted
from sdae.run import execute
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import load_weights
from sdae.training.distributed import _first_host
from sdae.training.loop import Stop

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(config: Config, store: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`sdae-cli run` in so many processes."""
    store.mkdir(exist_ok=True)
    file = store.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dump(config)))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-addr", "127.0.0.1", "--master-port"]
    for _ in range(5):
        more = [free_port(), "-m", "cli.main", "run", file, "--store", store]
        done = subprocess.run(
            [sys.executable, *map(str, words + more)], capture_output=True, text=True, timeout=600, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if "EADDRINUSE" not in done.stderr:  # else another took the port while torch was imported
            break
    return done


def numbers(folder: RunFolder) -> tuple[list[int], list[float], list[float]]:
    rows = folder.metrics()
    return [row["step"] for row in rows], [row["loss"] for row in rows], [row["lr"] for row in rows]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"probe": {"knn_every": 3, "pictures": 45}}),
        ("finetune", {"data": {"val_pictures": 51, "augment": MIXING}, "efficiency": {"micro_batch": 3}}),
        ("linprobe", {"data": {"val_pictures": 51}, "optim": {"base_lr": 0.1}}),
    ],
)
def test_two_processes_give_the_numbers_of_one(stage: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(stage, **changes)
    one = execute(config, Store(tmp_path / "one"))
    done = torchrun(config, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(one["id"]) == 1  # rank 0 alone speaks
    alone, together = (Store(tmp_path / name).run(run_id(config)) for name in ("one", "two"))
    result = together.result()
    assert result is not None
    assert result["world_size"] == 2
    (steps, losses, rates), (wanted_steps, wanted_losses, wanted_rates) = numbers(together), numbers(alone)
    assert steps == wanted_steps
    assert rates == wanted_rates
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    for score in ("top1", "top5", "knn_top1"):
        assert result["metrics"].get(score) == one["metrics"].get(score)
    assert set(result["weights"]) == set(one["weights"])
    ours, theirs = (load_weights(f.checkpoints / "model.safetensors")[0] for f in (together, alone))
    for name, wanted in theirs.items():
        if "qkv.bias" not in name:  # its key third has no gradient: Adam turns rounding into steps
            gap = (ours[name].double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
            assert float(gap) < 1e-5, name


def test_two_processes_go_on_where_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("pretrain", efficiency={"log_every": 5})
    execute(config, Store(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, world, step: step == 12)  # in the middle of a row
        with pytest.raises(Interrupted):
            execute(config, Store(tmp_path / "stopped"))
    done = torchrun(config, tmp_path / "stopped")
    assert done.returncode == 0, done.stderr
    whole, stopped = (numbers(Store(tmp_path / name).run(run_id(config))) for name in ("whole", "stopped"))
    assert stopped[0] == whole[0]
    assert stopped[1] == pytest.approx(whole[1], rel=1e-6)


def test_a_picture_that_another_rank_cannot_read_is_told(tmp_path: Path) -> None:
    from test_bad_input import pictures

    broken = pictures(tmp_path / "pictures") / "train" / "bee" / "2.png"
    broken.write_bytes(b"no picture")
    data = {"name": "imagefolder", "path": str(tmp_path / "pictures"), "train_pictures": None, "val_pictures": None}
    config = tiny("pretrain", data=data, optim={"epochs": 2})
    done = torchrun(config, tmp_path / "store")
    assert done.returncode != 0
    assert f"{broken}: broken picture" in done.stderr
    failure = Store(tmp_path / "store").run(run_id(config)).failure()
    assert failure is not None
    assert str(broken) in failure["message"]


def test_batches_that_ranks_cannot_share(tmp_path: Path) -> None:
    done = torchrun(tiny("pretrain", optim={"batch_size": 9}), tmp_path / "store")
    assert done.returncode != 0
    assert "optim.batch_size: 9 pictures cannot be shared equally by 2 processes" in done.stderr
    assert Store(tmp_path / "store").ids() == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[3-7,9],cpu1", "gpu3"), ("a,b[1-2]", "a"), ("x[07,9]", "x07")],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first
