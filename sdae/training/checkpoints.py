"""Checkpoints: safetensors with JSON metadata, last and previous, a torn one told by its checksum. No pickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdae.errors import UserError
from sdae.store import read_json, sync_folder, to_json, write_atomically

KEPT = 2


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Writes a safetensors file by temporary name and rename; returns its sha256."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(flat, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors keeps its files to their owner; a store may be shared
        digest = checksum(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error}") from error
    return digest


def load_weights(path: Path, digest: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. A torn or changed file is a `UserError`."""
    try:
        if digest is not None and checksum(path) != digest:
            raise UserError(f"{path}: torn or changed since it was written (its sha256 differs from the recorded one)")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    decoded: dict[str, Any] = {}
    for key, value in metadata.items():
        try:
            decoded[key] = json.loads(value)
        except ValueError:
            decoded[key] = value
    return tensors, decoded


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """The state from which a run goes on; its checksum, written last, makes it valid. Keeps the previous one too."""
    path = folder / f"state-{step:08d}.safetensors"
    digest = save_weights(path, tensors, {**metadata, "step": step})
    write_atomically(path.with_suffix(".sha256.json"), to_json({"sha256": digest}))
    for old in states(folder)[KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256.json").unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """State files, the latest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest state that is whole, or None."""
    for path in states(folder):
        record = read_json(path.with_suffix(".sha256.json"))
        with contextlib.suppress(UserError):
            if record is not None:
                return load_weights(path, record.get("sha256"))
    return None


def forget_states(folder: Path) -> None:
    for path in folder.glob("state-*"):
        path.unlink(missing_ok=True)
