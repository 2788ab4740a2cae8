"""The training step beside a plain reading of the paper on timm's blocks: images per second of both, in turns.

    python benchmarks/plain.py                          # the micro size of benchmarks/pretrain_step.py, fp32 and bf16
    python benchmarks/plain.py --size vit_base --precision bf16 --compiled

The plain one is what one writes first: all patches are embedded by a convolution and then picked, the decoder's tokens
are put back into raster order and all of them predicted, the teacher runs to its end, AdamW goes parameter by
parameter; eager. The same weights, pictures and masks give both the same loss (tests/test_speed.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parts import in_turns, seconds_of
from pretrain_step import PRECISIONS, SIZES, Variant, config_of, session_of, words
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.config import CostRun
from sdae.provenance import origin
from sdae.stages.cost import Bench
from sdae.stages.session import Session
from sdae.training import parallel
from sdae.training.loop import autocast

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))


class PlainEncoder(nn.Module):
    """(B, C, H, W) -> (B, 1 + n, D) for the patches `ids` (B, n), under timm's names."""

    def __init__(self, config: CostRun):
        super().__init__()
        model, tokens = config.model, config.tokens
        self.patch_embed = PatchEmbed(config.data.image_size, model.patch_size, model.channels, model.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + tokens, model.width) * 0.02)
        self.blocks = blocks(model.width, model.depth, model.heads)
        self.norm = LayerNorm(model.width, eps=1e-6)

    def forward(self, images: Tensor, ids: Tensor, folds: int = 1) -> Tensor:
        x = take(self.patch_embed(images) + self.pos_embed[:, 1:], ids)
        x = x.reshape(len(x) * folds, -1, x.shape[2])
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainAutoencoder(PlainEncoder):
    """The student: prediction of all patches (B, L, outputs)."""

    def __init__(self, config: CostRun, outputs: int):
        super().__init__(config)
        model = config.model
        self.decoder_embed = nn.Linear(model.width, model.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + config.tokens, model.decoder_dim) * 0.02)
        self.decoder_blocks = blocks(model.decoder_dim, model.decoder_depth, model.decoder_heads)
        self.decoder_norm = LayerNorm(model.decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(model.decoder_dim, outputs)

    def predict(self, images: Tensor, shuffled: Tensor, visible: int) -> Tensor:
        x = self.decoder_embed(self(images, shuffled[:, :visible]))
        hidden = self.mask_token.expand(len(x), shuffled.shape[1] - visible, -1).to(x.dtype)
        patches = take(torch.cat([x[:, 1:], hidden], dim=1), shuffled.argsort(dim=1))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # type: ignore[no-any-return]


class Plain(nn.Module):
    """MAE, or SdAE with the views masked (one fold) and folds: loss of images (B, C, H, W) and noise (B, L)."""

    def __init__(self, config: CostRun):
        super().__init__()
        self.visible, self.patch = config.tokens - config.masked, config.model.patch_size
        teacher = config.method.teacher
        outputs = config.model.width if teacher else self.patch**2 * config.model.channels  # type: ignore[operator]
        self.folds = teacher.folds or 1 if teacher else 0
        self.student = PlainAutoencoder(config, outputs)  # type: ignore[arg-type]
        self.teacher = PlainEncoder(config).requires_grad_(False) if teacher else None

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        shuffled = noise.argsort(dim=1, stable=True)
        masked = shuffled[:, self.visible :]
        prediction = take(self.student.predict(images, shuffled, self.visible), masked)
        if self.teacher is None:
            pixels = F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)
            in_order = pixels.unflatten(2, (images.shape[1], -1)).transpose(2, 3).flatten(2)  # row, column, channel
            target = take(in_order, masked)
            return (prediction - normalized(target)).square().mean()
        with torch.no_grad():
            target = normalized(self.teacher(images, masked, self.folds)[:, 1:].float())
        return 1 - F.cosine_similarity(prediction.reshape(target.shape), target, dim=1).mean()


def normalized(target: Tensor) -> Tensor:
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


class PlainStep:
    """A step of the plain one as `Bench.train_step` is one of ours."""

    def __init__(self, config: CostRun, device: torch.device):
        self.config, self.device = config, device
        self.module = Plain(config).to(device)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, (0.9, 0.95), weight_decay=0.05, foreach=False)
        size, channels = config.data.image_size, config.model.channels
        self.images = torch.randn(config.cost.batch_size, channels, size, size, device=device)

    def train_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        noise = torch.rand(len(self.images), self.config.tokens, device=self.device)
        with autocast(self.config.precision, self.device):
            loss = self.module(self.images, noise)
        loss.backward()
        self.optimizer.step()


def main() -> None:
    options = arguments()
    session = session_of(options)
    device = session.world.device
    if options.compiled:
        parallel.COMPILED_ON.add(device.type)
    rows = [row for view in options.views for p in options.precision for row in compared(view, p, options, session)]
    for row in rows:
        print("{view:6} {precision:5} {step:6} {images_per_s:9.1f} images/s  x plain {speedup:.3f}".format(**row))
    if options.json:
        found = {"benchmark": "plain", "device": device.type, "size": options.size, "rows": rows, **origin()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def compared(view: str, precision: str, options: argparse.Namespace, session: Session) -> list[dict[str, Any]]:
    mode = "compiled" if options.compiled else "eager"
    batch = options.batch or SIZES[options.size]["cost"]["batch_size"]
    config = config_of(Variant(view, mode, precision, batch), options)
    device = session.world.device
    steps = {"plain": PlainStep(config, device), "ours": Bench(config, config.method, session)}
    sides = {name: partial(seconds_of, step.train_step, config.cost.steps, device) for name, step in steps.items()}
    seconds = in_turns(sides, options.repeats)
    ratios = {name: [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)] for name in steps}
    return [
        {"view": view, "precision": precision, "step": name, "batch": batch,
         "images_per_s": batch / statistics.median(seconds[name]), "speedup": statistics.median(ratios[name]),
         "speedup_low": min(ratios[name]), "speedup_high": max(ratios[name]), "seconds": seconds[name]}
        for name in steps
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--views", type=words(("mae", "masked", "folds")), default=["mae", "folds"])
    parser.add_argument("--precision", type=words(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="ours; the plain one stays eager")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows, versions and hardware to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
