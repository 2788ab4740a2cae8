"""docs/slurm.md says what the code does: every key of a profile, every state of a run, every class of failure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_project import ROOT, blocks, table

from ablations.planner import plan
from sdae.store import Store
from slurm import job, reconcile
from slurm.ledger import Ledger
from slurm.profile import Profile, load_profile
from slurm.reconcile import CLASSES, LOST, Standing
from slurm.submit import Array, script

PAGE = ROOT / "docs/slurm.md"
SAMPLES: dict[str, Any] = {
    "partition": "gpu", "account": "us", "qos": "low", "reservation": "mine", "constraint": "a100", "exclude": "node7",
    "nodes": 2, "tasks": 2, "gpus": 2, "gpu_type": "v100", "cpus": 4, "memory": "16G", "time": "4h",
    "warn_seconds": 90, "requeue": False, "array_parallelism": 2, "sbatch": {"mail-type": "FAIL"},
    "setup": ["module load cuda"], "python": "/shared/envs/sdae/bin/python",
}  # fmt: skip


def rows(heading: str) -> dict[str, list[str]]:
    """By the words in backticks of the first cell."""
    found = table(PAGE, heading)
    assert found, heading
    return {word: row for row in found for word in re.findall(r"`([\w.-]+)`", row[0])}


def lines(tmp_path: Path, **values: Any) -> set[str]:
    """The text for sbatch of an array of two."""
    resources = Profile.model_validate({"time": "30m", "gpus": 4, **values}).resources("pretrain")
    runs = dict(enumerate([*plan(["table5"], "smoke").runs.values()][:2]))
    return set(script(Array(resources, runs), "token", Ledger(Store(tmp_path)), tmp_path).splitlines())


def test_every_key_with_its_default_and_what_it_becomes(tmp_path: Path) -> None:
    told, before = rows("key | default | becomes | meaning"), lines(tmp_path)
    assert list(told) == list(Profile.model_fields)
    for key, (_, default, becomes, meaning) in told.items():
        if key != "time":  # there is none
            assert yaml.safe_load(default.strip("`")) == Profile.model_fields[key].default, key
        if key in SAMPLES:
            changed = "\n".join(lines(tmp_path, **{key: SAMPLES[key]}) - before)
            option = becomes.strip("`").partition("=")[0] if key != "requeue" else "--no-requeue"
            assert re.search(rf"{re.escape(option)}\b", changed), f"{key}: no {option} in\n{changed}"
            assert option in becomes + meaning
    assert "--signal=USR2@120" in told["warn_seconds"][2] and "#SBATCH --signal=USR2@120" in before
    assert f"#SBATCH {told['gpu_type'][2].strip('`')}" in lines(tmp_path, gpu_type="v100")
    assert f"#SBATCH {told['array_parallelism'][2].strip('`')}" in lines(tmp_path, array_parallelism=2)


@pytest.mark.parametrize("number", [0, 1])
def test_its_profiles_are_profiles(number: int, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(list(blocks(PAGE, "yaml"))[number])
    profile = load_profile(path)
    if number:
        assert profile.resources("pretrain").nodes * profile.resources("pretrain").tasks_per_node == 8
        assert profile.resources("linprobe").tasks_per_node == 1


def test_every_state() -> None:
    named = (Standing.__doc__ or "").partition(".")[0].removeprefix("state: ").split(" | ")
    assert set(rows("state | meaning | leaves it by")) == set(named)


def test_every_class_of_failure_and_what_follows() -> None:
    told = rows("class | when | state | next")
    sources = "".join(Path(str(module.__file__)).read_text() for module in (job, reconcile))
    made = re.findall(r'\b(?:_fail|_failed|record)\((?:[\w.\[\]"]+, )*"([A-Z]\w+)"', sources)
    made += [
        kind for found in re.findall(r"\bkind(?:, how)? = (.+)", sources) for kind in re.findall(r'"([A-Z]\w+)"', found)
    ]
    assert {"NoProgress", "BadInput", "Killed", "JobFailed", "TimedOut"} <= set(made), "this test no longer finds them"
    assert set(told) - {"failure.json"} == set(made) | LOST | set(CLASSES.values())
    for kind in set(told) - {"failure.json"}:
        assert (told[kind][2] == "lost") == (kind in LOST), kind
        assert ("heal" if kind in LOST else "retry") in told[kind][3], kind
