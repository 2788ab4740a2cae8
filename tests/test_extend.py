"""A new ablation is one YAML file: it shows up in plan, sweep, table, figure, claims, explain and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from calling import call
from synthetic import fill

from ablations.planner import plan
from sdae.store import Store

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "examples" / "decoder_depth.yaml"
CELLS = [f"decoder_depth.depth-{n}.top1" for n in (1, 2, 4, 8)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend") / "runs"
    means = dict(zip(CELLS, (80.0, 83.0, 83.4, 84.0), strict=True))
    fill(Store(folder), plan([str(FILE)], "smoke", (0, 1, 2)), means, 0.02)
    return folder


def test_it_is_ten_lines() -> None:
    lines = [line for line in FILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 12
    page = (ROOT / "docs" / "extend.md").read_text()
    assert yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(FILE.read_text())


def test_plan_and_sweep() -> None:
    planned = json.loads(call("sweep", "plan", FILE, "--json").out)
    assert {cell for run in planned["runs"] for cell in run["feeds"]} == set(CELLS)
    depths = {run["config"]["model"]["decoder_depth"] for run in planned["runs"] if run["stage"] == "pretrain"}
    assert len(depths) == 4
    shared = json.loads(call("sweep", "plan", FILE, "figure4b", "--json", "--scale", "paper").out)
    assert shared["unique"] < shared["requested"], "eight blocks are the suite's own pre-training"
    profile = ROOT / "examples" / "profiles" / "a100.yaml"
    words = ("sweep", "submit", FILE, "--on", "slurm", "--profile", profile, "--dry-run", "--scale", "paper")
    assert call(*words).out.count("#SBATCH --array=0-3") == 2


def test_table_figure_claims_and_explain(store: Path, tmp_path: Path) -> None:
    here = ("--store", store)
    table = json.loads(call("paper", "table", FILE, *here, "--json").out)
    assert [cell["cell"] for row in table["rows"] for cell in row["cells"].values()] == CELLS
    assert [round(row["cells"]["top1"]["measured"]) for row in table["rows"]] == [80, 83, 83, 84]
    drawn = call("paper", "figure", FILE, *here, "--out", tmp_path).out.split()
    assert {Path(path).name for path in drawn} == {f"decoder_depth.{end}" for end in ("png", "svg", "pdf")}
    claims = {
        entry["claim"]: entry["verdict"] for entry in json.loads(call("paper", "claims", FILE, *here, "--json").out)
    }
    assert claims == {"deep-is-best": "supported", "shallow-is-enough": "contradicted"}
    told = json.loads(call("paper", "explain", CELLS[1], "--artifact", FILE, *here, "--json").out)
    assert (told["cell"], len(told["runs"])) == (CELLS[1], 3)


def test_report(store: Path, tmp_path: Path) -> None:
    call("paper", "report", "table5", FILE, "--store", store, "--out", tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in ("Does the depth of the decoder matter?", "Two blocks are enough", *CELLS):
        assert text in page
