"""Runs sdae-cli in children of a process that has imported what they need; started with the layer preloaded.

Orders are JSON lines on stdin: {"import": [modules]}, or {"words", "root", "out", "err", "log", "fault", "seconds"}.
Answers go to stdout: {}, or {"code", "count", "struck"}: how the child ended (minus the signal, if by one; null: it
hung and was killed), how many operations there were below `root`, and at which the fault struck first (0: at none).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from typing import Any, NoReturn


class Plan(ctypes.Structure):
    """As `struct plan` in layer.c."""

    _fields_ = (
        ("root", ctypes.c_char * 4096),
        ("armed", ctypes.c_int),
        ("fault", ctypes.c_int),
        ("value", ctypes.c_int),
        ("forever", ctypes.c_int),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("struck", ctypes.c_long),
        ("log", ctypes.c_int),
    )


def plan_of_layer() -> Plan:
    layer = ctypes.CDLL(None)
    layer.crash_plan.restype = ctypes.POINTER(Plan)
    return layer.crash_plan().contents  # type: ignore[no-any-return]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    plan = plan_of_layer()
    for line in sys.stdin:
        order = json.loads(line)
        if "import" in order:
            for name in order["import"]:
                _import(name)
            gc.freeze()
            answers.write("{}\n")
            continue
        plan.armed = plan.count = plan.struck = 0
        child = os.fork()
        if child == 0:
            _become(order, plan)
        answers.write(json.dumps({"code": _wait(child, order["seconds"]), "count": plan.count, "struck": plan.struck}))
        answers.write("\n")


def _import(name: str) -> None:
    module, _, call = name.partition(":")
    found = importlib.import_module(module)
    if call:  # what every run would compute again
        word, *values = call.split(",")
        getattr(found, word)(*values)


def _wait(child: int, seconds: float) -> int | None:
    descriptor = os.pidfd_open(child)
    ended = select.select([descriptor], [], [], seconds)[0]
    os.close(descriptor)
    if not ended:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if ended else None


def _become(order: dict[str, Any], plan: Plan) -> NoReturn:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.argv = ["sdae-cli", *order["words"]]
    os.chdir(order["root"])
    os.environ["XDG_CACHE_HOME"] = f"{order['root']}/cache"
    plan.root = order["root"].encode()
    plan.log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for name, value in order["fault"].items():
        setattr(plan, name, value)
    code = 1
    try:
        from cli.main import main as command

        plan.armed = 1
        command()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
