"""Processes of a campaign: forked from one that has everything imported, each with a machine and a view of its own.

To be imported before anything that imports torch, which is a fake from here on.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from concurrency import pretend, stale

pretend.without_torch()

import slurm.job  # noqa: E402
import slurm.local  # noqa: E402
import slurm.snapshot  # noqa: E402
import slurm.submit  # noqa: E402
import slurm.worker  # noqa: E402
from sdae import provenance  # noqa: E402

STACKS = 500  # descriptor of the file to which a process tells where it is
LONGEST = 120.0  # seconds that a worker may take to end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
LATER = (  # what the suite imports where it is needed: it would be read by every child again
    "sdae.training.checkpoints", "sdae.training.telemetry", "sdae.stages.session", "sdae.released", "analysis.check",
    "submitit.slurm.slurm",
)  # fmt: skip
real_time, real_kill = time.time, os.kill


class Clock:
    """The time, which may be put forward; files get the time that it was when they were written."""

    ahead = 0.0  # seconds
    jumps: list[tuple[float, float]] = []  # real time and seconds of each  # noqa: RUF012

    @classmethod
    def time(cls) -> float:
        return real_time() + cls.ahead

    @classmethod
    def jump(cls, seconds: float) -> None:
        cls.jumps.append((real_time(), seconds))
        cls.ahead += seconds

    @classmethod
    def of(cls, moment: float) -> float:
        return moment + sum(seconds for when, seconds in cls.jumps if when <= moment)


class Machine:
    """Where a process is: its host's name, and how it sees the store."""

    host = "here"
    settings: dict[str, Any] = {}  # noqa: RUF012
    seed: object = 0


def prepare() -> None:
    """Once, before the first fork: patches, and what is the same in every round."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become ours, so that their end is seen
    stale.install()
    time.time = Clock.time
    socket.gethostname = lambda: Machine.host
    os.kill = kill
    slurm.snapshot.ROOMS, slurm.snapshot.KINDS = ("ablations",), (".yaml",)  # the code is not run from there
    slurm.job.POLL, slurm.job.TERM_WAIT = 0.01, 0.05
    slurm.local.TICK = 0.03
    slurm.local.subprocess = SimpleNamespace(
        Popen=Forked, PIPE=-1, TimeoutExpired=slurm.local.subprocess.TimeoutExpired
    )
    slurm.submit.PAUSES = (0.005,) * 4
    slurm.submit.submit.__kwdefaults__["sleep"] = time.sleep
    for stage in provenance.STAGE_MODULES:
        provenance.record(stage)
    for name in LATER:
        importlib.import_module(name)


def kill(pid: int, number: int) -> None:
    if number != signal.SIGUSR1:
        pretend.BOOK.write("struck", pid)
    real_kill(pid, number)


def forked(work: Callable[[], int], name: str, seed: object, folder: Path) -> int:
    """A child that does this; what it raises is written to FOLDER/errors."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # our handlers must not see what is sent to the child
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 99
    try:
        code = _child(work, name, seed, folder, before)
    finally:  # whatever a handler raises, and where: a child must not come back to where its parent is
        os._exit(code)


def _child(work: Callable[[], int], name: str, seed: object, folder: Path, before: Any) -> int:
    code = 99
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        Machine.seed = seed
        stacks = os.open(folder / f"stack-{os.getpid()}-{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(stacks, STACKS)
        faulthandler.register(signal.SIGUSR1, STACKS, chain=False)
        use_disk(folder)
        code = work()
    except SystemExit as error:  # of a handler, after the last line that minds it
        code = int(error.code or 0)
    except BaseException:
        stale.use(None)
        errors = folder / "errors"
        errors.mkdir(exist_ok=True)
        (errors / f"{name}-{os.getpid()}").write_text(traceback.format_exc())
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def use_disk(folder: Path) -> None:
    draw = random.Random(f"disk {Machine.seed}")
    settings = Machine.settings
    lag = draw.choice(settings["lags"])
    life = int(draw.expovariate(1 / 40)) if draw.random() < settings["deaths"] else -1
    dawdle = draw.choice((0.0, 0.0, 0.004, 0.02)) if settings["dawdle"] else 0.0
    root = str(folder / "store")
    stale.use(stale.Disk(root, Machine.seed, lag=lag, life=life, dawdle=dawdle, renamed=renamed, clock=Clock.of))


def renamed(path: str) -> None:
    """Of every file that took its place in the store."""
    folder, _, name = path.rpartition("/")
    if name == "result.json":
        pretend.BOOK.write(folder.rpartition("/")[2], "finished")
    elif name == "failure.json":
        failure = json.loads(stale._open(path).read())
        pretend.BOOK.write("failures", failure["class"], " ".join(failure["message"].split()))


class Forked:
    """As `subprocess.Popen` of `python -m slurm.worker TARGET STORE`, without its imports."""

    def __init__(self, words: list[str], *, env: dict[str, str], stderr: Any, **_: Any):
        orders, answers = os.pipe(), os.pipe()
        self.returncode: int | None = None
        seed = f"{Machine.seed} {random.random()}"
        folder = pretend.BOOK.folder.parent
        self.pid = forked(
            lambda: self._work(words, env, orders[0], answers[1], stderr.fileno()), "worker", seed, folder
        )
        os.close(orders[0])
        os.close(answers[1])
        self.stdin, self.stdout = os.fdopen(orders[1], "wb", 0), os.fdopen(answers[0], "rb", 0)

    @staticmethod
    def _work(words: list[str], env: dict[str, str], orders: int, answers: int, errors: int) -> int:
        os.setsid()
        os.dup2(orders, 0)
        os.dup2(answers, 1)
        os.dup2(errors, 2)
        gc.collect()  # what is garbage must not close these numbers later, when they are other files
        os.closerange(3, STACKS)
        os.environ.clear()
        os.environ.update(env)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        sys.argv = words[2:]
        slurm.worker.main()
        return 0

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # a handler, called behind the line above before its answer was written down
                return -1
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or LONGEST)
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError("a worker does not end")
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
