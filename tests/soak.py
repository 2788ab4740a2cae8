"""A soak: one process that for hours sweeps, collects, makes tables and reports; workers are killed, files torn.

`python tests/soak.py --minutes 120 --out FILE [--seed S]`. SIGTERM and Ctrl-C end it after the turn at hand, with its
report. A turn is a small sweep with a seed of its own: its stages are run in this process, so that what leaks is seen
here, and every `WORKERS` turns by the local runner, whose worker is killed on the way. Then the index is brought up to
date, and at times torn before, a table is made, and every `REPORTS` turns the report. After each turn one writes down
how much memory, how many descriptors and threads the process has and how large the store should be, and at the end how
large it is.

Predicted is the store's size from its runs: the bytes that a run of each kind (`kind_of`) takes, measured at the first
one of each, times how many there are; and of the index, a share of that. provenance.json does not count: its size is
that of the uncommitted changes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sdae.run
from ablations.planner import PlannedRun, Sweep, plan
from analysis.frame import INDEX, collect
from analysis.render import render
from analysis.report import report
from analysis.study import build, study
from analysis.verdicts import judge_study
from sdae import provenance
from sdae.errors import Interrupted
from sdae.files import write_atomically
from sdae.store import Store
from slurm.local import run_local

WORKERS = 8  # turns between two with the local runner
REPORTS = 3  # turns between two reports
LEAST = 2  # turns, however short the time
LAST = 3  # seeds that tables and reports are made of: else a turn would take longer and longer
ENOUGH = 20  # turns after the warm ones that a growth of memory can be told from
WARM = 0.3  # share of the turns before caches are full
GROWTH = 1.0  # MiB that memory may grow in ten turns
SIZE = 0.02  # by which the store's size may differ from the predicted
INDEX_BYTES = 1200  # of the index, for a run
ARTIFACT = """\
title: Soak
columns:
  top1: {label: Top-1, unit: "%", run: finetune, metric: top1}
  probe: {label: Probe, unit: "%", run: linprobe, metric: top1}
runs:
  finetune: {recipe: finetune, optim: {epochs: 50}, init: {run: pretrain, weights: student}}
  linprobe: {recipe: linprobe, optim: {epochs: 50}, init: {run: pretrain, weights: student}}
rows:
  sdae: {label: SdAE, runs: {pretrain: {recipe: sdae, optim: {epochs: 40}}}}
  mae: {label: MAE, runs: {pretrain: {recipe: mae, optim: {epochs: 40}}}}
"""


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.store = Store(folder / "runs")
        self.artifact = folder / "soak.yaml"
        self.artifact.write_text(ARTIFACT)
        self.turns: list[dict[str, Any]] = []
        self.faults: Counter[str] = Counter()
        self.bytes: dict[str, int] = {}  # of the first run of each kind
        self.runs: Counter[str] = Counter()
        self.wrong: list[str] = []

    # A turn
    def turn(self) -> None:
        number, began = len(self.turns), time.monotonic()
        sweep = plan([self.artifact], "smoke", [number])
        if number % WORKERS == 1:
            self.by_workers(sweep)
        else:
            self.here(sweep)
        self.tear(sweep)
        frame = collect(self.store)
        missing = set(sweep.runs) - set(frame.loc[frame["state"] == "done", "id"])
        if missing:
            self.wrong.append(f"turn {number}: the index does not know {sorted(missing)}")
        seeds = list(range(max(0, number + 1 - LAST), number + 1))
        table = build(self.store, self.artifact, "smoke", seeds)
        for format in ("md", "latex", "html", "csv", "json"):
            render(table, format)
        if number % REPORTS == 0:
            found = study(self.store, [self.artifact, "table5"], "smoke", seeds)
            report(found, judge_study(found), self.folder / "paper")
        self.measure(sweep, time.monotonic() - began)

    def here(self, sweep: Sweep) -> None:
        """Every run in this process; some are told to stop on the way, and go on."""
        for run in sweep.runs.values():
            if self.random.random() < 0.15:
                self.stopped(run)
            sdae.run.execute(run.config, self.store)
            self.check(run)

    def stopped(self, run: PlannedRun) -> None:
        at = time.monotonic() + self.random.uniform(0.05, 0.5)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
        ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # outside the training loop
        signal.setitimer(signal.ITIMER_REAL, max(0.01, at - time.monotonic()))
        try:
            sdae.run.execute(run.config, self.store)
        except Interrupted:
            self.faults["stopped in its loop"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.signal(signal.SIGUSR2, ignored)

    def by_workers(self, sweep: Sweep) -> None:
        """By the local runner. Its worker is killed once; then the command is given again."""
        over = threading.Event()

        def strike() -> None:  # not in `on_update`: a run may begin and end between two of the runner's looks
            while not over.wait(0.01):
                for identity in sweep.runs:
                    claim = self.store.run(identity).claimed()
                    with contextlib.suppress(ProcessLookupError):
                        if claim:
                            os.kill(claim["pid"], signal.SIGKILL)
                            self.faults["worker killed"] += 1
                            return

        striker = threading.Thread(target=strike)
        striker.start()
        try:
            for retry in (False, True, True):
                summary = run_local(sweep, self.store, jobs=1, retry=retry)
                if summary.ok:
                    break
            else:
                self.wrong.append(f"turn {len(self.turns)}: {summary.messages}")
        finally:
            over.set()
            striker.join()
        for run in sweep.runs.values():
            self.check(run)

    def tear(self, sweep: Sweep) -> None:
        """What a broken disk or a careless hand does to files that are derived, or read by nobody any more."""
        index = self.store.root / INDEX
        if index.exists() and self.random.random() < 0.2:
            data = index.read_bytes()
            index.write_bytes(data[: self.random.randrange(len(data))])
            self.faults["index torn"] += 1
        if self.random.random() < 0.2:
            run = self.store.run(self.random.choice(list(sweep.runs)))
            whole = (run.path / "heartbeat.json").read_bytes()
            (run.path / "heartbeat.json").write_bytes(os.urandom(len(whole)))
            if run.state() != "done" or run.claimed():
                self.wrong.append(f"turn {len(self.turns)}: {run.id} is {run.state()} with a torn heartbeat")
            self.faults["heartbeat torn"] += 1

    def check(self, run: PlannedRun) -> None:
        """Counts a run that is done, and how large it is."""
        folder = self.store.run(run.id)
        if not folder.done:
            self.wrong.append(f"turn {len(self.turns)}: {run.id} is {folder.state()}")
        kind = kind_of(run)
        self.runs[kind] += 1
        self.bytes.setdefault(kind, size_of(folder.path))

    # What it costs
    def measure(self, sweep: Sweep, seconds: float) -> None:
        gc.collect()
        index = self.store.root / INDEX
        self.turns.append(
            {
                "turn": len(self.turns), "seconds": round(seconds, 3), "runs": sum(self.runs.values()),
                "rss_mib": resident(),
                "descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
                "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
                "predicted_bytes": sum(count * self.bytes[kind] for kind, count in self.runs.items()),
                "index_bytes": index.stat().st_size,
                "other_bytes": sum(f.stat().st_size for f in self.store.root.iterdir() if f.is_file() and f != index),
            }
        )  # fmt: skip

    def report(self, seed: int, seconds: float) -> dict[str, Any]:
        """The figures, and under `failures` where they are not as they must be."""
        found, turns = list(self.wrong), self.turns
        warm = turns[int(len(turns) * WARM) :]
        growth = 10 * slope([t["turn"] for t in warm], [t["rss_mib"] for t in warm])
        last = turns[-1] if turns else {}
        size = sum(size_of(self.store.run(i).path) for i in self.store.ids())
        fits = {
            key: 10 * slope([t["turn"] for t in warm], [t[key] for t in warm]) for key in ("descriptors", "threads")
        }
        if growth > GROWTH and len(warm) >= ENOUGH:
            found.append(f"memory grows by {growth:.2f} MiB in 10 turns (at most {GROWTH})")
        for key in ("descriptors", "threads", "children"):
            most = max((t[key] for t in turns[: max(1, len(turns) - len(warm))]), default=0)
            if warm and min(t[key] for t in warm[-3:]) > most:
                found.append(f"{key}: {warm[-1][key]} at the end, {most} at most while it warmed up")
        ratio = size / last["predicted_bytes"] - 1 if turns else 0.0
        if abs(ratio) > SIZE:
            found.append(f"the store differs by {ratio:+.1%} from what was predicted")
        if turns and last["index_bytes"] > INDEX_BYTES * last["runs"] + 50_000:
            found.append(f"the index has {last['index_bytes']} bytes for {last['runs']} runs")
        if turns and last["other_bytes"] > 100_000:
            found.append(f"{last['other_bytes']} bytes beside the runs and the index")
        return {
            "seed": seed, "seconds": round(seconds, 1), "turns": len(turns), "runs": dict(self.runs),
            "faults": dict(self.faults), "bytes_of_a_run": self.bytes, "memory_mib_per_10_turns": round(growth, 4),
            "memory_mib": [t["rss_mib"] for t in (turns[:1] + warm[:1] + turns[-1:])],
            "per_10_turns": {key: round(value, 4) for key, value in fits.items()},
            "store_bytes": size, "store_of_predicted": round(1 + ratio, 5), "failures": found,
            "of_each_turn": turns, **provenance.origin(),
        }  # fmt: skip


def kind_of(run: PlannedRun) -> str:
    """Runs of one kind have files of the same names and shapes."""
    method = getattr(run.config, "method", None)
    return f"{run.config.stage} {method.name}" if method else str(run.config.stage)


def size_of(folder: Path) -> int:
    """Bytes of a run's files, without the one that tells of the code."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "provenance.json")


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 3)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    return statistics.linear_regression(xs, ys).slope if len(xs) > 2 else 0.0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    over: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: over.append(number))
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="sdae-soak-"))
    try:
        soak = Soak(folder, options.seed)
        while not over and (time.monotonic() - began < 60 * options.minutes or len(soak.turns) < LEAST):
            try:
                soak.turn()
            except Interrupted:  # by our own signal, which the training loop has heard as well
                break
        document = soak.report(options.seed, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    fits = document["per_10_turns"]
    print(
        f"seed {options.seed}: "
        f"{document['turns']} turns in {document['seconds'] / 60:.1f} minutes, {sum(document['runs'].values())} runs, "
        f"{sum(document['faults'].values())} faults; in 10 turns {document['memory_mib_per_10_turns']:+.3f} MiB and "
        f"{fits['descriptors']:+.2f} descriptors; the store is {document['store_of_predicted']:.2%} of what was "
        f"predicted; wrong: {document['failures'] or 'nothing'}"
    )
    return int(bool(document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
