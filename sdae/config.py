"""What a run is: pydantic models, overrides, identity.

A run is one stage with one config. Its id is a hash of the complete, resolved *science* part of that config, so that
two people who ask for the same numbers ask for the same run. What must not change numbers (`efficiency`), what only
observes (`probe`), where the pictures lie (`data.path`) and the label `scale` are not part of the id.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from sdae.errors import UserError
from sdae.yamls import explain, merge, override, read_yaml

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]

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

# Keys added after the first release, with the value that leaves the numbers as they were. At that value a key is left
# out of the hash, so that the ids of older runs stay what they are.
NEUTRAL: dict[str, Any] = {}

NOT_SCIENCE = ("efficiency", "probe", "scale")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Augment(Strict):
    """Training augmentation. `randaugment` is timm's string, e.g. `rand-m9-mstd0.5-inc1`."""

    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    flip: bool = True
    randaugment: str | None = None
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    erasing: Fraction = 0.0

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the lower bound must not be above the upper one")
        return value

    @field_validator("randaugment")
    @classmethod
    def _randaugment(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"rand(-(m\d+(\.\d+)?|n\d+|mstd\d+(\.\d+)?|inc[01]))*", value):
            raise ValueError("expected timm's form rand-m9-mstd0.5-inc1 (parts m, n, mstd, inc) or null")
        return value


FINETUNE_AUGMENT = Augment(
    scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.25
)


class Data(Strict):
    """Which pictures. `train_pictures` / `val_pictures` / `classes` take a fixed, class-balanced part (null: all).

    `fingerprint` is filled in by `sdae.data.fingerprint`: a hash of the class list and the pictures per class.
    """

    name: Literal["builtin", "imagefolder", "tiny-imagenet", "cifar10", "cifar100", "stl10"] = "imagefolder"
    path: str | None = None
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    classes: Annotated[int, Field(ge=2)] | None = None
    train_pictures: Positive | None = None
    val_pictures: Positive | None = None
    augment: Augment = Augment()
    on_error: Literal["raise", "skip"] = "raise"
    fingerprint: str | None = None


class Model(Strict):
    """The network. `arch` is timm's name without the size suffix; null takes the arch's own value."""

    arch: str = "vit_base_patch16"
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    patch_size: Positive | None = None
    channels: Positive = 3
    decoder_depth: Annotated[int, Field(ge=0)] | None = None
    decoder_dim: Positive | None = None
    decoder_heads: Positive | None = None
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
    weight_ema: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _warmup_fits(self) -> Optim:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs:g} is more than the {self.epochs} epochs")
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


class Cost(Strict):
    """A cost run: batch per device, interleaved repeats of so many steps; `pictures` make an epoch (ImageNet-1k's)."""

    batch_size: Positive = 96
    repeats: Positive = 10
    steps: Positive = 5
    pictures: Positive = 1_281_167


class Efficiency(Strict):
    """What only makes a run fast: recorded, never part of its identity."""

    compile: bool = True
    workers: Annotated[int, Field(ge=0)] = 8
    micro_batch: Positive | None = None
    attention: Literal["auto", "flash", "efficient", "math"] = "auto"
    threads: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Positive = 50
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    tensorboard: bool = False


class Probe(Strict):
    """What only looks on: a kNN classification on the student's features every so many epochs of pre-training, an
    evaluation every so many epochs of fine-tuning. Off the gradient, changes no number."""

    knn_every: Positive | None = None
    k: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    pictures: Positive = 5000
    eval_every: Positive | None = None


class Run(Strict):
    """What every stage's config has."""

    scale: str = "custom"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data = Data()
    model: Model = Model()
    precision: Literal["bf16", "fp32"] = "bf16"
    efficiency: Efficiency = Efficiency()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _whole_patches(self) -> Run:
        patch = self.model.patch_size or 16
        if self.data.image_size % patch:
            raise ValueError(f"data.image_size: {self.data.image_size} is not a multiple of the patch size {patch}")
        return self

    @property
    def tokens(self) -> int:
        """L, the number of patches of a picture."""
        return (self.data.image_size // (self.model.patch_size or 16)) ** 2


class _Masked(Run):
    method: Method = Method()

    @model_validator(mode="before")
    @classmethod
    def _decoder(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values  # absent: the stage's own default
        decoder = {"decoder_depth": 8, "decoder_dim": 512, "decoder_heads": 16}
        model = values["model"]
        return values | {"model": model | {k: v for k, v in decoder.items() if model.get(k) is None}}

    @model_validator(mode="after")
    def _canonical_view(self) -> _Masked:
        masked = count_masked(self.tokens, self.method.mask_ratio)
        if self.tokens - masked < 1:
            raise ValueError(f"method.mask_ratio: {self.method.mask_ratio:g} leaves no visible patch of {self.tokens}")
        if self.method.teacher is not None:
            teacher = canonical_teacher(self.method.teacher, self.tokens, masked)
            object.__setattr__(self, "method", self.method.model_copy(update={"teacher": teacher}))
        return self

    @property
    def masked(self) -> int:
        """M, the number of masked patches."""
        return count_masked(self.tokens, self.method.mask_ratio)


def count_masked(tokens: int, mask_ratio: float) -> int:
    return tokens - int(tokens * (1 - mask_ratio))


def canonical_teacher(teacher: Teacher, tokens: int, masked: int) -> Teacher:
    """One spelling for one view, so that one run has one id; impossible views are refused."""
    view, folds, crop = teacher.view, teacher.folds, teacher.tokens
    if view == "folds":
        folds = folds or 3
        if folds > masked:
            raise ValueError(
                f"method.teacher.folds: {folds} is more than the {masked} masked patches (allowed: 1 to {masked})"
            )
        view = "masked" if folds == 1 else "folds"
    if view == "crop":
        if crop is None:
            raise ValueError(
                f"method.teacher.tokens: a crop needs a number of patches (allowed: 1 to {masked}, or {tokens})"
            )
        if crop == masked:
            view = "masked"
        elif crop == tokens:
            view = "full"
        elif crop > masked:
            raise ValueError(
                f"method.teacher.tokens: {crop} is more than the {masked} masked patches "
                f"(allowed: 1 to {masked}, or {tokens} for the full image)"
            )
    return teacher.model_copy(
        update={"view": view, "folds": folds if view == "folds" else None, "tokens": crop if view == "crop" else None}
    )


class Pretrain(_Masked):
    stage: Literal["pretrain"] = "pretrain"
    model: Model = Model(decoder_depth=8, decoder_dim=512, decoder_heads=16, drop_path=0.25)
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _no_labels(self) -> Pretrain:
        refuse_mixing(self.data.augment, "pretrain")
        return self


class CostRun(_Masked):
    """Throughput and memory of one pre-training step beside MAE's; takes no pictures from disk."""

    stage: Literal["cost"] = "cost"
    model: Model = Model(decoder_depth=8, decoder_dim=512, decoder_heads=16, drop_path=0.25)
    cost: Cost = Cost()

    @model_validator(mode="after")
    def _random_pictures(self) -> CostRun:
        object.__setattr__(self, "data", Data(image_size=self.data.image_size))
        return self


class _Classify(Run):
    init: Init = Init(weights="random")

    @model_validator(mode="after")
    def _no_decoder(self) -> _Classify:
        model = self.model.model_copy(update={"decoder_depth": None, "decoder_dim": None, "decoder_heads": None})
        object.__setattr__(self, "model", model)
        return self


class Finetune(_Classify):
    stage: Literal["finetune"] = "finetune"
    data: Data = Data(augment=FINETUNE_AUGMENT)
    model: Model = Model(drop_path=0.1)
    head: Head = Head()
    optim: Optim = Optim(
        epochs=100, batch_size=1024, base_lr=5e-4, weight_decay=0.05, betas=(0.9, 0.999),
        layer_decay=0.65, warmup_epochs=5, min_lr=1e-6,
    )  # fmt: skip


class Linprobe(_Classify):
    stage: Literal["linprobe"] = "linprobe"
    data: Data = Data(augment=Augment(scale=(0.08, 1.0)))
    head: Head = Head(pool="cls", norm="batch")
    optim: Optim = Optim(name="lars", epochs=90, batch_size=16384, base_lr=0.1, weight_decay=0.0, warmup_epochs=10)

    @model_validator(mode="after")
    def _no_mixing(self) -> Linprobe:
        refuse_mixing(self.data.augment, "linprobe")
        return self


def refuse_mixing(augment: Augment, stage: str) -> None:
    for key in ("mixup", "cutmix", "label_smoothing"):
        if getattr(augment, key):
            raise ValueError(f"data.augment.{key}: {getattr(augment, key):g} has no meaning in {stage} (allowed: 0)")


STAGES: dict[str, type[Run]] = {"pretrain": Pretrain, "finetune": Finetune, "linprobe": Linprobe, "cost": CostRun}
Config = Pretrain | Finetune | Linprobe | CostRun
_ADAPTERS = {name: TypeAdapter(cls) for name, cls in STAGES.items()}


def parse(values: Any, where: str = "config") -> Config:
    """A plain mapping as a checked, complete, canonical config. Raises `UserError` with one line.

    A stage's own defaults stand behind keys that are absent, also inside `data`, `model`, `optim` and their like.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of keys, got {type(values).__name__}")
    stage = values.get("stage", "pretrain")
    if not isinstance(stage, str) or stage not in STAGES:
        raise UserError(f"{where}: stage: {stage!r} is unknown (allowed: {', '.join(STAGES)})")
    try:
        return _ADAPTERS[stage].validate_python(merge(_defaults(stage), values))  # type: ignore[return-value]
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, STAGES[stage])}") from None
    except UserError as error:  # an unknown arch
        raise UserError(f"{where}: {error}") from None


def _defaults(stage: str) -> dict[str, Any]:
    """A stage's defaults as plain values, without what is filled in from the arch or from the method's name."""
    defaults = _ADAPTERS[stage].validate_python({}).model_dump()
    for key in ("width", "depth", "heads", "mlp_ratio", "patch_size"):
        del defaults["model"][key]
    if "method" in defaults:
        del defaults["method"]["normalize_pixels"]
    return defaults


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """A config file with `key=value` overrides upon it."""
    return parse(override(read_yaml(path) or {}, overrides or []), str(path))


def science(config: Config) -> dict[str, Any]:
    """The part of a config that says which numbers it gives, as JSON values."""
    values = config.model_dump(mode="json", exclude=set(NOT_SCIENCE))
    values["data"].pop("path")
    if str(values.get("init", {}).get("weights", "")).startswith("file:") and values["init"]["digest"]:
        values["init"]["weights"] = "file"  # the content counts, not where it lies
    for key, neutral in NEUTRAL.items():
        *parents, leaf = key.split(".")
        owner: Any = values
        for parent in parents:
            owner = owner.get(parent) if isinstance(owner, dict) else None
        if isinstance(owner, dict) and owner.get(leaf) == neutral:
            owner.pop(leaf, None)
    return values


def run_id(config: Config) -> str:
    """STAGE- and 16 hex digits of a hash over the complete, resolved science part."""
    text = json.dumps(science(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def dump(config: Config) -> dict[str, Any]:
    """A config as plain values, complete: what `config.yaml` and `sweep plan --json` hold."""
    values = config.model_dump(mode="json")
    return {"stage": values.pop("stage"), **values}
