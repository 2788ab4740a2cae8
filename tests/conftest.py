"""Shared by all tests: small configs that run in a second or two, and one thread per process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from sdae.config import Config, parse
from sdae.data.fingerprint import resolve
from sdae.yamls import merge

pytest_plugins = ("slurm_cluster",)

if settings.get_current_profile_name() == "default":  # else CI's, or that of the mutation campaign
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")

SHARED = Path(__file__).resolve().parents[2] / "shared"
PLAIN: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it
DECODER = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
TINY: dict[str, Any] = {
    "precision": "fp32",
    "efficiency": {"compile": False, "workers": 0, "threads": 1, "log_every": 3, "checkpoint_minutes": 0},
    "data": {"name": "builtin", "image_size": 32, "train_pictures": 64, "val_pictures": 50},
    "model": {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "drop_path": 0.2},
    "optim": {"epochs": 3, "batch_size": 8, "warmup_epochs": 1},
}


def tiny(stage: str = "pretrain", **changes: Any) -> Config:
    """A complete config that runs in about a second on one CPU thread."""
    values = merge(TINY, {"stage": stage})
    if stage in ("pretrain", "cost"):
        values = merge(values, {"model": DECODER})
    if stage == "cost":
        values = {k: v for k, v in values.items() if k not in ("optim", "data")} | {"data": {"image_size": 32}}
        values["cost"] = {"batch_size": 8, "repeats": 3, "steps": 1}
    config = parse(merge(values, changes))
    return config if stage == "cost" else config.model_copy(update={"data": resolve(config.data)})


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


@pytest.fixture
def real(shared: Path) -> Callable[[str], Path]:
    """Unpacks an archive of ../shared/data, once for all tests and workers, and gives its folder."""

    def unpacked(name: str) -> Path:
        archive = shared / "data" / f"{name}.tar"
        if not archive.exists():
            pytest.skip(f"{archive} is absent")
        home = Path(tempfile.gettempdir()) / f"sdae-test-data-{os.getuid()}"
        if not (home / name).is_dir():
            home.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home) as half, tarfile.open(archive) as tar:
                tar.extractall(half, **PLAIN)
                with contextlib.suppress(OSError):  # another worker was first
                    (Path(half) / name).rename(home / name)
        return home / name

    return unpacked
