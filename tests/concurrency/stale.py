"""What a process sees of a store on NFS, by standing before the functions that ask a file system.

The model is that of the Linux client with attribute caching (`ac`, `lookupcache=all`), made harsher where that is
simpler: what a process was told of a name (that it is there, which file it is, that it is absent) and of a folder
(which names are in it) it goes on believing for some time, drawn anew for each, up to `lag` seconds. A name that now
means another file is still opened as the old one. What a process itself changes in a folder goes to the server at once,
is decided there (link, symlink, mkdir and exclusive creation fail where the name exists), and comes with the folder's
new attributes (RFC 1813, wcc_data; NFSv4, change_info4): what it believed of that folder it then asks anew.

A process may also have a `life`: before so many changes are made to the store it dies, as by a power cut. And it may
dawdle: sleep for a moment before it looks or changes something, which shows races that a quick process hides.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_open, _stat, _lstat, _scandir, _listdir, _readlink = io.open, os.stat, os.lstat, os.scandir, os.listdir, os.readlink
_sleep, _monotonic, _os_open = time.sleep, time.monotonic, os.open
CRITICAL = ("result.json", "claim.json")  # where a process dawdles most
OPENED = 200  # files that a process keeps open to be able to read them although they are gone


class Known:
    """What was told of a name: an error, or the attributes of what it means, and that file, opened."""

    def __init__(self, until: float, error: int = 0, stat_result: Any = None, descriptor: int = -1, target: str = ""):
        self.until, self.error, self.stat, self.descriptor, self.target = until, error, stat_result, descriptor, target


class Disk:
    def __init__(
        self, root: str, seed: object, *, lag: float = 0.0, life: int = -1, dawdle: float = 0.0,
        renamed: Callable[[str], None] | None = None, clock: Callable[[float], float] | None = None,
    ):  # fmt: skip
        self.root, self.random = os.path.abspath(root), random.Random(str(seed))
        self.lag, self.life, self.dawdle, self.renamed = lag, life, dawdle, renamed
        self.names: dict[str, dict[tuple[str, bool], Known]] = {}
        self.lists: dict[str, tuple[float, list[Any] | int]] = {}
        self.clock = clock  # what the time was, where it is put forward, when the real one was so
        self.opened = 0
        self.changes = 0
        self.lock = threading.RLock()  # a run's heart beats in a thread of its own

    def within(self, path: Any, options: Any = None) -> str:
        """The path as text where it lies in the store, else nothing."""
        if isinstance(path, int) or (options and options.get("dir_fd") is not None):
            return ""
        text = os.fspath(path)
        if isinstance(text, bytes):
            return ""
        text = text if text.startswith("/") else os.path.abspath(text)
        return text.rstrip("/") if text.startswith(self.root) else ""

    # What it looks at
    def look(self, path: str, follow: bool = True) -> Known:
        folder, _, name = path.rpartition("/")
        with self.lock:
            names = self.names.setdefault(folder, {})
            known = names.get((name, follow))
            if known is not None and _monotonic() < known.until:
                return known
            self._dawdle(6.0 if name in CRITICAL else 0.2)
            self._forget(known)
            names[name, follow] = fresh = self._ask(path, follow, _monotonic() + self.random.uniform(0, self.lag))
            return fresh

    def _ask(self, path: str, follow: bool, until: float) -> Known:
        try:
            found = _stat(path) if follow else _lstat(path)
            descriptor, target = -1, _readlink(path) if stat.S_ISLNK(found.st_mode) else ""
            if stat.S_ISREG(found.st_mode) and self.opened < OPENED:
                descriptor = _os_open(path, os.O_RDONLY)
                self.opened += 1
                found = _stat(descriptor)  # of the file that was opened: the name may mean another by now
            return Known(until, 0, self._dated(found), descriptor, target)
        except OSError as error:
            return Known(until, error.errno or errno.EIO)

    def _dated(self, found: os.stat_result) -> os.stat_result:
        if self.clock is None:
            return found
        times = {"st_mtime": self.clock(found.st_mtime), "st_mtime_ns": int(self.clock(found.st_mtime_ns / 1e9) * 1e9)}
        return os.stat_result(tuple(found), times)

    def list(self, path: str) -> list[Any]:
        until, found = self.lists.get(path, (0.0, 0))
        if _monotonic() >= until:
            self._dawdle(0.2)
            until = _monotonic() + self.random.uniform(0, self.lag)
            try:
                with _scandir(path) as entries:
                    found = list(entries)
            except OSError as error:
                found = error.errno or errno.EIO
            self.lists[path] = until, found
        if isinstance(found, int):
            raise OSError(found, os.strerror(found), path)
        return found

    # What it changes
    def change(self, *paths: str) -> None:
        """Before a change; dies here where its life is over."""
        self.changes += 1
        if self.life >= 0 and self.changes > self.life:
            os.kill(os.getpid(), signal.SIGKILL)
        self._dawdle(6.0 if any(".claim" in path or path.endswith(CRITICAL) for path in paths) else 1.0)

    def changed(self, *paths: str) -> None:
        with self.lock:
            for path in paths:
                for folder in (path.rpartition("/")[0], path):  # itself: where a folder came or went
                    for known in self.names.pop(folder, {}).values():
                        self._forget(known)
                    self.lists.pop(folder, None)

    def forget_all(self) -> None:
        for folder in list(self.names):
            self.changed(f"{folder}/x")
        self.lists.clear()

    def _forget(self, known: Known | None) -> None:
        if known is not None and known.descriptor >= 0:
            os.close(known.descriptor)
            self.opened -= 1

    def _dawdle(self, share: float) -> None:
        if self.dawdle and self.random.random() < 0.1 * share:
            _sleep(self.random.uniform(0, self.dawdle))


DISK: Disk | None = None


def use(disk: Disk | None) -> None:
    """This process's view from now on; None: what is really there."""
    global DISK
    DISK = disk


def _raise(known: Known, path: Any) -> None:
    if known.error:
        raise OSError(known.error, os.strerror(known.error), os.fspath(path))


class _Entries:
    """As what `os.scandir` gives."""

    def __init__(self, entries: list[Any]):
        self.entries = iter(entries)

    def __iter__(self) -> Iterator[Any]:
        return self.entries

    def __next__(self) -> Any:
        return next(self.entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def _looking_stat(path: Any, **options: Any) -> Any:
    follow = options.get("follow_symlinks", True)
    if DISK and (text := DISK.within(path, options)):
        known = DISK.look(text, follow)
        _raise(known, path)
        return known.stat
    return _stat(path, **options)


def _looking_lstat(path: Any, **options: Any) -> Any:
    return _looking_stat(path, follow_symlinks=False, **options)


def _looking_readlink(path: Any, **options: Any) -> Any:
    if DISK and (text := DISK.within(path, options)):
        known = DISK.look(text, False)
        _raise(known, path)
        if not known.target:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fspath(path))
        return known.target
    return _readlink(path, **options)


def _looking_scandir(path: Any = ".") -> Any:
    if DISK and (text := DISK.within(path)):
        return _Entries(DISK.list(text))
    return _scandir(path)


def _looking_listdir(path: Any = ".") -> Any:
    if DISK and (text := DISK.within(path)):
        return [entry.name for entry in DISK.list(text)]
    return _listdir(path)


def _looking_open(file: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
    if not (DISK and (text := DISK.within(file))):
        return _open(file, mode, *words, **options)
    if not set(mode) & set("wax+"):
        with DISK.lock:
            known = DISK.look(text)
            _raise(known, file)
            source = f"/proc/self/fd/{known.descriptor}" if known.descriptor >= 0 else file
            return _open(source, mode, *words, **options)
    DISK.change(text)
    try:
        return _open(file, mode, *words, **options)
    finally:
        DISK.changed(text)


def _looking_os_open(path: Any, flags: int, *words: Any, **options: Any) -> int:
    text = DISK.within(path, options) if DISK else ""
    if not (DISK and text and flags & os.O_CREAT):
        return _os_open(path, flags, *words, **options)
    DISK.change(text)
    try:
        return _os_open(path, flags, *words, **options)
    finally:
        DISK.changed(text)


def _changing(real: Any, count: int) -> Any:
    """`real`, whose first `count` words are names that it changes."""

    def changing(*words: Any, **options: Any) -> Any:
        if not DISK:
            return real(*words, **options)
        if options.get("dir_fd") is not None or any(isinstance(word, int) for word in words[:count]):
            DISK.change()
            DISK.forget_all()  # as rmtree does it
            return real(*words, **options)
        paths = [text for word in words[:count] if (text := DISK.within(word))]
        if not paths:
            return real(*words, **options)
        DISK.change(*paths)
        try:
            if real is _replace and DISK.renamed:
                return _told(words, paths[-1])
            return real(*words, **options)
        finally:
            DISK.changed(*paths)

    return changing


_replace = os.replace


def _told(words: Any, path: str) -> None:
    """A rename and what is to be told of it: both or none, whatever signal comes."""
    assert DISK is not None
    assert DISK.renamed is not None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _replace(*words)
        DISK.renamed(path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def install() -> None:
    """Puts these functions before the real ones; as long as no view is in use they do nothing but call them."""
    os.stat, os.lstat, os.readlink = _looking_stat, _looking_lstat, _looking_readlink  # type: ignore[assignment]
    os.scandir, os.listdir, os.open = _looking_scandir, _looking_listdir, _looking_os_open  # type: ignore[assignment]
    builtins.open = io.open = _looking_open  # type: ignore[assignment]
    os.replace, os.rename = _changing(_replace, 2), _changing(os.rename, 2)
    os.link, os.symlink = _changing(os.link, 2), _changing(os.symlink, 2)
    os.unlink = os.remove = _changing(os.unlink, 1)
    os.mkdir, os.rmdir = _changing(os.mkdir, 1), _changing(os.rmdir, 1)
