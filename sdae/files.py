"""Files of a store: written whole or not at all, durable, and no litter of dead processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sdae.errors import UserError

OWNER = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\w+)\.[0-9a-f]{8}\.tmp$")  # of a temporary file
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, as JSON escapes it
OURS = re.compile(r"\..+\.[0-9a-f]{8}([0-9a-f]{24})?\.tmp")  # so do all of them end, those of earlier versions too
ABANDONED_SECONDS = 86400.0  # no file is being written for longer than that
NOT_PLAIN = "Not a plain file, but a pipe or a device"
LARGEST = 32_000_000  # bytes of a record; the largest that the suite writes, of an array of 10,000 runs, has half
MOST_NESTED = 200_000  # lists and mappings, or one in 16 bytes: each takes a hundred, of three in the file
DEEPEST = 100  # mappings and lists in one another


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is whole, also after a power cut. A disk that fails is a UserError
    that names `path`, and nothing is left behind; what a process left that was killed in here goes when the next one
    writes the same file."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        forget_dead(path.parent, path.name)  # before the flush: they must not come back alone
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written: {why(error)}") from error
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """The whole file or none of it: `written`. Raises UserError."""
    with written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def temporary_of(path: Path) -> Path:
    """A new name beside `path`, which tells whose it is: machine, process, when that began."""
    owner = f"{_machine()}-{os.getpid()}-{process_start(os.getpid())}"
    return path.with_name(f".{path.name}.{owner}.{uuid.uuid4().hex[:8]}.tmp")


def forget_dead(folder: Path, name: str = "") -> None:
    """Removes the temporary files and folders, of `name` or of all, that dead processes of this machine have left; and
    those of other machines, or of earlier versions, that are a day old. Files that are not the suite's stay."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            if entry.startswith(f".{name}") and OURS.fullmatch(entry):
                path = folder / entry
                with contextlib.suppress(OSError):
                    if abandoned(path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def abandoned(path: Path) -> bool:
    """Whether nobody goes on writing a temporary file. OSError where it is gone."""
    if (owner := OWNER.search(path.name)) and owner["machine"] == _machine():
        return process_start(int(owner["pid"])) != owner["start"]
    return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def make_folder(folder: Path, wrong: str = "cannot be written") -> None:
    """With those above it, durable. UserError, with the words `wrong`, where it cannot be made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            flush(path.parent)
    except OSError as error:
        raise UserError(f"{folder}: {wrong}: {why(error)}") from error


def why(error: OSError) -> str:
    """What the system says, and what to do next."""
    advice = {
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then the same command goes on"),
        **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "name a folder that you may write to"),
    }
    said = error.strerror or str(error)
    return f"{said} ({advice[error.errno]})" if error.errno in advice else said


def flush(path: Path) -> None:
    """Makes durable what was written to a file, or what names are in a folder. Where the file system lets no folder be
    opened or flushed, there is nothing to do. OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """The text of a JSON file. ValueError for NaN and infinite numbers, which JSON does not have."""
    return json.dumps(value, indent=1, sort_keys=False, allow_nan=False, default=str) + "\n"


def parse_json(content: bytes) -> Any:
    """What a JSON file holds. Half a surrogate pair, which no other file and no terminal can take, becomes a question
    mark. ValueError, also where it would take many times its bytes, or is nested too deeply for those who print it;
    RecursionError."""
    text = content.decode(json.detect_encoding(content))
    if (nested := text.count("[") + text.count("{")) > (most := max(MOST_NESTED, len(text) // 16)):
        raise ValueError(f"{nested:,} lists and mappings (allowed: {most:,})")
    found = json.loads(text)
    if nested > DEEPEST:
        level = [found]
        for _ in range(DEEPEST):
            level = [
                v
                for each in level
                for v in (each.values() if isinstance(each, dict) else each)
                if isinstance(v, (dict, list))
            ]
            if not level:
                break
        else:
            raise ValueError(f"more than {DEEPEST} lists and mappings in one another")
    if HALF.search(text):
        found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
    return found


def encodable(name: str | Path) -> str:
    """A file's name as every file and terminal can take it: what is not UTF-8 is escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def plain_file(path: str, flags: int) -> int:
    """An `opener` for reading. A pipe or a device, which may give nothing or never end, is an `IsADirectoryError`."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else NOT_PLAIN, path)
    return descriptor


def read_plain(path: str | Path, most: int = LARGEST) -> bytes:
    """The bytes of a plain file. OSError, and ValueError where it has more than `most`."""
    descriptor = plain_file(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (size := os.fstat(descriptor).st_size) > most:
            raise ValueError(f"{size:,} bytes (allowed: {most:,})")
        content = os.read(descriptor, size + 1)
        while len(content) <= most and (more := os.read(descriptor, 1 << 20)):  # grown meanwhile, or read in pieces
            content += more
        return content
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The content, or None where the file is absent, torn (a copy cut off by something other than us) or no file."""
    try:
        return parse_json(read_plain(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def read_record(path: Path) -> dict[str, Any] | None:
    """The keys and values of a JSON file, or None where it is absent, torn or something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else None


def checksum(path: Path) -> str:
    """The sha256 of a file. OSError."""
    with open(path, "rb", opener=plain_file) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_link(path: str, flags: int) -> int:
    """An `opener` for logs: not through a link that would lead out of the store, and no pipe that nobody reads."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def process_start(pid: int) -> str | None:
    """When a process of this machine began (so that a reused pid is not taken for the old process), or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # Killed, its first thread is a zombie while others are still ending, with its files and locks
        ended = fields[0] == "X" or (fields[0] == "Z" and len(os.listdir(f"/proc/{pid}/task")) < 2)
        return None if ended else fields[19]
    except (OSError, IndexError):
        if os.path.isdir("/proc/self"):
            return None
        try:  # no /proc (macOS): a pid is all there is
            os.kill(pid, 0)
            return "alive"
        except OSError:
            return None
