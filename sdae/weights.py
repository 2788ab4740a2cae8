"""Encoder weights in and out: from runs, timm, files; the layouts of the SdAE and MAE releases and of timm. Strict."""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdae.config import Init, Model
from sdae.errors import UserError
from sdae.store import RunFolder, Store
from sdae.training.checkpoints import checksum, load_weights, save_weights

DECODER = ("decoder_", "mask_token")
HEAD = ("head.", "fc_norm.", "head_drop")


def epoch_file(which: str, epoch: int) -> str:
    return f"{which}-epoch-{epoch:05d}.safetensors"


def encoder_of_run(run: RunFolder, which: str, epoch: int | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Student's or teacher's encoder after some completed epoch of a finished pre-training, checksum proved."""
    result = run.result()
    if result is None:
        raise UserError(f"{run.path}: this pre-training is not done")
    saved = {name: digest for name, digest in result.get("weights", {}).items() if name.startswith(f"{which}-epoch-")}
    if not saved:
        has = sorted({name.split("-")[0] for name in result.get("weights", {}) if "-epoch-" in name})
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
        path = Path(init.weights.removeprefix("file:")).expanduser()
        weights, where = split_layout(read_any(path), "auto", str(path))["student"], str(path)
    return fit(weights, model, image_size, where)


def with_digest(init: Init) -> Init:
    """`init` with the sha256 of its file, whose content is its identity. UserError for another one than asked."""
    if init.run is not None or not init.weights.startswith("file:"):
        return init
    path = Path(init.weights.removeprefix("file:")).expanduser()
    try:
        found = checksum(path)
    except OSError as error:
        raise UserError(f"init.weights: {path}: cannot be read: {error.strerror}") from None
    if init.digest not in (None, found):
        raise UserError(f"init.digest: {init.digest} is asked for, but {path} has {found}")
    return init.model_copy(update={"digest": found})


def fit(weights: dict[str, Tensor], model: Model, image_size: int, where: str) -> dict[str, Tensor]:
    """Proves that the weights are of this architecture; positions are interpolated to another picture size."""
    from sdae.models.encoder import Encoder

    with torch.device("meta"):
        wanted = Encoder(model, image_size).state_dict()
    _name_differences(set(wanted), set(weights), where)
    out = dict(weights)
    if out["pos_embed"].shape != wanted["pos_embed"].shape and out["pos_embed"].shape[2] == model.width:
        from timm.layers import resample_abs_pos_embed

        side = int((wanted["pos_embed"].shape[1] - 1) ** 0.5)
        out["pos_embed"] = resample_abs_pos_embed(out["pos_embed"], [side, side])
    for name, tensor in wanted.items():
        if out[name].shape != tensor.shape:
            raise UserError(
                f"{where}: a checkpoint of another architecture: {name} is {tuple(out[name].shape)}, "
                f"this config's model ({model.arch}) wants {tuple(tensor.shape)}"
            )
    return out


def _name_differences(wanted: set[str], given: set[str], where: str) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        parts = [
            f"{what}: {', '.join(keys)}" for what, keys in (("missing keys", missing), ("extra keys", extra)) if keys
        ]
        raise UserError(f"{where}: not this architecture's encoder; {'; '.join(parts)}")


def _from_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever a hub's client raises
        raise UserError(f"init.weights: timm:{name}: {str(error).splitlines()[0] if str(error) else error!r}") from None
    return {k: v for k, v in network.state_dict().items() if not k.startswith(HEAD)}


def read_any(path: Path) -> dict[str, Any]:
    """A checkpoint file as it is: safetensors, or a PyTorch file read without running anything of it."""
    if path.suffix == ".safetensors":
        return dict(load_weights(path)[0])
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a whole checkpoint of tensors: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of tensors, got {type(content).__name__}")
    return content


def split_layout(content: dict[str, Any], layout: str, where: str) -> dict[str, dict[str, Tensor]]:
    """Encoders by name (student, and teacher where the layout has one), under timm's names."""
    parts = {"student": content.get("model", content)}
    if layout == "sdae" or (layout == "auto" and "model_teacher" in content):
        if "model_teacher" not in content or "model" not in content:
            raise UserError(
                f"{where}: the SdAE release's layout has the keys model and model_teacher; here: {_keys(content)}"
            )
        parts["teacher"] = content["model_teacher"]
    elif layout == "mae" and "model" not in content:
        raise UserError(f"{where}: MAE's layout has the key model; here: {_keys(content)}")
    out = {}
    for name, part in parts.items():
        tensors = isinstance(part, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items())
        if not part or not tensors:
            raise UserError(f"{where}: {name}: expected a mapping of tensors; here: {_keys(part)}")
        stripped = {key.removeprefix("module."): value for key, value in part.items()}
        out[name] = {k: v for k, v in stripped.items() if not k.startswith((*DECODER, *HEAD))}
    return out


def _keys(content: Any) -> str:
    return ", ".join(sorted(map(str, content))[:8]) if isinstance(content, dict) else type(content).__name__


def describe(weights: dict[str, Tensor], where: str) -> dict[str, int]:
    """Width, depth, patch size and tokens read off the shapes; every missing or extra key is named."""
    blocks = {int(m[1]) for key in weights if (m := re.match(r"blocks\.(\d+)\.", key))}
    depth = max(blocks, default=-1) + 1
    per_block = [
        f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]  # fmt: skip
    wanted = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    wanted |= {f"blocks.{i}.{name}" for i in range(max(depth, 1)) for name in per_block}
    _name_differences(wanted, set(weights), where)
    shape = weights["patch_embed.proj.weight"].shape
    if len(shape) != 4:
        raise UserError(f"{where}: patch_embed.proj.weight is {tuple(shape)}, not (width, channels, patch, patch)")
    width, channels, patch, _ = shape
    return {
        "width": width, "depth": depth, "patch_size": patch, "channels": channels,
        "tokens": weights["pos_embed"].shape[1] - 1,
    }  # fmt: skip


def export_weights(store: Store, run: str, weights: str, epoch: int | str, out: Path) -> dict[str, Any]:
    """Writes a run's encoder as safetensors that `timm.create_model(..., num_classes=0, checkpoint_path=out)` loads."""
    folder = store.find(run)
    tensors, metadata = encoder_of_run(folder, weights, epoch)
    facts = describe(tensors, str(out))
    _writable_as_safetensors(out)
    digest = save_weights(out, tensors, metadata | facts)
    return {"file": str(out), "run": folder.id, "weights": weights, "sha256": digest, **metadata, **facts}


def import_weights(path: Path, layout: str, out: Path) -> dict[str, Any]:
    """A released checkpoint as safetensors for `init: {weights: file:OUT}`. A teacher goes to OUT with `-teacher`."""
    if layout not in ("sdae", "mae", "timm"):
        raise UserError(f"--from {layout}: unknown layout (allowed: sdae, mae, timm)")
    _writable_as_safetensors(out)
    content = read_any(path)
    encoders = split_layout(content, layout, str(path))
    facts = {name: describe(weights, f"{path}: {name}") for name, weights in encoders.items()}
    files = {}
    for name, weights in encoders.items():
        target = out if name == "student" else out.with_name(f"{out.stem}-{name}{out.suffix}")
        digest = save_weights(target, weights, {"layout": layout, "source": path.name, **facts[name]})
        files[name] = {"file": str(target), "sha256": digest, "tensors": len(weights), **facts[name]}
    source = content.get("model", content)
    left_out = sorted(k for k in source if k.removeprefix("module.").startswith((*DECODER, *HEAD)))
    return {"source": str(path), "layout": layout, "encoders": files, "left_out": left_out}


def _writable_as_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the file must end in .safetensors")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
