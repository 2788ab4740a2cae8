"""A run that is stopped at any instant and called again ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from test_data import make_folder

from sdae.config import Config, dump, run_id
from sdae.errors import Interrupted
from sdae.run import execute
from sdae.store import Store
from sdae.training import telemetry
from sdae.training.checkpoints import load_weights, states

SCIENCE = ("step", "epoch", "loss", "lr", "momentum", "target_std", "target_rank", "teacher_distance", "top1", "top5")


def science(store: Store, config: Config) -> tuple[dict[str, bytes], list[dict[str, float]], dict[str, float]]:
    """Weights as bytes, rows and result: what must not depend on how often the run was stopped."""
    folder = store.run(run_id(config))
    result = folder.result()
    assert result is not None
    weights = {
        f"{name}:{key}": tensor.numpy().tobytes()
        for name, digest in result["weights"].items()
        for key, tensor in load_weights(folder.checkpoints / name, digest)[0].items()
    }
    rows = [{k: row[k] for k in SCIENCE if k in row} for row in folder.metrics()]
    scores = {k: v for k, v in result["metrics"].items() if k != "images_per_s"}
    return weights, rows, scores


def start(config: Config, store: Path, tmp_path: Path, **options: Any) -> subprocess.Popen[bytes]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dump(config)))
    code = (
        "import sys; from sdae.config import load; from sdae.run import execute; from sdae.store import Store\n"
        "from sdae.errors import Interrupted\n"
        "try: execute(load(sys.argv[1]), Store(sys.argv[2]))\n"
        "except Interrupted: sys.exit(75)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(file), str(store)], stderr=subprocess.PIPE, **options)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_kill_at_random_moments(stage: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    changes = {"optim": {"epochs": 12}, "efficiency": {"log_every": 5}}
    config = tiny(stage, **changes)
    undisturbed, killed = Store(tmp_path / "a"), Store(tmp_path / "b")
    began = time.monotonic()
    execute(config, undisturbed)
    duration = time.monotonic() - began
    kills = 0
    while not killed.run(run_id(config)).done:
        process = start(config, killed.root, tmp_path)
        if kills < 5:
            folder = killed.run(run_id(config))
            while not folder.claimed() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, duration / 2) if kills else 0)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills > 0
    assert science(undisturbed, config) == science(killed, config)


def test_sigterm_saves_and_asks_to_be_resumed(tmp_path: Path) -> None:
    config = tiny("pretrain", optim={"epochs": 400}, efficiency={"checkpoint_minutes": 60})
    process = start(config, tmp_path / "store", tmp_path)
    folder = Store(tmp_path / "store").run(run_id(config))
    while len(folder.metrics()) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 75
    assert folder.state() == "started"
    assert states(folder.checkpoints)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_all_processes_of_a_job_step(number: signal.Signals, tmp_path: Path) -> None:
    """As Slurm sends it: the processes that read pictures get it as well, and must not die of it."""
    make_folder(tmp_path / "pictures", {"ant": (24, 5), "bee": (24, 4)}, size=(90, 70))
    data = {"name": "imagefolder", "path": str(tmp_path / "pictures"), "train_pictures": None, "val_pictures": None}
    config = tiny("pretrain", data=data, optim={"epochs": 400}, efficiency={"workers": 2, "checkpoint_minutes": 60})
    process = start(config, tmp_path / "store", tmp_path, start_new_session=True)
    folder = Store(tmp_path / "store").run(run_id(config))
    while len(folder.metrics()) < 3 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors.decode()
    assert folder.failure() is None
    assert states(folder.checkpoints)


def test_torn_state_is_passed_over(tmp_path: Path) -> None:
    config = tiny("pretrain")
    whole, torn = Store(tmp_path / "a"), Store(tmp_path / "b")
    execute(config, whole)
    folder = torn.run(run_id(config))

    def cut_off(status: dict[str, object]) -> None:
        if len(states(folder.checkpoints)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry.Pulse, "tell", lambda self, **status: cut_off(status))
        with pytest.raises(Interrupted):
            execute(config, torn)
    newest = states(folder.checkpoints)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    execute(config, torn)
    assert science(whole, config) == science(torn, config)


def test_metrics_hold_each_step_once(tmp_path: Path) -> None:
    config = tiny("pretrain")
    execute(config, Store(tmp_path))
    steps = [json.loads(line)["step"] for line in Store(tmp_path).run(run_id(config)).metrics_file.open()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24
