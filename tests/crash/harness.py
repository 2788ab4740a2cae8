"""One case: a command, a fault at one of its operations (or several faults in turn), the command again, and what must
be true then."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash.cluster import install
from crash.commands import STAGES, Command, commands, copy, left, whole
from crash.disk import Disk, Style, read_tree

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 300.0  # that a command may take
NONE, KILL, SIGNAL, ERROR, CLOCK = range(5)  # as in layer.c
HOURS = 3600
POWER: tuple[Style, ...] = ("strict", "names", "random")


@dataclass(frozen=True)
class Fault:
    """kills: whether the process is to end at once. codes: how the command may end; 0 always may, with all done."""

    name: str
    kind: int
    value: int = 0
    forever: bool = False
    kills: bool = False
    codes: tuple[int, ...] = ()
    weight: int = 1
    power: bool = False


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill", KILL, forever=True, kills=True, codes=(-9,), weight=5),
        Fault("power", KILL, forever=True, kills=True, codes=(-9,), weight=6, power=True),
        Fault("power-after", NONE, kills=True, weight=1, power=True),  # when the command has ended
        Fault("term", SIGNAL, signal.SIGTERM, kills=True, codes=(-15, 75), weight=3),
        Fault("int", SIGNAL, signal.SIGINT, kills=True, codes=(130, 75), weight=1),
        Fault("full", ERROR, errno.ENOSPC, forever=True, codes=(1, 2)),
        Fault("full-once", ERROR, errno.ENOSPC, codes=(1, 2)),
        Fault("io", ERROR, errno.EIO, forever=True, codes=(1, 2)),
        Fault("io-once", ERROR, errno.EIO, codes=(1, 2)),
        Fault("read-only", ERROR, errno.EROFS, forever=True, codes=(1, 2)),
        Fault("clock-forward", CLOCK, 7 * HOURS),
        Fault("clock-back", CLOCK, -7 * HOURS),
    )
}
MORE = "should not be there"
LOST_LOGS = ("log.txt", "heartbeat.json")  # what a power cut after the end of a command may take


def compiler() -> str | None:
    """The machine's C compiler, if there is one that this layer is written for."""
    if not sys.platform.startswith("linux"):
        return None
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)


def build(folder: Path) -> Path:
    """The layer as a library. Raises CalledProcessError with the compiler's words."""
    program, library = compiler(), folder / "layer.so"
    assert program is not None, "no C compiler"
    source = Path(__file__).with_name("layer.c")
    words = [program, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", library, source, "-lpthread"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    return library


@dataclass(frozen=True)
class Ended:
    code: int | None  # None: it hung
    count: int
    struck: int
    err: str


class Yard:
    """A scratch folder with the server, a template for each command, and what the command leaves undisturbed."""

    def __init__(self, folder: Path):
        self.folder, self.root, self.log = folder, folder / "root", folder / "log"
        self.templates: dict[str, Path] = {}
        self.left: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, int] = {}
        self.queue, programs = folder / "queue", folder / "bin"
        programs.mkdir()
        install(programs, self.queue)
        library = build(folder)
        self.environment = os.environ | {
            "PATH": str(programs),  # nothing else of the machine is called: no git, no LaTeX
            "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, "-m", "crash.server"], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1,
        )  # fmt: skip
        self.ask({"import": ["cli.main", "analysis.frame", "analysis.export", "sdae.provenance:code"]})

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        answer = self.server.stdout.readline()
        assert answer, f"the server ended with {self.server.wait()}"
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(300)

    def __enter__(self) -> Yard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, command: Command) -> None:
        copy(self.templates[command.name], self.root)
        shutil.rmtree(self.queue, ignore_errors=True)
        self.queue.mkdir()

    def _left(self, command: Command) -> dict[str, Any]:
        return left(command, self.root, self.queue)

    def together(self, command: Command, fault: Fault | None = None, at: int = 0) -> Ended:
        """A command of several processes, which are killed, or the first of which is told to end, `at` milliseconds
        after it began. Counted are milliseconds."""
        words = [sys.executable, "-m", "cli.main", *command.words]
        cache = {"XDG_CACHE_HOME": f"{self.root}/cache"}
        environment = {k: v for k, v in self.environment.items() if k != "LD_PRELOAD"} | cache
        began, struck = time.monotonic(), 0
        with open(self.folder / "err", "wb") as err, subprocess.Popen(
            words, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                if fault is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(at / 1000)
                    if process.poll() is None:
                        struck = at
                        if fault.kind == KILL:
                            os.killpg(process.pid, signal.SIGKILL)
                        else:
                            process.send_signal(fault.value)
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        text = (self.folder / "err").read_text(errors="replace")
        return Ended(code, round(1000 * (time.monotonic() - began)), struck, text)

    def call(self, words: Sequence[str], fault: Fault | None = None, at: int = 0, later: int = 0) -> Ended:
        """later: seconds that the clock is ahead."""
        plan = {"fault": CLOCK if later else NONE, "value": later, "forever": 0, "at": at, "struck": int(bool(later))}
        if fault is not None:
            plan |= {"fault": fault.kind, "value": fault.value, "forever": int(fault.forever)}
        out, err = self.folder / "out", self.folder / "err"
        order = {"words": list(words), "root": str(self.root), "out": str(out), "err": str(err), "log": str(self.log)}
        answer = self.ask({**order, "fault": plan, "seconds": SECONDS})
        return Ended(answer["code"], answer["count"], answer["struck"], err.read_text(errors="replace"))

    def prepare(self, command: Command) -> int:
        """Runs a command undisturbed, once; how many operations that takes."""
        if command.name in self.counts:
            return self.counts[command.name]
        if command.several:
            pass
        elif command.torch:
            stages = ("pretrain", "classify", "cost", "segment", "detect")
            modules = ["sdae.run", "sdae.data.packing", *(f"sdae.stages.{stage}" for stage in stages)]
            peak = ["sdae.provenance:environment", "sdae.training.telemetry:peak_flops,cpu,fp32"]
            code = [f"sdae.provenance:substance,{stage}" for stage in STAGES]
            self.ask({"import": modules + peak + code})
        else:
            self.ask({"import": ["analysis.study", "analysis.report", "slurm.sweep"]})
        template = self.folder / "templates" / command.name
        template.mkdir(parents=True)
        if command.name == "weights":
            self.prepare(commands()["pretrain"])
            copy(self.templates["pretrain"], self.root)
            assert self.call(commands()["pretrain"].words).code == 0
            template.rmdir()
            self.root.rename(template)
        else:
            command.make(template)
        self.templates[command.name] = template
        self._begin(command)
        disk = Disk(self.root)
        ended = self.together(command) if command.several else self.call(command.words)
        assert ended.code == 0, ended
        if not command.several:
            disk.replay(self.log)
            assert disk.now() == read_tree(self.root), "the layer does not see all that this command does"
        self.left[command.name] = self._left(command)
        self.counts[command.name] = ended.count
        return ended.count

    def case(
        self,
        command: Command,
        faults: Sequence[tuple[Fault, int]],
        draw: random.Random,
        struck: list[int] | None = None,
    ) -> list[str]:
        """What is wrong after these faults, each in one call of the command, and a last undisturbed one.

        struck: takes for each fault the operation that it struck; 0 where the call had ended before.
        """
        self.prepare(command)
        self._begin(command)
        wrong: list[str] = []
        for number, (fault, at) in enumerate(faults):
            # What an earlier, killed call holds is believed for a while, so only a later one ends all there is to do.
            found, where = self._strike(command, fault, at, draw, ends=number == 0 or not command.later)
            wrong += found
            if struck is not None:
                struck.append(where)
        again = self.together(command) if command.several else self.call(command.words, later=command.later)
        if again.code != 0:
            return [*wrong, f"the same command again ended with {again.code}: {again.err[-800:]}"]
        return wrong + differences(self.left[command.name], self._left(command))

    def _strike(
        self, command: Command, fault: Fault, at: int, draw: random.Random, ends: bool
    ) -> tuple[list[str], int]:
        """ends: whether a call that is not stopped leaves what an undisturbed one leaves."""
        disk = Disk(self.root) if fault.power else None
        ended = self.together(command, fault, at) if command.several else self.call(command.words, fault, at)
        wrong = [f"{fault.name}: {text}" for text in judge(command, fault, ended)]
        if fault.kind == ERROR:
            wrong += [f"{fault.name}: {text}" for text in whole(self.root, self.templates[command.name])]
        if ends and fault.kind == ERROR and ended.code == 0 and ended.struck:
            found = differences(self.left[command.name], self._left(command))
            found = [d for d in found if not d.startswith(MORE) and not d.endswith(command.cache or "\0")]
            wrong += [f"{fault.name}: ended with 0, but {d}" for d in found]
        if ends and fault.kind == CLOCK:
            again = self._left(command)
            wrong += [f"{fault.name}: {d}" for d in differences(self.left[command.name], again)]
        if disk is not None:
            disk.replay(self.log)
            if disk.now() != read_tree(self.root):
                return [*wrong, "the layer did not see all that this command did"], ended.struck
            disk.cut("strict" if fault.kind == NONE else draw.choice(POWER), draw)
            if ends and fault.kind == NONE:
                found = differences(self.left[command.name], self._left(command))
                lost = [d for d in found if not d.startswith(MORE) and not d.endswith(LOST_LOGS)]
                wrong += [f"{fault.name}: {d}" for d in lost]
        return wrong, ended.struck if fault.kind != NONE else ended.count


def judge(command: Command, fault: Fault, ended: Ended) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    if ended.code is None:
        return [f"hung for {SECONDS:.0f} s: {ended.err[-400:]}"]
    wrong = []
    codes = (0, *fault.codes, *((130,) if command.several and fault.kind == SIGNAL else ()))  # a sweep that was stopped
    if ended.code not in codes:
        wrong.append(f"ended with {ended.code}: {ended.err[-800:]}")
    elif "Traceback" in ended.err:
        wrong.append(f"a traceback reaches the user: {ended.err[-800:]}")
    elif ended.code in (1, 2):
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or not re.match(r"error: (--out )?[\w./-]+: ", lines[0]):
            wrong.append(f"expected one line that names the file: {ended.err[-400:]!r}")
    return wrong


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for each path that differs; it ends with the path."""
    lines = []
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            lines.append(f"is missing: {path}")
        elif path not in wanted:
            lines.append(f"{MORE}: {path}")
        elif found[path] != wanted[path]:
            lines.append(f"is another than that of an undisturbed run: {path}")
            if not isinstance(wanted[path], str):
                lines[-1] = f"is {found[path]} and not {wanted[path]}"[:600] + f": {path}"
    return lines
