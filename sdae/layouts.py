"""The layouts of released checkpoints, written from their architectures' descriptions: encoders under timm's names.

Strict: every tensor of an encoder is mapped by a rule or left out by a rule, and an odd or missing one is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdae.errors import UserError

DECODER = ("decoder_", "mask_token")
HEAD = ("head.", "fc_norm.", "head_drop")
TABLE = "attn.relative_position_bias_table"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
INDEX = "relative_position_index"  # which row each pair of tokens takes; a function of the grid


@dataclass
class Encoded:
    """An encoder under timm's names, and where each tensor of its part of the file went.

    mapped: how many tensors each rule took. filled: what the file lacks and the layout defines. missing: what it lacks,
    under the file's own names; empty tensors stand for it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    mapped: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One encoder of a file. at: the keys that lead to its tensors; prefix: what their names begin with.

    others: prefixes of names that are none of its business; () means every other one, None: there may be none.
    """

    name: str
    at: tuple[str, ...] = ()
    prefix: str = ""
    others: tuple[str, ...] | None = None
    optional: bool = False


# The first part is the one that the release is about: it goes to OUT, the other to OUT-NAME.
LAYOUTS: dict[str, tuple[tuple[Part, ...], ...]] = {
    "sdae": ((Part("student", ("model",)), Part("teacher", ("model_teacher",))),),
    "mae": ((Part("student", ("model",)),),),
    "timm": ((Part("student", ("model",)),), (Part("student", ("state_dict",)),), (Part("student"),)),
    "deit": ((Part("student", ("model",)),),),
    "moco-v3": (
        (
            Part("student", ("state_dict",), "base_encoder.", ("predictor.",)),
            Part("teacher", ("state_dict",), "momentum_encoder.", ("predictor.",), optional=True),
        ),
    ),
    "dino": (
        (Part("teacher", ("teacher",), "backbone.", HEAD), Part("student", ("student",), "backbone.", HEAD)),
        (Part("student", ("state_dict",), "backbone.", HEAD),),
        (Part("student", ("state_dict",)),),
        (Part("student"),),
    ),
    "beit": ((Part("student", ("model",)),),),
    "cae": ((Part("student", ("model",), "encoder.", ()),),),
}
PREFIXED = {
    "moco-v3": ("state_dict", "base_encoder."),
    "dino": ("state_dict", "backbone."),
    "cae": ("model", "encoder."),
}
OF_BEIT = re.compile(r"blocks\.0\.(gamma_1|attn\.(q_bias|relative_position_bias_table))")  # tells BEiT's names


def guess(content: dict[str, Any]) -> str:
    """The layout of a file that nobody named one for."""
    if "model_teacher" in content:
        return "sdae"
    if "teacher" in content and "student" in content:
        return "dino"
    for layout, (key, prefix) in PREFIXED.items():
        part = content.get(key)
        if isinstance(part, dict) and any(_bare(name).startswith(prefix) for name in part):
            return layout
    names = content.get("model", content)
    if isinstance(names, dict) and any(OF_BEIT.fullmatch(_bare(name)) for name in names):
        return "beit" if "model" in content else "timm"
    return "timm"


def encoders(content: dict[str, Any], layout: str, where: str) -> dict[str, Encoded]:
    """The encoders of a file in one of the `LAYOUTS`, or `auto`; the first is the one that the release is about.

    Raises UserError for another layout, for an odd key and for a missing one.
    """
    if layout == "auto":
        layout = guess(content)
    forms = LAYOUTS[layout]
    form = next((form for form in forms if all(_has(content, part) for part in form if not part.optional)), None)
    if form is None:
        ways = " or ".join(" and ".join(_place(part) for part in form if not part.optional) for form in forms)
        raise UserError(f"{where}: {layout}'s layout has {ways}; here: {keys_of(content)}")
    present = [part for part in form if _has(content, part)]
    out = {}
    for part in present:
        siblings = tuple(p.prefix for p in present if p is not part and p.at == part.at)
        out[part.name] = _encoder(content, part, siblings, layout, f"{where}: {part.name}")
    return out


def keys_of(content: Any) -> str:
    keys = sorted(map(str, content))[:8] if isinstance(content, dict) else [type(content).__name__]
    return ", ".join(keys) or "nothing"


def _place(part: Part) -> str:
    where = f"the key {'.'.join(part.at)}" if part.at else "tensors alone"
    return f"{where} with names {part.prefix}*" if part.prefix else where


def _tensors(content: dict[str, Any], part: Part) -> Any:
    found: Any = content
    for key in part.at:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _bare(name: Any) -> str:
    return str(name).removeprefix("module.")


def _has(content: dict[str, Any], part: Part) -> bool:
    found = _tensors(content, part)
    if not part.at:
        return any(isinstance(value, Tensor) for value in content.values())
    if not part.prefix:
        return found is not None
    return isinstance(found, dict) and any(_bare(name).startswith(part.prefix) for name in found)


def _encoder(content: dict[str, Any], part: Part, siblings: tuple[str, ...], layout: str, where: str) -> Encoded:
    found = _tensors(content, part)
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: expected a mapping of tensors; here: {keys_of(found)}")
    if odd := sorted(name for name, value in found.items() if not isinstance(value, Tensor)):
        raise UserError(f"{where}: expected a mapping of tensors; not one is {', '.join(odd[:8])}")
    out, mine, extra = Encoded(), {}, []
    for name, value in found.items():
        bare = name.removeprefix("module.")
        if bare.startswith(part.prefix):
            mine[bare.removeprefix(part.prefix)] = (name, value)
        elif part.others == () or bare.startswith(part.others or "\0"):
            out.left_out.append(name)
        elif not bare.startswith(siblings or "\0"):
            extra.append(name)
    if extra:
        raise UserError(f"{where}: not {layout}'s layout; extra keys: {', '.join(sorted(extra))}")
    beit = layout in ("beit", "cae") or (layout == "timm" and any(OF_BEIT.fullmatch(name) for name in mine))
    dropped = (*DECODER, *HEAD, *(("lm_head.",) if beit else ()))
    taken: dict[str, Tensor] = {}
    for name, (full, value) in mine.items():
        if name.startswith(dropped) or (beit and name.endswith(INDEX)):
            out.left_out.append(full)
        else:
            taken[name] = value
    if beit:
        _from_beit(taken, out, where)
    if twice := sorted(out.tensors.keys() & taken.keys()):
        raise UserError(f"{where}: not {layout}'s layout; extra keys: {', '.join(twice)}")
    out.mapped["same name" if not part.prefix else f"same name behind {part.prefix}"] += len(taken)
    out.tensors |= taken
    out.mapped = +out.mapped
    if layout == "cae" and "pos_embed" not in out.tensors and not relative(out.tensors):
        _fill_positions(out, where)
    if beit and any(_bare(n).startswith("fc_norm.") for n in out.left_out) and "norm.weight" not in out.tensors:
        _fill_norm(out)
    out.left_out.sort()
    return out


def _from_beit(taken: dict[str, Tensor], out: Encoded, where: str) -> None:
    """Moves what has BEiT's names out of `taken`: biases of q and v alone, gammas, tables of relative positions."""
    blocks = blocks_of(taken)
    present = [group for group in (("gamma_1", "gamma_2"), ("attn.q_bias", "attn.v_bias"), (TABLE,))
               if any(f"blocks.{i}.{name}" in taken for i in blocks for name in group)]  # fmt: skip
    wanted = [f"blocks.{i}.{name}" for i in blocks for group in present for name in group]
    out.missing = [name for name in wanted if name not in taken]
    taken |= {name: torch.empty(0) for name in out.missing}
    shared = taken.pop(SHARED_TABLE, None)
    if shared is not None:
        out.mapped[f"{SHARED_TABLE} -> a copy in every block"] += 1
    for i in blocks:
        at = f"blocks.{i}."
        for k in (1, 2):
            if (gamma := taken.pop(f"{at}gamma_{k}", None)) is not None:
                out.tensors[f"{at}ls{k}.gamma"] = gamma
                out.mapped["gamma_1, gamma_2 -> ls1.gamma, ls2.gamma"] += 1
        q, v = taken.pop(f"{at}attn.q_bias", None), taken.pop(f"{at}attn.v_bias", None)
        if q is not None and v is not None:
            _alike(q, v, f"{at}attn.q_bias", "v_bias", 1, out, where)
            out.tensors[f"{at}attn.qkv.bias"] = q if out.missing else torch.cat([q, torch.zeros_like(q), v])
            out.mapped["attn.q_bias, attn.v_bias -> attn.qkv.bias with zeros for k"] += 2
        if shared is not None:
            own = taken.pop(f"{at}{TABLE}", None)
            _alike(shared if own is None else own, shared, f"{at}{TABLE}", "the shared one", 2, out, where)
            out.tensors[f"{at}{TABLE}"] = shared.clone() if own is None or out.missing else own + shared
            out.mapped[f"{TABLE}, the shared one added"] += own is not None
    if not any(name.endswith("attn.qkv.bias") for name in (*taken, *out.tensors)):
        for i in blocks:
            if (weight := taken.get(f"blocks.{i}.attn.qkv.weight")) is not None and weight.dim():
                out.tensors[f"blocks.{i}.attn.qkv.bias"] = weight.new_zeros(weight.shape[0])
                out.filled[f"blocks.{i}.attn.qkv.bias"] = "zeros: the file's blocks have no bias of q, k and v"


def _alike(one: Tensor, other: Tensor, name: str, beside: str, dims: int, out: Encoded, where: str) -> None:
    if not out.missing and (one.dim() != dims or one.shape != other.shape):
        raise UserError(f"{where}: {name} is {tuple(one.shape)}, {beside} {tuple(other.shape)}")


def _fill_positions(out: Encoded, where: str) -> None:
    """CAE's positions, which its files need not hold: sin-cos as MoCo v3's, rows in the first half of the channels."""
    from sdae.models.encoder import sincos_positions

    width = next((value.shape[-1] for name, value in out.tensors.items() if name == "cls_token" and value.dim()), 0)
    if not width or width % 4:
        raise UserError(f"{where}: neither positions nor a cls_token that tells their width")
    side = 14  # 224 px in patches of 16: CAE's files are of no other size
    columns_first = sincos_positions(width, side)
    grid = columns_first[:, 1:].reshape(1, side, side, width).transpose(1, 2).flatten(1, 2)
    out.tensors["pos_embed"] = torch.cat([columns_first[:, :1], grid], dim=1)
    out.filled["pos_embed"] = "sin-cos of 14 x 14 patches: the file holds no positions"


def _fill_norm(out: Encoded) -> None:
    """A file fine-tuned on pooled tokens has a norm behind the pooling only, which belongs to the classifier."""
    width = out.tensors["cls_token"].shape[-1] if "cls_token" in out.tensors else 0
    for name, value in (("norm.weight", torch.ones(width)), ("norm.bias", torch.zeros(width))):
        out.tensors[name] = value
        out.filled[name] = "ones and zeros: the file has fc_norm, of its classifier, in place of the encoder's norm"


def blocks_of(names: Iterable[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(r"blocks\.(\d{1,4})\.", name))})


def relative(tensors: Iterable[str]) -> bool:
    return any(name.endswith(TABLE) for name in tensors)


def kind(tensors: Iterable[str]) -> dict[str, Any]:
    """`positions` and `layer_scale`, read off an encoder's names."""
    names = set(tensors)
    tables = relative(names)
    both = "both" if "pos_embed" in names else "relative"
    scaled = any(re.search(r"\.ls[12]\.gamma$", name) for name in names)
    return {"positions": both if tables else "absolute", "layer_scale": scaled}


def describe(weights: dict[str, Tensor], where: str, missing: Iterable[str] = ()) -> dict[str, Any]:
    """Width, depth, patch size, tokens and the kind of positions, read off the shapes. missing: see `Encoded`.

    Raises UserError: every missing or extra key is named, and the first tensor of another shape.
    """
    facts = kind(weights)
    depth = max(blocks_of(weights), default=-1) + 1
    patch_embed = weights.get("patch_embed.proj.weight")
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    shape = (0, 0, 0, 0) if patch_embed is None else tuple(patch_embed.shape)
    width = shape[0] if shape else 0
    wide = hidden.shape[0] if hidden is not None and hidden.dim() else 0
    table = weights.get(f"blocks.0.{TABLE}")
    tokens, heads = 0, table.shape[-1] if table is not None and table.dim() == 2 else None
    if facts["positions"] == "relative":
        tokens = patches_of_table(len(table)) if heads and table is not None else 0
    elif "pos_embed" in weights and weights["pos_embed"].dim() == 3:
        tokens = weights["pos_embed"].shape[1] - 1
    rows = (2 * round(tokens**0.5) - 1) ** 2 + 3
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,), "mlp.fc1.weight": (wide, width), "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (width, wide), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    if facts["layer_scale"]:
        block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
    if facts["positions"] != "absolute":
        block[TABLE] = (rows, heads or 0)
    wanted: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "patch_embed.proj.weight": shape, "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    if facts["positions"] != "relative":
        wanted["pos_embed"] = (1, tokens + 1, width)
    wanted |= {f"blocks.{i}.{name}": size for i in range(max(depth, 1)) for name, size in block.items()}
    name_differences(set(wanted), set(weights), where, missing)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise UserError(f"{where}: patch_embed.proj.weight is {shape}, not (width, channels, patch, patch)")
    for name, size in wanted.items():
        if tuple(weights[name].shape) != size:
            raise UserError(f"{where}: {name} is {tuple(weights[name].shape)}, not {size} as the others say")
    if round(tokens**0.5) ** 2 != tokens or not tokens:
        raise UserError(f"{where}: positions of {tokens} patches, which are no square")
    heads_known = {} if heads is None else {"heads": heads}
    return {
        "width": width, "depth": depth, **heads_known, "patch_size": shape[2], "channels": shape[1], "tokens": tokens,
        **facts,
    }  # fmt: skip


def patches_of_table(rows: int) -> int:
    """How many patches a table of (2 side - 1)^2 + 3 rows is for; 0 for another number of rows."""
    side = (round(max(rows - 3, 0) ** 0.5) + 1) // 2
    return side**2 if (2 * side - 1) ** 2 + 3 == rows else 0


def name_differences(wanted: set[str], given: set[str], where: str, also_missing: Iterable[str] = ()) -> None:
    missing, extra = sorted((wanted - given).union(also_missing)), sorted(given - wanted)
    if missing or extra:
        parts = [
            f"{what}: {', '.join(keys)}" for what, keys in (("missing keys", missing), ("extra keys", extra)) if keys
        ]
        raise UserError(f"{where}: not this architecture's encoder; {'; '.join(parts)}")
