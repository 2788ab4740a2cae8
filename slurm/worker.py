"""A process that lives through many runs: `python -m slurm.worker TARGET STORE`.

Importing torch and timm costs seconds, a smoke run costs one. Orders come as JSON lines on stdin ({"id", "config"}),
answers go as JSON lines to the stdout that the process began with ({"event": ready | progress | end}). While a run
lasts stdout and stderr are its `log.txt`. A worker whose parent is gone stops its run, state saved, and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from sdae.config import parse
from sdae.errors import Interrupted, RunFailed, UserError
from sdae.files import no_link
from sdae.store import RunFolder, Store

REFUSALS = {"AlreadyRunning": "elsewhere", "NeedNotDone": "waiting"}


def main() -> None:
    target, root = sys.argv[1:3]
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what others print must not end up between the answers
    module, _, name = target.partition(":")
    execute = getattr(importlib.import_module(module), name)
    store = Store(root)

    def tell(state: dict[str, Any]) -> None:
        send(channel, {"event": "progress", **state})

    send(channel, {"event": "ready"})
    for line in sys.stdin:
        order = json.loads(line)
        answer = run(execute, store.run(order["id"]), store, order["config"], tell)
        send(channel, {"event": "end", "id": order["id"], **answer})


def send(channel: IO[str], answer: dict[str, Any]) -> None:
    try:
        channel.write(json.dumps(answer, default=str) + "\n")
    except OSError:  # nobody listens any more
        signal.raise_signal(signal.SIGTERM)


def run(
    execute: Any, folder: RunFolder, store: Store, values: dict[str, Any],
    progress: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """One run; how it ended: done | failed | refused | elsewhere | waiting | interrupted, with a line that says why."""
    try:
        folder.refuse_links()
    except UserError as error:  # nor may this be told in its log
        return {"outcome": "refused", "message": str(error)}
    before = folder.failure()
    with logged(folder):
        try:
            execute(parse(values, folder.id), store, progress=progress)
            return {"outcome": "done"}
        except (Interrupted, KeyboardInterrupt) as error:
            return {"outcome": "interrupted", "message": str(error), "signals": [*getattr(error, "signals", ())]}
        except UserError as error:
            outcome = REFUSALS.get(type(error).__name__, "refused")
            if outcome == "refused":
                print(f"error: {error}", file=sys.stderr)
            return {"outcome": outcome, "message": str(error)}
        except BaseException as error:
            traceback.print_exc()
            # A RunFailed has told why; that is gone where somebody has retried the run since
            if not isinstance(error, RunFailed) and folder.failure() == before:
                folder.fail(type(error).__name__, str(error), traceback.format_exc())
            message = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
            return {"outcome": "failed", "message": message}


def record(folder: RunFolder, values: dict[str, Any], kind: str, message: str, submission: str | None) -> None:
    """The failure of a run that may not have a folder yet."""
    folder.create(parse(values, folder.id))
    folder.fail(kind, message, submission=submission)


@contextlib.contextmanager
def logged(folder: RunFolder) -> Iterator[None]:
    """File descriptors 1 and 2 are the run's log, also for what C code prints."""
    folder.path.mkdir(parents=True, exist_ok=True)
    log = no_link(str(folder.log), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.set_blocking(log, True)
    saved = [os.dup(1), os.dup(2)]
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(log)


if __name__ == "__main__":
    main()
