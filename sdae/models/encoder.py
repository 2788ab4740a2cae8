"""The ViT encoder, on timm's blocks and under timm's parameter names."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sdae.models.linear import speed_up
from sdae.sections import Model

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
LAYER_SCALE = 0.1  # BEiT's and CAE's start for their base size
SHORT = {"fp32": 32, "bf16": 512}  # tokens; for so few, the CPU's fused attention is slower than two plain products


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions (1, 1 + side^2, width); the cls position is zero.

    The first half of the channels encodes the column, the second half the row; in each, sines then cosines with
    omega_i = 10000^(-i / (width / 4)).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    grid = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid])[None].float()


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C * patch^2), patches in raster order, channels first inside a patch."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, n) of tokens (B, L, C) or (1, L, C): (B, n, C)."""
    index = ids[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.expand(ids.shape[0], -1, -1).gather(1, index)


class Block(vision_transformer.Block):  # type: ignore[misc]
    """timm's pre-norm block under timm's names, as `run_block` runs it: a module call, so that it can be sharded."""

    def forward(
        self, x: Tensor, drop: Tensor | None = None, keep: slice | Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        return run_block(self, x, drop, keep, bias)


def run_blocks(blocks: nn.ModuleList, x: Tensor, factors: list[tuple[Any, ...]], again: bool) -> Tensor:
    """The blocks one behind the other; `factors`: what each takes beside the tokens.

    again: keep no activations for the backward pass, compute them once more in it (the same numbers).
    """
    for block, rest in zip(blocks, factors, strict=True):
        if again and torch.is_grad_enabled():
            x = checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *rest)
    return x


def run_block(
    block: vision_transformer.Block, x: Tensor, drop: Tensor | None = None, keep: slice | Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One pre-norm block (B, N, D).

    `bias` (heads, N, N) is added to the attention's scores. `drop` (2, B) holds the stochastic-depth factors of its
    residual branches, 0 or 1 / (1 - p). `keep`, a slice of tokens or their ids (B, n), says which tokens are wanted
    behind the block: the others take part in the attention and are then let go, since the MLP does not mix tokens.
    """
    if x.device.type == "cpu":
        block.attn.fused_attn = is_long(x, x.shape[1])
    attended = block.ls1(block.attn(block.norm1(x), None if bias is None else bias.to(x.dtype)))
    x = x + (attended if drop is None else attended * drop[0, :, None, None].to(x.dtype))
    if keep is not None:
        x = x[:, keep] if isinstance(keep, slice) else gather(x, keep)
    hidden = block.ls2(block.mlp(block.norm2(x)))
    out: Tensor = x + (hidden if drop is None else hidden * drop[1, :, None, None].to(x.dtype))
    return out


def is_long(x: Tensor, tokens: int) -> bool:
    """Whether rows of so many tokens, in the precision of `x` or of its autocast, are worth the CPU's fused kernel."""
    bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return tokens > SHORT["bf16" if bf16 else "fp32"]


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth rises linearly from 0 to `rate` over the blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


@lru_cache(maxsize=64)
def relative_index(height: int, width: int, cls: bool) -> Tensor:
    """Which row of a table of offsets each pair of tokens takes: int64 (N, N), N = h w, and one more with `cls`.

    The table has (2h - 1)(2w - 1) rows for the offsets of patches, then cls to patch, patch to cls, cls to cls (BEiT).
    """
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    down, right = rows[:, None] - rows + height - 1, columns[:, None] - columns + width - 1
    index = down * (2 * width - 1) + right
    if cls:
        offsets = (2 * height - 1) * (2 * width - 1)
        index = F.pad(index, (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


@lru_cache(maxsize=64)
def offset_weights(known: int, wanted: int) -> Tensor:
    """How the offsets of `wanted` patches in a row are made of those of `known`: (2 wanted - 1, 2 known - 1).

    An offset keeps its bias in a shorter row. In a longer one the known offsets are spread by a geometric progression,
    near ones hardly and the farthest to the end, and linear between (BEiT's rule: evenly spread, it lost on ADE20K).
    """
    places = torch.ones(known - 1, dtype=torch.float64)
    if wanted > known > 2:
        low, high = 1.0, float(wanted)
        for _ in range(100):
            ratio = (low + high) / 2
            low, high = (low, ratio) if sum(ratio**i for i in range(known - 1)) > wanted - 1 else (ratio, high)
        places = low ** torch.arange(known - 1, dtype=torch.float64)
    reach = torch.cat([torch.zeros(1, dtype=torch.float64), places.cumsum(0)])
    at = torch.cat([-reach[1:].flip(0), reach])
    asked = torch.arange(1 - wanted, wanted, dtype=torch.float64).clamp(at[0], at[-1])
    right = torch.searchsorted(at, asked).clamp(1, max(len(at) - 1, 1))
    if known == 1:
        return torch.ones(len(asked), 1)
    share = (asked - at[right - 1]) / (at[right] - at[right - 1])
    rows = torch.arange(len(asked))
    weights = torch.zeros(len(asked), len(at), dtype=torch.float64)
    weights[rows, right - 1], weights[rows, right] = 1 - share, share
    return weights.float()


def resize_table(table: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The table ((2h - 1)(2w - 1) + 3, heads) of a grid from that of a square one of `side` patches."""
    if grid == (side, side):
        return table
    down, right = (offset_weights(side, n).to(table.device) for n in grid)
    square = table[:-3].reshape(2 * side - 1, 2 * side - 1, -1).float()
    with torch.autocast(table.device.type, enabled=False):
        offsets = torch.einsum("ay,bx,yxh->abh", down, right, square)
    return torch.cat([offsets.flatten(0, 1).to(table.dtype), table[-3:]])


def relative_bias(table: Tensor, side: int, grid: tuple[int, int], cls: bool = True) -> Tensor:
    """The bias (heads, N, N) of a grid from the table ((2 side - 1)^2 + 3, heads) of a square one, resized."""
    index = relative_index(*grid, cls).to(table.device)
    return resize_table(table, side, grid)[index].permute(2, 0, 1)


class Encoder(nn.Module):
    """Patch embedding, cls token, pre-norm blocks, final LayerNorm. Position is added before tokens are picked.

    Released encoders may have a relative position bias for each block, and layer scale (`Model`).
    """

    checkpointing = False  # see `run_blocks`

    def __init__(self, model: Model, image_size: int):
        super().__init__()
        assert model.width and model.depth and model.heads and model.patch_size and model.mlp_ratio
        self.width, self.patch = model.width, model.patch_size
        self.side = image_size // model.patch_size
        self.patch_embed = PatchEmbed(image_size, self.patch, model.channels, self.width, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.relative = model.positions != "absolute"
        absolute = torch.zeros(1, 1 + self.side**2, self.width)
        if model.positions == "relative":
            self.register_buffer("pos_embed", absolute, persistent=False)
        else:
            self.pos_embed = nn.Parameter(absolute)
        self.blocks = nn.ModuleList(
            Block(
                self.width, model.heads, model.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm,
                init_values=LAYER_SCALE if model.layer_scale else None,
            )
            for _ in range(model.depth)
        )  # fmt: skip
        if self.relative:
            for block in self.blocks:
                table = torch.zeros((2 * self.side - 1) ** 2 + 3, model.heads)
                block.attn.relative_position_bias_table = nn.Parameter(table)  # type: ignore[union-attr]
        self.norm = LayerNorm(self.width)
        speed_up(self)

    def embed(self, patches: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embeds the patches (B, L, C p^2) named by `ids` (B, n), or all of them, and adds their positions."""
        projection = self.patch_embed.proj
        weight = projection.weight.flatten(1)
        if ids is None:
            return F.linear(patches, weight, projection.bias) + self.pos_embed[:, 1:]
        return F.linear(gather(patches, ids), weight, projection.bias) + gather(self.pos_embed[:, 1:], ids)

    def encode(self, tokens: Tensor, drop: Tensor | None = None, keep: slice | Tensor | None = None) -> Tensor:
        """Puts the cls token in front of each row (B, n, D), runs the blocks: (B, 1 + n, D), or just the kept tokens.

        drop: (depth, 2, B) stochastic-depth factors. keep: see `run_block`; ids count the cls token as 0.
        """
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        last, grid = len(self.blocks) - 1, (self.side, self.side)
        factors = [
            (
                None if drop is None else drop[i],
                keep if i == last else None,
                self.bias(block, grid) if self.relative else None,
            )
            for i, block in enumerate(self.blocks)
        ]
        return self.norm(run_blocks(self.blocks, x, factors, self.checkpointing))  # type: ignore[no-any-return]

    def bias(self, block: nn.Module, grid: tuple[int, int], cls: bool = True) -> Tensor:
        """A block's relative position bias (heads, N, N) for a grid of patches."""
        table: Tensor = block.attn.relative_position_bias_table  # type: ignore[union-attr, assignment]
        return relative_bias(table, self.side, grid, cls)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """All tokens of whole pictures (B, C, H, W): (B, 1 + L, D)."""
        return self.encode(self.embed(patchify(images, self.patch)), drop)

    def init_sincos(self) -> None:
        """The student's initialization: xavier-uniform and sin-cos positions."""
        self.pos_embed.data.copy_(sincos_positions(self.width, self.side))
        init_xavier(self)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.data.view(self.width, -1))
        bound = 1 / math.sqrt(projection.weight[0].numel())  # PyTorch's own for a Conv2d's bias
        nn.init.uniform_(projection.bias, -bound, bound)
        nn.init.normal_(self.cls_token, std=0.02)

    def init_timm(self) -> None:
        """timm's own initialization: what the teacher and a network trained from scratch start from."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.patch_embed.proj.reset_parameters()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.pos_embed, nn.Parameter):  # else it stays zero
            nn.init.trunc_normal_(self.pos_embed, std=0.02)


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform for every Linear (a fused qkv as one matrix), bias 0; LayerNorm 1 and 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            child.reset_parameters()
