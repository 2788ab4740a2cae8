"""How many branches of the guarded rooms the tests take: `python tests/coverage_campaign.py --out FILE [pytest words]`.

The fast tests under coverage.py, or those that pytest's words leave, each room in FILE. Exit code 1 where a test fails
or a room has less than 90 % of its branches; what processes of their own do is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sdae/store.py", "ablations", "slurm", "analysis")
LEAST = 0.9


def rooms(files: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Lines and branches of each room, there and taken, of the files of coverage's own json."""
    found = {}
    for room in ROOMS:
        sums = Counter[str]()
        for name, file in files.items():
            if name == room or name.startswith(f"{room}/"):
                sums.update({key: value for key, value in file["summary"].items() if isinstance(value, int)})
        found[room] = {
            "branches": sums["num_branches"], "taken": sums["covered_branches"],
            "lines": sums["num_statements"], "run": sums["covered_lines"],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    options, words = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    from sdae.provenance import origin

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sdae-coverage-") as scratch:
        told = Path(scratch) / "coverage.json"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", str(options.jobs), "-m", "not slow", "--cov",
             f"--cov-report=json:{told}", *words],
            cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(Path(scratch) / "data"), "OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip
        if not told.exists():
            sys.exit(f"pytest ended with {code}, without a report")
        found = rooms(json.loads(told.read_text())["files"])
    seconds = round(time.monotonic() - began, 1)
    document = {"campaign": "coverage", "tests": code, "words": words, "seconds": seconds, "rooms": found, **origin()}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    for room, of in found.items():
        print(f"{room:14} {of['taken'] / of['branches']:.1%} of {of['branches']:,} branches")
    sys.exit(1 if code or any(of["taken"] < LEAST * of["branches"] for of in found.values()) else 0)


if __name__ == "__main__":
    main()
