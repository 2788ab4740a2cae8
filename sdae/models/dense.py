"""A ViT encoder as the backbone of dense tasks: pictures of any size in, a pyramid of four maps out."""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sdae.models.encoder import Encoder, is_long, patchify, run_block
from sdae.models.normalization import GlobalBatchNorm2d
from sdae.sections import Backbone, Model

Grid = tuple[int, int]


def taps_of(depth: int) -> tuple[int, int, int, int]:
    """The blocks after one third, half, two thirds and all of the depth: 3, 5, 7, 11 of 12; 7, 11, 15, 23 of 24."""
    first, second, third, last = (max(0, math.ceil(depth * share / 6) - 1) for share in (2, 3, 4, 6))
    return first, second, third, last


class Pyramid(Encoder):
    """The encoder, tapped after four blocks; its maps are resized to 1/4, 1/2, 1 and 2 patches a step.

    Positions are interpolated to any grid of patches. With windows the cls token is left out, as nothing reads it
    there. The encoder's last norm is dropped.
    """

    def __init__(self, model: Model, image_size: int, backbone: Backbone, checkpointing: bool = False):
        super().__init__(model, image_size)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.taps = backbone.taps or taps_of(len(self.blocks))
        self.window, self.checkpointing = backbone.window, checkpointing
        self.blocks[self.taps[-1] + 1 :].requires_grad_(False)  # nothing reads them
        if self.window:
            self.cls_token.requires_grad_(False)
        width = self.width
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), GlobalBatchNorm2d(width), nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )  # fmt: skip
        self.up2 = nn.ConvTranspose2d(width, width, 2, 2)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels a step of each map; those of a patch of 16 are 4, 8, 16, 32."""
        return max(1, self.patch // 4), max(1, self.patch // 2), self.patch, 2 * self.patch

    def positions(self, grid: Grid) -> Tensor:
        """(1, 1 + h w, D)."""
        if grid == (self.side, self.side):
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, list(grid))  # type: ignore[no-any-return]

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:  # type: ignore[override]
        """Pictures (B, C, H, W), sides multiples of the patch, to four maps (B, D, ., .), the finest first.

        drop: (depth, 2, B) stochastic-depth factors.
        """
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        position = self.positions(grid)
        weight = self.patch_embed.proj.weight.flatten(1)
        x = F.linear(patchify(images, self.patch), weight, self.patch_embed.proj.bias) + position[:, 1:]
        if not self.window:
            cls = self.cls_token + position[:, :1]
            x = torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        found: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            factors = None if drop is None else drop[i]
            windowed = self.window is not None and i not in self.taps
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.block, block, x, grid, factors, windowed, use_reentrant=False)
            else:
                x = self.block(block, x, grid, factors, windowed)
            if i in self.taps:
                tokens = x if self.window else x[:, 1:]
                found[i] = tokens.transpose(1, 2).reshape(len(x), self.width, *grid)
        finest, fine, same, coarse = (found[i] for i in self.taps)
        return [self.up4(finest), self.up2(fine), same, F.max_pool2d(coarse, 2, ceil_mode=True)]

    def block(self, block: Block, x: Tensor, grid: Grid, drop: Tensor | None, windowed: bool) -> Tensor:
        """One block over all tokens, or within windows (the picture is filled up with zeros to whole windows)."""
        if not windowed:
            return run_block(
                block, x, drop, bias=self.bias(block, grid, cls=not self.window) if self.relative else None
            )
        assert self.window is not None
        if x.device.type == "cpu":
            block.attn.fused_attn = is_long(x, self.window**2)
        side = self.window
        local = self.bias(block, (side, side), cls=False).to(x.dtype) if self.relative else None
        attended = block.ls1(merge(block.attn(split(block.norm1(x), grid, side), local), grid, side))
        x = x + (attended if drop is None else attended * drop[0, :, None, None].to(x.dtype))
        hidden = block.ls2(block.mlp(block.norm2(x)))
        out: Tensor = x + (hidden if drop is None else hidden * drop[1, :, None, None].to(x.dtype))
        return out


def split(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Tokens (B, h w, D) as windows (B n m, side^2, D), zeros behind the last row and column."""
    batch, _, width = x.shape
    below, beside = -grid[0] % side, -grid[1] % side
    image = F.pad(x.reshape(batch, *grid, width), (0, 0, 0, beside, 0, below))
    n, m = image.shape[1] // side, image.shape[2] // side
    return image.view(batch, n, side, m, side, width).transpose(2, 3).reshape(-1, side * side, width)


def merge(windows: Tensor, grid: Grid, side: int) -> Tensor:
    """What `split` gave as tokens (B, h w, D)."""
    n, m, width = -(-grid[0] // side), -(-grid[1] // side), windows.shape[2]
    image = windows.view(-1, n, m, side, side, width).transpose(2, 3).reshape(-1, n * side, m * side, width)
    return image[:, : grid[0], : grid[1]].reshape(image.shape[0], -1, width)
