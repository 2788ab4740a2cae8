"""Views, objective, student and teacher against slow references and against the rules of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_parity import FOLDS, read
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.config import Pretrain
from sdae.methods.mae import MAE
from sdae.methods.sdae import SdAE
from sdae.models.encoder import Encoder, drop_path_rates, patchify, run_block, sincos_positions
from sdae.models.linear import Linear, speed_up
from sdae.models.timm_names import lookup
from sdae.objective import cosine_loss, normalize, similarity_axis
from sdae.sections import ARCHITECTURES, Teacher, architecture
from sdae.stages.pretrain import build, saved_epochs
from sdae.stages.session import drop_factors, uniform
from sdae.training.optimizers import ema_momentum
from sdae.views import View, as_rows, split

B = 4


def pretrain(view: str = "folds", **changes: Any) -> Pretrain:
    """A tiny config of a teacher view: L = 16, 4 visible, 12 masked."""
    teacher = {"view": view} | {k: changes.pop(k) for k in ("folds", "tokens", "normalize", "init") if k in changes}
    config = tiny("pretrain", method={"teacher": teacher}, **changes)
    assert isinstance(config, Pretrain)
    return config


def sdae(view: str = "folds", **changes: Any) -> SdAE:
    module = build(pretrain(view, **changes))
    assert isinstance(module, SdAE)
    return module


def batch(channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, 32, 32) and mask noise (B, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, channels, 32, 32, generator=generator), torch.rand(B, 16, generator=generator)


def repainted(images: Tensor, row: int, patch: int) -> Tensor:
    """The pictures with other pixels in one patch (of 8 x 8) of one picture."""
    out = images.clone()
    y, x = divmod(patch, 4)
    out[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 3.0
    return out


# Views


@given(st.integers(0, 2**31), st.integers(1, 15))
def test_visible_and_masked_are_a_partition_in_noise_order(seed: int, visible: int) -> None:
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    shown, masked = split(noise, visible)
    assert shown.shape == (3, visible)
    for row in range(3):
        together = [*shown[row].tolist(), *masked[row].tolist()]
        assert sorted(together) == list(range(16))
        assert noise[row, together].tolist() == sorted(noise[row].tolist())


@pytest.mark.parametrize(
    ("teacher", "length", "folds"),
    [
        ({"view": "full"}, 147, 1),
        ({"view": "masked"}, 147, 1),
        ({"view": "crop", "tokens": 49}, 49, 1),
        ({"view": "folds", "folds": 2}, 73, 2),
        ({"view": "folds", "folds": 3}, 49, 3),
        ({"view": "folds", "folds": 4}, 36, 4),
    ],
)
def test_the_paper_s_views_at_224_px(teacher: dict[str, Any], length: int, folds: int) -> None:
    view = View.of(Teacher(**teacher), 147)
    assert (view.length, view.folds, view.full) == (length, folds, teacher["view"] == "full")


def test_one_fold_is_the_masked_view() -> None:
    assert pretrain("folds", folds=1) == pretrain("masked")
    images, noise = batch()
    one, masked = sdae("folds", folds=1)(images, noise), sdae("masked")(images, noise)
    assert torch.equal(one.target, masked.target)
    assert torch.equal(one.loss, masked.loss)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_as_batch_rows_equal_folds_one_by_one(folds: int) -> None:
    module = sdae("folds", folds=folds)
    images, noise = batch()
    output = module(images, noise)
    length = 12 // folds
    _, masked = split(noise, 4)
    tokens = module.teacher.embed(patchify(images, 8))
    for row in range(B):
        for fold in range(folds):
            ids = masked[row, fold * length : (fold + 1) * length]
            alone = module.teacher.encode(tokens[row, ids][None])[0, 1:]
            torch.testing.assert_close(output.features[row * folds + fold], alone, rtol=1e-5, atol=1e-5)
    assert output.prediction.shape == output.target.shape == (B * folds, length, 24)
    whole = module.student.predict(patchify(images, 8), noise.argsort(1)[:, :4], masked, folds * length, None)
    assert torch.equal(output.prediction, as_rows(whole, folds))
    assert torch.equal(output.prediction[1], whole[0, length : 2 * length])


def test_left_over_tokens_are_not_used() -> None:
    module = sdae("folds", folds=5)  # 12 masked: 5 x 2, two are left over
    images, noise = batch()
    _, masked = split(noise, 4)
    before = module(images, noise)
    assert before.prediction.shape == (B * 5, 2, 24)
    for place in range(12):
        after = module(repainted(images, 0, int(masked[0, place])), noise)
        assert torch.equal(before.loss, after.loss) == (place >= 10)


def test_a_crop_is_the_head_of_the_masked_list() -> None:
    module = sdae("crop", tokens=5)
    images, noise = batch()
    shown, masked = split(noise, 4)
    before = module(images, noise)
    assert before.target.shape == (B, 5, 24)
    for place in range(12):
        after = module(repainted(images, 1, int(masked[1, place])), noise)
        assert torch.equal(before.target, after.target) == (place >= 5)
    assert torch.equal(before.target, module(repainted(images, 1, int(shown[1, 0])), noise).target)


def test_the_full_view_sees_everything_and_scores_the_masked() -> None:
    module = sdae("full")
    images, noise = batch()
    shown, masked = split(noise, 4)
    output = module(images, noise)
    everything = module.teacher(images)
    for row in range(B):
        torch.testing.assert_close(output.features[row], everything[row, 1 + masked[row]], rtol=1e-5, atol=1e-5)
    changed = module(repainted(images, 2, int(shown[2, 0])), noise)
    assert not torch.equal(output.target[2], changed.target[2])
    assert torch.equal(output.target[:2], changed.target[:2])


# Objective


@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0.001, 100))
def test_normalization_is_equation_3(channels: int, seed: int, size: float) -> None:
    f = torch.randn(5, channels, generator=torch.Generator().manual_seed(seed)) * size + 1
    exact = f.double()
    wanted = (exact - exact.mean(1, keepdim=True)) / (exact.var(1, unbiased=True, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normalize(f).double(), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normalize(exact), wanted)


@pytest.mark.parametrize(
    ("similarity", "full", "axis"),
    [
        ("tokens", True, 1),
        ("tokens", False, 1),
        ("channels", True, 2),
        ("channels", False, 2),
        ("authors", True, 2),
        ("authors", False, 1),
    ],
)
def test_similarity_axis(similarity: str, full: bool, axis: int) -> None:
    assert similarity_axis(similarity, full) == axis
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    cosines = []
    for row in range(2):
        for k in range(4 if axis == 1 else 3):
            x, y = (t[row, :, k] if axis == 1 else t[row, k] for t in (a, b))
            cosines.append(float(x @ y / (x.norm() * y.norm())))
    assert float(cosine_loss(a, b, axis)) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_the_similarity_setting_reaches_the_loss() -> None:
    images, noise = batch()
    for view in ("full", "folds"):
        losses = {}
        for similarity in ("authors", "tokens", "channels"):
            module = build(tiny("pretrain", method={"teacher": {"view": view}, "similarity": similarity}))
            output = module(images, noise)
            losses[similarity] = float(output.loss.detach())
        assert losses["authors"] == losses["channels" if view == "full" else "tokens"]
        assert losses["tokens"] != losses["channels"]


def test_raw_targets_are_the_features() -> None:
    images, noise = batch()
    raw, normalized = (sdae("masked", normalize=flag)(images, noise) for flag in (False, True))
    assert torch.equal(raw.target, raw.features)
    assert torch.equal(normalized.target, normalize(raw.target))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("channels", [3, 1])
def test_mae_s_pixel_target(normalized: bool, channels: int) -> None:
    config = tiny("pretrain", method={"name": "mae", "normalize_pixels": normalized}, model={"channels": channels})
    module = build(config)
    assert isinstance(module, MAE)
    images, noise = batch(channels)
    output = module(images, noise)
    _, masked = split(noise, 4)
    errors = []
    for row in range(B):
        for place, patch in enumerate(masked[row].tolist()):
            y, x = divmod(patch, 4)
            pixels = [
                float(images[row, c, 8 * y + i, 8 * x + j]) for i in range(8) for j in range(8) for c in range(channels)
            ]
            target = torch.tensor(pixels, dtype=torch.float64)
            if normalized:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            errors.append((output.prediction[row, place].detach().double() - target).square().mean())
    assert len(errors) == B * 12
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


# Student and teacher


def test_only_the_student_learns() -> None:
    module = sdae()
    images, noise = batch()
    module(images, noise).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    without = {name for name, p in module.student.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed"}  # fixed sin-cos


def test_the_teacher_follows_equation_7() -> None:
    module = sdae()
    before = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    student = module.student.state_dict()
    module.update_teacher(0.9)
    after = module.teacher.state_dict()
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight", "norm.bias", "blocks.1.mlp.fc2.bias"} <= set(after)
    for name, value in after.items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student[name])
    assert not torch.equal(after["pos_embed"], before["pos_embed"])
    module.update_teacher(0.0)
    assert module.teacher_distance() == 0.0


def test_momentum_rises_on_a_cosine_over_epochs() -> None:
    values = [ema_momentum(e, start=0.96, end=0.99, epochs=300) for e in range(300)]
    assert values[0] == pytest.approx(0.96)
    assert values[150] == pytest.approx(0.975)
    assert values[299] < 0.99
    assert values == sorted(values)
    assert ema_momentum(100, start=0.96, end=0.99, epochs=300) == pytest.approx(0.99 - 0.03 * 0.75)
    assert ema_momentum(100, start=0.9, end=None, epochs=300) == 0.9


def test_encoders_are_kept_every_fifteenth_of_the_run() -> None:
    assert saved_epochs(300) == set(range(20, 301, 20))
    assert saved_epochs(4) == {1, 2, 3, 4}
    assert len(saved_epochs(100)) == 15
    assert 100 in saved_epochs(100)


def test_teacher_s_start() -> None:
    own, copied = sdae(init="own"), sdae(init="student")
    for name, value in copied.teacher.state_dict().items():
        assert torch.equal(value, copied.student.state_dict()[name])
    assert own.teacher_distance() > 0.5
    assert not torch.equal(own.teacher.pos_embed, own.student.pos_embed)
    copied.student.cls_token.data.add_(1)  # a copy, not the same memory
    assert not torch.equal(copied.teacher.cls_token, copied.student.cls_token)


def test_initialization() -> None:
    config = pretrain(model={"width": 96, "depth": 4, "decoder_dim": 48})
    module = build(config)
    assert isinstance(module, SdAE)
    for name, child in module.student.named_modules():
        if isinstance(child, nn.Linear):
            bound = math.sqrt(6 / (child.in_features + child.out_features))  # a fused qkv as one matrix
            assert 0.95 * bound < float(child.weight.detach().abs().max()) <= bound, name
            assert float(child.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert not child.bias.any()
        elif isinstance(child, nn.LayerNorm):
            assert bool((child.weight == 1).all())
            assert not child.bias.any()
            assert child.eps == 1e-6
    student, teacher = module.student, module.teacher
    pixels = 3 * 8 * 8
    bound = math.sqrt(6 / (pixels + 96))
    assert 0.95 * bound < float(student.patch_embed.proj.weight.abs().max()) <= bound
    default = 1 / math.sqrt(pixels)  # PyTorch's for Conv2d
    for weight in (student.patch_embed.proj.bias, teacher.patch_embed.proj.weight, teacher.patch_embed.proj.bias):
        assert 0.8 * default < float(weight.abs().max()) <= default
    assert float(student.cls_token.std()) == pytest.approx(0.02, rel=0.3)
    assert float(student.mask_token.std()) == pytest.approx(0.02, rel=0.3)
    for name, child in teacher.named_modules():
        if isinstance(child, nn.Linear):
            assert float(child.weight.std()) == pytest.approx(0.02, rel=0.05), name
            assert not child.bias.any()
    for token in (teacher.pos_embed, teacher.cls_token):
        assert float(token.std()) == pytest.approx(0.02, rel=0.3)
    assert float(student.pos_embed.std()) > 0.4


def test_the_seed_alone_decides_the_first_weights() -> None:
    torch.manual_seed(1)
    a = build(pretrain(seed=3)).state_dict()
    torch.manual_seed(2)
    b = build(pretrain(seed=3)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["student.cls_token"], build(pretrain(seed=4)).state_dict()["student.cls_token"])


def test_sincos_positions() -> None:
    width, side = 16, 3
    table = sincos_positions(width, side)
    assert table.shape == (1, 10, width)
    assert not table[0, 0].any()
    for row in range(side):
        for column in range(side):
            wanted = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / (width / 4)) for i in range(width // 4)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[0, 1 + row * side + column], torch.tensor(wanted))
    golden, config = read(FOLDS)
    recorded = golden["student.pos_embed"]
    torch.testing.assert_close(sincos_positions(config["embed_dim"], 8), recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("view", ["full", "masked", "crop", "folds", "mae"])
def test_permuting_the_batch_permutes_the_outputs(view: str) -> None:
    if view == "mae":
        module = build(tiny("pretrain", method={"name": "mae"}))
    else:
        module = sdae(view, tokens=5 if view == "crop" else None)
    folds = 3 if view == "folds" else 1
    images, noise = batch()
    drop = drop_factors(0.5, 2, 0, 0, 0, B, B, torch.device("cpu"))
    assert drop is not None
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = module(images, noise, drop), module(images[order], noise[order], drop[:, :, order])
    rows = (order[:, None] * folds + torch.arange(folds)).flatten()
    torch.testing.assert_close(permuted.prediction, straight.prediction[rows])
    torch.testing.assert_close(permuted.target, straight.target[rows])
    torch.testing.assert_close(permuted.loss, straight.loss)


@pytest.mark.parametrize("drop", [False, True])
def test_a_block_may_let_tokens_go_before_its_mlp(drop: bool) -> None:
    encoder = Encoder(pretrain().model, 32)
    x = torch.randn(B, 9, 24, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[2.0, 0, 1, 1], [1, 1, 0, 2]]) if drop else None
    block = encoder.blocks[0]
    whole = run_block(block, x, factors)
    torch.testing.assert_close(run_block(block, x, factors, slice(2, 5)), whole[:, 2:5])
    ids = torch.tensor([[3, 1], [0, 8], [5, 5], [2, 7]])
    picked = torch.stack([whole[row, ids[row]] for row in range(B)])
    torch.testing.assert_close(run_block(block, x, factors, ids), picked)


def test_a_block_is_timm_s_and_a_dropped_branch_is_skipped() -> None:
    block = Encoder(pretrain().model, 32).blocks[0]
    x = torch.randn(B, 9, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run_block(block, x), block(x))
    assert torch.equal(run_block(block, x, torch.zeros(2, B)), x)
    first = run_block(block, x, torch.tensor([[2.0] * B, [0.0] * B]))
    torch.testing.assert_close(first, x + 2 * block.attn(block.norm1(x)))


def test_stochastic_depth_draws() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]
    cpu = torch.device("cpu")
    whole = drop_factors(0.5, 3, 1, 2, 0, 4000, 4000, cpu)
    assert whole is not None
    assert torch.equal(whole[0], torch.ones(2, 4000))
    assert set(whole[2].unique().tolist()) == {0.0, 2.0}
    assert float((whole[2] == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((whole[1] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(whole[2, 0], whole[2, 1])  # each branch for itself
    part = drop_factors(0.5, 3, 1, 2, 1000, 500, 4000, cpu)
    assert part is not None
    assert torch.equal(part, whole[:, :, 1000:1500])
    other = drop_factors(0.5, 3, 1, 3, 0, 4000, 4000, cpu)
    assert other is not None
    assert not torch.equal(other, whole)
    assert drop_factors(0.0, 3, 1, 2, 0, 8, 8, cpu) is None
    assert torch.equal(uniform((4, 9), 1, 2), uniform((4, 9), 1, 2))
    assert not torch.equal(uniform((4, 9), 1, 2), uniform((4, 9), 2, 1))


# Layers and architectures


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (3, 1, 12)])
def test_fast_linear_is_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 20)
    fast = nn.Sequential(nn.Linear(12, 20))
    fast[0].load_state_dict(plain.state_dict())
    speed_up(fast)
    assert type(fast[0]) is Linear
    x = torch.randn(shape)
    weight = torch.randn(*shape[:-1], 20)
    results = []
    for layer in (plain, fast[0]):
        given_x = x.clone().requires_grad_()
        y = layer(given_x)
        (y.sin() * weight).sum().backward()
        results.append((y.detach(), given_x.grad, layer.weight.grad, layer.bias.grad))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast[0](x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast[0](x), F.linear(x, plain.weight, plain.bias))
    torch.testing.assert_close(fast[0].double()(x.double()), plain.double()(x.double()))


def test_a_frozen_fast_linear_passes_gradients_on() -> None:
    layer = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    speed_up(layer)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer[0].weight.sum(0).expand(3, 6))
    assert layer[0].weight.grad is None


def test_channel_counts() -> None:
    for channels in (1, 4):
        module = sdae(model={"channels": channels})
        images, noise = batch(channels)
        assert torch.isfinite(module(images, noise).loss)


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_shapes_of_the_table_are_timm_s(size: str) -> None:
    name = next(n for n in timm.list_models(f"vit_{size}_patch*") if n.removesuffix("_224").count("_") == 2)
    arch = name.removesuffix("_224")
    assert architecture(arch) == pytest.approx(lookup(arch))
