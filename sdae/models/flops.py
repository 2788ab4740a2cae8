"""FLOP of a run, by formula: one multiply-add is 2 FLOP; only matrix products count. Nothing here imports torch.

Training counts three forward passes (forward, gradient of the inputs, gradient of the weights), less the gradient of
the pictures, which nobody takes; a teacher counts one. All L patches are counted as embedded, also where the code
embeds fewer. ViT-B/16 at 224 px, decoder 8 x 512: MAE 58.46 GFLOP an image; with a teacher that sees the full image
93.58, all masked patches 84.63, three folds 84.44, a crop of 49 67.27.
"""

from __future__ import annotations

from sdae.config import Config, Detect, Segment
from sdae.sections import Method, Model


def blocks(tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    """`depth` transformer blocks over one sequence: qkv, projection and MLP; the two products of the attention."""
    return depth * ((8 + 4 * mlp_ratio) * tokens * width**2 + 4 * tokens**2 * width)


def embedding(model: Model, tokens: int) -> float:
    return 2 * tokens * _whole(model.patch_size) ** 2 * model.channels * _whole(model.width)


def encoder(model: Model, tokens: int) -> float:
    """The blocks over `tokens` patches and the cls token; no patch embedding."""
    return blocks(tokens + 1, _whole(model.width), _whole(model.depth), float(model.mlp_ratio or 4))


def teacher(model: Model, method: Method, tokens: int, masked: int) -> float:
    """The teacher's forward pass of one picture of `tokens` patches, `masked` of them masked; 0 for MAE."""
    if method.teacher is None:
        return 0.0
    view = method.teacher
    folds = view.folds or 1  # a view's unused keys are null
    length = tokens if view.view == "full" else (view.tokens or masked) // folds
    return embedding(model, tokens) + folds * encoder(model, length)


def pretraining(model: Model, method: Method, tokens: int, masked: int) -> float:
    """FLOP of one picture's training step: student, decoder, teacher."""
    width, dim = _whole(model.width), _whole(model.decoder_dim)
    outputs = width if method.name == "sdae" else _whole(model.patch_size) ** 2 * model.channels
    decoder = (
        2 * (tokens - masked + 1) * width * dim
        + blocks(tokens + 1, dim, model.decoder_depth or 0, 4.0)
        + 2 * (tokens + 1) * dim * outputs
    )
    student = 3 * (encoder(model, tokens - masked) + decoder) + 2 * embedding(model, tokens)
    return student + teacher(model, method, tokens, masked)


def per_image(config: Config) -> float:
    """FLOP of one training picture of a run: a probe's encoder is frozen and costs one forward pass."""
    if config.stage == "pretrain" or config.stage == "cost":
        return pretraining(config.model, config.method, config.tokens, config.masked)
    if config.stage == "segment" or config.stage == "detect":
        return dense(config)
    forward = encoder(config.model, config.tokens)
    if config.stage == "linprobe":
        return forward + embedding(config.model, config.tokens)
    return 3 * forward + 2 * embedding(config.model, config.tokens)


def dense(config: Segment | Detect) -> float:
    """FLOP of one training picture: a crop of `image_size`, or a picture of `image_size` x 4/3 of it."""
    model, data, stage = config.model, config.data, config.stage
    patch, width = _whole(model.patch_size), _whole(model.width)
    side = data.image_size // patch
    grid = side * (side if stage == "segment" else round(4 * side / 3))
    window = config.backbone.window
    if window is None:
        trunk = encoder(model, grid)
    else:  # all blocks but the four tapped ones attend within windows
        depth, ratio = _whole(model.depth), float(model.mlp_ratio or 4)
        local = grid / window**2 * blocks(window**2, width, max(depth - 4, 0), ratio)
        trunk = local + blocks(grid, width, min(depth, 4), ratio)
    pyramid = 8 * width**2 * (1 + 4 + 1) * grid
    maps = 16 * grid, 4 * grid, grid, grid / 4
    classes = data.classes or {"ade20k": 150, "coco": 80}.get(data.name, 11)
    head = (
        _upernet(config, width, maps, classes)
        if config.stage == "segment"
        else _mask_rcnn(config, width, maps, classes)
    )
    return 3 * (trunk + pyramid + head) + 2 * embedding(model, grid)


def _upernet(config: Segment, width: int, maps: tuple[float, ...], classes: int) -> float:
    head = config.head
    c, aux, fine = head.channels, head.aux_channels, sum(maps[:3])
    pooled = sum(2 * width * c * size**2 for size in head.pools)
    bottleneck = 18 * (width + len(head.pools) * c) * c * maps[3]
    return (
        pooled + bottleneck + (2 * width * c + 18 * c**2) * fine
        + (18 * 4 * c**2 + 2 * c * classes) * maps[0]
        + (18 * width * aux + 2 * aux * classes) * maps[2]
    )  # fmt: skip


def _mask_rcnn(config: Detect, width: int, maps: tuple[float, ...], classes: int) -> float:
    head = config.head
    c, hidden = head.channels, head.hidden
    every = sum(maps) + maps[3] / 4  # the RPN's coarsest map is subsampled from the pyramid's
    pyramid = (2 * width * c + 18 * c**2) * sum(maps) + (18 * c**2 + 2 * c * 15) * every
    box = 4 * 18 * c**2 * 49 + 2 * 49 * c * hidden + 2 * hidden * 5 * (classes + 1)
    mask = (4 * 18 + 8) * c**2 * 196 + 2 * c * (classes + 1) * 784
    return pyramid + head.sampled * (box + mask / 4)  # a quarter of the sampled are objects


def _whole(value: int | None) -> int:
    assert value is not None  # filled in when the config was parsed
    return value
