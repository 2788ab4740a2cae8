"""Released checkpoints, made in each release's layout: what goes where, and features equal to an independent forward.

The forward below is written from the papers' descriptions and reads the files' own names; it shares nothing with
`sdae.models`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.layers.pos_embed_rel
import torch
from calling import assert_refused, call
from conftest import tiny
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import Tensor
from torch.nn import functional as F

from sdae import released
from sdae.config import run_id
from sdae.errors import UserError
from sdae.layouts import LAYOUTS, describe, encoders
from sdae.models.classifier import Classifier
from sdae.models.encoder import Encoder, relative_bias, resize_table
from sdae.run import execute, with_content
from sdae.sections import Head, Init, Model
from sdae.store import Store
from sdae.training.checkpoints import load_weights
from sdae.training.optimizers import parameter_groups
from sdae.weights import fit, load_init

DOCS = Path(__file__).resolve().parents[1] / "docs" / "weights.md"
WIDTH, DEPTH, HEADS, PATCH, SIDE = 24, 3, 2, 8, 4
TABLE = "attn.relative_position_bias_table"
Tensors = dict[str, Tensor]


def model(positions: str = "absolute", layer_scale: bool = False, **changes: Any) -> Model:
    shape = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH}
    return Model(arch="vit_tiny_patch16", positions=positions, layer_scale=layer_scale, **(shape | changes))  # type: ignore[arg-type]


# Files in each layout


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * 0.3


def vit(seed: int, *, biases: bool = True, positions: int | None = SIDE, norm: bool = True) -> Tensors:
    """A plain ViT under the names that all of them share. biases: of q, k and v together."""
    new, hidden = draw(seed), 4 * WIDTH
    out = {
        "cls_token": new(1, 1, WIDTH),
        "patch_embed.proj.weight": new(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": new(WIDTH),
    }
    if positions:
        out["pos_embed"] = new(1, positions**2 + 1, WIDTH)
    for i in range(DEPTH):
        block = {
            "norm1.weight": 1 + new(WIDTH), "norm1.bias": new(WIDTH), "attn.qkv.weight": new(3 * WIDTH, WIDTH),
            "attn.proj.weight": new(WIDTH, WIDTH), "attn.proj.bias": new(WIDTH), "norm2.weight": 1 + new(WIDTH),
            "norm2.bias": new(WIDTH), "mlp.fc1.weight": new(hidden, WIDTH), "mlp.fc1.bias": new(hidden),
            "mlp.fc2.weight": new(WIDTH, hidden), "mlp.fc2.bias": new(WIDTH),
        }  # fmt: skip
        if biases:
            block["attn.qkv.bias"] = new(3 * WIDTH)
        out |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    if norm:
        out |= {"norm.weight": 1 + new(WIDTH), "norm.bias": new(WIDTH)}
    return out


def beit(
    seed: int, *, shared: bool = False, own: bool = False, qv: bool = True, gammas: bool = True, **kinds: Any
) -> Tensors:
    """BEiT's names: biases of q and v alone, gammas, tables of relative positions for each block or for all."""
    new = draw(seed + 1000)
    out = vit(seed, **({"biases": False, "positions": None} | kinds))
    rows = (2 * SIDE - 1) ** 2 + 3
    for i in range(DEPTH):
        if gammas:
            out |= {f"blocks.{i}.gamma_{k}": new(WIDTH) for k in (1, 2)}
        if qv:
            out |= {f"blocks.{i}.attn.{k}_bias": new(WIDTH) for k in "qv"}
        if own:
            out[f"blocks.{i}.{TABLE}"] = new(rows, HEADS)
            out[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(SIDE**2 + 1, SIDE**2 + 1, dtype=torch.long)
    if shared:
        out["rel_pos_bias.relative_position_bias_table"] = new(rows, HEADS)
        out["rel_pos_bias.relative_position_index"] = torch.zeros(SIDE**2 + 1, SIDE**2 + 1, dtype=torch.long)
    return out


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def linear(name: str, out: int = 10) -> Tensors:
    return {f"{name}.weight": torch.zeros(out, WIDTH), f"{name}.bias": torch.zeros(out)}


def mlp(prefix: str) -> Tensors:
    return (
        linear(f"{prefix}head.0") | linear(f"{prefix}head.3") | {f"{prefix}head.1.num_batches_tracked": torch.tensor(3)}
    )


# An independent forward


def offset_row(i: int, j: int, side: int) -> int:
    """BEiT's table: a row for each (down, right) from j to i, then cls to patch, patch to cls, cls to cls."""
    offsets = (2 * side - 1) ** 2
    if i == 0 or j == 0:
        return offsets + (2 if i == j else 0 if i == 0 else 1)
    (y, x), (v, u) = divmod(i - 1, side), divmod(j - 1, side)
    return (y - v + side - 1) * (2 * side - 1) + (x - u + side - 1)


def forward(file: Tensors, images: Tensor, positions: Tensor | None = None) -> Tensor:
    """All tokens behind the last norm, straight from a release's tensors. No norm in the file: one without weights."""
    x = F.conv2d(images, file["patch_embed.proj.weight"], file["patch_embed.proj.bias"], stride=PATCH)
    side = x.shape[2]
    x = torch.cat([file["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    positions = file.get("pos_embed") if positions is None else positions
    x = x if positions is None else x + positions
    rows = torch.tensor([[offset_row(i, j, side) for j in range(side**2 + 1)] for i in range(side**2 + 1)])
    tables = [file.get("rel_pos_bias.relative_position_bias_table")]
    for i in range(DEPTH):
        at = {name.removeprefix(f"blocks.{i}."): v for name, v in file.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (WIDTH,), at["norm1.weight"], at["norm1.bias"], 1e-6)
        queries, keys, values = (y @ w.T for w in at["attn.qkv.weight"].chunk(3))
        if "attn.qkv.bias" in at:
            biases = at["attn.qkv.bias"].chunk(3)
            queries, keys, values = queries + biases[0], keys + biases[1], values + biases[2]
        if "attn.q_bias" in at:
            queries, values = queries + at["attn.q_bias"], values + at["attn.v_bias"]
        heads = []
        for h, channels in enumerate(torch.arange(WIDTH).chunk(HEADS)):
            scores = queries[..., channels] @ keys[..., channels].transpose(1, 2) / math.sqrt(len(channels))
            for table in (*tables, at.get(TABLE)):
                if table is not None:
                    scores = scores + table[rows, h]
            heads.append(scores.softmax(-1) @ values[..., channels])
        y = torch.cat(heads, dim=-1) @ at["attn.proj.weight"].T + at["attn.proj.bias"]
        x = x + at.get("gamma_1", torch.ones(WIDTH)) * y
        y = F.layer_norm(x, (WIDTH,), at["norm2.weight"], at["norm2.bias"], 1e-6)
        y = F.gelu(y @ at["mlp.fc1.weight"].T + at["mlp.fc1.bias"]) @ at["mlp.fc2.weight"].T + at["mlp.fc2.bias"]
        x = x + at.get("gamma_2", torch.ones(WIDTH)) * y
    return F.layer_norm(x, (WIDTH,), file.get("norm.weight"), file.get("norm.bias"), 1e-6)


def pictures(size: int = SIDE * PATCH) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def features(weights: Tensors, net: Model, size: int = SIDE * PATCH) -> Tensor:
    encoder = Encoder(net, size)
    encoder.load_state_dict(weights)
    with torch.no_grad():
        out: Tensor = encoder(pictures(size))
    return out


@dataclasses.dataclass
class Case:
    layout: str
    content: dict[str, Any]
    file: Tensors  # the encoder's tensors under the release's own names
    left_out: set[str]
    net: Model
    other: Tensors | None = None  # the file's second encoder, and what it is called
    other_name: str = "teacher"


def cases() -> dict[str, Case]:
    new = draw(5)
    base, momentum = vit(1), vit(2)
    projector = mlp("module.base_encoder.") | mlp("module.momentum_encoder.") | under("module.", linear("predictor.0"))
    moco = under("module.base_encoder.", base) | under("module.momentum_encoder.", momentum) | projector
    shared, tuned = beit(3, shared=True), beit(4, own=True)
    pooled = beit(5, own=True, norm=False)
    pretraining = {"mask_token": torch.zeros(1, 1, WIDTH)} | linear("lm_head", 8192)
    indices = {f"blocks.{i}.attn.relative_position_index" for i in range(DEPTH)}
    positioned, bare = beit(6, positions=SIDE), beit(7)
    others = under("teacher.", bare) | under("regresser_and_decoder.", bare) | {"alignment.0": new(3)}
    dino = {
        "student": under("module.backbone.", vit(8)) | mlp("module."),
        "teacher": under("backbone.", vit(9)) | mlp(""),
    }
    heads, one = mlp("module.") | mlp(""), {"epoch": 299, "optimizer": {"state": {}}}
    relative, scaled = model("relative", True), model("absolute", True)
    return {
        "moco-v3": Case("moco-v3", {"state_dict": moco} | one, base, set(projector), model(), momentum),
        "beit, pre-trained": Case(
            "beit", {"model": shared | pretraining} | one, shared,
            set(pretraining) | {"rel_pos_bias.relative_position_index"}, relative,
        ),
        "beit, fine-tuned": Case(
            "beit", {"model": tuned | linear("head")}, tuned, indices | set(linear("head")), relative,
        ),
        "beit, fine-tuned on pooled tokens": Case(
            "beit", {"model": pooled | under("fc_", {"norm.weight": new(WIDTH), "norm.bias": new(WIDTH)})}, pooled,
            indices | {"fc_norm.weight", "fc_norm.bias"}, relative,
        ),
        "beit, both kinds of tables": Case(
            "beit", {"model": (twice := beit(10, own=True, shared=True))}, twice,
            indices | {"rel_pos_bias.relative_position_index"}, relative,
        ),
        "beit, absolute positions too": Case(
            "beit", {"model": (abs_too := beit(11, own=True, positions=SIDE))}, abs_too, indices, model("both", True),
        ),
        "beit, no biases, no gammas": Case(
            "beit", {"model": (plain := beit(12, own=True, qv=False, gammas=False))}, plain, indices, model("relative"),
        ),
        "cae": Case("cae", {"model": under("encoder.", positioned) | others}, positioned, set(others), scaled),
        "dino, in full": Case("dino", dino | one, vit(9), set(heads), model(), vit(8), "student"),
        "dino, the encoder alone": Case("dino", dict(vit(9)), vit(9), set(), model()),
        "dino, state_dict": Case(
            "dino", {"state_dict": under("module.backbone.", vit(9)) | mlp("module.")}, vit(9), set(mlp("module.")),
            model(),
        ),
        "deit": Case("deit", {"model": vit(13) | linear("head")}, vit(13), set(linear("head")), model()),
        "mae": Case(
            "mae", {"model": vit(14) | linear("decoder_embed") | {"mask_token": new(1, 1, 16)}}, vit(14),
            {"decoder_embed.weight", "decoder_embed.bias", "mask_token"}, model(),
        ),
    }  # fmt: skip


CASES = cases()


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_release_s_features_are_those_of_its_architecture(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, out = saved(case.content, tmp_path / "release.pth"), tmp_path / "out.safetensors"
    called = call("weights", "import", "--from", case.layout, source, "--out", out, "--json")
    assert called.code == 0, called
    report = json.loads(called.out)
    first, *rest = report["encoders"].values()
    assert set(report["left_out"]) == case.left_out
    assert sum(first["mapped"].values()) == len(case.file) - sum("position_index" in key for key in case.file)
    assert (first["width"], first["depth"], first["patch_size"], first["tokens"]) == (WIDTH, DEPTH, PATCH, SIDE**2)
    assert (first["positions"], first["layer_scale"]) == (case.net.positions, case.net.layer_scale)
    torch.testing.assert_close(features(load_file(out), case.net), forward(case.file, pictures()), rtol=1e-5, atol=1e-5)
    assert len(rest) == (case.other is not None)
    if case.other is not None:
        second = load_file(tmp_path / f"out-{case.other_name}.safetensors")
        torch.testing.assert_close(features(second, case.net), forward(case.other, pictures()), rtol=1e-5, atol=1e-5)
    for file in (out, source):  # a run takes the release as it is, too
        loaded = load_init(Init(weights=f"file:{file}"), Store(tmp_path), case.net, SIDE * PATCH)
        assert loaded is not None
        assert all(torch.equal(loaded[key], value) for key, value in load_file(out).items())
    text = call("weights", "import", "--from", case.layout, source, "--out", out).out
    assert first["sha256"] in text, "the same file gives the same bytes, whose sha256 is the identity of its runs"
    assert all(rule in text for rule in first["mapped"])
    assert all(key in text for key in case.left_out)


def test_what_a_file_lacks_and_its_layout_defines_is_named(tmp_path: Path) -> None:
    """A pooled classifier's file has no encoder's norm, one without biases none, CAE's no positions."""
    lacking = {
        "beit, fine-tuned on pooled tokens": {"norm.weight", "norm.bias"},
        "beit, no biases, no gammas": {f"blocks.{i}.attn.qkv.bias" for i in range(DEPTH)},
        "beit, pre-trained": set(),
    }
    for name, filled in lacking.items():
        source = saved(CASES[name].content, tmp_path / "a.pth")
        called = call("weights", "import", "--from", "beit", source, "--out", tmp_path / "a.safetensors", "--json")
        assert set(json.loads(called.out)["encoders"]["student"]["filled"]) == filled
    bare, out = beit(7), tmp_path / "cae.safetensors"
    source = saved({"model": under("encoder.", bare)}, tmp_path / "cae.pth")
    called = call("weights", "import", "--from", "cae", source, "--out", out, "--json")
    assert set(json.loads(called.out)["encoders"]["student"]["filled"]) == {"pos_embed"}
    rates = [10000 ** (-k / (WIDTH / 4)) for k in range(WIDTH // 4)]
    grid = [
        [wave(place * rate) for place in (row, column) for wave in (math.sin, math.cos) for rate in rates]
        for row in range(14) for column in range(14)
    ]  # fmt: skip
    positions = torch.cat([torch.zeros(1, WIDTH), torch.tensor(grid)])[None]
    torch.testing.assert_close(load_file(out)["pos_embed"], positions, rtol=0, atol=1e-5)
    net, size = model("absolute", True), 14 * PATCH
    ours = features(load_file(out), net, size)
    torch.testing.assert_close(ours, forward(bare, pictures(size), positions), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_timm_s_beit_computes_the_same(shared: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Beit(
            img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0,
            init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared,
            global_pool="token",
        ).eval()  # fmt: skip
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    save_file(network.state_dict(), tmp_path / "beit.safetensors")
    net = model("relative", True)
    weights = load_init(Init(weights=f"file:{tmp_path}/beit.safetensors"), Store(tmp_path), net, SIDE * PATCH)
    assert weights is not None
    with torch.no_grad():
        theirs = network.forward_features(pictures())
    torch.testing.assert_close(features(weights, net), theirs, rtol=1e-5, atol=1e-5)


# Another picture size


def test_offsets_keep_their_bias_in_a_smaller_grid() -> None:
    table = draw(3)((2 * 5 - 1) ** 2 + 3, HEADS)
    whole, part = relative_bias(table, 5, (5, 5)), relative_bias(table, 5, (3, 4))
    for i in range(3 * 4 + 1):
        for j in range(3 * 4 + 1):
            a, b = (0 if k == 0 else (k - 1) // 4 * 5 + (k - 1) % 4 + 1 for k in (i, j))
            assert torch.equal(part[:, i, j], whole[:, a, b])
    assert torch.equal(relative_bias(table, 5, (3, 4), cls=False), part[:, 1:, 1:])


@pytest.mark.filterwarnings("ignore")  # timm's
def test_a_table_grows_as_beit_s_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own rule, written after BEiT's, up to the precision of its search for the progression."""
    monkeypatch.setattr(timm.layers.pos_embed_rel, "_USE_SCIPY", False)
    table = draw(4)((2 * 14 - 1) ** 2 + 3, HEADS)
    for side in (24, 32, 40):
        shape = ((2 * side - 1) ** 2 + 3, HEADS)
        theirs = timm.layers.pos_embed_rel.resize_rel_pos_bias_table(table, (side, side), shape)
        torch.testing.assert_close(resize_table(table, 14, (side, side)), theirs, rtol=0, atol=2e-3)
    assert resize_table(table, 14, (20, 33)).shape == (39 * 65 + 3, HEADS)


@pytest.mark.parametrize("side", [2, 3, 4, 6, 9])
def test_weights_follow_the_picture_size(side: int) -> None:
    size = side * PATCH
    net = model("both", True)
    tensors = CASES["beit, absolute positions too"].file
    weights = {}
    for name, value in tensors.items():
        if "index" not in name and "_bias" not in name.removesuffix("bias_table"):
            weights[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    for i in range(DEPTH):
        weights[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * WIDTH)
        weights[f"blocks.{i}.{TABLE}"] = tensors[f"blocks.{i}.{TABLE}"]
    fitted = fit(weights, net, size, "here")
    encoder = Encoder(net, size)
    encoder.load_state_dict(fitted)
    ours = encoder.bias(encoder.blocks[0], (side, side))
    from_file = relative_bias(tensors[f"blocks.0.{TABLE}"], SIDE, (side, side))
    torch.testing.assert_close(ours, from_file, rtol=0, atol=1e-6)
    assert fitted["pos_embed"].shape == (1, side**2 + 1, WIDTH)
    assert encoder(pictures(size)).shape == (2, side**2 + 1, WIDTH)


# Training from them


def test_weights_of_another_kind_say_what_to_set(tmp_path: Path) -> None:
    relative = saved(CASES["beit, pre-trained"].content, tmp_path / "beit.pth")
    plain = saved(CASES["deit"].content, tmp_path / "deit.pth")
    store = Store(tmp_path / "store")
    wants = {
        (relative, "absolute", False): "model.positions: relative, model.layer_scale: true",
        (relative, "relative", False): "want model.layer_scale: true (this config has model.layer_scale: false)",
        (relative, "both", True): "want model.positions: relative (",
        (plain, "relative", True): "model.positions: absolute, model.layer_scale: false",
    }
    for (file, positions, scale), words in wants.items():
        with pytest.raises(UserError) as caught:
            load_init(Init(weights=f"file:{file}"), store, model(positions, scale), SIDE * PATCH)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    net = {"depth": DEPTH, "positions": "relative", "layer_scale": True}
    with pytest.raises(UserError, match=r"another architecture: cls_token is \(1, 1, 24\).*wants \(1, 1, 48\)"):
        execute(tiny("finetune", init={"weights": f"file:{relative}"}, model=net | {"width": 48}), store)
    with pytest.raises(UserError, match=r"bias_table is .*, 2.* wants .*, 4"):
        load_init(Init(weights=f"file:{relative}"), store, model("relative", True, heads=4), SIDE * PATCH)
    assert not (tmp_path / "store").exists() or not store.ids()


@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
def test_training_starts_from_a_beit_file(stage: str, tmp_path: Path) -> None:
    source, out = saved(CASES["beit, pre-trained"].content, tmp_path / "b.pth"), tmp_path / "b.safetensors"
    assert call("weights", "import", "--from", "beit", source, "--out", out).code == 0
    net = {"depth": DEPTH, "positions": "relative", "layer_scale": True}
    still = {"base_lr": 1e-30, "min_lr": 0.0, "epochs": 1, "warmup_epochs": 0}
    moving = {"base_lr": 0.02, "epochs": 1, "warmup_epochs": 0}
    store, start = Store(tmp_path / "store"), load_file(out)
    for optim, moves in ((still, False), (moving, stage == "finetune")):
        result = execute(tiny(stage, init={"weights": f"file:{out}"}, model=net, optim=optim), store)
        final = load_weights(store.run(result["id"]).checkpoints / "model.safetensors")[0]
        assert "pos_embed" not in final, "a file without absolute positions gets none"
        for name in ("blocks.1.ls2.gamma", f"blocks.0.{TABLE}", f"blocks.2.{TABLE}", "blocks.1.attn.qkv.bias"):
            assert torch.allclose(final[name], start[name], rtol=0, atol=1e-12) != moves, name


def test_a_random_start_and_the_layers_of_relative_positions() -> None:
    network = Classifier(model("relative", True), SIDE * PATCH, Head(), 10)
    network.init_weights(0.01)
    assert not network.pos_embed.any()
    named = dict(network.named_parameters())
    for i in range(DEPTH):
        assert not named[f"blocks.{i}.{TABLE}"].any()
        assert torch.equal(named[f"blocks.{i}.ls1.gamma"], torch.full((WIDTH,), 0.1))
    config = tiny("finetune", model={"depth": DEPTH, "positions": "relative", "layer_scale": True})
    from sdae.stages.classify import ClassifyTask

    session: Any = type("Session", (), {"world": type("World", (), {"device": torch.device("cpu")})})
    task = ClassifyTask(config, session, network, 10, None)  # type: ignore[arg-type]
    whole = parameter_groups(network, 0.05, 0.5, DEPTH)
    assert len([p for group in whole for p in group["params"]]) == len(named)  # type: ignore[attr-defined]
    for i in range(DEPTH):
        for name in (f"blocks.{i}.{TABLE}", f"blocks.{i}.ls2.gamma"):
            (group,) = [g for g in task.optimizer.param_groups if any(p is named[name] for p in g["params"])]
            assert (group["weight_decay"], group["lr_scale"]) == (0.0, pytest.approx(0.65 ** (DEPTH - i)))


# The folder of weights


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("SDAE_WEIGHTS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_imported_weights_are_found_by_name(home: Path, tmp_path: Path) -> None:
    assert released.find_weights("beit-300") is None
    source = saved(CASES["beit, pre-trained"].content, tmp_path / "beit.pth")
    called = call("weights", "import", "--from", "beit", source, "--as", "beit-300", "--json")
    assert called.code == 0, called
    report = json.loads(called.out)["encoders"]["student"]
    file = home / "beit-300.safetensors"
    assert report["file"] == str(file)
    assert released.find_weights("beit-300") == released.find_weights("beit-300.safetensors") == file
    net = {"depth": DEPTH, "positions": "relative", "layer_scale": True}
    named = [tiny("finetune", init={"weights": f"file:{name}"}, model=net) for name in (file, "beit-300.safetensors")]
    assert len({run_id(with_content(config)) for config in named}) == 1  # type: ignore[arg-type]
    result = execute(
        tiny("finetune", init={"weights": "file:beit-300.safetensors"}, model=net, optim={"epochs": 1}),
        Store(tmp_path / "store"),
    )
    assert result["config"]["init"]["digest"] == report["sha256"] == released.digest_of("file:beit-300.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "beit-300.safetensors")
    assert released.located("beit-300.safetensors") == Path("beit-300.safetensors"), "the working folder comes first"
    with pytest.raises(UserError, match=r"elsewhere/beit-300.safetensors: cannot be read"):
        execute(tiny("finetune", init={"weights": "file:elsewhere/beit-300.safetensors"}), Store(tmp_path / "store"))


def test_the_home_of_a_user_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert released.located("~nobody-of-this-name/x.pth") == Path("~nobody-of-this-name/x.pth")
    monkeypatch.setenv("SDAE_WEIGHTS", "~nobody-of-this-name/weights")
    assert released.inventory() == []


def test_the_list_says_what_is_there_and_what_the_tables_want(home: Path, tmp_path: Path) -> None:
    listed = json.loads(call("weights", "list", "--json").out)
    assert listed["weights"] == []
    assert {row["name"]: row["state"] for row in listed["wanted"]} == {
        "deit-300": "timm:deit_base_patch16_224.fb_in1k", "moco-v3-300": "missing",
        "dino-400": "timm:vit_base_patch16_224.dino", "beit-300": "missing", "beit-800": "missing",
        "cae-300": "missing",
    }  # fmt: skip
    source = saved(CASES["moco-v3"].content, tmp_path / "moco.pth.tar")
    assert call("weights", "import", "--from", "moco-v3", source, "--as", "moco-v3-300").code == 0
    torn = (home / "moco-v3-300.safetensors").read_bytes()
    for name, content in (("torn", torn[:-5]), ("cut", torn[:40]), ("empty", b""), ("zeros", bytes(4000))):
        (home / f"{name}.safetensors").write_bytes(content)
    (home / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    (home / "folder.safetensors").mkdir()
    listed = json.loads(call("weights", "list", "--json").out)
    rows = {row["name"]: row for row in listed["weights"]}
    assert {name for name, row in rows.items() if row["problem"]} == {
        "torn", "cut", "empty", "zeros", "nowhere", "folder",
    }  # fmt: skip
    row = rows["moco-v3-300"]
    assert (row["layout"], row["width"], row["depth"], row["positions"]) == ("moco-v3", WIDTH, DEPTH, "absolute")
    assert row["sha256"] == released.digest_of("file:moco-v3-300.safetensors")
    assert row["bytes"] == (home / "moco-v3-300.safetensors").stat().st_size
    assert {r["name"]: r["state"] for r in listed["wanted"]}["moco-v3-300"] == "imported"
    text = call("weights", "list").out
    assert "moco-v3-300-teacher" in text
    assert "not a whole safetensors file" in text


def test_looking_up_weights_takes_no_torch(home: Path) -> None:
    code = (
        "import sys, cli.main; sys.argv = ['sdae-cli', 'weights', 'list']\n"
        "try: cli.main.main()\nexcept SystemExit: pass\nassert not {'torch', 'timm'} & set(sys.modules)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=DOCS.parents[1])
    assert done.returncode == 0, done.stderr
    assert "beit-800" in done.stdout


def test_the_suite_s_own_tables_and_the_docs_name_every_release() -> None:
    page = DOCS.read_text()
    for name, release in released.RELEASED.items():
        cells = [f"`{name}`", release.project, release.file, release.licence, release.digest, release.layout]
        cells += [f"`timm:{release.timm}`"] if release.timm else []
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(cell in row for cell in cells), (name, row)
        assert release.layout in LAYOUTS
        if release.timm:
            config = timm.get_pretrained_cfg(release.timm)
            assert config is not None
            assert str(config.license).lower() == release.licence.lower()
            assert str(config.url).endswith(release.file)
    assert all(f"`{layout}`" in page for layout in LAYOUTS)


# Bad input


class Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_bad_files_are_one_line_each(home: Path, tmp_path: Path) -> None:
    good = CASES["beit, pre-trained"].content["model"]
    file = tmp_path / "bad.pth"

    def refused(content: Any, *parts: str, layout: str = "beit") -> None:
        called = call("weights", "import", "--from", layout, saved(content, file), "--as", "bad")
        assert_refused(called, "bad.pth", *parts)
        assert not home.exists()

    def without(*names: str) -> dict[str, Any]:
        return {"model": {name: value for name, value in good.items() if name not in names}}

    refused(CASES["moco-v3"].content, "beit's layout has the key model", "state_dict")
    refused({"model": good}, "moco-v3's layout has the key state_dict with names base_encoder.*", layout="moco-v3")
    refused({"model": good}, "cae's layout has the key model with names encoder.*", layout="cae")
    refused({"model": good}, "extra keys", "blocks.0.gamma_1", layout="deit")
    refused({"model": good}, "dino's layout has the key teacher with names backbone.*", "here: model", layout="dino")
    gone = ("blocks.1.gamma_2", "blocks.0.attn.v_bias", "blocks.2.norm1.weight", "norm.bias")
    refused(without(*gone), f"missing keys: {', '.join(sorted(gone))}")
    refused({"model": good | {"blocks.0.odd": torch.zeros(1), "pos": torch.zeros(1)}}, "extra keys: blocks.0.odd, pos")
    own = CASES["beit, fine-tuned"].content["model"]
    lacks = {name: value for name, value in own.items() if name != f"blocks.1.{TABLE}"}
    refused({"model": lacks}, f"missing keys: blocks.1.{TABLE}")
    refused({"model": good | {"blocks.0.attn.qkv.bias": torch.zeros(3 * WIDTH)}}, "extra keys: blocks.0.attn.qkv.bias")
    refused({"model": good | {"blocks.0.attn.v_bias": torch.zeros(5)}}, "q_bias is (24,), v_bias (5,)")
    refused({"model": good | {"rel_pos_bias.relative_position_bias_table": torch.zeros(51, HEADS)}}, TABLE, "(51, 2)")
    refused({"model": good | {"blocks.1.mlp.fc2.weight": torch.zeros(3, 3)}}, "blocks.1.mlp.fc2.weight is (3, 3)")
    refused({"model": vit(1) | {"pos_embed": torch.zeros(1, 12, WIDTH)}}, "11 patches", layout="deit")
    refused({"model": vit(1) | {"pos_embed": torch.zeros(3)}}, "pos_embed is (3,)", layout="deit")
    stray = CASES["moco-v3"].content["state_dict"] | {"module.queue": torch.zeros(2)}
    refused({"state_dict": stray}, "extra keys: module.queue", layout="moco-v3")
    touched = tmp_path / "touched"
    refused({"model": good, "args": Payload(touched)}, "not a whole checkpoint")
    file.write_bytes(pickle.dumps({"model": Payload(touched)}))
    assert_refused(call("weights", "import", "--from", "beit", file, "--as", "bad"), "bad.pth")
    whole = saved({"model": good}, file).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_refused(call("weights", "import", "--from", "beit", file, "--as", "bad"), "bad.pth", "not a whole")
    assert not touched.exists()
    assert not home.exists()


@pytest.mark.parametrize("name", CASES)
def test_any_damage_is_an_error_that_names_it_or_none(name: str) -> None:
    case, seed = CASES[name], zlib.crc32(name.encode())
    print(f"seed {seed}")
    draws = random.Random(seed)
    for _ in range(150):
        content = copy.copy(case.content)
        nested = [key for key, value in content.items() if isinstance(value, dict) and key != "optimizer"]
        part = content
        if nested:
            inner = draws.choice(nested)
            part = content[inner] = dict(content[inner])
        for _ in range(draws.randint(1, 3)):
            key = draws.choice(sorted(part))
            shape = [draws.choice((0, 1, 2, 3, 10, 24, 72)) for _ in range(draws.randint(0, 4))]
            damage: Any = draws.choice((torch.zeros(shape), torch.zeros(shape), None, "text", {"a": torch.zeros(1)}))
            if draws.random() < 0.5:
                part.pop(key)
            else:
                part[draws.choice((key, key, key, "blocks.1.odd", "odd"))] = damage
        for layout in (case.layout, "auto"):
            fault = fault_of(content, layout, case.net)
            assert fault is None or ("here.pth" in fault and "\n" not in fault), fault


def fault_of(content: dict[str, Any], layout: str, net: Model) -> str | None:
    try:
        for encoded in encoders(content, layout, "here.pth").values():
            describe(encoded.tensors, "here.pth", encoded.missing)
            fit(encoded.tensors, net, 2 * SIDE * PATCH, "here.pth", encoded.missing)
    except UserError as error:
        return str(error)
    return None


def test_bad_names_and_places(home: Path, tmp_path: Path) -> None:
    source = saved(CASES["deit"].content, tmp_path / "deit.pth")
    words = ("weights", "import", "--from", "deit", source)
    for name in ("../deit", "a/b", "/tmp/x", "", ".hidden", "a b"):
        assert_refused(call(*words, "--as", name), "bare name", "beit-300")
    assert_refused(call(*words), "--out", "--as")
    assert_refused(call(*words, "--as", "a", "--out", tmp_path / "a.safetensors"), "--out", "--as")
    called = call("weights", "import", "--from", "beitt", source, "--as", "x")
    assert called.code == 2
    assert "moco-v3" in called.err
    assert not home.exists()
    home.write_text("a file")
    assert_refused(call(*words, "--as", "deit"), "cannot be written")
