"""Steps recorded from the authors' programme, replayed through the training code by `sdae-cli parity`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import assert_refused, call
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdae.parity import LIMITS

GOLDEN = Path(__file__).parent / "golden"
FOLDS, FULL, MAE = (
    GOLDEN / f"{name}.safetensors"
    for name in ("folds3-64tokens-epoch.part", "full-64tokens-iteration.part", "mae-64tokens-normpix")
)
Golden = tuple[dict[str, Tensor], dict[str, Any]]


def read(path: Path) -> Golden:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def copy(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], out: Path) -> Path:
    """A golden file with something changed in it."""
    tensors, config = read(path)
    change(tensors, config)
    save_file(tensors, out, metadata={"config": json.dumps(config)})
    return out


def add(name: str, amount: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[name].view(-1)[0] += amount

    return change


def setting(**values: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, config: config.update(values)


def errors(row: dict[str, Any]) -> set[str]:
    """Which errors are over their limit."""
    return {name for name, limit in LIMITS.items() if row[name] is not None and not row[name] <= limit}


def test_recorded_steps_are_met() -> None:
    called = call("parity", FOLDS, FULL, MAE, "--json")
    assert called.code == 0
    rows = json.loads(called.out)
    assert [row["file"] for row in rows] == [str(FOLDS), str(FULL), str(MAE)]
    for row in rows:
        assert list(row) == ["file", *LIMITS, "passed"]
        assert row["passed"] is True
        assert errors(row) == set()
    assert rows[2]["target_error"] is rows[2]["teacher_error"] is None
    assert all(isinstance(rows[0][name], float) for name in LIMITS)
    assert "passed" in call("parity", MAE).out


def test_all_shared_recordings(shared: Path) -> None:
    files = sorted((shared / "golden").glob("*.safetensors"))
    called = call("parity", *files, "--json")
    assert called.code == 0
    assert len(json.loads(called.out)) == len(files) >= 4


@pytest.mark.parametrize(
    ("file", "change", "wrong"),
    [
        (FOLDS, add("expected.loss", 1e-4), {"loss_error"}),
        (FOLDS, add("expected.target", 1e-3), {"target_error"}),
        (FULL, add("expected.target", 1e-3), {"target_error"}),
        (FOLDS, add("expected.grad.norm.weight", 1.0), {"gradient_error"}),
        (FOLDS, add("expected.student.cls_token", 1e-3), {"weight_error"}),
        (FOLDS, add("expected.teacher.pos_embed", 1e-2), {"teacher_error"}),
        (MAE, add("expected.student.mask_token", float("nan")), {"weight_error"}),
        (MAE, add("expected.grad.cls_token", float("nan")), {"gradient_error"}),
        (FULL, add("expected.teacher.blocks.0.norm1.bias", float("nan")), {"teacher_error"}),
        (FOLDS, setting(momentum_per_epoch=[0.9, 0.93]), {"teacher_error"}),
        (FOLDS, setting(ema_every="iteration"), {"teacher_error", "loss_error", "weight_error"}),
        (MAE, setting(weight_decay=0.0), {"weight_error", "loss_error"}),
        (MAE, setting(betas=[0.9, 0.999]), {"weight_error"}),
    ],
)
def test_a_difference_is_found_where_it_is(file: Path, change: Any, wrong: set[str], tmp_path: Path) -> None:
    called = call("parity", copy(file, change, tmp_path / "tampered.safetensors"), "--json")
    assert called.code == 1
    (row,) = json.loads(called.out)
    assert row["passed"] is False
    found = errors(row) | {name for name in LIMITS if row[name] is None and name in wrong}  # JSON has no NaN
    assert found == wrong


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (FOLDS, setting(cosine_axis="channels")),
        (FULL, setting(cosine_axis="tokens")),
        (FOLDS, setting(teacher_folds=None)),
        (FOLDS, setting(teacher_tokens=None, teacher_folds=None)),
        (FOLDS, setting(teacher_normalize=False)),
        (MAE, setting(normalize_pixels=False)),
    ],
)
def test_settings_are_not_ignored(file: Path, change: Any, tmp_path: Path) -> None:
    called = call("parity", copy(file, change, tmp_path / "other.safetensors"), "--json")
    if called.code == 2:  # shapes do not fit any more
        assert_refused(called, "other.safetensors")
    else:
        assert called.code == 1
        assert json.loads(called.out)[0]["passed"] is False


def test_only_tokens_that_the_loss_uses_are_compared(tmp_path: Path) -> None:
    tensors, _ = read(FOLDS)
    visible = next(i for i in range(64) if i not in tensors["expected.ids_masked"].view(2, -1)[0].tolist())

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["expected.prediction"][0, visible] += 1

    assert call("parity", copy(FOLDS, change, tmp_path / "visible.safetensors")).code == 0
    masked = int(tensors["expected.ids_masked"].view(2, -1)[0, 0])

    def used(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["expected.prediction"][0, masked] += 1e-3

    (row,) = json.loads(call("parity", copy(FOLDS, used, tmp_path / "masked.safetensors"), "--json").out)
    assert errors(row) == {"prediction_error"}


def test_the_key_bias_is_left_out(tmp_path: Path) -> None:
    def change(part: int) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
        def add_to(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
            for group in ("grad", "student"):
                bias = tensors[f"expected.{group}.blocks.1.attn.qkv.bias"]
                third = len(bias) // 3
                bias[part * third : (part + 1) * third] += 0.1

        return add_to

    codes = [call("parity", copy(MAE, change(part), tmp_path / f"{part}.safetensors")).code for part in range(3)]
    assert codes == [1, 0, 1]


def drop(prefix: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for owner in (tensors, config):
            for key in [k for k in owner if k.startswith(prefix)]:
                del owner[key]

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (drop("noise"), "noise"),
        (drop("format"), "format"),
        (drop("lr"), "lr"),
        (drop("expected.loss"), "expected.loss"),
        (drop("expected.grad"), "expected.grad"),
        (drop("expected.student"), "expected.student"),
        (drop("student.norm"), "norm.bias is not there"),
        (setting(steps=9), "replayed"),
        (setting(format=1), "replayed"),
        (setting(steps_per_epoch=0), "replayed"),
        (setting(momentum_per_epoch=[]), "replayed"),
        (setting(depth=3), "weights of another network: blocks.2"),
        (setting(mask_ratio=2), "mask_ratio"),
        (setting(num_heads=5), "heads"),
        (setting(cosine_axis="rows"), "similarity"),
        (setting(image_size=64), "weights of another network"),
    ],
)
def test_an_incomplete_recording_is_bad_input(change: Any, part: str, tmp_path: Path) -> None:
    assert_refused(call("parity", copy(FOLDS, change, tmp_path / "odd.safetensors")), "odd.safetensors", part)


def test_garbage_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "garbage.safetensors"
    for content in (b"", b"garbage" * 99, FOLDS.read_bytes()[:-100], b"\xff" * 8):
        file.write_bytes(content)
        assert_refused(call("parity", file), "garbage.safetensors")
    for metadata in (None, {"config": "{"}, {"config": "[1]"}, {"other": "1"}):
        save_file({"x": torch.zeros(1)}, file, metadata=metadata)
        assert_refused(call("parity", file), "garbage.safetensors", "config")
    assert_refused(call("parity", tmp_path / "absent.safetensors"), "no such file")
    assert_refused(call("parity", tmp_path))
