"""What a run is: pydantic models, overrides, identity.

A run is one stage with one config. Its id is a hash of the complete, resolved *science* part of that config, so that
two people who ask for the same numbers ask for the same run. What must not change numbers (`efficiency`), what only
observes (`probe`), where the pictures lie (`data.path`) and the label `scale` are not part of the id.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sdae.errors import UserError
from sdae.sections import (
    FINETUNE_AUGMENT,
    Augment,
    Backbone,
    Cost,
    Data,
    DetectData,
    DetectHead,
    DetectTest,
    Efficiency,
    Head,
    Init,
    Method,
    Model,
    Optim,
    Pictures,
    Probe,
    SegmentData,
    SegmentHead,
    SegmentTest,
    StepOptim,
    Strict,
    Teacher,
    refuse_mixing,
)
from sdae.yamls import explain, merge, override, read_yaml

# Keys added after the first release, with the value that leaves the numbers as they were. At that value a key is left
# out of the hash, so that the ids of older runs stay what they are.
NEUTRAL: dict[str, Any] = {
    "model.positions": "absolute", "model.layer_scale": False, "optim.bf16_gradients": False,
}  # fmt: skip

NOT_SCIENCE = ("efficiency", "probe", "scale")


class Run(Strict):
    """What every stage's config has."""

    scale: str = "custom"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Pictures = Data()
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
    data: Data = Data()
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
        if self.model.positions != "absolute" or self.model.layer_scale:
            raise ValueError("model.positions, model.layer_scale: of released encoders only (allowed: absolute, false)")
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
    """M = L - int(L (1 - mask_ratio)) of L patches."""
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


class _Encoded(Run):
    init: Init = Init(weights="random")

    @model_validator(mode="after")
    def _no_decoder(self) -> _Encoded:
        model = self.model.model_copy(update={"decoder_depth": None, "decoder_dim": None, "decoder_heads": None})
        object.__setattr__(self, "model", model)
        return self


class Finetune(_Encoded):
    stage: Literal["finetune"] = "finetune"
    data: Data = Data(augment=FINETUNE_AUGMENT)
    model: Model = Model(drop_path=0.1)
    head: Head = Head()
    optim: Optim = Optim(
        epochs=100, batch_size=1024, base_lr=5e-4, weight_decay=0.05, betas=(0.9, 0.999),
        layer_decay=0.65, warmup_epochs=5, min_lr=1e-6,
    )  # fmt: skip


class Linprobe(_Encoded):
    stage: Literal["linprobe"] = "linprobe"
    data: Data = Data(augment=Augment(scale=(0.08, 1.0)))
    head: Head = Head(pool="cls", norm="batch")
    optim: Optim = Optim(name="lars", epochs=90, batch_size=16384, base_lr=0.1, weight_decay=0.0, warmup_epochs=10)

    @model_validator(mode="after")
    def _no_mixing(self) -> Linprobe:
        refuse_mixing(self.data.augment, "linprobe")
        return self


class _Dense(_Encoded):
    """A task with an answer for every place of a picture, upon the pyramid of a ViT (paper sections 3.2, 3.3)."""

    backbone: Backbone = Backbone()

    @model_validator(mode="after")
    def _taps_fit(self) -> _Dense:
        depth, taps = self.model.depth or 0, self.backbone.taps
        if taps and (list(taps) != sorted(taps) or taps[0] < 0 or taps[-1] >= depth):
            raise ValueError(f"backbone.taps: {taps} must rise and lie in the {depth} blocks (0 to {depth - 1})")
        return self


class Segment(_Dense):
    stage: Literal["segment"] = "segment"
    data: SegmentData = SegmentData()  # type: ignore[assignment]
    model: Model = Model(drop_path=0.1)
    head: SegmentHead = SegmentHead()
    optim: StepOptim = StepOptim()
    test: SegmentTest = SegmentTest()

    @model_validator(mode="after")
    def _stride_covers(self) -> Segment:
        if self.test.stride and self.test.stride > self.data.image_size:
            raise ValueError(f"test.stride: {self.test.stride} leaves gaps between windows of {self.data.image_size}")
        return self


class Detect(_Dense):
    stage: Literal["detect"] = "detect"
    data: DetectData = DetectData()  # type: ignore[assignment]
    model: Model = Model(drop_path=0.2)
    head: DetectHead = DetectHead()
    optim: StepOptim = StepOptim(
        steps=87_960, lr=3e-4, schedule="steps", milestones=(65_970, 80_630), layer_decay=0.75, warmup_steps=500
    )
    test: DetectTest = DetectTest()


STAGES: dict[str, type[Run]] = {
    "pretrain": Pretrain, "finetune": Finetune, "linprobe": Linprobe, "segment": Segment, "detect": Detect,
    "cost": CostRun,
}  # fmt: skip
Config = Pretrain | Finetune | Linprobe | Segment | Detect | CostRun


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
        return STAGES[stage].model_validate(merge(_defaults(stage), values))  # type: ignore[return-value]
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, STAGES[stage])}") from None
    except UserError as error:  # an unknown arch
        raise UserError(f"{where}: {error}") from None


def _defaults(stage: str) -> dict[str, Any]:
    """A stage's defaults as plain values, without what is filled in from the arch or from the method's name."""
    defaults = STAGES[stage]().model_dump()
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
        section, leaf = key.split(".")
        if leaf in values.get(section, {}) and values[section][leaf] == neutral:
            del values[section][leaf]
    return values


def run_id(config: Config) -> str:
    """STAGE- and 16 hex digits of a hash over the complete, resolved science part."""
    text = json.dumps(science(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def dump(config: Config) -> dict[str, Any]:
    """A config as plain values, complete: what `config.yaml` and `sweep plan --json` hold."""
    values = config.model_dump(mode="json")
    return {"stage": values.pop("stage"), **values}
