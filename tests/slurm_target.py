"""Stands in for sdae/run.py in the checkout that tests hand to a real Slurm: runs that pretend, without torch.

They claim their folder, beat, save their state and stop when told, as real ones do. A run is a chain of hashes, a link
a step, so its result tells whether a resumed run went on from its own state. `orders.json` beside the store, read at
each step, says what runs do: the keys of ORDERS, for `all`, for a stage, or for an id.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from sdae.config import Config, run_id
from sdae.errors import Interrupted, RunFailed, UserError
from sdae.files import read_json, write_atomically
from sdae.store import RunFolder, Store

ORDERS = {
    "steps": 10,
    "pause": 0.1,  # seconds that a step takes
    "save": 1,  # steps between two states; 0: none is saved, not even when told to stop
    "wait": False,  # stay before the last step
    "deaf": False,  # do not mind signals
    "fail": "",  # at the last step, with this message
}
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class NeedNotDone(UserError):
    pass


class AlreadyRunning(UserError):
    pass


def orders(store: Store, config: Config) -> dict[str, Any]:
    told = read_json(store.root.parent / "orders.json") or {}
    return {**ORDERS, **told.get("all", {}), **told.get(config.stage, {}), **told.get(run_id(config), {})}


def link(chain: str, step: int) -> str:
    return hashlib.sha256(f"{chain} {step}".encode()).hexdigest()


def metrics_of(identity: str, steps: int = 10) -> dict[str, Any]:
    """What a run must end with, however often it was stopped."""
    chain = identity
    for step in range(1, steps + 1):
        chain = link(chain, step)
    return {"top1": int(chain[:8], 16) / 2**32, "loss": float(steps), "chain": chain}


def execute(
    config: Config, store: Store, *, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    folder = store.run(run_id(config))
    if (result := folder.result()) is not None:
        return result
    if (need := getattr(getattr(config, "init", None), "run", None)) and not store.run(need).done:
        raise NeedNotDone(f"{folder.id}: waits for {need}")
    folder.create(config)
    with folder.claim() as mine:
        if not mine:
            raise AlreadyRunning(f"{folder.id}: another process is running it")
        if (result := folder.result()) is not None:
            return result
        told: set[int] = set()
        before = {number: signal.signal(number, lambda number, _: told.add(number)) for number in SIGNALS}
        try:
            metrics = _run(config, store, folder, told)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        folder.finish({"format": 1, "id": folder.id, "stage": config.stage, "metrics": metrics, "by": place()})
        return folder.result() or {}


def place() -> dict[str, Any]:
    names = {"job": "SLURM_ARRAY_JOB_ID", "index": "SLURM_ARRAY_TASK_ID", "restart": "SLURM_RESTART_COUNT"}
    return {"pid": os.getpid(), **{key: os.environ.get(name) for key, name in names.items()}}


def _run(config: Config, store: Store, folder: RunFolder, told: set[int]) -> dict[str, Any]:
    folder.forget_failure()
    chain, step = _load(folder)
    print(f"pretends from step {step}", flush=True)
    while True:
        now = orders(store, config)
        last = step + 1 >= now["steps"]
        if last and now["fail"]:
            folder.fail("Pretended", now["fail"])
            raise RunFailed(now["fail"])
        if step >= now["steps"]:
            return {"top1": int(chain[:8], 16) / 2**32, "loss": float(step), "chain": chain}
        if not (last and now["wait"]):
            step += 1
            chain = link(chain, step)
        time.sleep(now["pause"])
        if folder.dispossessed:
            os._exit(75)
        stop = bool(told) and not now["deaf"]  # of this moment: a later signal waits for the next step
        if now["save"] and (stop or step % now["save"] == 0) and step < now["steps"]:
            _save(folder, chain, step)
        folder.write("heartbeat.json", {"time": time.time(), "step": step, "steps": now["steps"], **place()})
        if stop and step < now["steps"]:
            raise Interrupted(f"{folder.id}: stopped at step {step}", told)


def _save(folder: RunFolder, chain: str, step: int) -> None:
    """Files named as those of `sdae.training.checkpoints`."""
    file = folder.checkpoints / f"state-{step:08d}.safetensors"
    if not file.exists():
        write_atomically(file, chain)
        write_atomically(file.with_suffix(".sha256.json"), json.dumps({"sha256": ""}))
        for old in sorted(folder.checkpoints.glob("state-*"))[:-4]:
            old.unlink()


def _load(folder: RunFolder) -> tuple[str, int]:
    step = folder.saved_step
    return (folder.checkpoints / f"state-{step:08d}.safetensors").read_text() if step else folder.id, step
