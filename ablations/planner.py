"""From artifacts to a sweep: every run once, needs before dependants, each with the cells that it feeds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.artifact import Artifact, Cell, Column, Row, available, load_artifact
from ablations.scale import (
    DENSE,
    PAPER_PICTURES,
    PAPER_TOKENS,
    SNAPSHOTS,
    Scale,
    load_scale,
    recipes,
    round_half_up,
    scale_epochs,
    scale_momentum,
    scale_tokens,
    tidy,
)
from sdae.config import Config, count_masked, parse, run_id, science
from sdae.data.fingerprint import fingerprint
from sdae.errors import UserError
from sdae.released import RELEASED, SUFFIX, digest_of
from sdae.sections import Model, Pictures
from sdae.yamls import merge

__all__ = ["Artifact", "Cell", "Column", "PlannedRun", "Row", "Sweep", "available", "load_artifact", "plan"]

Values = Mapping[str, Any]
NEEDS_RELEASED = "needs weights"
MISSING = "blocked: weights missing"
SHAPE = ("arch", "width", "depth", "heads", "mlp_ratio", "patch_size", "channels")


@dataclass
class PlannedRun:
    """`paper` holds, by key, the paper's value of every number that the scale changed (momentum, epochs, tokens).

    `origin` is the same with the values of its need: what tells two arms of the paper apart.
    """

    id: str
    config: Config
    needs: tuple[str, ...]
    feeds: list[str] = field(default_factory=list)
    paper: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Sweep:
    """`runs` in topological order. `requested`: runs summed over the artifacts, needs included, before they share any.

    `provisional`: the pictures were not found, so ids are not those which the runs will have. `blocked`: cells whose
    run wants what is not to be had here, and what that is.
    """

    scale: Scale
    artifacts: list[Artifact]
    runs: dict[str, PlannedRun]
    cells: dict[str, list[tuple[int, str]]]
    requested: int
    provisional: bool = False
    blocked: dict[str, str] = field(default_factory=dict)

    @property
    def unique(self) -> int:
        return len(self.runs)


def plan(
    artifacts: Sequence[str | Path] = (),
    scale: str | Path | Scale = "smoke",
    seeds: Sequence[int] = (0,),
    *,
    content: str | Mapping[str, str] | None = None,
    data_path: str | None = None,
    cells: Collection[str] | None = None,
) -> Sweep:
    """The sweep of some artifacts (none given: all of the suite's) at one scale.

    content: fingerprints of pictures and digests of weights that are not on this machine (`content_key`); a text
    stands for all pictures. data_path: where the scale's pictures lie. cells: only the runs that feed these.
    """
    scale = load_scale(scale)
    if data_path is not None:
        scale = scale.model_copy(update={"data": {**scale.data, "path": data_path}})
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            raise UserError(f"seeds: {seed} is given twice")
    if not seeds:
        raise UserError("seeds: at least one is needed, e.g. 0,1,2")
    loaded: dict[str, Artifact] = {}
    for name in artifacts or available():
        artifact = load_artifact(name, scale)
        if artifact.name in loaded:
            other = loaded[artifact.name].path
            raise UserError(f"two artifacts are named {artifact.name!r}: {other} and {artifact.path}")
        loaded[artifact.name] = artifact
    return _Planner(scale, tuple(seeds), content).plan(list(loaded.values()), cells)


class _First:
    """A planned run of one seed, from which those of other seeds are made: they differ in the seeds' keys alone."""

    def __init__(self, config: Config, paper: dict[str, Any], origin: dict[str, Any]):
        self.config, self.paper, self.origin = config, paper, origin
        self.text = json.dumps(science(config), sort_keys=True, separators=(",", ":"))
        self.init = getattr(config, "init", None)
        assert self.again(config.seed, self.init and self.init.run)[0] == run_id(config)

    def again(self, seed: int, need: str | None = None) -> tuple[str, Config]:
        """Id and config of the run of this seed, whose need is this one."""
        text = self.text.replace(f'"seed":{self.config.seed},"stage":', f'"seed":{seed},"stage":')
        update: dict[str, Any] = {"seed": seed}
        if self.init and need:
            text = text.replace(f'"run":"{self.init.run}"', f'"run":"{need}"')
            update["init"] = self.init.model_copy(update={"run": need})
        identity = f"{self.config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return identity, self.config.model_copy(update=update)


class _Planner:
    def __init__(self, scale: Scale, seeds: tuple[int, ...], content: str | Mapping[str, str] | None):
        self.scale, self.seeds = scale, seeds
        self.any_pictures = content if isinstance(content, str) else None
        self.content: Mapping[str, str] = {} if content is None or isinstance(content, str) else content
        self.fingerprints: dict[str, str | None] = {}
        self.runs: dict[str, PlannedRun] = {}
        self.resolved: dict[tuple[str, int], PlannedRun] = {}
        self.firsts: dict[str, _First] = {}
        self.texts: dict[tuple[int, str], str] = {}

    def plan(self, artifacts: list[Artifact], wanted: Collection[str] | None = None) -> Sweep:
        cells: dict[str, list[tuple[int, str]]] = {}
        blocked: dict[str, str] = {}
        requested = 0
        for artifact in artifacts:
            mine: dict[str, tuple[str, PlannedRun]] = {}
            for cell, (name, specs) in artifact.specs.items():
                if wanted is not None and cell not in wanted:
                    continue
                if reason := self._blocked(specs[name].get("init")):
                    blocked[cell] = reason
                    continue
                where = f"{artifact.path}: rows.{artifact.cells[cell].row}.runs"
                for seed in self.seeds:
                    run = self._resolve(name, specs, seed, where, ())
                    self._check_distinct(cell, run, mine)
                    cells.setdefault(cell, []).append((seed, run.id))
                    requested += self._feed(run, cell, mine)
        provisional = None in self.fingerprints.values()
        return Sweep(self.scale, artifacts, self.runs, cells, requested, provisional, blocked)

    def _blocked(self, init: Any) -> str | None:
        """Why a run from released weights cannot be run: they are of one network, and they must have been imported."""
        weights = str(init.get("weights")) if isinstance(init, dict) and init.get("run") is None else ""
        if weights not in _RELEASED:
            return None
        net = self.scale.network
        if (net.arch, net.width, net.depth) != ("vit_base_patch16", 768, 12):
            return NEEDS_RELEASED
        if weights.startswith("file:") and weights not in self.content and digest_of(weights) is None:
            return MISSING
        return None

    def _feed(self, run: PlannedRun, cell: str, mine: dict[str, tuple[str, PlannedRun]]) -> int:
        """Notes that a run and its needs feed a cell; how many of them are new to the artifact."""
        new = sum(self._feed(self.runs[need], cell, mine) for need in run.needs if need in self.runs)
        planned = self.runs.setdefault(run.id, run)
        if cell not in planned.feeds:
            planned.feeds.append(cell)
        new += run.id not in mine
        mine.setdefault(run.id, (cell, run))
        return new

    def _check_distinct(self, cell: str, run: PlannedRun, mine: Mapping[str, tuple[str, PlannedRun]]) -> None:
        """Arms that differ in the paper must not become one run at this scale."""
        if run.id in mine:
            other_cell, other = mine[run.id]
            for key in sorted(run.origin.keys() | other.origin.keys()):
                if run.origin.get(key) != other.origin.get(key):
                    raise UserError(
                        f"scale {self.scale.name}: {other_cell} and {cell} become the same run: {key} is "
                        f"{other.origin.get(key)} and {run.origin.get(key)} in the paper"
                    )

    def _resolve(self, name: str, specs: Mapping[str, Any], seed: int, where: str, path: tuple[str, ...]) -> PlannedRun:
        if name in path:
            raise UserError(f"{where}: {' -> '.join((*path[path.index(name) :], name))}: these runs need each other")
        spec = specs[name]
        text = self.texts.get((id(specs), name))
        if text is None:
            text = self.texts[id(specs), name] = json.dumps([name, specs], sort_keys=True, default=str)
        if (text, seed) in self.resolved:
            return self.resolved[text, seed]
        where_here = f"{where}.{name}"
        needs: list[PlannedRun] = []
        external: tuple[str, ...] = ()
        init = spec.get("init")
        if isinstance(init, dict) and init.get("run") is not None:
            target = str(init["run"])
            if target in specs:
                needs.append(self._resolve(target, specs, seed, where, (*path, name)))
            elif re.fullmatch(r"pretrain-[0-9a-f]{16}", target):
                external = (target,)
            else:
                there = ", ".join(specs)
                raise UserError(f"{where_here}.init.run: no run {target!r} (there are: {there}, or a run's id)")
        first = self.firsts.get(text)
        if first is None or not 0 <= seed < 2**63:
            values, paper = self._scaled(spec, needs[0] if needs else None, where_here)
            values["seed"] = seed
            config = self._fingerprinted(parse(values, where_here))
            origin = paper | {f"{n.config.stage}'s {k}": v for n in needs for k, v in n.origin.items()}
            first = self.firsts.setdefault(text, _First(config, paper, origin))
        needed = (*(n.id for n in needs), *external)
        run = PlannedRun(*first.again(seed, *needed), needed, [], dict(first.paper), dict(first.origin))
        for need in needs:
            self.runs.setdefault(need.id, need)
        self.resolved[text, seed] = run
        return run

    def _scaled(self, spec: Values, need: PlannedRun | None, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A spec in the paper's terms as a config at this scale, and the paper's values of what the scale changed."""
        name = spec.get("recipe")
        if not isinstance(name, str) or name not in recipes():
            raise UserError(f"{where}.recipe: {name!r} is unknown (allowed: {', '.join(recipes())})")
        own = {k: v for k, v in spec.items() if k != "recipe"}
        for key, option in (("seed", "--seeds"), ("scale", "--scale")):
            if key in own:
                raise UserError(f"{where}.{key}: is set by {option}, not by an artifact")
        recipe = recipes()[name]
        values = merge(merge(recipe, self.scale.part(recipe["stage"])), self.scale.recipes.get(name, {}))
        if need is not None:  # the network is that of the pre-training
            values = merge(values, {"model": {k: getattr(need.config.model, k) for k in SHAPE}})
        values = merge(values, own)
        paper: dict[str, Any] = {}
        try:
            if "optim" in values:
                epochs, epochs_here = self._length(values, paper)
                if values.get("method") is not None:
                    batch_paper = merge(recipe, own)["optim"]["batch_size"]
                    self._momentum(values, epochs, epochs_here, batch_paper, paper)
            if values.get("method") is not None:
                self._tokens(values, paper)
            if need is not None:
                values["init"] = self._init(values["init"], need, paper)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None
        except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError):
            pass  # a value that cannot be: parse() says which
        return values, paper

    def _length(self, values: dict[str, Any], paper: dict[str, Any]) -> tuple[int, int]:
        """Epochs by the scale's factor; warm-up keeps its share of them."""
        optim = dict(values["optim"])
        if values["stage"] in DENSE:
            return self._steps(values, optim, paper)
        epochs = optim["epochs"]
        here = scale_epochs(epochs, getattr(self.scale.epochs, values["stage"]))
        warmup = optim["warmup_epochs"]
        if isinstance(warmup, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", warmup)
            if not match:
                raise UserError(
                    f"optim.warmup_epochs: {warmup!r} (allowed: a number of epochs, or a share such as 20%)"
                )
            warmup = float(match[1]) * epochs / 100
        optim["epochs"], optim["warmup_epochs"] = here, tidy(warmup * here / epochs)
        if here != epochs:
            paper |= {"optim.epochs": epochs, "optim.warmup_epochs": warmup}
        values["optim"] = optim
        return epochs, here

    def _steps(self, values: dict[str, Any], optim: dict[str, Any], paper: dict[str, Any]) -> tuple[int, int]:
        """Steps, warm-up and milestones by the scale's factor."""
        factor = getattr(self.scale.epochs, values["stage"])
        steps = optim["steps"]
        here = scale_epochs(steps, factor)
        before = {f"optim.{key}": optim[key] for key in ("steps", "warmup_steps", "milestones") if optim.get(key)}
        optim |= {"steps": here, "warmup_steps": round_half_up(optim["warmup_steps"] * here / steps)}
        if optim.get("milestones"):
            optim["milestones"] = sorted({max(1, round_half_up(m * here / steps)) for m in optim["milestones"]})
        if here != steps:
            paper |= before
        values["optim"] = optim
        return steps, here

    def _momentum(
        self, values: dict[str, Any], epochs: int, here: int, batch_paper: int, paper: dict[str, Any]
    ) -> None:
        ema = values["method"].get("ema")
        if ema is None or values["method"].get("name") == "mae":
            return
        shortening = epochs / here
        if ema["every"] == "iteration":
            steps = here * max(1, self.scale.pictures // values["optim"]["batch_size"])
            shortening = epochs * (PAPER_PICTURES // batch_paper) / steps
            if self.scale.pictures == PAPER_PICTURES and here == epochs:  # as long as the paper's, whatever the batch
                shortening = 1
        ema = dict(ema)
        for key in ("momentum", "momentum_end"):
            if isinstance(ema.get(key), int | float) and 0 <= ema[key] <= 1 and shortening != 1:
                paper[f"method.ema.{key}"] = ema[key]
                ema[key] = scale_momentum(ema[key], shortening)
        values["method"] = {**values["method"], "ema": ema}

    def _tokens(self, values: dict[str, Any], paper: dict[str, Any]) -> None:
        method = values["method"]
        teacher = method.get("teacher") or {}
        if method.get("name") == "mae" or teacher.get("view") != "crop" or teacher.get("tokens") is None:
            return
        tokens, ratio, crop = self._count(values), method.get("mask_ratio", 0.75), teacher["tokens"]
        here = scale_tokens(crop, tokens, ratio)
        if not 1 <= here <= count_masked(tokens, ratio) and here != tokens:
            raise UserError(f"method.teacher.tokens: {crop} of 196 patches become {here} of {tokens} (at least 1)")
        if crop not in (count_masked(PAPER_TOKENS, ratio), PAPER_TOKENS) and tokens != PAPER_TOKENS:
            paper["method.teacher.tokens"] = crop
        values["method"] = {**method, "teacher": {**teacher, "tokens": here}}

    def _count(self, values: dict[str, Any]) -> int:
        """L, the patches of a picture."""
        patch = Model.model_validate(values["model"]).patch_size or 16
        return int(values["data"]["image_size"] // patch) ** 2

    def _init(self, init: dict[str, Any], need: PlannedRun, paper: dict[str, Any]) -> dict[str, Any]:
        """`epoch` counts the paper's completed epochs; a checkpoint must lie there."""
        init = {**init, "run": need.id}
        epoch = init.get("epoch")
        if isinstance(epoch, int) and need.config.stage == "pretrain":
            length = need.config.optim.epochs
            length_paper = need.paper.get("optim.epochs", length)
            if not 1 <= epoch <= length_paper or epoch * SNAPSHOTS % length_paper:
                kept = length_paper / SNAPSHOTS
                raise UserError(f"init.epoch: {epoch} of {length_paper}: encoders are kept every {kept:g} epochs")
            if epoch * length % length_paper:
                here = epoch * length / length_paper
                raise UserError(f"init.epoch: {epoch} of {length_paper} becomes {here:g} of {length} epochs")
            if length != length_paper:
                paper["init.epoch"] = epoch
            init["epoch"] = epoch * length // length_paper
        return init

    def _fingerprinted(self, config: Config) -> Config:
        """The config with the fingerprint of its pictures, null where they are absent; a cost run takes none."""
        if config.stage == "cost":
            return config
        key = _pictures(config.data)
        if key not in self.fingerprints:
            given = self.any_pictures or self.content.get(content_key(config.stage, config.data.name))
            self.fingerprints[key] = given or fingerprint(config.data)
        update: dict[str, Any] = {"data": config.data.model_copy(update={"fingerprint": self.fingerprints[key]})}
        init = getattr(config, "init", None)
        if init is not None and init.run is None and init.weights.startswith("file:") and init.digest is None:
            digest = self.content.get(init.weights) or digest_of(init.weights)
            update["init"] = init.model_copy(update={"digest": digest})
        return config.model_copy(update=update)


def content_key(stage: str, dataset: str) -> str:
    """How a data set is named among the known contents; a file of weights is named as `init.weights` names it."""
    return f"{stage} {dataset}" if stage in DENSE else dataset


_RELEASED = frozenset(
    f"timm:{released.timm}" if released.timm else f"file:{name}{SUFFIX}" for name, released in RELEASED.items()
)


def _pictures(data: Pictures) -> str:
    """What tells one set of pictures from another."""
    keys = {"name", "path", "classes", "train_pictures", "val_pictures"}
    return type(data).__name__ + data.model_dump_json(include=keys)
