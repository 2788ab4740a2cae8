"""Which changes of the code make a run's number stale, and that a run tells by which code it was made."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import tiny

from sdae import provenance
from sdae.errors import UserError
from sdae.run import execute
from sdae.store import Store
from slurm.ledger import Ledger
from slurm.snapshot import snapshot

SDAE = Path(provenance.__file__).parent
STAGES = tuple(provenance.STAGE_MODULES)


def code_in(folder: Path) -> ModuleType:
    """`sdae.provenance` of a copy of the code."""
    spec = importlib.util.spec_from_file_location("provenance_of_the_copy", folder / "sdae" / "provenance.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(SDAE, tmp_path / "sdae", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def changed(copy: Path, file: str, old: str, new: str) -> set[str]:
    """The stages whose substance another text in a file changes."""
    before = {stage: code_in(copy).substance(stage) for stage in STAGES}
    path = copy / "sdae" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return {stage for stage in STAGES if code_in(copy).substance(stage) != before[stage]}


def test_a_copy_has_the_same_substance(copy: Path) -> None:
    here = {stage: provenance.substance(stage) for stage in STAGES}
    assert {stage: code_in(copy).substance(stage) for stage in STAGES} == here
    assert here["finetune"] == here["linprobe"]
    assert len(set(here.values())) == len(STAGES) - 1
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in here.values())


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("objective.py", "from torch import Tensor\n", "# a comment\nfrom torch import Tensor\n"),
        ("objective.py", '"""', '"""Other words. '),
        ("objective.py", "-> Tensor:", '-> Tensor:\n    """Another docstring."""\n    # and a comment\n'),
        ("objective.py", "-> Tensor:", "-> object:"),
        ("objective.py", "from torch import Tensor\n", "from pathlib import Path\n\nfrom torch import Tensor\n"),
        ("store.py", "GRACE_SECONDS = 300.0", "GRACE_SECONDS = 200.0"),
        ("errors.py", "RESUME_ME = 75", "RESUME_ME = 76"),
        ("provenance.py", "DIFF_LIMIT = 200_000", "DIFF_LIMIT = 100_000"),
        ("config.py", '    scale: str = "custom"\n', '    scale: str = "custom"\n    another: bool = False\n'),
        ("training/checkpoints.py", "KEPT = 2", "KEPT = 3"),
        ("parity.py", '"""', '"""Other. """\nX = 1\n"""'),
    ],
)
def test_what_cannot_change_a_number_changes_nothing(copy: Path, file: str, old: str, new: str) -> None:
    assert changed(copy, file, old, new) == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("objective.py", "1e-6", "1e-5", {"pretrain", "cost"}),
        ("views.py", "\ndef ", "\ndef other(a=1): ...\n\n\ndef ", {"pretrain", "cost"}),
        ("stages/classify.py", "100", "101", {"finetune", "linprobe"}),
        ("config.py", "return tokens - int(", "return tokens - round(", set(STAGES)),
        ("training/distributed.py", "\ndef ", "\ndef other(a=1): ...\n\n\ndef ", set(STAGES)),
        ("data/randomness.py", "def hashed(", "def hashed_again() -> None: ...\n\n\ndef hashed(", set(STAGES)),
        ("training/telemetry.py", "2 * size**3", "3 * size**3", {"cost"}),
        ("models/encoder.py", "def patchify(", "def unused(a=1) -> None: ...\n\n\ndef patchify(", set(STAGES)),
    ],
)
def test_what_can_change_a_number_makes_its_stages_stale(
    copy: Path, file: str, old: str, new: str, stages: set[str]
) -> None:
    assert changed(copy, file, old, new) == stages


def test_the_closure_is_whole() -> None:
    """Every module of the method and the trainer counts for some stage, or is one that cannot change its numbers."""
    names = {".".join(("sdae", *p.relative_to(SDAE).with_suffix("").parts)) for p in SDAE.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in names}
    counted = {module for stage in STAGES for module in provenance._closure(stage)}
    elsewhere = {"sdae.run", "sdae.parity", "sdae.inspect", "sdae.predict", "sdae.data.packing", "sdae.data.feed"}
    elsewhere |= {"sdae.data.survey", "sdae.models.timm_names"}  # packing's, and config's for ids
    assert modules - counted - provenance.NO_NUMBERS.keys() <= elsewhere
    assert provenance.NO_NUMBERS.keys() <= modules
    assert {"sdae.objective", "sdae.methods.sdae", "sdae.data.datasets"} <= provenance._closure("pretrain").keys()
    assert "sdae.objective" not in provenance._closure("finetune")
    source = (SDAE / "config.py").read_text()
    for part in provenance.PARTS["sdae.config"]:
        assert f"def {part.rpartition('.')[2]}(" in source


def test_broken_code_is_named(copy: Path) -> None:
    (copy / "sdae" / "views.py").write_text("def (:\n")
    with pytest.raises(UserError, match=r"views\.py: line 1: not valid Python"):
        code_in(copy).substance("pretrain")


def test_a_snapshot_tells_the_same_without_torch(tmp_path: Path) -> None:
    folder = snapshot(Ledger(Store(tmp_path / "runs")))
    program = (
        "import json, sys; from sdae import provenance as p; "
        "print(json.dumps([[p.substance(s) for s in p.STAGE_MODULES], 'torch' in sys.modules, p.__file__]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        check=True, timeout=600,
    )  # fmt: skip
    found, torch, where = json.loads(told.stdout)
    assert found == [provenance.substance(stage) for stage in STAGES]
    assert not torch
    assert Path(where).is_relative_to(folder)


def test_a_run_says_by_which_code_it_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = execute(tiny(optim={"epochs": 1}), store)
    assert result["provenance"]["substance"] == provenance.substance("pretrain")
    assert (store.run(result["id"]).provenance() or {})["substance"] == provenance.substance("pretrain")
