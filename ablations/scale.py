"""A scale: the network, the pictures and how much shorter everything is than in the paper.

The rules that turn the paper's numbers into a scale's are pure functions here. One factor shortens all pre-trainings,
so that 100 : 300 : 1600 stays what it is; warm-up keeps its share; the teacher's momentum is raised to the power of the
shortening, else a teacher of a short run stays noise; token counts keep their share of the picture.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdae.config import count_masked, parse
from sdae.errors import UserError
from sdae.sections import Data, DetectData, Efficiency, Model, Pictures, Probe, SegmentData
from sdae.yamls import explain, merge, read_yaml

HERE = Path(__file__).parent
PAPER_TOKENS = 196  # 224 px, patch 16
PAPER_PICTURES = 1_281_167
LENGTHS = (100, 300, 1600)  # the paper's pre-trainings, in epochs
SNAPSHOTS = 15  # encoders kept along a pre-training (Figure 4c)

Factor = Annotated[float, Field(gt=0, le=1)]
SECTIONS: dict[str, type[BaseModel]] = {"data": Data, "model": Model, "efficiency": Efficiency, "probe": Probe}
DENSE = ("segment", "detect")  # stages with pictures of their own, which a recipe names


class Factors(BaseModel):
    """Epochs (steps, of dense tasks) here per epoch of the paper, by stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pretrain: Factor = 1.0
    finetune: Factor = 1.0
    linprobe: Factor = 1.0
    segment: Factor = 1.0
    detect: Factor = 1.0


class Scale(BaseModel):
    """`scales/NAME.yaml` or a file of the user's. `recipes`: by name, the keys that this scale puts over a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[\w.+ -]+$")]
    description: str = ""
    data: dict[str, Any]
    model: dict[str, Any] = {}
    precision: str = "bf16"
    efficiency: dict[str, Any] = {}
    probe: dict[str, Any] = {}
    pictures: Annotated[int, Field(ge=1)]
    epochs: Factors = Factors()
    recipes: dict[str, dict[str, Any]] = {}
    jobs: Annotated[int, Field(ge=1)] | None = None

    def part(self, stage: str) -> dict[str, Any]:
        """The keys of a config that the scale sets for every run of a stage."""
        values = {
            "model": self.model, "precision": self.precision, "efficiency": self.efficiency, "probe": self.probe,
            "scale": self.name,
        }  # fmt: skip
        return values if stage in DENSE else {"data": self.data, **values}

    def pictures_of(self, stage: str) -> Pictures:
        """The pictures of a stage's runs: the scale's own, or, of a dense task, those that its recipe names."""
        if stage not in DENSE:
            return Data.model_validate(self.data)
        data = merge(recipes()[stage]["data"], self.recipes.get(stage, {}).get("data", {}))
        return (SegmentData if stage == "segment" else DetectData).model_validate(data)

    @property
    def network(self) -> Model:
        return Model.model_validate(self.model)

    @property
    def tokens(self) -> int:
        """L, the patches of a picture."""
        return (Data.model_validate(self.data).image_size // (self.network.patch_size or 16)) ** 2

    @property
    def title(self) -> str:
        """Scale, dataset and network in one line, e.g. `smoke: builtin, 256 pictures of 32 px, ViT 32 x 2, patch 4`."""
        net = self.network
        name = "ImageNet-1k" if self.pictures == PAPER_PICTURES else self.data["name"]
        pictures = f"{self.pictures:,} pictures of {Data.model_validate(self.data).image_size} px"
        length = round_half_up(300 * self.epochs.pretrain)
        short = "" if length == 300 else f"; 300 epochs become {length}"
        return f"{self.name}: {name}, {pictures}, ViT {net.width} x {net.depth}, patch {net.patch_size}{short}"


@functools.cache
def recipes() -> dict[str, dict[str, Any]]:
    """The paper's recipes by name (`recipes.yaml`)."""
    return read_yaml(HERE / "recipes.yaml")  # type: ignore[no-any-return]


def scales() -> list[str]:
    return sorted(p.stem for p in (HERE / "scales").glob("*.yaml"))


def load_scale(name: str | Path | Scale) -> Scale:
    """A scale by name or from a YAML file, which may say `extends: mini` (a name, or a path beside it)."""
    if isinstance(name, Scale):
        return name
    path = _find(str(name), Path())
    values = _read(path, ())
    if "pictures" not in values and isinstance(values.get("data"), dict):
        values["pictures"] = values["data"].get("train_pictures")
    if values.get("pictures") is None:
        raise UserError(f"{path}: pictures: missing (how many training pictures; or set data.train_pictures)")
    try:
        scale = Scale.model_validate({"name": path.stem, **values})
        for key, model in SECTIONS.items():
            model.model_validate(getattr(scale, key))
    except ValidationError as error:
        section = error.title.lower()
        prefix = f"{section}." if section in SECTIONS else ""
        raise UserError(f"{path}: {prefix}{explain(error, SECTIONS.get(section, Scale))}") from None
    except UserError as error:  # an unknown arch
        raise UserError(f"{path}: {error}") from None
    if path.parent != HERE / "scales" and scale.name in scales():
        raise UserError(
            f"{path}: name: {scale.name!r} is that of one of the suite's own scales, whose results are held against "
            "the paper or pooled (allowed: another file name, or a name: in the file)"
        )
    _check(scale, path)
    return scale


def _check(scale: Scale, path: Path) -> None:
    if "name" not in scale.data:
        raise UserError(f"{path}: data.name: missing")
    for key in scale.recipes:
        if key not in recipes():
            raise UserError(f"{path}: recipes.{key}: unknown recipe (allowed: {', '.join(recipes())})")
    for length in LENGTHS:
        if not math.isclose(length * scale.epochs.pretrain, round(length * scale.epochs.pretrain), rel_tol=1e-9):
            raise UserError(
                f"{path}: epochs.pretrain: {scale.epochs.pretrain:g} does not leave {length} epochs whole "
                "(100 : 300 : 1600 are to stay in proportion)"
            )
    for name, recipe in recipes().items():  # a wrong key is told here, with this file's name, not amid a plan
        values = merge(merge(recipe, scale.part(recipe["stage"])), scale.recipes.get(name, {}))
        if isinstance(optim := values.get("optim"), dict) and "warmup_epochs" in optim:
            values = merge(values, {"optim": {"warmup_epochs": 0}})
        parse(values, f"{path}: recipes.{name}")


def _find(name: str, beside: Path) -> Path:
    if re.fullmatch(r"[\w-]+", name) and (HERE / "scales" / f"{name}.yaml").exists():
        return HERE / "scales" / f"{name}.yaml"
    path = beside / name
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"scale {name!r} is unknown (allowed: {', '.join(scales())}, or a YAML file)")
    return path


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: extends: {' -> '.join(p.name for p in (*seen, path))} is a circle")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected a scale's name or a YAML file, got {base!r}")
    return merge(_read(_find(base, path.parent), (*seen, path.resolve())), values)


# The rules
def round_half_up(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)  # 1e-9: 0.05 * 90 is 4.5, whatever its last bit says


def scale_epochs(paper: int, factor: float) -> int:
    return max(1, round_half_up(paper * factor))


def scale_tokens(paper: int, tokens: int, mask_ratio: float) -> int:
    """The paper's n of 196 patches as a number of `tokens` patches: all stays all, all masked stays all masked."""
    masked = count_masked(PAPER_TOKENS, mask_ratio)
    if not (1 <= paper <= masked or paper == PAPER_TOKENS):
        raise UserError(f"method.teacher.tokens: {paper} of the paper's 196 patches (allowed: 1 to {masked}, or 196)")
    if paper == PAPER_TOKENS:
        return tokens
    if paper == masked:
        return count_masked(tokens, mask_ratio)
    return (2 * paper * tokens + PAPER_TOKENS) // (2 * PAPER_TOKENS)


def scale_momentum(momentum: float, shortening: float) -> float:
    """m -> m^(updates of the paper / updates here), so that the teacher forgets its start to the same degree."""
    return momentum if shortening == 1 else tidy(momentum**shortening)


def tidy(value: float) -> float:
    """Twelve digits: a run's id must not hang on the last bit of a machine's pow()."""
    return float(f"{value:.12g}")
