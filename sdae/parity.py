"""Replays recorded steps through the real training code and reports how far the numbers are apart.

A golden file is safetensors: pictures, mask noise and weights before the first step; loss, prediction, target,
gradients of the first step and weights after the last one. Its metadata `config` says everything the steps need.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdae.config import Pretrain, count_masked, parse
from sdae.errors import UserError
from sdae.methods.mae import MAE
from sdae.methods.sdae import SdAE
from sdae.released import header_size
from sdae.training.checkpoints import must_fit
from sdae.training.optimizers import adamw
from sdae.views import View, split

LIMITS = {
    "loss_error": 1e-5, "prediction_error": 1e-5, "target_error": 1e-5,
    "gradient_error": 1e-4, "weight_error": 1e-5, "teacher_error": 1e-5,
}  # fmt: skip


def replay(path: str | Path) -> dict[str, Any]:
    """The errors of one golden file, null where it has no counterpart (MAE has no target and no teacher).

    loss, prediction, target: largest absolute difference. gradients: relative to each tensor's largest value. weights,
    teacher: relative L2 norm of each tensor. Left out: the key third of `attn.qkv.bias`, whose true gradient is zero.
    """
    tensors, golden = _read(Path(path))
    try:
        return _replay(str(path), tensors, golden)
    except KeyError as error:
        raise UserError(f"{path}: not a golden file: {error.args[0]!r} is missing") from None
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a golden file that can be replayed: {reason}") from None


def _replay(path: str, tensors: dict[str, Tensor], golden: dict[str, Any]) -> dict[str, Any]:
    mae = golden["format"].startswith("mae")
    config = _config(path, golden, mae)
    student = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    must_fit(student, lambda: (MAE(config) if mae else SdAE(config, _view(golden, config))).student, path)
    model: SdAE | MAE = MAE(config) if mae else SdAE(config, _view(golden, config))
    for module, prefix in ((model.student, "student."), (getattr(model, "teacher", None), "teacher.")):
        if module is not None:
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    optimizer = adamw(model.student, golden["lr"], golden["weight_decay"], golden["betas"], eps=golden["eps"])

    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    errors: dict[str, float | None] = dict.fromkeys(LIMITS)
    losses = []
    for step in range(golden["steps"]):
        images = (tensors["images"][step] / 255 - mean[:, None, None]) / deviation[:, None, None]
        output = model(images, tensors["noise"][step])
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
        if step == 0:
            _, masked = split(tensors["noise"][0], model.visible)
            errors["prediction_error"] = _prediction_error(output.prediction, masked, tensors["expected.prediction"])
            errors["gradient_error"] = _gradient_error(model, tensors)
            if not mae:
                errors["target_error"] = _target_error(output.target, masked, tensors["expected.target"])
        optimizer.step()
        if isinstance(model, SdAE):
            ends_epoch = (step + 1) % golden["steps_per_epoch"] == 0
            if golden["ema_every"] == "iteration" or ends_epoch:
                model.update_teacher(golden["momentum_per_epoch"][step // golden["steps_per_epoch"]])
    errors["loss_error"] = float((torch.tensor(losses, dtype=torch.float64) - tensors["expected.loss"]).abs().max())
    errors["weight_error"] = _weight_error(model.student, "expected.student.", tensors)
    if isinstance(model, SdAE):
        errors["teacher_error"] = _weight_error(model.teacher, "expected.teacher.", tensors)
    passed = all(e is None or e <= LIMITS[name] for name, e in errors.items())  # NaN fails
    return {"file": path, **errors, "passed": passed}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        header_size(path)
        with safe_open(path, "pt") as file:
            golden = json.loads((file.metadata() or {})["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if not isinstance(golden, dict):
            raise TypeError("config")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: its metadata has no `config` with a JSON object") from None
    return tensors, golden


def _config(path: str, golden: dict[str, Any], mae: bool) -> Pretrain:
    method: dict[str, Any] = {"name": "mae" if mae else "sdae", "mask_ratio": golden["mask_ratio"]}
    if mae:
        method["normalize_pixels"] = golden["normalize_pixels"]
    else:
        teacher = {
            "view": "full" if golden["teacher_tokens"] is None else "masked",
            "normalize": golden["teacher_normalize"],
        }
        method |= {"teacher": teacher, "similarity": golden["cosine_axis"]}
    config = parse({
        "stage": "pretrain", "precision": "fp32", "data": {"image_size": golden["image_size"]}, "method": method,
        "model": {
            "width": golden["embed_dim"], "depth": golden["depth"], "heads": golden["num_heads"],
            "patch_size": golden["patch_size"], "decoder_depth": golden["decoder_depth"], "drop_path": 0.0,
            "decoder_dim": golden["decoder_embed_dim"], "decoder_heads": golden["decoder_num_heads"],
        },
    }, f"{path}: golden config")  # fmt: skip
    assert isinstance(config, Pretrain)
    return config


def _view(golden: dict[str, Any], config: Pretrain) -> View:
    """The recorded view; unlike a config it may also cut a crop into folds."""
    tokens, folds = golden["teacher_tokens"], golden["teacher_folds"] or 1
    masked = count_masked(config.tokens, golden["mask_ratio"])
    return View(masked, full=True) if tokens is None else View(min(tokens, masked) // folds, folds)


def _prediction_error(prediction: Tensor, masked: Tensor, expected: Tensor) -> float:
    """Only the tokens that the loss uses; `expected` holds all L tokens in raster order."""
    used = prediction.detach().reshape(expected.shape[0], -1, expected.shape[2])
    index = masked[:, : used.shape[1], None].expand(-1, -1, expected.shape[2])
    return float((used - expected.gather(1, index)).abs().max())


def _target_error(target: Tensor, masked: Tensor, expected: Tensor) -> float:
    if expected.dim() == 2:  # the full image: masked tokens in raster order, flattened over pictures
        order = masked.argsort(dim=1)[:, :, None].expand(-1, -1, target.shape[2])
        target = target.gather(1, order).flatten(0, 1)
    return float((target - expected).abs().max())


def _without_key_bias(name: str, value: Tensor) -> Tensor:
    if name.endswith("attn.qkv.bias"):
        third = value.shape[0] // 3
        return torch.cat([value[:third], value[2 * third :]])
    return value


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one group; a file without any of them proves nothing."""
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}*")
    return found


def _gradient_error(model: SdAE | MAE, tensors: dict[str, Tensor]) -> float:
    worst = 0.0
    parameters = dict(model.student.named_parameters())
    for name, expected in _below("expected.grad.", tensors).items():
        gradient = parameters[name].grad
        if gradient is None:
            raise KeyError(f"gradient of {name}")
        expected = _without_key_bias(name, expected)
        gap = (_without_key_bias(name, gradient) - expected).abs().max()
        worst = _worse(worst, float(gap / expected.abs().max().clamp_min(1e-30)))
    return worst


def _weight_error(module: torch.nn.Module, prefix: str, tensors: dict[str, Tensor]) -> float:
    worst = 0.0
    ours = module.state_dict()
    for name, expected in _below(prefix, tensors).items():
        expected = _without_key_bias(name, expected).double()
        gap = _without_key_bias(name, ours[name]).double() - expected
        worst = _worse(worst, float(gap.norm() / expected.norm().clamp_min(1e-30)))
    return worst


def _worse(a: float, b: float) -> float:
    return a if math.isnan(a) or b <= a else b  # NaN is the worst of all
