"""Encoder weights in and out: from runs, timm, files and released checkpoints (`sdae.layouts`). Strict."""

from __future__ import annotations

import argparse
import pickle  # for the name of an error  # nosec B403
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdae.errors import UserError
from sdae.files import DEEPEST, checksum, plain_file
from sdae.layouts import LAYOUTS, TABLE, describe, encoders, kind, name_differences, patches_of_table
from sdae.released import SUFFIX, home_of, located, weights_folder
from sdae.sections import Init, Model
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import KINDS, load_weights, save_weights

SAID = "sdae"  # the one key of a file's metadata


def epoch_file(which: str, epoch: int) -> str:
    """The file of an encoder after an epoch."""
    return f"{which}-epoch-{epoch:05d}.safetensors"


def encoder_of_run(run: RunFolder, which: str, epoch: int | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Student's or teacher's encoder after some completed epoch of a finished pre-training, checksum proved."""
    written = run.outcome()["weights"]
    pattern = re.compile(rf"{re.escape(which)}-epoch-\d{{1,9}}\.safetensors", re.ASCII)
    saved = {name: digest for name, digest in written.items() if pattern.fullmatch(name)}
    if not saved:
        has = sorted({name.split("-")[0] for name in written if "-epoch-" in name})
        raise UserError(f"{run.id}: has no {which} (its saved encoders: {', '.join(has) or 'none'})")
    name = max(saved) if epoch == "last" else epoch_file(which, int(epoch))
    if name not in saved:
        epochs = ", ".join(str(int(n.split("-")[2].split(".")[0])) for n in sorted(saved))
        raise UserError(f"{run.id}: init.epoch: {epoch} was not saved (allowed: last, {epochs})")
    return load_weights(run.checkpoints / name, saved[name])


def load_init(init: Init, store: Store, model: Model, image_size: int) -> dict[str, Tensor] | None:
    """The encoder weights that `init` names, fitted to the picture size; None for random. Raises UserError."""
    if init.run is not None:
        weights, where = encoder_of_run(store.run(init.run), init.weights, init.epoch)[0], init.run
    elif init.weights == "random":
        return None
    elif init.weights.startswith("timm:"):
        weights, where = _from_timm(init.weights.removeprefix("timm:")), init.weights
    else:
        path = located(init.weights.removeprefix("file:"))
        found = next(iter(encoders(read_any(path), "auto", str(path)).values()))
        return fit(found.tensors, model, image_size, str(path), found.missing)
    return fit(weights, model, image_size, where)


def with_digest(init: Init) -> Init:
    """`init` with the sha256 of its file, whose content is its identity. UserError for another one than asked."""
    if init.run is not None or not init.weights.startswith("file:"):
        return init
    path = located(init.weights.removeprefix("file:"))
    try:
        found = checksum(path)
    except OSError as error:
        raise UserError(f"init.weights: {path}: cannot be read: {error.strerror}") from None
    if init.digest not in (None, found):
        raise UserError(f"init.digest: {init.digest} is asked for, but {path} has {found}")
    return init.model_copy(update={"digest": found})


def fit(
    weights: dict[str, Tensor], model: Model, image_size: int, where: str, missing: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Proves that the weights are of this architecture; positions are resized to another picture size.

    missing: what their file lacks beside, under its own names. Raises UserError: for weights with another kind of
    positions or layer scale it says which keys to set.
    """
    from sdae.models.encoder import Encoder, resize_table

    asked = {"positions": model.positions, "layer_scale": model.layer_scale}
    if (found := kind(weights)) != asked:
        wants, has = (
            ", ".join(f"model.{key}: {str(value).lower()}" for key, value in values.items() if found[key] != asked[key])
            for values in (found, asked)
        )
        raise UserError(f"{where}: these weights want {wants} (this config has {has})")
    with torch.device("meta"):
        wanted = Encoder(model, image_size).state_dict()
    name_differences(set(wanted), set(weights), where, missing)
    out = dict(weights)
    side = image_size // (model.patch_size or 16)
    if "pos_embed" in wanted and out["pos_embed"].shape != wanted["pos_embed"].shape and _is_square(out["pos_embed"]):
        from timm.layers import resample_abs_pos_embed

        out["pos_embed"] = resample_abs_pos_embed(out["pos_embed"], [side, side])
    for name, tensor in wanted.items():
        if name.endswith(TABLE) and out[name].dim() == 2 and (patches := patches_of_table(len(out[name]))):
            out[name] = resize_table(out[name], round(patches**0.5), (side, side))
        if out[name].shape != tensor.shape:
            raise UserError(
                f"{where}: a checkpoint of another architecture: {name} is {tuple(out[name].shape)}, "
                f"this config's model ({model.arch}) wants {tuple(tensor.shape)}"
            )
    return out


def _is_square(positions: Tensor) -> bool:
    """Whether these are (1, 1 + side^2, width)."""
    patches = positions.shape[1] - 1 if positions.dim() == 3 else -1
    return len(positions) == 1 and patches > 0 and round(patches**0.5) ** 2 == patches


def _from_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever a hub's client raises
        raise UserError(f"init.weights: timm:{name}: {str(error).splitlines()[0] if str(error) else error!r}") from None
    return encoders(network.state_dict(), "timm", f"timm:{name}")["student"].tensors


def read_any(path: Path) -> dict[str, Any]:
    """A checkpoint file as it is: safetensors, or a PyTorch file read without running anything of it."""
    if path.suffix == ".safetensors":
        return dict(load_weights(path)[0])
    try:
        with open(path, "rb", opener=plain_file):  # no pipe, in which torch would wait
            _refuse_bomb(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        if isinstance(error, pickle.UnpicklingError):  # its own words tell how to run the file's code all the same
            reason = "it holds something else than tensors and plain values, of which nothing was run"
        elif isinstance(error, (EOFError, KeyError, ValueError, IndexError)):
            reason = "not what torch.save writes"
        raise UserError(f"{path}: not a whole checkpoint of tensors: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of tensors, got {type(content).__name__}")
    _refuse_views(content, path)
    return content


def _refuse_bomb(path: Path) -> None:
    """PyTorch's files are archives of plain entries: packed ones may stand for any amount of memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            told = sum(entry.file_size for entry in entries)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # none, or a broken one: torch says so
    if packed:
        raise UserError(f"{path}: not a checkpoint as PyTorch writes it: {packed[0]} is compressed")
    if told > (size := path.stat().st_size):
        raise UserError(f"{path}: not a checkpoint as PyTorch writes it: entries of {told:,} bytes in {size:,}")


def _refuse_views(content: dict[Any, Any], path: Path, above: tuple[int, ...] = ()) -> None:
    """No tensor may be more than what the file holds of it, as one with strides of 0 would be when it is copied, or of
    a kind that no safetensors file of ours has. Raises UserError."""
    if id(content) in above or len(above) > DEEPEST:
        raise UserError(f"{path}: mappings in one another without an end")
    for name, value in content.items():
        if isinstance(value, dict):
            _refuse_views(value, path, (*above, id(content)))
        elif isinstance(value, Tensor):
            plain = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
            if plain and value.dtype not in KINDS:
                raise UserError(f"{path}: {name}: {value.dtype} (allowed: {', '.join(sorted(KINDS.values()))})")
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{path}: {name}: not a plain tensor, or larger than what is stored of it")


def export_weights(store: Store, run: str, weights: str, epoch: int | str, out: Path) -> dict[str, Any]:
    """Writes a run's encoder as safetensors that `timm.create_model(..., num_classes=0, checkpoint_path=out)` loads."""
    folder = store.find(run)
    tensors, metadata = encoder_of_run(folder, weights, epoch)
    facts = describe(tensors, str(out))
    _writable_as_safetensors(out)
    digest = save_weights(out, tensors, {SAID: metadata | facts})
    return {"file": str(out), "run": folder.id, "weights": weights, "sha256": digest, **metadata, **facts}


def import_weights(path: Path, layout: str, out: Path | None = None, name: str | None = None) -> dict[str, Any]:
    """A released checkpoint as safetensors for `init: {weights: file:OUT}`: OUT, or NAME in the folder of weights.

    A second encoder of the file (a teacher) goes to OUT with `-teacher`. Returns what went where; raises UserError.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--from {layout}: unknown layout (allowed: {', '.join(LAYOUTS)})")
    if (out is None) == (name is None):
        raise UserError("weights import: say where to: --out FILE.safetensors, or --as NAME for the folder of weights")
    if name is not None:
        out = home_of(name)
    else:
        assert out is not None
        _writable_as_safetensors(out)
    found = encoders(read_any(path), layout, str(path))
    facts = {which: describe(encoder.tensors, f"{path}: {which}", encoder.missing) for which, encoder in found.items()}
    if name is not None:
        try:
            weights_folder().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{weights_folder()}: cannot be written: {error.strerror}") from None
    source = checksum(path)
    files = {}
    for i, (which, encoder) in enumerate(found.items()):
        target = out if i == 0 else out.with_name(f"{out.stem}-{which}{SUFFIX}")
        said = {"layout": layout, "source": source, "encoder": which, "filled": sorted(encoder.filled), **facts[which]}
        digest = save_weights(target, encoder.tensors, {SAID: said})
        files[which] = {
            "file": str(target), "sha256": digest, "tensors": len(encoder.tensors), **facts[which],
            "mapped": dict(encoder.mapped), "filled": encoder.filled,
        }  # fmt: skip
    left_out = sorted({key for encoder in found.values() for key in encoder.left_out})
    return {"source": str(path), "sha256": source, "layout": layout, "encoders": files, "left_out": left_out}


def _writable_as_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the file must end in .safetensors")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
