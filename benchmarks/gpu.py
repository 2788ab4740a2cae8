"""GPU evidence in one command, made for a machine that is lent for minutes: run it again and it goes on.

    python benchmarks/gpu.py --out evidence --store runs --minutes 9
    python benchmarks/gpu.py --out evidence --store runs --only arms,step    # some of the parts, in this order
    python benchmarks/gpu.py --out evidence --store runs --dry               # the same path on a CPU, under a minute

In a checkout that is not installed: PYTHONPATH=. python benchmarks/gpu.py ..

    tests   the tests marked `gpu`
    step    the training step: eager, compiled, CUDA graphs; MAE and folds; what its parts take
    cost    Table 1 at the paper's size, as cost runs in the store
    input   pictures per second from files, with all cores, and over what the step takes
    changes what each change that makes the step fast is worth by itself
    arms    Table 5, Figures 4(b) and 4(a) of the scale `small`, then more seeds, several runs at once, in the store

A part has its share of the minutes and ends there; running arms save their state first. --out gets NAME.json of each
part (commit, versions and hardware in it) and in runs.tar the results of the finished runs, no weights. A part that
fails is told in its file and stops no other; what is whole in --out is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablations.planner import Sweep, plan
from ablations.scale import Scale, load_scale
from sdae.errors import UserError
from sdae.files import write_atomically
from sdae.provenance import origin
from sdae.store import Store
from slurm.local import run_local

HERE = Path(__file__).resolve().parent
SHARES = {
    "tests": 0.15,
    "step": 0.3,
    "cost": 0.3,
    "input": 0.14,
    "changes": 0.1,
    "arms": 1.0,
}  # of the minutes; arms: what is left
ONCE = ("tests", "step", "input", "changes")  # the others go on where the store stands
ARMS = ("table5", "figure4b", "figure4a")
SEEDS = 5
LAST_WORDS = 15.0  # seconds that saving a state and writing the results may take


def main() -> None:
    options = arguments()
    began = time.monotonic()
    end = began + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{options.store.resolve()}-compiled")
    signal.signal(signal.SIGTERM, lambda *_: None)  # a deadline that comes a moment late must not end us
    parts: dict[str, Callable[[argparse.Namespace, float], dict[str, Any]]] = {
        "tests": tests, "step": step, "cost": cost, "input": feeding, "changes": changes, "arms": arms,
    }  # fmt: skip
    for name in options.only:
        if name in ONCE and whole(options.out / f"{name}.json", options.dry):
            print(f"{name:6} is in {options.out} already")
            continue
        started = time.monotonic()
        deadline = min(started + 60 * options.minutes * SHARES[name], end) - LAST_WORDS * (not options.dry)
        try:
            found = parts[name](options, deadline) if deadline > started else {"skipped": "no time is left"}
        except (UserError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        found = {"benchmark": f"gpu-{name}", "dry": options.dry, "seconds": time.monotonic() - started, **found}
        write_atomically(options.out / f"{name}.json", json.dumps(found | origin(), indent=1) + "\n")
        keep_results(Store(options.store), options.out / "runs.tar")
        note = found.get("failed") or found.get("skipped") or found.get("summary", "done")
        print(f"{name:6} {found['seconds']:6.1f} s  {note}", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all; everything is in {options.out}")


def whole(path: Path, dry: bool) -> bool:
    """Whether a part has been measured to its end; a dry one stands for no other."""
    found = json.loads(path.read_text()) if path.exists() else {"skipped": ""}
    return not {"failed", "skipped"} & found.keys() and (dry or not found["dry"])


def keep_results(store: Store, archive: Path) -> None:
    """Of each finished run of the store its result.json, and nothing else; in one file, as a lent machine may give back
    few."""
    with tarfile.open(archive, "w") as tar:
        for identity in store.ids():
            if store.run(identity).done:
                tar.add(store.run(identity).path / "result.json", f"{identity}/result.json")


def command(words: list[Any], deadline: float) -> dict[str, Any]:
    """A Python program in this folder's repository: its exit code and the end of what it said, if in time."""
    sites = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may lie there
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sites)},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: its children too
        said, _ = process.communicate()
        code = None
    lines = said.replace(str(HERE.parent) + os.sep, "").strip().splitlines()
    found: dict[str, Any] = {"exit_code": code, "said": lines[-60:]}
    if code is None:
        found["failed"] = "its time was up"
    elif code:
        found["failed"] = lines[-1] if lines else f"exit code {code}"
    else:
        found["summary"] = lines[-1] if lines else ""
    return found


def tests(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    return command(["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"], deadline)


def step(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    sizes = (
        ["--size", "nano", "--views", "mae,folds", "--repeats", 2, "--cpu"] if options.dry
        else ["--size", "vit_base", "--precision", "bf16", "--modes", "graphs,eager", "--batch", 256,
              "--views", "folds,mae", "--repeats", 7]
    )  # fmt: skip
    return with_json([HERE / "pretrain_step.py", *sizes, "--parts"], deadline)


def changes(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    sizes = (
        ["--size", "nano", "--precision", "fp32", "--repeats", 1, "--steps", 20, "--cpu"] if options.dry
        else ["--size", "vit_base", "--precision", "bf16", "--repeats", 5]
    )  # fmt: skip
    return with_json([HERE / "changes.py", *sizes], deadline)


def feeding(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Pictures per second that this machine's cores make of files: to be set beside what a step takes."""
    sizes = (
        ["--count", 8, "--repeats", 1, "--variants", "pil,jpeg"] if options.dry
        else ["--workers", len(os.sched_getaffinity(0)), "--repeats", 5, "--variants", "pil,jpeg,shards,raw"]
    )  # fmt: skip
    found = with_json([HERE / "input.py", *sizes, *(options.input or [])], deadline)
    need = fastest_step(options.out / "step.json")
    if need:  # of SdAE, three folds: what the files must feed
        for row in found["measured"].get("rows", []):
            row["of_the_step"] = round(row.get("total", row["images_per_s"]) / need, 3)
    return found | {"step_images_per_s": need}


def fastest_step(file: Path) -> float | None:
    """Pictures per second of the fastest step of SdAE that was measured here."""
    if not file.exists():
        return None
    rows = json.loads(file.read_text()).get("measured", {}).get("rows", [])
    return max((row["images_per_s"] for row in rows if row["view"] == "folds"), default=None)


def with_json(words: list[Any], deadline: float) -> dict[str, Any]:
    """A benchmark, with what it wrote to its --json until then, also where its time was up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        said = command([*words, "--json", file], deadline)
        measured = json.loads(file.read_text()) if file.exists() else {}
    return {"measured": measured} | said


def cost(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Table 1's rows as runs of the store, the paper's own first; a run that the deadline cuts off is done again."""
    scale, store = scale_of(options, "paper"), Store(options.store)
    sweep = plan(["table1"], scale)
    found = run(plan(["table1"], scale, cells=["table1.folds.time"]), options, deadline)
    if not (options.dry or found["left"]):
        found = run(sweep, options, deadline)
    rows = [
        {"run": identity, "cells": planned.feeds, "device": result["device"], **result["metrics"]}
        for identity, planned in sweep.runs.items()
        if (result := store.run(identity).result()) is not None
    ]
    return found | {"rows": rows}


def arms(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Artifact by artifact with the first seed, then all of them with the next, as far as the time reaches."""
    scale, found = scale_of(options, "small"), {"done": 0, "left": 0}
    further: dict[str, Any] = {"data_path": str(options.data)} if options.data else {}
    if options.dry:
        further["cells"] = ["table5.folds.top1"]
    rounds = [([name], [0]) for name in ARMS] + [(list(ARMS), [seed]) for seed in range(1, SEEDS)]
    for names, seeds in rounds[:1] if options.dry else rounds:
        if time.monotonic() > deadline:
            break
        ended = run(plan(names, scale, seeds, **further), options, deadline)
        found = {**found, **ended, "done": found["done"] + ended["done"], "left": found["left"] + ended["left"]}
        if ended["left"] or ended["troubles"]:
            break
    return found | {"summary": f"{found['done']} runs are done, {found['left']} of those begun are left"}


def run(sweep: Sweep, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """What of a sweep is not done, until the deadline; then what runs is asked to save its state."""
    left = max(deadline - time.monotonic(), 0.1)  # the second signal ends workers that only compile
    timers = [threading.Timer(left + wait, os.kill, (os.getpid(), signal.SIGTERM)) for wait in (0, LAST_WORDS - 5)]
    for timer in timers:
        timer.start()
    try:
        summary = run_local(sweep, Store(options.store), jobs=options.jobs)
    finally:
        for timer in timers:
            timer.cancel()
    undone = [identity for identity, state in summary.states.items() if state != "done"]
    failed = {identity: summary.messages.get(identity, "") for identity in summary.having("failed")}
    done = len(summary.having("done"))
    return {
        "done": done, "left": len(undone), "interrupted": summary.interrupted, "troubles": failed,
        "summary": f"{done} of {len(summary.states)} runs are done" + (f", {len(failed)} failed" if failed else ""),
    }  # fmt: skip


def scale_of(options: argparse.Namespace, name: str) -> Scale:
    return load_scale("smoke" if options.dry else name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what was found")
    parser.add_argument("--store", type=Path, required=True, help="folder of the runs; the next call goes on in it")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SHARES))
    parser.add_argument("--data", type=Path, help="where the pictures of the scale `small` lie (else SDAE_DATA says)")
    parser.add_argument("--jobs", type=int, help="runs at once (default: the scale's)")
    parser.add_argument("--input", nargs="*", help="further words for benchmarks/input.py")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at sizes that prove nothing but the path")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in SHARES]:
        parser.error(f"--only: {', '.join(unknown)} unknown (allowed: {', '.join(SHARES)})")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: more than 0")
    return options


if __name__ == "__main__":
    main()
