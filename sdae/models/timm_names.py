"""Shapes of timm's vision transformers that the short table in `sdae.config` does not hold, read off timm itself."""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from sdae.errors import UserError


@cache
def lookup(arch: str) -> dict[str, Any]:
    """Width, depth, heads, mlp ratio and patch size of a plain ViT named without its size suffix.

    Raises UserError for a name that timm does not know, and for networks that are not a plain ViT with a cls token.
    """
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    names = [name for name in timm.list_models(f"{arch}*") if re.fullmatch(re.escape(arch) + r"(_\d+)?", name)]
    if not names:
        known = sorted({re.sub(r"_\d+$", "", n) for n in timm.list_models("vit_*patch*")})
        near = ", ".join(difflib.get_close_matches(arch, known, 6, cutoff=0.0))
        raise UserError(
            f"model.arch: {arch!r} is unknown (allowed: timm's plain ViTs without the size suffix, e.g. {near})"
        )
    with torch.device("meta"):
        network = timm.create_model(names[0], num_classes=0)
    if not isinstance(network, VisionTransformer) or not _is_plain(
        {k: v.shape for k, v in network.state_dict().items()}
    ):
        raise UserError(f"model.arch: {arch!r} is not a plain ViT with a cls token and learned positions")
    block = network.blocks[0]
    width = network.embed_dim
    return {
        "width": width, "depth": len(network.blocks), "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width, "patch_size": network.patch_embed.patch_size[0],
    }  # fmt: skip


def _is_plain(shapes: dict[str, Any]) -> bool:
    """Whether these are just the weights of `sdae.models.encoder.Encoder`, of any size."""
    per_block = r"blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    pattern = re.compile(rf"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|{per_block}")
    if (
        not all(pattern.fullmatch(key) for key in shapes)
        or not {"cls_token", "pos_embed", "norm.bias"} <= shapes.keys()
    ):
        return False
    patches = shapes["pos_embed"][1] - 1
    same_hidden = shapes["blocks.0.mlp.fc1.weight"][0] == shapes["blocks.0.mlp.fc2.weight"][1]
    return bool(round(patches**0.5) ** 2 == patches and same_hidden)
