"""What the local executor's tests run in place of `sdae.run:execute`: claims, waits, ends as the environment says.

FAKE_SECONDS: how long a run takes. FAKE_PRETRAIN and its like: fail | crash | kill | refuse, for all runs of a stage.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from sdae.config import Config, run_id
from sdae.errors import Interrupted, RunFailed, UserError
from sdae.store import Store


class AlreadyRunning(UserError):
    pass


def execute(config: Config, store: Store, *, progress: Any = None) -> dict[str, Any]:
    folder = store.run(run_id(config))
    if result := folder.result():
        return result
    folder.create(config)
    with folder.claim() as mine:
        if not mine:
            raise AlreadyRunning("another process is running it")
        if result := folder.result():  # finished by another between the look and the claim
            return result
        stopped: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        print(f"began {time.time()} threads {os.environ['OMP_NUM_THREADS']}")
        sys.stdout.flush()
        os.write(1, b"from below python\n")
        progress({"id": folder.id, "epoch": 1, "epochs": 2, "step": 1, "steps": 2, "images_per_s": 10.0})
        until = time.monotonic() + float(os.environ.get("FAKE_SECONDS", "0"))
        while time.monotonic() < until:
            time.sleep(0.005)
            if stopped:
                raise Interrupted("stopped; its state is saved")
        signal.signal(signal.SIGTERM, before)
        _misbehave(os.environ.get(f"FAKE_{config.stage.upper()}", ""), folder)
        print(f"ended {time.time()}")
        folder.finish({"id": folder.id, "metrics": {"top1": 1.0}})
        return folder.result() or {}


def _misbehave(mode: str, folder: Any) -> None:
    if mode == "fail":
        folder.fail("NonFiniteLoss", "the loss is nan at step 3")
        raise RunFailed("the loss is nan at step 3")
    if mode == "crash":
        raise ZeroDivisionError("nobody expected this")
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "refuse":
        raise UserError("data.path: a picture is broken")
