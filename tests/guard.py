"""What is called with bad input on purpose: watched for writes elsewhere, and, in a child, held to time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 5.0  # of processor time: of others on the machine one cannot tell a hang
PATIENCE = 12  # times as long by the clock, and whoever waits for something is taken to hang
MEMORY = 1 << 30  # bytes more than there were
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1,
    "os.chmod": 1, "shutil.rmtree": 1,
}  # fmt: skip
OURS = ("git", "uname", "fc-list", "nvidia-smi")  # programs that tell of the code and of the machine
RUNS = ("os.system", "subprocess.Popen", "os.posix_spawn", "socket.connect", "urllib.Request")
FULL = re.compile(r"allocat|out of memory|MemoryError|Cannot allocate", re.IGNORECASE)

_log: list[str] | None = None  # what the hook has seen while somebody watches
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _log is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
            _log.append(os.path.abspath(os.fsdecode(path)))
    elif event in CHANGES:
        paths = [one for one in arguments[: CHANGES[event]] if isinstance(one, (str, bytes, os.PathLike))]
        _log.extend(os.path.abspath(os.fsdecode(path)) for path in paths if not event.endswith("link"))
        if event.endswith("link"):  # the target of a link is text
            _log.append(os.path.abspath(os.fsdecode(arguments[1])))
    elif event in RUNS and not (event == "subprocess.Popen" and os.path.basename(str(arguments[0])) in OURS):
        _log.append(f"{event} {arguments[:2]!r}")


@contextlib.contextmanager
def watched(*allowed: Path) -> Iterator[list[str]]:
    """Collects the paths that Python code writes, makes, renames or removes outside of `allowed`, and the programs and
    connections that it starts. What libraries write by themselves is seen in `tree` alone."""
    global _log, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for the life of the process
        _hooked = True
    roots = [os.path.abspath(path) for path in allowed] + ["/dev/null", "/dev/shm", "/proc/self"]
    found: list[str] = []
    _log = []
    try:
        yield found
    finally:
        seen, _log = _log, None
        found += [
            path for path in seen
            if "__pycache__" not in path and not any(path == root or path.startswith(root + "/") for root in roots)
        ]  # fmt: skip


def tree(*folders: Path) -> dict[str, str]:
    """Every file with a digest of its content, every link with its target, every folder."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 24 else "big"
        else:
            found[str(path)] = "folder"
    return found


class Outcome(NamedTuple):
    """What a call in a child came to. problem: None, or why it must not be so; value: what it returned; seconds: of
    processor time."""

    problem: str | None
    value: Any
    seconds: float


def confined(
    function: Callable[[], Any], *allowed: Path, seconds: float = SECONDS, memory: int = MEMORY,
    refusals: tuple[type[Exception], ...] = (),
) -> Outcome:  # fmt: skip
    """`function()` in a fork of this process, which may take so much processor time, so much more memory, and write in
    `allowed`.

    An exception of `refusals` is an answer like any other, its text the value; it must be one line.
    """
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
            _serve(function, allowed, memory, refusals, writer)
            code = 0
        os._exit(code)
    os.close(writer)
    received, end = b"", began + PATIENCE * seconds
    with open(reader, "rb", buffering=0) as pipe:
        while (left := end - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            if not (part := pipe.read(1 << 20)):
                break
            received += part
        else:
            os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    spent, waited = usage.ru_utime + usage.ru_stime, time.monotonic() >= end
    if spent >= seconds or waited:
        return Outcome(f"took more than {PATIENCE * seconds if waited else seconds:g} s", None, spent)
    if not received:
        return Outcome(f"the process ended with {os.waitstatus_to_exitcode(status)}", None, spent)
    return Outcome(*pickle.loads(received), spent)


def _serve(
    function: Callable[[], Any], allowed: tuple[Path, ...], memory: int, refusals: tuple[type[Exception], ...], to: int
) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    problem, value = None, None
    with watched(*allowed) as written:
        try:
            value = function()
        except refusals as error:
            value = str(error)
            if "\n" in value or not value:
                problem = f"not one line: {value!r}"
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    if isinstance(value, str) and FULL.search(value):
        problem = f"took more than {memory >> 20} MiB: {value}"
    if written:
        problem = f"written or started elsewhere: {written[:3]}"
    try:
        content = pickle.dumps((problem, value))
    except Exception:  # not for another process
        content = pickle.dumps((problem, type(value).__name__))
    with open(to, "wb") as pipe:
        pipe.write(content)
