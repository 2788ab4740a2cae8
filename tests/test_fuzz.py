"""Values near the edge of what the schemas allow, and a seeded part of tests/fuzz_campaign.py.

SDAE_SEED gives another seed than 0; failures print what brings them back.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from bad import makers
from fuzz_campaign import ODD, one_round, targets
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ablations.artifact import ArtifactFile, load_artifact
from ablations.scale import Scale, load_scale
from sdae.config import STAGES, dump, load, parse, run_id
from sdae.errors import UserError
from slurm.profile import Profile, load_profile

SEED = int(os.environ.get("SDAE_SEED", "0"))
NAMES = (
    "config", "artifact", "scale", "profile", "result", "stored config", "metrics", "heartbeat", "provenance", "index",
    "submission", "orders", "coco", "label map", "classes", "picture", "packed manifest", "packed index", "safetensors",
    "released", "golden",
)  # fmt: skip
TOLD = (  # files of a run, and what commands tell a user of them
    "config.yaml", "failure.json", "heartbeat.json", "metrics.jsonl", "attempts.jsonl", "claim.json", "log.txt",
    "state-00000006.sha256.json", "provenance.json", "pruned.json", "result.json",
)  # fmt: skip
ODDITIES = st.sampled_from(ODD) | st.text(max_size=9) | st.integers() | st.floats()


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """What a field of this type may hold, or nearly: bounds are not looked at, so that some are beyond them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return sections(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(one) for one in arguments])
    if origin in (tuple, list):
        inner = [one for one in arguments if one is not ...]
        if origin is list or ... in arguments:
            return st.lists(values(inner[0]), max_size=4)
        return st.tuples(*map(values, inner)).map(list)
    if origin in (dict, typing.get_origin(typing.Mapping)):
        keys = st.sampled_from(["pretrain", "finetune", "only", "top1", "a{n}", "n", "x y", "../x", "-->"])
        return st.dictionaries(keys, values(arguments[1]), max_size=3)
    known: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.sampled_from([-1, 0, 1, 2, 3, 8, 16, 64, 2**31, 2**63, 10**30]),
        float: st.sampled_from([-1.0, 0.0, 1e-300, 0.1, 0.5, 1.0, 1.5, 1e300, float("inf"), float("nan")]),
        str: st.sampled_from(["", "sdae", "mae", "builtin", "vit_base_patch16", "a\nb", "4:00:00", "4h", "16G", "{n}"]),
        type(None): st.none(),
    }  # fmt: skip
    return known.get(annotation, ODDITIES)


def sections(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """A mapping with some of a model's keys, of which one in ten holds an oddity; at times an unknown key."""
    fields = {
        name: st.one_of(*[values(field.annotation)] * 9, ODDITIES) if name != "arch" else st.just("vit_base_patch16")
        for name, field in model.model_fields.items()
    }
    unknown = st.dictionaries(st.sampled_from(["", "x", "a\nb", "épochs", "<<"]), ODDITIES, max_size=1)
    known = st.fixed_dictionaries({}, optional=fields)
    return st.tuples(known, st.one_of(*[st.just({})] * 9, unknown)).map(lambda parts: {**parts[0], **parts[1]})


def refused_or(read: Callable[[], Any]) -> Any:
    """What is read, or None where that is refused; whatever else is raised is a fault."""
    try:
        return read()
    except UserError:
        return None


many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.mark.parametrize("stage", STAGES)
def test_configs_are_read_or_refused(stage: str) -> None:
    @seed(SEED)
    @many
    @given(sections(STAGES[stage]))
    def holds(found: dict[str, Any]) -> None:
        config = refused_or(lambda: parse({**found, "stage": stage}))
        if config is not None:  # what is taken is complete, has an id, and is the same when it is read again
            assert run_id(parse(dump(config))) == run_id(config)

    holds()


@pytest.mark.parametrize(
    ("model", "read"),
    [(ArtifactFile, lambda path: load_artifact(path, "smoke")), (Scale, load_scale), (Profile, load_profile)],
    ids=["artifact", "scale", "profile"],
)
def test_files_are_read_or_refused(model: type[BaseModel], read: Callable[[Path], Any], tmp_path: Path) -> None:
    @seed(SEED)
    @many
    @given(sections(model))
    def holds(found: dict[str, Any]) -> None:
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(found), encoding="utf-8", errors="surrogatepass")
        refused_or(lambda: read(path))

    holds()


def test_any_text_as_yaml(tmp_path: Path) -> None:
    signs = st.text(st.sampled_from("{}[]:,-?&*!|>'\"%@`#~<=. \t\n\r\0\x1b\ufeff0aé1_"), max_size=60)

    @seed(SEED)
    @settings(many, max_examples=200)
    @given(signs)
    def holds(text: str) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        refused_or(lambda: load(path))

    holds()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.good(tmp_path_factory.mktemp("good"))


def test_every_reader_is_fuzzed(good: Path) -> None:
    assert set(targets(good)) == {*NAMES, *(f"told of {name}" for name in TOLD)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bytes_changed_at_random(name: str, good: Path, tmp_path: Path) -> None:
    for number in range(3):
        found = one_round(name, targets(good)[name], SEED, number, tmp_path)
        assert found["failures"] == [], f"SDAE_SEED={SEED}"
        assert found["inputs"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD)
def test_what_commands_tell_of_records_changed_at_random(name: str, good: Path, tmp_path: Path) -> None:
    found = one_round(f"told of {name}", targets(good)[f"told of {name}"], SEED, 0, tmp_path)
    assert found["failures"] == [], f"SDAE_SEED={SEED}"
    assert found["inputs"] == 4
