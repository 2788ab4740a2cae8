"""A short soak, and that its report tells of leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak import ENOUGH, Soak

HERE = Path(__file__).parent
SEED = os.environ.get("SDAE_SEED", "0")  # the same faults each time; `make trust` draws others


@pytest.mark.slow
def test_two_turns(tmp_path: Path) -> None:
    print("SDAE_SEED", SEED)
    words = [str(HERE / "soak.py"), "--minutes", "0", "--seed", SEED, "--out", str(tmp_path / "soak.json")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["failures"] == []
    assert report["turns"] == 2
    assert report["faults"]["worker killed"] >= 1
    assert 0.98 < report["store_of_predicted"] < 1.02


def planted(tmp_path: Path, **growth: float) -> list[str]:
    """What the report says of turns in which these grow by so much in each."""
    soak = Soak(tmp_path, 0)
    run = soak.store.run("pretrain-0123456789abcdef").path
    run.mkdir(parents=True)
    (run / "result.json").write_bytes(b"x" * 1000)
    steady = {"rss_mib": 500.0, "descriptors": 9, "threads": 3, "children": 0, "predicted_bytes": 1000}
    sizes = {"index_bytes": 4000, "other_bytes": 2, "runs": 1, "seconds": 1.0}
    for turn in range(2 * ENOUGH):
        values = {key: value + growth.get(key, 0) * turn for key, value in steady.items()}
        soak.turns.append({"turn": turn, **values, **sizes})
    failures: list[str] = soak.report(0, 1.0)["failures"]
    return failures


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ({}, []),
        ({"rss_mib": 0.2}, ["memory grows by 2.00 MiB in 10 turns (at most 1.0)"]),
        ({"descriptors": 1}, ["descriptors: 48 at the end, 20 at most while it warmed up"]),
        ({"threads": 1}, ["threads: 42 at the end, 14 at most while it warmed up"]),
        ({"predicted_bytes": 1}, ["the store differs by -3.8% from what was predicted"]),
    ],
)
def test_leaks_are_told(growth: dict[str, float], said: list[str], tmp_path: Path) -> None:
    assert planted(tmp_path, **growth) == said
