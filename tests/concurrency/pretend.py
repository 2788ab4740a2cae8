"""Training that only pretends, below the suite's real `sdae.run.execute`: no torch, a run takes some hundredths of a
second, and what became of it is written to a log of its own, which the suite does not know.

`without_torch` must be called before `sdae.run` is imported, in a process that does nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdae.errors import Interrupted, UserError
from sdae.files import write_atomically

FAKES = ("torch", "torchvision", "timm", "safetensors")
STAGES = ("pretrain", "classify", "cost")
STEPS = 4


class Pretended(Exception):
    """What a run fails of that was told to fail."""


class _Anything:
    """Stands for whatever a fake module is asked for: a decorator, a base class, a number that is false."""

    def __call__(self, *words: Any, **_: Any) -> Any:
        return words[0] if len(words) == 1 and callable(words[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __bool__(self) -> bool:
        return False

    def __index__(self) -> int:
        return 0

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _FakeModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    OutOfMemoryError = MemoryError
    SafetensorError = OSError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        fake = name.partition(".")[0] in FAKES
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if fake else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _FakeModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def without_torch() -> None:
    """From now on torch and its like are fakes, and the stages pretend."""
    sys.meta_path.insert(0, _Finder())
    for name in STAGES:
        module = types.ModuleType(f"sdae.stages.{name}")
        module.run = run  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


class Logbook:
    """`FOLDER/ID`: a line for each thing that became of a run. One write of one line, so that lines do not mix."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.peace = False  # nothing fails any more

    def write(self, name: str, *words: object) -> None:
        line = " ".join(str(word) for word in (*words, os.getpid())) + "\n"
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def lines(self, name: str) -> list[list[str]]:
        file = self.folder / name
        return [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []

    @contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Whether nobody else is in here for this run. The lock goes with the process that holds it."""
        descriptor = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)


BOOK = Logbook(Path(os.devnull))  # of the round


def link(chain: str, step: int) -> str:
    return hashlib.sha256(f"{chain} {step}".encode()).hexdigest()


def expected(identity: str) -> dict[str, Any]:
    """The metrics that a run must end with, however often it was stopped."""
    chain = identity
    for step in range(1, STEPS + 1):
        chain = link(chain, step)
    return {"top1": int(chain[:8], 16) / 2**32, "loss": float(STEPS)}


def run(config: Any, session: Any) -> dict[str, Any]:
    """The stage: a chain of hashes, a link a step; its result tells whether it went on from its own state."""
    folder, draw = session.folder, random.Random(f"{os.getpid()} {time.monotonic()}")
    if not BOOK.peace and draw.random() < 0.04:
        raise UserError("pretended: refused before the first step")
    with BOOK.alone(folder.id) as alone:
        BOOK.write(folder.id, "begins" if alone else "twice")
        step = folder.saved_step
        chain = (folder.checkpoints / f"state-{step:08d}.safetensors").read_text() if step else folder.id
        while step < STEPS:
            time.sleep(draw.uniform(0.0, 0.008))
            if session.stop.asked:
                raise Interrupted(f"{folder.id}: stopped at step {step}", session.stop.signals)
            step += 1
            chain = link(chain, step)
            if step < STEPS and draw.random() < 0.5:
                file = folder.checkpoints / f"state-{step:08d}.safetensors"
                write_atomically(file, chain)
                write_atomically(file.with_suffix(".sha256.json"), json.dumps({"sha256": ""}))
            session.pulse.tell(step=step, steps=STEPS)
            if not BOOK.peace and draw.random() < 0.02:
                raise Pretended("told to fail")
            if not BOOK.peace and draw.random() < 0.01:
                os.kill(os.getpid(), signal.SIGKILL)
    return {"metrics": {"top1": int(chain[:8], 16) / 2**32, "loss": float(step)}, "weights": {}}
