"""How long it takes to hand many runs to a real Slurm, to see how they stand, and to take them back.

    . DIR/env.sh                                  # of examples/slurm-on-one-machine, or on a login node
    python benchmarks/slurm_submit.py             # 1,000 runs: 500 pre-trainings, a fine-tuning after each

The jobs would begin in an hour, and are cancelled at the end. Prints JSON: seconds and sbatch calls, and the processes
that are still there after `sweep submit` (there must be none). Exit code 1 where something is above its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MARK = "SDAE_BENCHMARK"
LIMITS = {"submit_s": 10.0, "status_s": 2.0}
ARTIFACT: dict[str, Any] = {
    "title": "Many runs",
    "columns": {"top1": {"run": "finetune", "metric": "top1"}},
    "runs": {"finetune": {"recipe": "finetune", "init": {"run": "pretrain", "weights": "student"}}},
    "rows": {
        "r-{ratio}": {
            "grid": {"ratio": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9]},
            "runs": {"pretrain": {"recipe": "sdae", "method": {"mask_ratio": "{ratio}"}}},
        }
    },
}
COUNTED = """#!/bin/sh
echo x >> {calls}
exec {program} "$@"
"""


class Bench:
    def __init__(self, folder: Path, profile: dict[str, Any]):
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.calls = folder / "calls"
        self.calls.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name in ("sbatch", "squeue", "sacct", "scontrol", "sacctmgr", "scancel"):
            if program := shutil.which(name):
                file = programs / name
                file.write_text(COUNTED.format(calls=self.calls / name, program=program))
                file.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), MARK: self.mark}
        (folder / "many.yaml").write_text(yaml.safe_dump(ARTIFACT))
        (folder / "profile.yaml").write_text(yaml.safe_dump(profile))

    def cli(self, *words: str) -> tuple[float, str]:
        """Seconds and stdout of an sdae-cli."""
        for file in self.calls.iterdir():
            file.unlink()
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words], cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"sdae-cli {' '.join(words)}: exit code {done.returncode}: {done.stderr}")
        return time.perf_counter() - began, done.stdout

    def counts(self) -> dict[str, int]:
        """How often the last command called each of Slurm's programs."""
        return {file.name: len(file.read_text().split()) for file in sorted(self.calls.iterdir())}

    def left(self) -> list[str]:
        """Command lines of processes that descend from ours, other than the jobs themselves."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = process.joinpath("environ").read_bytes()
                if f"{MARK}={self.mark}".encode() in environment and b"SLURM_JOB_ID=" not in environment:
                    found.append(process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="a multiple of 20")
    parser.add_argument("--partition", help="where to; default: Slurm's")
    parser.add_argument("--repeats", type=int, default=3, help="how often to look at the queue")
    options = parser.parse_args()
    if options.runs < 20 or options.runs % 20:
        parser.error("--runs: a multiple of 20")
    profile = {"partition": options.partition, "time": "1:00:00", "sbatch": {"begin": "now+1hour"}}
    with tempfile.TemporaryDirectory(prefix="sdae-submit-") as name:
        bench = Bench(Path(name), profile)
        seeds = ",".join(str(seed) for seed in range(options.runs // 20))
        words = f"sweep submit many.yaml --seeds {seeds} --on slurm --profile profile.yaml --json".split()
        try:
            plan_s, _ = bench.cli("sweep", "plan", "many.yaml", "--seeds", seeds, "--json")
            submit_s, text = bench.cli(*words)
            report, submit_calls = json.loads(text), bench.counts()
            left = bench.left()
            looks, status_calls = [], {}
            before = sum(os.times()[2:4])
            for _ in range(options.repeats):
                looks.append(bench.cli("sweep", "status", "--json")[0])
                status_calls = bench.counts()
            cpu_s = (sum(os.times()[2:4]) - before) / options.repeats
            again_s, again = bench.cli(*words)
        except BaseException:
            with contextlib.suppress(SystemExit):
                bench.cli("sweep", "cancel", "--yes", "--json")
            raise
        cancel_s, cancelled = bench.cli("sweep", "cancel", "--yes", "--json")
        found: dict[str, Any] = {
            "runs": len(report["submitted"]),
            "arrays": [array["array"] for array in report["arrays"]],
            "plan_s": round(plan_s, 2),
            "submit_s": round(submit_s, 2),
            "submit_calls": submit_calls,
            "processes_left": left,
            "status_s": round(statistics.median(looks), 2),
            "status_cpu_s": round(cpu_s, 2),
            "status_calls": status_calls,
            "submit_again_s": round(again_s, 2),
            "submitted_again": len(json.loads(again)["submitted"]),
            "cancel_s": round(cancel_s, 2),
            "cancelled": len(json.loads(cancelled)["cancelled"]),
            "slurm": subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip(),
        }
    print(json.dumps(found, indent=1))
    slow = [key for key, limit in LIMITS.items() if found[key] > limit]
    whole = found["runs"] == found["cancelled"] == options.runs and not found["submitted_again"]
    sys.exit(bool(slow or left or not whole))


if __name__ == "__main__":
    main()
