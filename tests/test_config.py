"""Identity of a run: what is part of it, what is not, one spelling for one run; and what is refused, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sdae.config import STAGES, Config, Pretrain, count_masked, dump, load, parse, run_id, science
from sdae.errors import UserError
from sdae.yamls import merge, override

FROZEN = Path(__file__).parent / "ids.json"
PARENT = {"run": "pretrain-0123456789abcdef", "weights": "teacher"}


def refused(values: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(values, "here.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("here.yaml: ")
    return message.removeprefix("here.yaml: ")


# Identity


def test_ids_never_change() -> None:
    """tests/ids.json holds configs with the ids that they had when they were added.

    To add one: append {"config": {..}, "id": null}; the failure tells its id. An id that changed means that every store
    loses its runs: a new key belongs into `sdae.config.NEUTRAL`; only a changed default may change ids, knowingly.
    """
    entries = json.loads(FROZEN.read_text())
    assert len(entries) >= 12
    assert [run_id(parse(entry["config"])) for entry in entries] == [entry["id"] for entry in entries]
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert {entry["config"].get("stage", "pretrain") for entry in entries} == set(STAGES)


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(values, dict):
        return [leaf for key, value in values.items() for leaf in leaves(value, (*path, key))]
    return [path]


def at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {**values, path[0]: changed(values[path[0]], path[1:], value) if len(path) > 1 else value}


# What a leaf may be changed to, in turn; the first that is accepted and is not the old value counts.
ANY: list[Any] = [True, False, 1, 2, 3, 4, 12, 24, 64, 0.5, 0.3, 0.001, [0.3, 0.8], [3, 5], [0, 2, 4, 6], 90000, None]
WORDS = [
    "masked", "folds", "full", "student", "own", "teacher", "iteration", "epoch", "channels", "tokens", "mae", "sdae",
    "cls", "mean", "batch", "layer", "lars", "adamw", "fp32", "bf16", "cpu", "math", "skip", "builtin", "last", "other",
    "vit_small_patch16", "rand-m5", "pretrain-fedcba9876543210", "random", "timm:other",
    "relative", "whole", "coco-json", "segmentation-folder", "smooth_l1",
]  # fmt: skip
COMPLETE: list[dict[str, Any]] = [
    {"stage": "pretrain", "method": {"teacher": {"view": "folds"}}, "data": {"fingerprint": "a" * 16, "path": "x"}},
    {"stage": "pretrain", "method": {"teacher": {"view": "crop", "tokens": 9}}},
    {"stage": "pretrain", "method": {"name": "mae"}},
    {"stage": "finetune", "init": PARENT, "optim": {"clip": 1.0, "weight_ema": 0.9}, "data": {"fingerprint": "a" * 16}},
    {"stage": "linprobe", "init": PARENT | {"epoch": 20}},
    {"stage": "segment", "init": PARENT, "data": {"fingerprint": "a" * 16, "path": "x"}, "optim": {"clip": 1.0}},
    {"stage": "detect", "init": PARENT, "backbone": {"taps": [1, 2, 3, 11], "window": 14}},
    {"stage": "cost"},
]
OUTSIDE = {("scale",), ("data", "path")}


@pytest.mark.parametrize("given_values", COMPLETE, ids=lambda v: f"{v['stage']}-{len(str(v))}")
def test_every_science_key_is_part_of_the_id_and_nothing_else(given_values: dict[str, Any]) -> None:
    config = parse(given_values)
    values, identity = dump(config), run_id(config)
    untouched = []
    for path in leaves(values):
        if path == ("stage",):
            continue
        for value in [*WORDS, *ANY]:
            try:
                other = parse(changed(values, path, value))
            except UserError:
                continue
            if at(dump(other), path) != at(values, path):
                break
        else:
            untouched.append(".".join(path))
            continue
        inside = path[0] not in ("efficiency", "probe") and path not in OUTSIDE
        assert (run_id(other) != identity) == inside, f"{'.'.join(path)}: {at(values, path)!r} -> {value!r}"
    known = {
        "pretrain": {
            "data.augment.mixup", "data.augment.cutmix", "data.augment.label_smoothing", "method.normalize_pixels",
            "method.teacher", "method.similarity", "method.ema", "method.teacher.folds", "method.teacher.tokens",
            "model.positions", "model.layer_scale",
        },
        "finetune": {"model.decoder_depth", "model.decoder_dim", "model.decoder_heads", "init.digest"},
    }  # fmt: skip
    known["linprobe"] = known["finetune"] | {k for k in known["pretrain"] if k.startswith("data")}
    known["segment"] = known["detect"] = known["finetune"] | {"optim.name", "optim.schedule", "optim.milestones"}
    known["cost"] = known["pretrain"] | {".".join(p) for p in leaves(values) if p[0] == "data" and p[1] != "image_size"}
    assert set(untouched) <= known[config.stage]  # they have one value only in this stage


def test_a_digest_stands_for_the_file() -> None:
    a, b, c = (
        parse({"stage": "finetune", "init": {"weights": f"file:{name}", "digest": digest}})
        for name, digest in (("a", "1" * 64), ("b", "1" * 64), ("a", "2" * 64))
    )
    assert run_id(a) == run_id(b) != run_id(c)


def test_parents_count() -> None:
    ids = {
        run_id(parse({"stage": stage, "init": init}))
        for stage in ("finetune", "linprobe")
        for init in (PARENT, PARENT | {"weights": "student"}, PARENT | {"epoch": 20}, {"weights": "random"})
    }
    assert len(ids) == 8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"view": "crop", "tokens": 147}, {"view": "masked"}),
        ({"view": "crop", "tokens": 196}, {"view": "full"}),
        ({"view": "folds", "folds": 1}, {"view": "masked"}),
        ({"view": "masked", "folds": 3, "tokens": 49}, {"view": "masked"}),
        ({"view": "full", "folds": 3}, {"view": "full"}),
        ({"view": "crop", "tokens": 49, "folds": 2}, {"view": "crop", "tokens": 49}),
        ({"view": "folds", "tokens": 49}, {"view": "folds", "folds": 3}),
        ({}, {"view": "folds", "folds": 3}),
    ],
)
def test_one_view_has_one_spelling(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = (parse({"method": {"teacher": teacher}}) for teacher in (one, other))
    assert a == b
    assert run_id(a) == run_id(b)
    teacher = dump(a)["method"]["teacher"]
    assert (teacher["folds"] is None) == (teacher["view"] != "folds")
    assert (teacher["tokens"] is None) == (teacher["view"] != "crop")


def test_other_spellings_of_one_run() -> None:
    assert run_id(parse({})) == run_id(parse({"stage": "pretrain", "model": {"arch": "vit_base_patch16"}}))
    assert run_id(parse({"model": {"width": 768, "heads": 12}})) == run_id(parse({}))
    assert run_id(parse({"optim": {"base_lr": "2.666e-4"}})) == run_id(parse({}))  # YAML 1.1 reads 1e-4 as a string
    assert run_id(parse({"optim": {"warmup_epochs": 60}})) == run_id(parse({"optim": {"warmup_epochs": 60.0}}))
    mae = {"name": "mae", "teacher": {"view": "full"}, "similarity": "tokens"}
    assert run_id(parse({"method": mae})) == run_id(parse({"method": {"name": "mae"}}))
    assert dump(parse({"method": mae}))["method"]["teacher"] is None


def test_a_stage_s_own_defaults_stand_behind_absent_keys() -> None:
    tuned = parse(
        {"stage": "finetune", "optim": {"epochs": 5, "warmup_epochs": 1}, "data": {"augment": {"mixup": 0.0}}}
    )
    assert tuned.optim.betas == (0.9, 0.999)  # type: ignore[union-attr]
    assert tuned.data.augment.cutmix == 1.0
    assert parse({"stage": "linprobe"}).optim.name == "lars"  # type: ignore[union-attr]
    small = parse({"model": {"arch": "vit_small_patch8"}})
    assert (small.model.width, small.model.patch_size, small.model.decoder_dim) == (384, 8, 512)
    assert small.model.drop_path == 0.25
    assert merge({"init": PARENT}, {"init": {"weights": "random"}}) == {"init": {"weights": "random"}}


@pytest.mark.parametrize(
    ("tokens", "ratio", "masked"), [(196, 0.75, 147), (64, 0.75, 48), (16, 0.6, 10), (196, 0.9, 177)]
)
def test_masked_patches(tokens: int, ratio: float, masked: int) -> None:
    assert count_masked(tokens, ratio) == masked == tokens - int(tokens * (1 - ratio))


# Round trip

architectures = st.sampled_from(["vit_tiny_patch16", "vit_small_patch8", "vit_base_patch16", "vit_huge_patch14"])
optims = st.fixed_dictionaries({}, optional={
    "epochs": st.integers(60, 1600), "batch_size": st.integers(1, 4096), "base_lr": st.floats(1e-6, 1.0),
    "weight_decay": st.floats(0, 1), "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    "warmup_epochs": st.floats(0, 60), "clip": st.none() | st.floats(0.1, 10),
    "weight_ema": st.none() | st.floats(0.1, 0.9),
})  # fmt: skip
augments = st.fixed_dictionaries({}, optional={
    "scale": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)), "flip": st.booleans(), "erasing": st.floats(0, 1),
    "randaugment": st.sampled_from([None, "rand-m9-mstd0.5-inc1", "rand-m5-n3"]),
})  # fmt: skip
shared_keys: dict[str, Any] = {
    "seed": st.integers(0, 2**40), "precision": st.sampled_from(["bf16", "fp32"]), "scale": st.text(max_size=8),
    "model": st.fixed_dictionaries({"arch": architectures}, optional={"drop_path": st.floats(0, 0.9)}),
    "data": st.fixed_dictionaries({}, optional={
        "image_size": st.sampled_from([112, 224, 448]), "augment": augments, "path": st.none() | st.text(min_size=1),
        "name": st.sampled_from(["imagefolder", "builtin", "cifar10"]), "classes": st.none() | st.integers(2, 1000),
    }),
    "efficiency": st.fixed_dictionaries({}, optional={"threads": st.integers(1, 9), "micro_batch": st.integers(1, 99)}),
    "probe": st.fixed_dictionaries({}, optional={"knn_every": st.none() | st.integers(1, 99)}),
}  # fmt: skip
teachers = st.one_of(
    st.fixed_dictionaries({"view": st.sampled_from(["full", "masked", "folds"]), "normalize": st.booleans()}),
    st.fixed_dictionaries({"view": st.just("folds"), "folds": st.integers(1, 12)}),
    st.fixed_dictionaries({"view": st.just("crop"), "tokens": st.integers(1, 30)}),
)
methods = st.one_of(
    st.just({"name": "mae"}),
    st.fixed_dictionaries({"teacher": teachers}, optional={
        "mask_ratio": st.floats(0.6, 0.9), "similarity": st.sampled_from(["tokens", "channels", "authors"]),
        "ema": st.fixed_dictionaries({"momentum": st.floats(0, 1), "every": st.sampled_from(["epoch", "iteration"])}),
    }),
)  # fmt: skip
inits = st.one_of(
    st.just({"weights": "random"}),
    st.fixed_dictionaries(
        {"run": st.just("pretrain-0123456789abcdef"), "weights": st.sampled_from(["student", "teacher"])},
        optional={"epoch": st.integers(1, 300)},
    ),
)
configs = st.one_of(
    st.fixed_dictionaries({"stage": st.just("pretrain"), "method": methods, "optim": optims}, optional=shared_keys),
    st.fixed_dictionaries(
        {"stage": st.sampled_from(["finetune", "linprobe"]), "init": inits, "optim": optims}, optional=shared_keys
    ),
    st.fixed_dictionaries({"stage": st.just("cost"), "method": methods}, optional=shared_keys),
)


@given(configs)
def test_dump_and_parse_are_a_round_trip(values: dict[str, Any]) -> None:
    config = parse(values)
    again = parse(dump(config))
    assert again == config
    assert run_id(again) == run_id(config)
    from_disk = parse(yaml.safe_load(yaml.safe_dump(dump(config), sort_keys=False)))
    assert from_disk == config
    assert json.loads(json.dumps(science(config))) == science(config)
    assert dump(again) == dump(config)


# What is refused

JUNK = [None, "", "x", 0, -1, 1e9, 2**70, float("nan"), float("inf"), [], {}, [1, 2, 3], True, {"x": 1}, "1e-3"]


def parsed(values: dict[str, Any]) -> tuple[Config | None, str]:
    """The config, or why there is none."""
    try:
        return parse(values, "here.yaml"), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("stage", STAGES)
def test_junk_at_any_key_is_accepted_or_refused_in_one_line(stage: str) -> None:
    values = dump(parse({"stage": stage}))
    places = {path[:n] for path in leaves(values) for n in range(1, len(path) + 1)}
    for path in sorted(places):
        for junk in JUNK:
            config, message = parsed(changed(values, path, junk))
            assert "\n" not in message
            if config is None:
                assert message.startswith("here.yaml: ")
            else:
                assert parse(dump(config)) == config
                run_id(config)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"optim": {"lr": 1}}, ["optim.lr: unknown key", "allowed: name, epochs"]),
        ({"colour": 1}, ["colour: unknown key", "method"]),
        ({"method": {"teacher": {"fold": 3}}}, ["method.teacher.fold: unknown key", "folds"]),
        ({"stage": "train"}, ["stage: 'train'", "pretrain, finetune, linprobe, segment, detect, cost"]),
        ({"optim": {"epochs": "many"}}, ["optim.epochs: 'many'", "integer"]),
        ({"optim": 3}, ["optim: 3"]),
        ({"seed": -1}, ["seed: -1"]),
        ({"seed": 2**64}, ["seed: "]),
        ({"seed": 0.5}, ["seed: 0.5"]),
        ({"method": {"teacher": {"view": "crop", "tokens": 150}}}, ["tokens: 150", "147", "196"]),
        ({"method": {"teacher": {"view": "crop", "tokens": 197}}}, ["tokens: 197"]),
        ({"method": {"teacher": {"view": "crop", "tokens": 0}}}, ["tokens: 0"]),
        ({"method": {"teacher": {"view": "crop"}}}, ["tokens", "1 to 147"]),
        ({"method": {"teacher": {"folds": 0}}}, ["method.teacher.folds: 0"]),
        ({"method": {"teacher": {"folds": 148}}}, ["method.teacher.folds: 148", "1 to 147"]),
        ({"method": {"teacher": {"view": "half"}}}, ["'half'", "'full', 'masked', 'crop' or 'folds'"]),
        ({"method": {"mask_ratio": 1.0}}, ["method.mask_ratio: 1.0"]),
        ({"method": {"mask_ratio": 0}}, ["method.mask_ratio: 0"]),
        ({"method": {"mask_ratio": 0.999}}, ["method.mask_ratio: 0.999"]),
        ({"method": {"ema": {"momentum": 1.5}}}, ["method.ema.momentum: 1.5"]),
        ({"model": {"arch": "vit_enormous_patch16"}}, ["'vit_enormous_patch16'"]),
        ({"model": {"heads": 5}}, ["heads: 5", "768"]),
        ({"model": {"patch_size": 15}}, ["image_size: 224", "15"]),
        ({"data": {"name": "imagenet"}}, ["data.name: 'imagenet'", "imagefolder"]),
        ({"data": {"augment": {"mixup": 0.8}}}, ["data.augment.mixup: 0.8", "pretrain"]),
        ({"data": {"augment": {"scale": [0.9, 0.1]}}}, ["data.augment.scale"]),
        ({"stage": "finetune", "data": {"augment": {"randaugment": "auto"}}}, ["randaugment", "rand-m9-mstd0.5-inc1"]),
        ({"optim": {"warmup_epochs": 301}}, ["warmup_epochs: 301", "300"]),
        ({"stage": "finetune", "init": {"run": "finetune-0123456789abcdef"}}, ["pretrain-"]),
        ({"stage": "finetune", "init": PARENT | {"weights": "random"}}, ["student or teacher"]),
        ({"stage": "finetune", "init": PARENT | {"epoch": 0}}, ["init.epoch"]),
        ({"stage": "finetune", "init": {"weights": "student"}}, ["random, timm:NAME or file:PATH"]),
        ({"stage": "finetune", "init": {"weights": "random", "epoch": 3}}, ["epoch"]),
        ({"stage": "finetune", "method": {}}, ["method: unknown key"]),
        ({"stage": "segment", "backbone": {"taps": [-3, 0, 1, 2]}}, ["backbone.taps", "0 to 11"]),
        ({"stage": "detect", "backbone": {"taps": [3, 5, 7, 12]}}, ["backbone.taps", "0 to 11"]),
        ([1], ["expected a mapping"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_names_key_value_and_what_is_allowed(values: Any, parts: list[str]) -> None:
    message = refused(values)
    for part in parts:
        assert part in message, message


def test_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage: pretrain\nmethod: {teacher: {view: masked}}\noptim: {epochs: 10, warmup_epochs: 2}\n")
    config = load(
        file, ["optim.epochs=20", "optim.base_lr=1e-3", "method.teacher.view=full", "data.augment.flip=false"]
    )
    assert isinstance(config, Pretrain)
    assert (config.optim.epochs, config.optim.base_lr, config.optim.warmup_epochs) == (20, 1e-3, 2)
    assert config.method.teacher is not None
    assert config.method.teacher.view == "full"
    assert config.data.augment.flip is False
    file.write_text("")
    assert load(file) == parse({})
    for text, part in (
        ("a:\n\tb: 1", "tab"), ("seed: 1\nseed: 2", "'seed' is given twice"), ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"), ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("seed: &a [*a]", "its aliases stand for more than"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=r"run\.yaml") as caught:
            load(file)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    for text in ("seed", "=1", "seed=[", "seed.x.y=1", "optim=1", ".=1"):
        with pytest.raises(UserError) as caught:
            parse(override({}, [text]))
        assert "\n" not in str(caught.value)
