"""The sections of a config: one model each, with what is allowed in it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Side = Annotated[int, Field(ge=1, le=65_536)]  # of a tensor: more than any network has

# timm's plain vision transformers: width, depth, heads, mlp ratio. Other names of timm's are looked up in timm itself.
ARCHITECTURES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "gigantic": (1664, 48, 16, 64 / 13),
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _ordered(value: Any) -> Any:
    if value[0] > value[1]:
        raise ValueError("the lower bound must not be above the upper one")
    return value


class Augment(Strict):
    """Training augmentation. `randaugment` is timm's string, e.g. `rand-m9-mstd0.5-inc1`."""

    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    flip: bool = True
    randaugment: str | None = None
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    erasing: Fraction = 0.0

    _ordered = field_validator("scale")(_ordered)

    @field_validator("randaugment")
    @classmethod
    def _randaugment(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"rand(-(m\d+(\.\d+)?|n\d+|mstd\d+(\.\d+)?|inc[01]))*", value):
            raise ValueError("expected timm's form rand-m9-mstd0.5-inc1 (parts m, n, mstd, inc) or null")
        return value


FINETUNE_AUGMENT = Augment(
    scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.25
)


class Pictures(Strict):
    """Which pictures. `train_pictures` / `val_pictures` / `classes` take a fixed part of them (null: all).

    `fingerprint` is filled in by `sdae.data.fingerprint`: a hash of the class list and the numbers of pictures.
    """

    name: str
    path: str | None = None
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    classes: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    train_pictures: Positive | None = None
    val_pictures: Positive | None = None
    on_error: Literal["raise", "skip"] = "raise"
    fingerprint: str | None = None


class Data(Pictures):
    """Pictures with one label each; the parts taken of them are class-balanced."""

    name: Literal["builtin", "imagefolder", "packed", "tiny-imagenet", "cifar10", "cifar100", "stl10"] = "imagefolder"
    augment: Augment = Augment()


class SceneAugment(Strict):
    """Training augmentation of segmentation (ADE20K's recipe).

    The shorter side becomes `scale` times `image_size` (the longer one at most `longest` times as long), a crop of
    `image_size` in which no class has more than `most_of_one_class` of the labelled pixels is cut, flipped, distorted
    in brightness, contrast, saturation and hue.
    """

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    longest: Annotated[float, Field(ge=1)] = 4.0
    most_of_one_class: Annotated[float, Field(gt=0, le=1)] = 0.75
    flip: bool = True
    distort: bool = True

    _ordered = field_validator("scale")(_ordered)


class SegmentData(Pictures):
    """Pictures with a label map each; `image_size`: the side of a training crop and of a test window."""

    name: Literal["ade20k", "segmentation-folder", "builtin"] = "ade20k"
    image_size: Annotated[int, Field(ge=8, le=4096)] = 512
    augment: SceneAugment = SceneAugment()


class ObjectAugment(Strict):
    """Training augmentation of detection, as DETR's: the shorter side becomes one of `sides`; every other time that is
    done to a crop of sides between `crop[0]` and `crop[1]` from the picture at one of `crop_sides` (null: never)."""

    sides: Annotated[tuple[Positive, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    crop: tuple[Positive, Positive] | None = (384, 600)
    crop_sides: Annotated[tuple[Positive, ...], Field(min_length=1)] = (400, 500, 600)
    flip: bool = True

    @field_validator("crop")
    @classmethod
    def _crop_ordered(cls, value: tuple[int, int] | None) -> Any:
        return value and _ordered(value)


class DetectData(Pictures):
    """Pictures with objects (COCO json); `image_size`: the shorter side in tests, `longest`: the longer one at most."""

    name: Literal["coco", "coco-json", "builtin"] = "coco"
    image_size: Annotated[int, Field(ge=8, le=4096)] = 800
    longest: Positive = 1333
    augment: ObjectAugment = ObjectAugment()


class Model(Strict):
    """The network. `arch` is timm's name without the size suffix; null takes the arch's own value.

    `positions` relative: a learned bias of the attention for each offset (BEiT); `layer_scale`: a learned factor per
    channel behind each residual branch (BEiT, CAE).
    """

    arch: str = "vit_base_patch16"
    width: Side | None = None
    depth: Annotated[int, Field(ge=1, le=1000)] | None = None
    heads: Side | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    patch_size: Side | None = None
    channels: Side = 3
    positions: Literal["absolute", "relative", "both"] = "absolute"
    layer_scale: bool = False
    decoder_depth: Annotated[int, Field(ge=0, le=1000)] | None = None
    decoder_dim: Side | None = None
    decoder_heads: Side | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = architecture(values.get("arch", "vit_base_patch16"))
        return values | {k: v for k, v in own.items() if values.get(k) is None}

    @model_validator(mode="after")
    def _whole_heads(self) -> Model:
        for width, heads, name in (
            (self.width, self.heads, "heads"),
            (self.decoder_dim, self.decoder_heads, "decoder_heads"),
        ):
            if width and heads and width % heads:
                raise ValueError(f"{name}: {heads} does not divide the width {width}")
        for width, name in ((self.width, "width"), (self.decoder_dim, "decoder_dim")):
            if width and width % 4:
                raise ValueError(f"{name}: {width} must be a multiple of 4 (sin-cos positions take four parts)")
        return self


def architecture(arch: Any) -> dict[str, Any]:
    """Width, depth, heads, mlp ratio and patch size of a timm ViT name without its size suffix."""
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)", str(arch))
    if match and match[1] in ARCHITECTURES:
        width, depth, heads, mlp_ratio = ARCHITECTURES[match[1]]
        return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "patch_size": int(match[2])}
    from sdae.models.timm_names import lookup  # costs seconds: only for names that the table does not hold

    return lookup(str(arch))


class Teacher(Strict):
    view: Literal["full", "masked", "crop", "folds"] = "folds"
    folds: Positive | None = None
    tokens: Positive | None = None
    normalize: bool = True
    init: Literal["own", "student"] = "own"


class Ema(Strict):
    """teacher <- m teacher + (1 - m) student, Eq. (7). `momentum_end` null: constant; else a cosine over the epochs."""

    every: Literal["epoch", "iteration"] = "epoch"
    momentum: Fraction = 0.96
    momentum_end: Fraction | None = 0.99


class Method(Strict):
    """The pre-training method. MAE has no teacher: `teacher`, `similarity`, `ema` are null there."""

    name: Literal["sdae", "mae"] = "sdae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    teacher: Teacher | None = None
    similarity: Literal["authors", "tokens", "channels"] | None = None
    ema: Ema | None = None
    normalize_pixels: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _unused_keys_are_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("name", "sdae") == "mae":
            values.update(teacher=None, similarity=None, ema=None)
            if values.get("normalize_pixels") is None:
                values["normalize_pixels"] = True
        elif values.get("name", "sdae") == "sdae":
            values["normalize_pixels"] = None
            for key, default in (("teacher", {}), ("similarity", "authors"), ("ema", {})):
                if values.get(key) is None:
                    values[key] = default
        return values


class Optim(Strict):
    """Learning rate = base_lr x batch_size / 256; linear warm-up from 0, cosine to `min_lr`, per step."""

    name: Literal["adamw", "lars"] = "adamw"
    epochs: Positive = 300
    batch_size: Positive = 768
    base_lr: Annotated[float, Field(gt=0)] = 2.666e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    warmup_epochs: Annotated[float, Field(ge=0)] = 60
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    bf16_gradients: bool = False
    weight_ema: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _warmup_fits(self) -> Optim:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs:g} is more than the {self.epochs} epochs")
        return self


class StepOptim(Strict):
    """AdamW counted in steps, as dense tasks are. `lr` is the peak at `batch_size` pictures, reached linearly from 0.

    schedule poly: lr (1 - t)^power over what follows the warm-up; steps: times 0.1 at each of the `milestones`.
    """

    name: Literal["adamw"] = "adamw"
    steps: Positive = 160_000
    batch_size: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["poly", "steps"] = "poly"
    power: Annotated[float, Field(gt=0)] = 1.0
    milestones: tuple[Positive, ...] = ()
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = 0.65
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 1500
    clip: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> StepOptim:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is more than the {self.steps} steps")
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("milestones: wanted by schedule steps, and by it alone")
        if list(self.milestones) != sorted({m for m in self.milestones if m <= self.steps}):
            raise ValueError(f"milestones: {self.milestones} must rise and stay below the {self.steps} steps")
        return self


class Init(Strict):
    """Where an encoder's weights come from: `run` with weights student|teacher, or random | timm:NAME | file:PATH."""

    run: str | None = None
    weights: str = "student"
    epoch: Literal["last"] | Positive = "last"
    digest: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Init:
        if self.run is not None:
            if not re.fullmatch(r"pretrain-[0-9a-f]{16}", self.run):
                raise ValueError(f"run: {self.run!r} is not the id of a pre-training (pretrain- and 16 hex digits)")
            if self.weights not in ("student", "teacher"):
                raise ValueError(f"weights: {self.weights!r} of a run must be student or teacher")
        elif not (self.weights == "random" or re.fullmatch(r"(timm|file):.+", self.weights)):
            raise ValueError(f"weights: {self.weights!r} without a run must be random, timm:NAME or file:PATH")
        elif self.epoch != "last":
            raise ValueError("epoch: only weights of a run have epochs")
        return self


class Head(Strict):
    """Classification head: pooling of the encoder's tokens and the normalization in front of the linear layer."""

    pool: Literal["mean", "cls"] = "mean"
    norm: Literal["layer", "batch"] = "layer"


class Backbone(Strict):
    """How an encoder becomes a pyramid. `taps`: the four blocks (0-based) whose outputs are taken (null: after one
    third, half, two thirds and all of them). `window`: the other blocks attend within windows of so many tokens a side
    (null: everywhere)."""

    taps: tuple[int, int, int, int] | None = None
    window: Positive | None = None


class SegmentHead(Strict):
    """UperNet: channels of the pyramid, pooled grids, dropout before the classes; an FCN on the third map beside it."""

    channels: Side = 768
    pools: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 3, 6)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    aux_channels: Side = 256
    aux_weight: Annotated[float, Field(ge=0)] = 0.4


class SegmentTest(Strict):
    """slide: windows of `data.image_size`, `stride` apart (null: two thirds of it), averaged where they overlap.

    The shorter side becomes `image_size` times each of `scales`; probabilities are averaged over scales and flips.
    """

    mode: Literal["slide", "whole"] = "slide"
    stride: Positive | None = None
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    flip: bool = False


class DetectHead(Strict):
    """Mask R-CNN: channels of FPN, RPN and heads, width of the box head's fully connected layer, regression loss."""

    channels: Side = 256
    hidden: Side = 1024
    anchor: Annotated[float, Field(gt=0)] = 8.0
    box_loss: Literal["giou", "smooth_l1"] = "giou"
    box_weight: Annotated[float, Field(ge=0)] = 10.0
    rpn_sampled: Positive = 256
    sampled: Positive = 512
    proposals: Positive = 1000


class DetectTest(Strict):
    score: Annotated[float, Field(ge=0, le=1)] = 0.05
    nms: Annotated[float, Field(gt=0, le=1)] = 0.5
    detections: Positive = 100


class Cost(Strict):
    """A cost run: batch per device, interleaved repeats of so many steps; `pictures` make an epoch (ImageNet-1k's)."""

    batch_size: Positive = 96
    repeats: Positive = 10
    steps: Positive = 5
    pictures: Positive = 1_281_167


class Efficiency(Strict):
    """What only makes a run fast: recorded, never part of its identity."""

    compile: bool = True
    cuda_graphs: bool = False
    fsdp: bool = False
    workers: Annotated[int, Field(ge=0, le=1024)] = 8
    micro_batch: Positive | None = None
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    checkpointing: bool = False
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Positive = 50
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    tensorboard: bool = False

    @model_validator(mode="after")
    def _graphs_are_of_compiled_code(self) -> Efficiency:
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs: true wants compile: true")
        return self


class Probe(Strict):
    """What only looks on: a kNN classification on the student's features every so many epochs of pre-training, an
    evaluation every so many epochs of fine-tuning. Off the gradient, changes no number."""

    knn_every: Positive | None = None
    k: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    pictures: Positive = 5000
    eval_every: Positive | None = None


def refuse_mixing(augment: Augment, stage: str) -> None:
    """Raises ValueError for settings of classification that dense prediction cannot use."""
    for key in ("mixup", "cutmix", "label_smoothing"):
        if getattr(augment, key):
            raise ValueError(f"data.augment.{key}: {getattr(augment, key):g} has no meaning in {stage} (allowed: 0)")
