"""The released encoders that Tables 2-4 want, and the folder where imported ones lie. Without torch.

A bare name in `init: {weights: file:NAME.safetensors}` that is not in the working folder is looked up in that folder.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sdae.data.fingerprint import cache_folder
from sdae.errors import UserError
from sdae.files import checksum, parse_json, plain_file

SUFFIX = ".safetensors"
NOT_PUBLISHED = "not published"
HEADER_LIMIT = 8_000_000  # bytes; an encoder has some 100,000


@dataclass(frozen=True)
class Released:
    """One method's encoder as its authors released it (ViT-B/16, ImageNet-1k, 224 px).

    timm: timm's name of it, where timm has it. file: as its project names it. digest: of that file, where its project
    publishes one.
    """

    method: str
    epochs: int
    layout: str
    project: str
    file: str
    licence: str
    digest: str = NOT_PUBLISHED
    timm: str | None = None
    positions: Literal["absolute", "relative", "both"] = "absolute"
    layer_scale: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """The keys of `model` that these weights want beside the arch."""
        return {"positions": self.positions, "layer_scale": self.layer_scale}


RELEASED = {
    "deit-300": Released(
        "DeiT", 300, "deit", "facebookresearch/deit", "deit_base_patch16_224-b5f2ef4d.pth", "Apache-2.0",
        "sha256 begins with b5f2ef4d", timm="deit_base_patch16_224.fb_in1k",
    ),
    "moco-v3-300": Released(
        "MoCo v3", 300, "moco-v3", "facebookresearch/moco-v3", "vit-b-300ep.pth.tar", "CC BY-NC 4.0",
    ),
    "dino-400": Released(
        "DINO", 400, "dino", "facebookresearch/dino", "dino_vitbase16_pretrain.pth", "Apache-2.0",
        timm="vit_base_patch16_224.dino",
    ),
    "beit-300": Released(
        "BEiT", 300, "beit", "microsoft/unilm (beit)", NOT_PUBLISHED, "MIT", positions="relative", layer_scale=True,
    ),
    "beit-800": Released(
        "BEiT", 800, "beit", "microsoft/unilm (beit)", NOT_PUBLISHED, "MIT", positions="relative", layer_scale=True,
    ),
    "cae-300": Released(
        "CAE", 300, "cae", "lxtGH/CAE", "CAE-base, 300 epochs, in the README's folder", "not stated", layer_scale=True,
    ),
}  # fmt: skip


def weights_folder() -> Path:
    """$SDAE_WEIGHTS, or `weights` in the user's cache folder."""
    return Path(os.path.expanduser(os.environ.get("SDAE_WEIGHTS") or cache_folder() / "weights"))


def find_weights(name: str) -> Path | None:
    """The imported file of this name (`beit-300`, with or without .safetensors), if it is there."""
    path = home_of(name)
    return path if path.is_file() else None


def home_of(name: str) -> Path:
    """Where weights imported under this name lie. Raises UserError for a name that is none."""
    bare = name.removesuffix(SUFFIX)
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", bare):
        raise UserError(f"weights {name!r}: expected a bare name, e.g. beit-300 (letters, digits, '.', '_', '+', '-')")
    return weights_folder() / f"{bare}{SUFFIX}"


def located(named: str) -> Path:
    """The file that `file:PATH` means: PATH itself, or, for a bare name that is not here, that of `weights_folder`."""
    path = Path(os.path.expanduser(named))  # Path's own ends in an error for a user that is not there
    if len(path.parts) == 1 and not path.exists() and path.suffix == SUFFIX:
        kept = weights_folder() / path
        return kept if kept.is_file() else path
    return path


def digest_of(weights: str) -> str | None:
    """The sha256 of what `file:PATH` means, null where it is not there."""
    path = located(weights.removeprefix("file:"))
    try:
        state = path.stat()
    except OSError:
        return None
    return _digest(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _digest(path: str, _mtime: int, _size: int) -> str:
    return checksum(Path(path))


def header_size(path: Path) -> None:
    """Raises UserError where the head of a safetensors file is so long that reading it takes seconds and memory."""
    with open(path, "rb", opener=plain_file) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_LIMIT:
        raise UserError(f"{path}: not a whole safetensors file: a head of {size:,} bytes (allowed: {HEADER_LIMIT:,})")


def header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a safetensors file, and its metadata as plain values under `__metadata__`."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= HEADER_LIMIT:
                raise ValueError
            found = parse_json(file.read(size))
            ends = [value["data_offsets"][1] for key, value in found.items() if key != "__metadata__"]
            if path.stat().st_size != 8 + size + max(ends, default=0):
                raise ValueError
        metadata = found.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path}: not a whole safetensors file") from None
    return {**found, "__metadata__": {key: plain(value) for key, value in metadata.items()}}


def plain(value: str) -> Any:
    """An entry of a file's metadata; as it is where it is no JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def inventory() -> list[dict[str, Any]]:
    """Every file of the folder of weights, by name, with what its import said of it and its sha256."""
    rows: list[dict[str, Any]] = []
    for path in sorted(weights_folder().glob(f"*{SUFFIX}")):
        row: dict[str, Any] = {"name": path.stem, "file": str(path), **dict.fromkeys(("bytes", "problem", "sha256"))}
        said: Any = {}
        try:
            row |= {"bytes": path.stat().st_size, "sha256": checksum(path)}
            said = header(path)["__metadata__"].get("sdae")
        except (OSError, UserError) as error:
            row["problem"] = str(error)
        for key in ("layout", "width", "depth", "patch_size", "positions", "layer_scale"):
            row[key] = said.get(key) if isinstance(said, dict) else None
        rows.append(row)
    return rows


def wanted() -> list[dict[str, Any]]:
    """The released encoders that Tables 2-4 want: what they are, and whether they are here, in timm, or missing."""
    rows = []
    for name, released in RELEASED.items():
        here = find_weights(name)
        state = "imported" if here else f"timm:{released.timm}" if released.timm else "missing"
        rows.append(
            {
                "name": name, "method": released.method, "epochs": released.epochs, "layout": released.layout,
                "project": released.project, "published": released.file, "licence": released.licence,
                "digest": released.digest, **released.model, "state": state,
            }
        )  # fmt: skip
    return rows
