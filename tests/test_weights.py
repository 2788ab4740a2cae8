"""Encoder weights: out to timm, in from runs, files and released checkpoints; every odd key named, nothing executed."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from calling import assert_refused, call
from conftest import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdae.config import run_id
from sdae.errors import RunFailed, UserError
from sdae.models.encoder import Encoder
from sdae.run import execute
from sdae.sections import Init, Model
from sdae.stages.pretrain import build
from sdae.store import Store
from sdae.training.checkpoints import load_weights
from sdae.weights import load_init, read_any

TINY_VIT = {"arch": "vit_tiny_patch16", "width": None, "depth": None, "heads": None, "patch_size": 8}
STILL = {"base_lr": 1e-30, "min_lr": 0.0, "epochs": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A tiny pre-training: width 24, depth 2, patch 8 at 32 px, three epochs."""
    store = Store(tmp_path_factory.mktemp("store"))
    return store, execute(tiny("pretrain", optim={"base_lr": 0.05}), store)["id"]


def encoder(model: Model, image_size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    network = Encoder(model, image_size)
    network.init_timm()
    return network.state_dict()


@pytest.fixture
def student() -> dict[str, Tensor]:
    """What a release's `model` holds: encoder and decoder."""
    module = build(tiny("pretrain"))
    return module.student.state_dict()


# Out


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_timm_loads_an_export_strictly_and_computes_the_same(which: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = tiny(
        "pretrain", model=TINY_VIT, optim={"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "base_lr": 0.01}
    )
    identity = execute(config, Store(store))["id"]
    out = tmp_path / "encoder.safetensors"
    called = call("weights", "export", identity[:14], "--weights", which, "--out", out, "--store", store, "--json")
    assert called.code == 0, called
    report = json.loads(called.out)
    assert (report["width"], report["depth"], report["patch_size"], report["tokens"]) == (192, 12, 8, 16)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, checkpoint_path=str(out)
    ).eval()
    ours = Encoder(config.model, 32)
    ours.load_state_dict(load_weights(Store(store).run(identity).checkpoints / f"{which}-epoch-00001.safetensors")[0])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network.forward_features(images), rtol=1e-4, atol=1e-5)
    assert set(load_file(out)) == set(network.state_dict())


def test_an_export_goes_round_through_file(pretrained: tuple[Store, str], tmp_path: Path) -> None:
    store, identity = pretrained
    out = tmp_path / "teacher.safetensors"
    called = call(
        "weights", "export", identity, "--weights", "teacher", "--epoch", 2, "--out", out, "--store", store.root
    )
    assert called.code == 0
    init = Init(weights=f"file:{out}")
    loaded = load_init(init, store, tiny("pretrain").model, 32)
    wanted = load_weights(store.run(identity).checkpoints / "teacher-epoch-00002.safetensors")[0]
    assert loaded is not None
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_exports_that_cannot_be(pretrained: tuple[Store, str], tmp_path: Path) -> None:
    store, identity = pretrained
    out = tmp_path / "x.safetensors"
    words = ("weights", "export", identity, "--store", store.root)
    assert_refused(call(*words, "--out", out, "--epoch", 4), "4 was not saved", "allowed: last, 1, 2, 3")
    assert_refused(call(*words, "--out", tmp_path / "x.pth"), ".safetensors")
    assert_refused(call(*words, "--out", tmp_path / "none" / "x.safetensors"), "no folder")
    assert_refused(call("weights", "export", "pretrain-f", "--out", out, "--store", store.root), "no run")
    assert not list(tmp_path.iterdir())


# In from runs


@pytest.mark.parametrize(
    ("which", "epoch", "file"), [("student", "last", 3), ("teacher", "last", 3), ("teacher", 1, 1)]
)
def test_a_run_s_encoder_is_where_fine_tuning_starts(
    which: str, epoch: Any, file: int, pretrained: tuple[Store, str]
) -> None:
    store, identity = pretrained
    init = {"run": identity, "weights": which, "epoch": epoch}
    result = execute(tiny("finetune", init=init, optim=STILL), store)
    wanted = load_weights(store.run(identity).checkpoints / f"{which}-epoch-{file:05d}.safetensors")[0]
    final = load_weights(store.run(result["id"]).checkpoints / "model.safetensors")[0]
    for name, value in wanted.items():
        if not name.startswith("norm."):  # dropped for a fresh fc_norm
            torch.testing.assert_close(final[name], value, rtol=0, atol=1e-20)
    ids = {run_id(tiny("finetune", init=init | change)) for change in ({}, {"weights": "student"}, {"epoch": 2})}
    assert len(ids) == (2 if which == "student" else 3)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"init": {"epoch": 4}}, ["epoch: 4 was not saved", "last, 1, 2, 3"]),
        ({"model": {"width": 32}}, ["another architecture", "cls_token is (1, 1, 24)", "wants (1, 1, 32)"]),
        ({"model": {"depth": 3}}, ["missing keys", "blocks.2.norm1.weight", "blocks.2.mlp.fc2.bias"]),
        ({"model": {"depth": 1}}, ["extra keys", "blocks.1.norm1.weight"]),
        ({"model": {"patch_size": 4}}, ["another architecture", "patch_embed.proj.weight"]),
        ({"model": {"channels": 1}}, ["another architecture", "patch_embed.proj.weight"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(
    changes: dict[str, Any], parts: list[str], pretrained: tuple[Store, str]
) -> None:
    store, identity = pretrained
    before = store.ids()
    with pytest.raises(UserError) as caught:
        execute(tiny("finetune", **(changes | {"init": {"run": identity} | changes.get("init", {})})), store)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert store.ids() == before


def test_mae_has_no_teacher(tmp_path: Path) -> None:
    store = Store(tmp_path)
    identity = execute(tiny("pretrain", method={"name": "mae"}, optim={"epochs": 1, "warmup_epochs": 0}), store)["id"]
    with pytest.raises(UserError, match="has no teacher"):
        execute(tiny("linprobe", init={"run": identity, "weights": "teacher"}), store)


def test_a_torn_checkpoint_is_told_by_its_checksum(pretrained: tuple[Store, str], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(pretrained[0].root, root)
    file = root / pretrained[1] / "checkpoints" / "student-epoch-00003.safetensors"
    content = file.read_bytes()
    config = tiny("finetune", init={"run": pretrained[1], "weights": "student"})
    for torn in (content[: len(content) // 2], b"", content[:-4] + b"\1\2\3\4"):
        file.write_bytes(torn)
        with pytest.raises(UserError, match=r"student-epoch-00003\.safetensors: torn or changed"):
            execute(config, Store(root))
    file.unlink()
    with pytest.raises(UserError, match="no such checkpoint"):
        execute(config, Store(root))


def test_a_parent_that_is_not_done(tmp_path: Path) -> None:
    from sdae.run import NeedNotDone

    with pytest.raises(NeedNotDone, match="waits for pretrain-0123456789abcdef"):
        execute(tiny("finetune", init={"run": "pretrain-0123456789abcdef"}), Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_positions_follow_the_picture_size(pretrained: tuple[Store, str]) -> None:
    store, identity = pretrained
    loaded = load_init(Init(run=identity), store, tiny("pretrain").model, 64)
    own = load_init(Init(run=identity), store, tiny("pretrain").model, 32)
    assert loaded is not None
    assert own is not None
    assert loaded["pos_embed"].shape == (1, 65, 24)
    assert torch.equal(loaded["pos_embed"][:, 0], own["pos_embed"][:, 0])


# In from files


def test_a_file_s_content_is_its_identity(tmp_path: Path) -> None:
    model = tiny("finetune").model
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        save_file(encoder(model, seed=seed), file)
    store = Store(tmp_path / "store")
    a, b, c = (
        execute(tiny("finetune", init={"weights": f"file:{file}"}, optim={"epochs": 1}), store)["id"] for file in files
    )
    assert a == b != c
    save_file(encoder(model, seed=2), files[0])
    assert execute(tiny("finetune", init={"weights": f"file:{files[0]}"}, optim={"epochs": 1}), store)["id"] not in (
        a,
        c,
    )
    config = store.run(a).config()
    assert config is not None
    with pytest.raises(UserError, match=r"init.digest: .* is asked for"):
        execute(config, store.__class__(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"none\.pth: cannot be read: No such file"):
        execute(tiny("finetune", init={"weights": f"file:{tmp_path}/none.pth"}), store)


def save_release(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_the_sdae_release_s_layout(student: dict[str, Tensor], tmp_path: Path) -> None:
    teacher = encoder(tiny("pretrain").model)
    release = {
        "model": student, "model_teacher": teacher, "epoch": 299, "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=1e-3, model="mae_vit"), "scaler": None,
    }  # fmt: skip
    source = save_release(tmp_path / "sdae.pth", release)
    out = tmp_path / "imported.safetensors"
    called = call("weights", "import", source, "--out", out, "--json")
    assert called.code == 0, called
    report = json.loads(called.out)
    assert set(report["encoders"]) == {"student", "teacher"}
    assert report["encoders"]["student"]["width"] == 24
    assert "decoder_pred.weight" in report["left_out"]
    assert not any(name.startswith("blocks") for name in report["left_out"])
    for file, wanted in ((out, student), (tmp_path / "imported-teacher.safetensors", teacher)):
        found = load_file(file)
        assert set(found) == {k for k in wanted if not k.startswith(("decoder", "mask_token"))}
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert load_init(Init(weights=f"file:{file}"), Store(tmp_path), tiny("pretrain").model, 32) is not None
    assert load_init(Init(weights=f"file:{source}"), Store(tmp_path), tiny("pretrain").model, 32) is not None


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mae_s_and_timm_s_layouts(prefix: str, student: dict[str, Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    named = {prefix + name: value for name, value in student.items()}
    mae = save_release(tmp_path / "mae.pth", {"model": named, "args": argparse.Namespace(), "epoch": 799})
    assert call("weights", "import", mae, "--from", "mae", "--out", out).code == 0
    assert torch.equal(load_file(out)["blocks.0.mlp.fc1.weight"], student["blocks.0.mlp.fc1.weight"])
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7)
    source = save_release(tmp_path / "timm.pth", {prefix + k: v for k, v in network.state_dict().items()})
    called = call("weights", "import", source, "--from", "timm", "--out", out, "--json")
    assert called.code == 0
    assert json.loads(called.out)["left_out"] == [f"{prefix}head.bias", f"{prefix}head.weight"]
    assert torch.equal(load_file(out)["norm.weight"], network.norm.weight)
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    assert call("weights", "import", tmp_path / "timm.safetensors", "--from", "timm", "--out", out).code == 0
    assert_refused(call("weights", "import", mae, "--from", "sdae", "--out", out), "model_teacher")
    assert_refused(call("weights", "import", source, "--from", "mae", "--out", out), "the key model")


def test_every_odd_key_is_named(student: dict[str, Tensor], tmp_path: Path) -> None:
    odd = dict(student)
    for name in ("blocks.0.attn.qkv.bias", "norm.weight"):
        del odd[name]
    odd |= {"blocks.1.gamma_1": torch.zeros(3), "relative_bias": torch.zeros(3)}
    source = save_release(tmp_path / "odd.pth", {"model": odd})
    out = tmp_path / "out.safetensors"
    called = call("weights", "import", source, "--from", "mae", "--out", out)
    assert_refused(
        called, "missing keys: blocks.0.attn.qkv.bias, norm.weight; extra keys: blocks.1.gamma_1, relative_bias"
    )
    assert not out.exists()
    with pytest.raises(
        UserError, match=r"missing keys: blocks\.0.attn.qkv.bias, norm.weight; extra keys: blocks.1.gamma"
    ):
        load_init(Init(weights=f"file:{source}"), Store(tmp_path), tiny("pretrain").model, 32)


class Payload:
    """Pickled, it would touch a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_checkpoint_is_not_run(student: dict[str, Tensor], tmp_path: Path) -> None:
    touched, out = tmp_path / "touched", tmp_path / "out.safetensors"
    source = save_release(tmp_path / "evil.pth", {"model": student, "args": Payload(touched)})
    assert_refused(
        call("weights", "import", source, "--from", "mae", "--out", out), "evil.pth", "not a whole checkpoint"
    )
    source.write_bytes(pickle.dumps({"model": Payload(touched)}))
    assert_refused(call("weights", "import", source, "--from", "mae", "--out", out), "evil.pth")
    source = save_release(tmp_path / "module.pth", nn.Linear(2, 2))
    assert_refused(call("weights", "import", source, "--from", "mae", "--out", out), "module.pth")
    assert not touched.exists()
    assert not out.exists()


def fault_of(file: Path) -> str | None:
    try:
        read_any(file)
    except UserError as error:
        return str(error)
    return None


def test_any_garbage_is_one_line(student: dict[str, Tensor], tmp_path: Path) -> None:
    whole = save_release(tmp_path / "whole.pth", {"model": student}).read_bytes()
    torch.save({"model": student}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy.pth").read_bytes()
    draw = np.random.default_rng(0)
    file = tmp_path / "garbage.pth"
    for content in (whole, legacy):
        for _ in range(40):
            torn = bytearray(content[: draw.integers(1, len(content))])
            for place in draw.integers(0, min(len(torn), 2000), 5):
                torn[place] = draw.integers(256)
            file.write_bytes(torn)
            fault = fault_of(file)
            assert fault is None or ("garbage.pth" in fault and "\n" not in fault)
    for odd in ([1], {"model": 3}, {"model": {}}, {"model": {0: torch.zeros(1)}}, {"model": {"cls_token": [1]}}):
        called = call(
            "weights", "import", save_release(file, odd), "--from", "mae", "--out", tmp_path / "o.safetensors"
        )
        assert_refused(called, "garbage.pth")
    flat = {"model": student | {"patch_embed.proj.weight": torch.zeros(24, 192)}}
    called = call("weights", "import", save_release(file, flat), "--from", "mae", "--out", tmp_path / "o.safetensors")
    assert_refused(called, "patch_embed.proj.weight")
    assert_refused(call("weights", "import", tmp_path, "--from", "mae", "--out", tmp_path / "o.safetensors"))
    assert_refused(call("weights", "import", tmp_path / "none", "--out", tmp_path / "o.safetensors"), "no such")


def test_another_run_s_state_is_not_resumed(pretrained: tuple[Store, str], tmp_path: Path) -> None:
    from sdae.training.checkpoints import save_state

    config = tiny("pretrain", seed=9)
    folder = Store(tmp_path).run(run_id(config))
    folder.create(config)
    save_state(folder.checkpoints, 3, {"x": torch.zeros(1)}, {"id": "pretrain-0000000000000000"})
    with pytest.raises(RunFailed, match="holds the state of pretrain-0000000000000000"):
        execute(config, Store(tmp_path))
