"""What is behind a cell: every fact is one that a run recorded, and what was not recorded is not there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from calling import assert_refused, call
from synthetic import fill, run_of

from ablations.planner import Sweep, available, plan
from analysis.explain import explain, text
from analysis.report import page
from analysis.study import Study, study
from sdae import provenance
from sdae.errors import UserError
from sdae.store import Store

ARMS = """\
title: Two masks
columns: {top1: {run: finetune, metric: top1, decimals: 1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain, weights: student}, optim: {epochs: 20}}}
rows:
  half: {runs: {pretrain: {recipe: sdae, optim: {epochs: 20}, method: {mask_ratio: 0.5}}}}
  most: {runs: {pretrain: {recipe: sdae, optim: {epochs: 20}, method: {mask_ratio: 0.75}}}}
"""
FOLDS, MASKED = "table5.folds.top1", "table5.masked.top1"


@pytest.fixture
def sweep() -> Sweep:
    return plan(["table5"], "smoke", (0, 1), content="feed")


@pytest.fixture
def store(tmp_path: Path, sweep: Sweep) -> Store:
    store = Store(tmp_path / "runs")
    fill(store, sweep, {FOLDS: 84.1})
    return store


def of_table5(store: Store, cell: str = FOLDS) -> dict[str, Any]:
    return explain(study(store, ["table5"], "smoke", (0, 1)), cell)


def test_a_cell_and_its_runs(store: Store, sweep: Sweep) -> None:
    found = of_table5(store)
    assert json.loads(json.dumps(found)) == found
    assert {k: found[k] for k in ("cell", "artifact", "row", "label", "column", "unit", "scale", "synthetic")} == {
        "cell": FOLDS, "artifact": "table5", "row": "folds", "label": "Multi fold", "column": "top1", "unit": "%",
        "scale": "smoke", "synthetic": True,
    }  # fmt: skip
    assert found["paper"] == {"value": 84.1, "decimals": 1, "where": "Table 5"}
    assert found["above"] == MASKED
    assert (found["difference"], found["verdict"], found["stale"]) == (None, None, False)
    assert [run["id"] for run in found["runs"]] == [identity for _, identity in sweep.cells[FOLDS]]
    assert found["measured"]["n"] == 2
    assert found["measured"]["mean"] == pytest.approx(sum(run["value"] for run in found["runs"]) / 2)
    for seed, run in enumerate(found["runs"]):
        assert (run["seed"], run["state"], run["stage"], run["config"]) == (seed, "done", "finetune", {})
        assert (run["commit"], run["dirty"], run["substance"]) == ("c0ffee" * 6 + "c0ff", False, None)
        assert (run["environment"], run["checkpoints"], run["log"]) == (None, [], [])
        assert (run["started"], run["gpu_hours"], run["device"]) == ("2023-11-14T22:13:20+00:00", 60 / 3600, "cpu")
        assert run["weights"] == {"weights": "student", "epoch": "last"}
        need = run["needs"]
        assert need["id"] == sweep.runs[run["id"]].needs[0]
        assert need["config"] == {"method.teacher.view": ["masked", "folds"], "method.teacher.folds": [None, 3]}
        assert need["value"] is None
        assert "needs" not in need


def test_the_first_arm_is_set_against_the_defaults(store: Store) -> None:
    found = of_table5(store, "table5.full-raw.top1")
    assert found["above"] is None
    need = found["runs"][0]["needs"]
    assert need["config"]["method.teacher.normalize"] == [True, False]
    assert need["config"]["method.teacher.view"] == ["folds", "full"]
    assert not {"seed", "scale", "data.path", "init.run"} & need["config"].keys()
    assert "pretrain: method.teacher.normalize: yes -> no" in text(found)


def test_files_of_a_run_are_told_and_none_is_hashed(store: Store, sweep: Sweep) -> None:
    run = run_of(sweep, FOLDS)
    folder = store.run(run.id)
    result = json.loads((folder.path / "result.json").read_text())
    result |= {"weights": {"model.safetensors": "a" * 64, "gone.safetensors": "b" * 64}, "world_size": 8}
    (folder.path / "result.json").write_text(json.dumps(result))
    folder.checkpoints.mkdir()
    (folder.checkpoints / "model.safetensors").write_bytes(b"x" * 100)
    (folder.checkpoints / "state-00000007.safetensors").write_bytes(b"y" * 50)
    (folder.checkpoints / "state-00000007.sha256.json").write_text(json.dumps({"sha256": "c" * 64}))
    (folder.checkpoints / "nonfinite-00000003.safetensors").write_bytes(b"z")
    folder.log.write_text("".join(f"line {n}\n" for n in range(30)))
    record = {"python": "3.12.1", "packages": {"torch": "2.14.0"}, "host": "h", "cores": 4, "gpus": ["G", "G"]}
    folder.write("provenance.json", record | {"substance": "d" * 16})
    found = of_table5(store)["runs"][0]
    assert found["checkpoints"] == [
        {"name": "model.safetensors", "sha256": "a" * 64, "bytes": 100},
        {"name": "gone.safetensors", "sha256": "b" * 64, "bytes": None},
        {"name": "nonfinite-00000003.safetensors", "sha256": None, "bytes": 1},
        {"name": "state-00000007.safetensors", "sha256": "c" * 64, "bytes": 50},
    ]
    assert found["log"] == [f"line {n}" for n in range(20, 30)]
    assert found["environment"] == {"python": "3.12.1", "torch": "2.14.0", "host": "h", "cores": 4, "gpus": ["G", "G"]}
    assert found["gpu_hours"] == pytest.approx(8 / 60)
    said = text(of_table5(store))
    for part in (
        "h, 2 x G, python 3.12.1, torch 2.14.0",
        "gone.safetensors (gone)",
        "and 2 more",
        "line 29",
        "0.133 h",
    ):
        assert part in said


def test_runs_that_are_not_done_say_so(store: Store, sweep: Sweep) -> None:
    first, second = (run_of(sweep, FOLDS, n) for n in (0, 1))
    store.remove(second.id)
    (store.run(first.id).path / "result.json").write_text('{"metrics": {')
    found = of_table5(store)
    assert (found["measured"], found["state"]) == (None, "failed")
    assert [run["state"] for run in found["runs"]] == ["torn", "not run"]
    assert "result.json cannot be read" in found["runs"][0]["message"]
    assert [run["value"] for run in found["runs"]] == [None, None]
    assert found["runs"][1]["config"] == {}  # what would run is known
    assert found["runs"][1]["needs"]["state"] == "done"
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert "measured    nothing: failed" in text(found)
    assert f"{second.id}: not run\n" in text(found)

    store.remove(first.id)
    store.run(first.id).create(first.config)
    store.run(first.id).fail("NonFiniteLoss", "loss is nan at step 7")
    store.run(second.id).create(second.config)
    with store.run(second.id).claim():
        store.run(second.id).write("heartbeat.json", {"epoch": 3.0, "epochs": 5, "time": time.time()})
        found = of_table5(store)
        for epoch in (None, "3", [3]):
            store.run(second.id).write("heartbeat.json", {"epoch": epoch, "epochs": 5, "time": time.time()})
            assert [run["message"] for run in of_table5(store)["runs"]][1] is None
    assert [run["state"] for run in found["runs"]] == ["failed", "running"]
    assert [run["message"] for run in found["runs"]] == ["NonFiniteLoss: loss is nan at step 7", "epoch 3 of 5"]
    assert all(run["gpu_hours"] is None and run["ended"] is None for run in found["runs"])


def test_a_result_that_says_no_number_of_processes(store: Store, sweep: Sweep) -> None:
    file = store.run(run_of(sweep, FOLDS).id).path / "result.json"
    result = json.loads(file.read_text()) | {"device": "a GPU"}
    hours = []
    for processes in (1, 3, None, "many", [8], {"a": 1}):
        file.write_text(json.dumps(result | {"world_size": processes}))
        hours.append(page.hours(study(store, ["table5"], "smoke", (0, 1))))
        assert of_table5(store)["runs"][0]["state"] == "done"
    one = hours[0]
    assert hours[1][0] - one[0] == pytest.approx(2 * result["time"]["seconds"] / 3600)
    assert hours[2:] == [one] * 4


def test_stale_is_the_run_or_what_it_started_from(store: Store, sweep: Sweep) -> None:
    run = run_of(sweep, FOLDS)

    def made_by(identity: str, substance: str) -> None:
        file = store.run(identity).path / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"provenance": {"substance": substance}}))

    made_by(run.id, provenance.substance("finetune"))
    assert not of_table5(store)["stale"]
    made_by(run.needs[0], "0" * 16)
    found = of_table5(store)
    assert [one["stale"] for one in (found, found["runs"][0], found["runs"][0]["needs"], found["runs"][1])] == [
        True, True, True, False,
    ]  # fmt: skip
    assert found["runs"][0]["substance"] == provenance.substance("finetune")
    assert "substance 0000000000000000 (changed since)" in text(found)
    assert not of_table5(store, MASKED)["stale"]


def test_an_empty_store_and_a_cell_that_nothing_fills(tmp_path: Path) -> None:
    empty = study(Store(tmp_path / "none"), (), "smoke")
    found = explain(empty, FOLDS)
    assert (found["state"], found["measured"], found["runs"][0]["state"]) == ("not run", None, "not run")
    assert "measured    nothing: not run" in text(found)
    theirs = explain(empty, "table2.moco-v3-300.linear")
    assert (theirs["runs"], theirs["above"], theirs["paper"]["value"]) == ([], None, 76.2)
    assert "no run fills this cell" in text(theirs)
    assert explain(empty, "figure4c.teacher-20.top1")["paper"] is None


@pytest.mark.parametrize("cell", ["table5", "table5.folds", "table5.fold.top1", "table5.folds.top2"])
def test_a_name_that_there_is_not(store: Store, cell: str) -> None:
    with pytest.raises(UserError, match=r"cell '.*' is unknown \(e\.g\. .*table5\..*\.top1"):
        of_table5(store, cell)


def test_every_cell_of_the_suite(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    fill(store, plan((), "smoke", (0, 1), content="feed"))
    whole: Study = study(store, (), "smoke")
    assert set(whole.tables) == set(available())
    for name, cell in whole.cells.items():
        found = explain(whole, name)
        assert (found["cell"], found["state"]) == (name, cell.state)
        assert [run["id"] for run in found["runs"] if run["value"] is not None] == cell.runs
        json.dumps(found, allow_nan=False)
        assert text(found).startswith(f"{name}: ")


def test_quick_with_many_runs(tmp_path: Path) -> None:
    """0.3 s on an idle machine with ten thousand runs in the store; three thousand here, and room for a busy one."""
    store = Store(tmp_path / "runs")
    fill(store, plan((), "smoke", range(25), content="feed"))
    of_table = lambda: explain(study(store, ["table5"], "smoke"), FOLDS)  # noqa: E731
    assert of_table()["measured"]["n"] == 25
    before = time.process_time()
    of_table()
    assert time.process_time() - before < 1


def test_a_real_run_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text(ARMS)
    assert call("sweep", "submit", "arms.yaml", "--jobs", "1").code == 0
    called = call("paper", "explain", "arms.most.top1", "--artifact", "arms.yaml", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    (run,) = found["runs"]
    assert (found["state"], found["stale"], found["paper"], found["above"]) == (
        "measured",
        False,
        None,
        "arms.half.top1",
    )
    for one, stage in ((run, "finetune"), (run["needs"], "pretrain")):
        assert (one["state"], one["stage"], one["stale"]) == ("done", stage, False)
        assert one["substance"] == provenance.substance(stage)
        assert one["environment"]["torch"]
        assert one["device"] == "cpu"
        assert one["gpu_hours"] > 0
        assert one["log"][-1].partition(" ")[2].startswith("done in")
        assert one["checkpoints"]
        assert all(len(file["sha256"]) == 64 and file["bytes"] > 1000 for file in one["checkpoints"])
    assert run["needs"]["config"] == {"method.mask_ratio": [0.5, 0.75]}
    said = call("paper", "explain", "arms.most.top1", "--artifact", "arms.yaml").out
    assert "pretrain: method.mask_ratio: 0.5 -> 0.75" in said
    assert run["id"] in said

    changes = json.loads(call("paper", "diff", "2026-01-01", "runs", "--artifact", "arms.yaml", "--json").out)
    assert [(cell["cell"], cell["change"]) for cell in changes["cells"]] == [
        ("arms.half.top1", "appeared"), ("arms.most.top1", "appeared"),
    ]  # fmt: skip
    assert changes["cells"][1]["runs"]["came"] == [run["id"]]
    assert_refused(call("paper", "explain", "arms.most", "--artifact", "arms.yaml"), "arms.most", "arms.most.top1")
    assert_refused(call("paper", "explain", "tabel5.folds.top1"), "tabel5")
