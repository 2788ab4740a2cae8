"""The code as it was at submission: a copy named by its content, which queued jobs run whatever is edited later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from sdae import provenance
from sdae.errors import UserError
from sdae.files import flush, temporary_of
from slurm.ledger import Ledger

ROOMS = ("sdae", "ablations", "slurm", "analysis", "cli")
KINDS = (".py", ".yaml", ".j2")


def snapshot(ledger: Ledger, make: bool = True) -> Path:
    """The folder, absolute, that holds this code; made where it is not there yet (not for a dry run)."""
    source = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    files = [path for room in ROOMS for path in sorted((source / room).rglob("*")) if path.suffix in KINDS]
    contents = {path.relative_to(source): path.read_bytes() for path in files}
    for path, content in contents.items():
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    target = (ledger.codes / digest.hexdigest()[:16]).absolute()
    if target.exists() and target.stat().st_uid != os.getuid():  # another's code is not run, whatever its name says
        target = target.with_name(f"{target.name}-{os.getuid()}")
    if target.is_dir() or not make:
        return target
    fresh = temporary_of(target)
    try:
        fresh.mkdir(mode=0o700, parents=True)
        for path, content in contents.items():
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            (fresh / path).write_bytes(content)
        (fresh / provenance.SNAPSHOT).write_text(json.dumps(provenance.code()))
        for path in (*fresh.rglob("*"), fresh):  # jobs run it: a power cut must not leave half of it under its name
            flush(path)
        with contextlib.suppress(FileExistsError):  # another submitter has made the same
            os.rename(fresh, target)
            flush(ledger.codes)
    except OSError as error:
        if not target.is_dir():
            raise UserError(f"{ledger.codes}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target
