"""How planning, reading, status, tables and the command line's start grow with the number of runs.

    python benchmarks/orchestration.py                    # 133, 1,064 and 10,108 made-up runs at scale paper
    python benchmarks/orchestration.py --seeds 1,8 --json orchestration.json

For each size, the least of several repeats in processes of their own: seconds to plan, to read the store anew and again
unchanged, to tell the status, to make every table, figure, claim and page, to explain a cell, and the peak memory.
`growth` is the time of the largest size over that of the one before, per run: 1 is linear, less is better; fixed costs
push it down.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from collect_10k import in_its_own_process, timed

from sdae.provenance import origin
from sdae.store import Store

STARTS = {"python": "pass", "typer and rich": "import typer, rich.console, rich.table, rich.progress"}
STARTS["sdae-cli --help"] = "import sys; sys.argv = ['sdae-cli', '--help']; from cli.main import main; main()"
TOLD = ("plan_s", "collect_cold_s", "collect_unchanged_s", "status_s", "everything_s", "explain_s", "peak_gib")


def of_size(seeds: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds and GiB for a store of that many seeds: the least, and the repeats. `status_s` is `sweep list`'s."""
    from ablations.scale import load_scale
    from slurm.status import overview

    found = in_its_own_process("fill", seeds, folder)
    store = Store(folder)
    for _ in range(repeats):
        timed(found, "status_s", lambda: overview(load_scale("paper"), list(range(seeds)), store))
        for name, times in in_its_own_process("measure", seeds, folder).items():
            found.setdefault(name, []).extend(times)
    return {name: min(times) for name, times in found.items()} | {f"{name}_repeats": t for name, t in found.items()}


def start_times(repeats: int) -> dict[str, list[float]]:
    """Seconds until a process has started and ended, in turns."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(repeats):
        for name, code in STARTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            times[name].append(time.perf_counter() - began)
    return times


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """Time per run of the largest size over that of the size before."""
    if len(rows) < 2:
        return {}
    small, large = rows[-2:]
    per_run = large["runs"] / small["runs"]
    return {name: round(large[name] / small[name] / per_run, 3) for name in TOLD if small.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 76])
    parser.add_argument("--repeats", type=int, default=3, help="of what is measured; three times as many starts")
    parser.add_argument("--json", type=Path, help="also write everything, with hardware and versions, to this file")
    options = parser.parse_args()
    rows = []
    for seeds in sorted(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(of_size(seeds, Path(folder) / "runs", options.repeats))
        row = rows[-1]
        print(f"{row['runs']:>6.0f} runs: " + ", ".join(f"{name} {row[name]:.3f}" for name in TOLD))
    grown, times = growth(rows), start_times(3 * options.repeats)
    starts = {name: statistics.median(found) for name, found in times.items()}
    print("growth: " + ", ".join(f"{name} {value:g}" for name, value in grown.items()))
    print("start: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in starts.items()))
    if options.json:
        found = {"benchmark": "orchestration", "rows": rows, "growth": grown, "start_s": starts}
        options.json.write_text(json.dumps({**found, "start_s_repeats": times, **origin()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
