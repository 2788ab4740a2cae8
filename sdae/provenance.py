"""Where a number comes from: code, command, versions, hardware, job."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pydantic", "safetensors")
DIFF_LIMIT = 200_000
SNAPSHOT = "snapshot.json"  # beside a copy of the code: what `code()` said of the original


@lru_cache(maxsize=1)
def code() -> dict[str, Any]:
    """Commit and uncommitted changes of the checkout that this code runs from; nulls outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(FileNotFoundError):
        return json.loads((root / SNAPSHOT).read_text())  # type: ignore[no-any-return]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    rooms = ["sdae", "ablations", "slurm", "analysis", "cli"]
    diff = git("diff", "HEAD", "--", *rooms) if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "diff": diff[:DIFF_LIMIT] if diff else None,
    }


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    import torch

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "packages": packages, "platform": platform.platform(),
        "cpu": _cpu(), "cores": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda if gpus else None,
    }  # fmt: skip


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def record() -> dict[str, Any]:
    """All of it, for `provenance.json`."""
    slurm = {k: v for k, v in os.environ.items() if k in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")}
    return {**code(), "command": sys.argv, **environment(), "host": platform.node(), "slurm": slurm}
