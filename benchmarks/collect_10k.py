"""How long the store of ten thousand runs takes to be read, and every table and figure to be made from it.

    python benchmarks/collect_10k.py              # 76 seeds of all artifacts at scale paper: 10,108 made-up runs

Prints JSON: seconds of each step (planning and collecting: the least of five), their share of its limit, and the peak
memory of the process that takes them all, in GiB. Exit code 1 where something is above its limit. `--store DIR` keeps
the runs and uses them again; `--profile` prints where the time goes instead.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablations.planner import plan
from sdae.store import NO_PICTURES, Store, SyntheticStore

TRIES = 5  # a machine that others use as well is asked again
LIMITS = {
    "make_s": 60.0,
    "collect_cold_s": 1.0,
    "collect_unchanged_s": 0.1,
    "everything_s": 30.0,
    "explain_s": 0.3,
    "peak_gib": 1.0,
}


Times = dict[str, list[float]]  # of each step, the repeats


def fill(store: SyntheticStore, seeds: int) -> Times:
    """Makes the runs, in a process of its own: what that takes is not what reading them takes."""
    from analysis.universe import make

    took: Times = {}
    for _ in range(TRIES):
        sweep = timed(took, "plan_s", lambda: plan((), "paper", range(seeds), content=NO_PICTURES))
    timed(took, "make_s", lambda: make(store, sweep))
    return took


def timed(took: Times, name: str, step: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = step()
    took.setdefault(name, []).append(time.perf_counter() - began)
    return found


def measure(store: Store, out: Path) -> Times:
    """Seconds of each step. Imports are done before."""
    import analysis.explain
    import analysis.figures
    import analysis.report
    import analysis.study
    import analysis.verdicts
    from analysis.frame import INDEX, collect
    from analysis.render import FORMATS, render

    took: Times = {}
    for _ in range(TRIES):
        (store.root / INDEX).unlink(missing_ok=True)
        runs = len(timed(took, "collect_cold_s", lambda: collect(store)))
        timed(took, "collect_unchanged_s", lambda: collect(store))
    began = time.perf_counter()
    study = timed(took, "study_s", lambda: analysis.study.study(store, (), "paper"))
    timed(took, "tables_s", lambda: [render(t, f) for t in study.tables.values() for f in FORMATS])
    timed(took, "figure_s", lambda: analysis.figures.draw(store, "4", "paper", out))
    verdicts = timed(took, "claims_s", lambda: analysis.verdicts.judge_study(study))
    timed(took, "report_s", lambda: analysis.report.report(study, verdicts, out))
    took["everything_s"] = [min(took["collect_cold_s"]) + time.perf_counter() - began]
    explained: Times = {}
    for cell in ("table2.sdae-300.finetune", "figure4a.epoch-0.96-300.top1", "figure4c.student-100.top1"):
        timed(explained, cell, lambda cell=cell: analysis.explain.explain_cell(store, cell, None, "paper"))  # type: ignore[misc]
    took["explain_s"] = max(explained.values())
    return {"runs": [float(runs)], **took, "peak_gib": [peak_gib()]}


def peak_gib() -> float:
    """Of this process since its program began; ru_maxrss would remember the one that started it."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def in_its_own_process(step: str, seeds: int, store: Path) -> Times:
    words = [sys.executable, __file__, "--step", step, "--store", str(store), "--seeds", str(seeds)]
    here = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": here})
    found: Times = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=76)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--step", choices=["fill", "measure"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.step == "fill":
            return print(json.dumps(fill(SyntheticStore(options.store), options.seeds)))
        if options.step == "measure":
            return print(json.dumps(measure(Store(options.store), Path(folder))))
        store = options.store or Path(folder) / "runs"
        found = {} if Store(store).synthetic else in_its_own_process("fill", options.seeds, store)
        if options.profile:
            with cProfile.Profile() as profile:
                measure(Store(store), Path(folder))
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
            return
        found |= in_its_own_process("measure", options.seeds, store)
    least = {name: min(times) for name, times in found.items()}
    ratios = {name: round(least[name] / limit, 3) for name, limit in LIMITS.items() if name in least}
    print(
        json.dumps({"found": {k: round(v, 3) for k, v in least.items()}, "limits": LIMITS, "ratio": ratios}, indent=1)
    )
    sys.exit(any(ratio > 1 for ratio in ratios.values()))


if __name__ == "__main__":
    main()
