"""Eight processes that submit, run, collect, cancel, retry and heal on one store at once, in rounds.

`python tests/concurrency_campaign.py --rounds 1000 --seed S --out FILE` goes on where it was cut off. Only the training
pretends (`concurrency.pretend`); claims, workers, the local runner, submitter, tasks, reconciler and index are the
suite's own, each in a process of its own. In half of the rounds processes are on machines of their own, and see the
store as over NFS (`concurrency.stale`). A seed gives the same plans and faults, not the same order of what processes
do.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from concurrency import stale
from concurrency.processes import Clock, prepare
from concurrency.rounds import ACTORS, Round

from ablations.planner import Sweep, plan
from sdae import provenance
from sdae.files import write_atomically

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def sweeps() -> Sweep:
    """Pre-trainings with their fine-tunings and probes, and some costs."""
    return plan(["table1", "table2", "table5"], "smoke")


def part(whole: Sweep, draw: random.Random) -> Sweep:
    """Some runs of a sweep with their needs."""
    heads = [run for run in whole.runs.values() if run.config.stage == "pretrain"]
    chosen = {run.id for run in draw.sample(heads, draw.randint(1, 2))}
    more = [run for run in whole.runs.values() if run.needs and set(run.needs) <= chosen]
    chosen |= {run.id for run in draw.sample(more, min(len(more), draw.randint(1, 3)))}
    costs = [run for run in whole.runs.values() if run.config.stage == "cost"]
    chosen |= {run.id for run in draw.sample(costs, draw.choice((0, 0, 1)))}
    runs = {i: run for i, run in whole.runs.items() if i in chosen}
    return dataclasses.replace(whole, runs=runs, requested=len(runs))


def play(seed: str, whole: Sweep, keep: bool = False) -> tuple[Counter[str], str]:
    """One round: what happened in it, and what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="sdae-concurrency-", dir=MEMORY))
    Clock.ahead = 0.0
    Clock.jumps.clear()
    this = Round(seed, folder, part(whole, random.Random(f"part {seed}")))
    try:
        return this.play(), ""
    except AssertionError as error:
        return this.counts, str(error)
    finally:
        stale.use(None)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(folder, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", help="else that of FILE, or any")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins later")
    parser.add_argument("--round", help="only this one, and keep its folder")
    options = parser.parse_args()
    prepare()
    whole = sweeps()
    gc.collect()
    gc.freeze()
    if options.round is not None:
        counts, wrong = play(f"{options.seed or 0} {options.round}", whole, keep=True)
        print(dict(counts), wrong, sep="\n")
        return int(bool(wrong))
    if options.out and options.out.exists() and options.seed not in (None, json.loads(options.out.read_text())["seed"]):
        parser.error(f"--seed {options.seed}: {options.out} goes on with its own; name another file")
    return campaign(options, whole)


def campaign(options: argparse.Namespace, whole: Sweep) -> int:
    seed = options.seed or str(random.randrange(2**32))
    report: dict[str, Any] = {"seed": seed, "rounds": 0, "seconds": 0.0, "counts": {}, "failures": []}
    if options.out and options.out.exists():
        report = json.loads(options.out.read_text())
    end, known = time.monotonic() + options.seconds, report["rounds"]
    while report["rounds"] < options.rounds and (began := time.monotonic()) < end:
        number = report["rounds"]
        counts, wrong = play(f"{report['seed']} {number}", whole)
        report["rounds"] += 1
        report["seconds"] = round(report["seconds"] + time.monotonic() - began, 3)
        report["counts"] = dict(sorted((Counter(report["counts"]) + counts).items()))
        if wrong:
            report["failures"].append({"round": number, "what": wrong})
            print(f"round {number} of seed {report['seed']}: {wrong}", file=sys.stderr)
        if options.out:
            write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    if options.out and report["rounds"] > known:
        write_atomically(options.out, json.dumps(report | provenance.origin(), indent=1) + "\n")
    seconds = report["seconds"] / max(1, report["rounds"])
    print(
        f"seed {report['seed']}: "
        f"{report['rounds']} rounds of {ACTORS} processes, {seconds:.2f} s each; {report['counts'].get('finished', 0)} "
        f"runs finished, {report['counts'].get('killed', 0)} processes killed; {len(report['failures'])} rounds wrong"
    )
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
