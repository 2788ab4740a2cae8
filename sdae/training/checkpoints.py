"""Checkpoints: safetensors with JSON metadata, last and previous, a torn one told by its checksum. No pickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdae.errors import UserError
from sdae.files import checksum, read_record, to_json, write_atomically, written
from sdae.released import header_size, plain
from sdae.store import RunFolder
from sdae.upkeep import pruned as pruned_of

KEPT = 2
KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip  # as safetensors calls them


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Writes a safetensors file by temporary name and rename; returns its sha256.

    safetensors' own `save_file` is not used: killed, it leaves a temporary file under a name that nobody knows, and the
    order of its metadata is not fixed. Here the same tensors and metadata give the same bytes.
    """
    flat = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # aligned, as the format asks
    header: dict[str, Any] = {"__metadata__": {key: json.dumps(value) for key, value in sorted(metadata.items())}}
    end = 0
    for name, tensor in flat:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with written(path) as file:
        for part in (len(text).to_bytes(8, "little") + text, *(tensor for _, tensor in flat)):
            content = part if isinstance(part, bytes) else memoryview(_bytes(part).numpy())  # type: ignore[arg-type]
            file.write(content)
            digest.update(content)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def load_weights(path: Path, digest: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. A torn or changed file is a `UserError`."""
    try:
        header_size(path)
        if digest is not None and checksum(path) != digest:
            raise UserError(f"{path}: torn or changed since it was written (its sha256 differs from the recorded one)")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        removed = path.name in pruned_of(RunFolder(path.parent.parent))
        cure = f": `results prune` removed it; remove {path.parent.parent} and run it again to have it"
        raise UserError(f"{path}: no such checkpoint{cure if removed else ''}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    return tensors, {key: plain(value) for key, value in metadata.items()}


def load_model(folder: RunFolder, network: Callable[[int], nn.Module]) -> tuple[Any, list[str]]:
    """The network (on the CPU, in eval mode) and the class names of a finished run with labels, checksum proved.

    network: makes it for so many classes. Raises UserError.
    """
    file = folder.checkpoints / "model.safetensors"
    tensors, metadata = load_weights(file, folder.outcome()["weights"].get(file.name))
    classes = metadata.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{file}: its metadata names no classes")
    must_fit(tensors, lambda: network(len(classes)), str(folder.path))
    module = network(len(classes))
    module.load_state_dict(tensors)
    return module.eval(), classes


def must_fit(tensors: dict[str, Tensor], network: Callable[[], nn.Module], where: str) -> None:
    """Proves that tensors are those of a network, before that takes memory. Raises UserError."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in network().state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != given:
        odd = min(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        there, asked = (str(shapes.get(odd, "not there")) for shapes in (given, wanted))
        raise UserError(f"{where}: weights of another network: {odd} is {there}, its config wants {asked}")


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """The state from which a run goes on; its checksum, written last, makes it valid. Keeps the previous one too."""
    RunFolder(folder.parent).sync_metrics()
    path = folder / f"state-{step:08d}.safetensors"
    digest = save_weights(path, tensors, {**metadata, "step": step})
    write_atomically(path.with_suffix(".sha256.json"), to_json({"sha256": digest}))
    whole = [file for file in states(folder) if file <= path and file.with_suffix(".sha256.json").exists()][:KEPT]
    for old in states(folder):  # later ones were torn, or killed in their writing: this run began before them
        if old not in whole:
            old.unlink(missing_ok=True)
            old.with_suffix(".sha256.json").unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """State files, the latest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest state that is whole, or None."""
    for path in states(folder):
        record = read_record(path.with_suffix(".sha256.json"))
        with contextlib.suppress(UserError):
            if record is not None:
                return load_weights(path, record.get("sha256"))
    return None


def forget_states(folder: Path) -> None:
    """Of a run that is done; what cannot be removed now goes when the run is called again."""
    for path in folder.glob("state-*"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
