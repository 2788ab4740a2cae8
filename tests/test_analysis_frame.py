"""The store as a frame: columns, states, the index, and that ten thousand runs are collected in a second."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import fill, run_of, write

from ablations.planner import Sweep, plan
from analysis import frame as frames
from analysis.export import compare, export, show
from analysis.frame import COLUMNS, INDEX, arm_name, collect, config_hash
from analysis.table import arms
from sdae.config import dump, run_id
from sdae.errors import UserError
from sdae.files import temporary_of
from sdae.store import Store


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return plan(["table1", "table5"], "smoke", (0, 1), content="feed")


@pytest.fixture
def store(tmp_path: Path, sweep: Sweep) -> Store:
    store = Store(tmp_path / "runs")
    fill(store, sweep, {"table5.folds.top1": 84.1})
    return store


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read, seen = frames._read, []

    def counted(store: Store, identity: str, *rest: Any) -> dict:
        seen.append(identity)
        return read(store, identity, *rest)

    monkeypatch.setattr(frames, "_read", counted)
    return seen


def test_columns_and_dtypes_are_documented(store: Store, tmp_path: Path) -> None:
    empty = collect(Store(tmp_path / "none"))
    assert len(empty) == 0
    assert list(empty.columns) == list(COLUMNS)
    assert not (tmp_path / "none").exists()
    frame = collect(store)
    assert list(frame.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert empty.dtypes.to_dict() == frame.dtypes[: len(COLUMNS)].to_dict()
    assert list(frame.columns[len(COLUMNS) :]) == ["target_rank", "target_std", "teacher_distance"]
    row = frame.set_index("id").loc[run_of(plan(["table5"], "smoke", content="feed"), "table5.folds.top1").id]
    assert (row["stage"], row["state"], row["scale"], row["seed"], row["dataset"]) == (
        "finetune",
        "done",
        "smoke",
        0,
        "builtin",
    )
    assert row["top1"] == pytest.approx(84.1, abs=0.5)
    assert row["synthetic"]
    assert row["started"] == pd.Timestamp(1.7e9, unit="s", tz="UTC")
    need = frame.set_index("id").loc[row["need"]]
    assert (need["view"], need["folds"], need["method"], need["ema_every"]) == ("folds", 3, "sdae", "epoch")


def test_arm_is_the_config_without_its_seeds(store: Store, sweep: Sweep) -> None:
    frame = collect(store).set_index("id")
    assert (frame.groupby("arm")["seed"].nunique() == 2).all()
    assert frame["arm"].to_dict() == arms(sweep)
    for identity, run in sweep.runs.items():
        assert f"{run.config.stage}-{config_hash(dump(run.config))[0]}" == identity == run_id(run.config)
    assert arm_name("a", None) == "a"


def test_only_what_changed_is_read_again(store: Store, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_reads(monkeypatch)
    first = collect(store)
    assert sorted(seen) == store.ids()
    seen.clear()
    pd.testing.assert_frame_equal(collect(store), first)
    assert seen == []
    run = run_of(sweep, "table5.folds.top1")
    write(store, run.config, run.id, {"top1": 12.5, "further": 3.0})
    frame = collect(store).set_index("id")
    assert seen == [run.id]
    assert frame.loc[run.id, "top1"] == 12.5
    assert frame["further"].count() == 1
    store.remove(run.id)
    assert run.id not in set(collect(store)["id"])
    assert len(seen) == 1
    (store.root / INDEX).write_bytes(b"not parquet")
    assert len(collect(store)) == len(first) - 1


def test_what_a_killed_writer_left_goes_though_nothing_is_written(store: Store) -> None:
    collect(store)
    code = f"from pathlib import Path; from sdae.files import temporary_of; print(temporary_of(Path({INDEX!r})))"
    left = store.root / subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    mine = temporary_of(store.root / INDEX)
    for path in (left, mine):
        path.write_bytes(b"half")
    collect(store)
    assert not left.exists()
    assert mine.exists(), "of a process that lives"
    mine.unlink()


def test_a_store_that_cannot_be_written_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise UserError(f"{path}: cannot be written")

    monkeypatch.setattr(frames, "write_atomically", refuse)
    assert len(collect(store)) == len(store.ids())
    assert not (store.root / INDEX).exists()


@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, 0.99])
def test_a_torn_result_is_said_to_be_torn(store: Store, sweep: Sweep, keep: float) -> None:
    run = run_of(sweep, "table5.folds.top1")
    file = store.run(run.id).path / "result.json"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    row = collect(store).set_index("id").loc[run.id]
    assert row["state"] == "torn"
    assert pd.isna(row["top1"])
    assert "result.json" in row["message"]
    assert (collect(store)["state"] == "done").sum() == len(sweep.runs) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "finetune-0123456789abcdef"}, "is that of finetune-0123456789abcdef"),
        ({"id": "\ud800"}, "is that of ?"),  # half a surrogate pair: no file or terminal can take it
        ({"time": {"started": 1e999, "ended": 0}}, "not the expected form"),
        ({"metrics": None}, "no metrics"),
        ({"format": 99}, "format 99"),
        ({"config": {"data": 3}}, "not the expected form"),
        ({"dataset": {"train": 3}}, "not the expected form"),
        ({"config.seed": 9}, "not the one that the id stands for"),
    ],
)
def test_a_result_that_is_not_the_runs_own_is_refused(store: Store, sweep: Sweep, change: dict, message: str) -> None:
    run = run_of(sweep, "table5.folds.top1")
    file = store.run(run.id).path / "result.json"
    result = json.loads(file.read_text())
    for key, value in change.items():
        owner, leaf = (result["config"], "seed") if key == "config.seed" else (result, key)
        owner[leaf] = value
    file.write_text(json.dumps(result))
    row = collect(store).set_index("id").loc[run.id]
    assert row["state"] == "torn"
    assert message in row["message"]


def test_hand_made_results_do_with_what_they_have(store: Store, sweep: Sweep) -> None:
    run = run_of(sweep, "table5.folds.top1")
    file = store.run(run.id).path / "result.json"
    file.write_text(json.dumps({"metrics": {"top1": 77, "top5": "many"}, "seed": 0, "synthetic": True}))
    row = collect(store).set_index("id").loc[run.id]
    assert (row["state"], row["stage"], row["top1"]) == ("done", "finetune", 77.0)
    assert pd.isna(row["top5"])
    assert pd.isna(row["arm"])


def test_runs_without_a_result_have_a_state(tmp_path: Path, sweep: Sweep) -> None:
    store = Store(tmp_path / "runs")
    failed, started, running, *_ = sweep.runs.values()
    for run in (failed, started, running):
        store.run(run.id).create(run.config)
    store.run(failed.id).fail("NonFiniteLoss", "loss is nan at step 7")
    (store.root / "not-a-run").mkdir()
    with store.run(running.id).claim() as owned:
        assert owned
        for _ in range(2):
            frame = collect(store).set_index("id")
            assert frame["state"].to_dict() == {failed.id: "failed", started.id: "started", running.id: "running"}
    assert frame.loc[failed.id, "failure"] == "NonFiniteLoss"
    assert frame.loc[failed.id, "message"] == "loss is nan at step 7"
    assert frame.loc[started.id, "scale"] == "smoke"
    assert frame["arm"].to_dict() == {run.id: arms(sweep)[run.id] for run in (failed, started, running)}
    assert collect(store).set_index("id").loc[running.id, "state"] == "started"
    store.run(failed.id).forget_failure()
    assert collect(store).set_index("id").loc[failed.id, "state"] == "started"


def test_ten_thousand_runs(tmp_path: Path, sweep: Sweep) -> None:
    """1 s cold and 0.1 s warm on an idle machine; the bounds here leave room for a busy one."""
    root = tmp_path / "runs"
    root.mkdir()
    base = run_of(sweep, "table5.folds.top1").config
    need = sweep.runs[str(base.init.run)]  # type: ignore[union-attr]
    store = Store(root)
    write(store, need.config, need.id, {})
    template = json.loads((root / need.id / "result.json").read_text())
    for seed in range(1, 10_000):
        template["config"]["seed"] = template["seed"] = seed
        template["id"] = identity = f"pretrain-{config_hash(copy.deepcopy(template['config']))[0]}"
        os.mkdir(root / identity)
        (root / identity / "result.json").write_text(json.dumps(template))
    seconds = []
    for _ in range(2):
        before = time.process_time()
        frame = collect(store)
        seconds.append(time.process_time() - before)
    assert len(frame) == 10_000
    assert (frame["state"] == "done").all()
    assert frame["arm"].nunique() == 1
    assert seconds[0] < 20  # 1 on a quiet machine
    assert seconds[1] < seconds[0] / 2  # 0.1


def test_export_keeps_the_mark(store: Store, tmp_path: Path) -> None:
    rows = len(store.ids())
    for suffix in ("csv", "parquet", "json"):
        out = tmp_path / "out" / f"frame.{suffix}"
        assert export(store, out) == rows
    assert pd.read_csv(tmp_path / "out" / "frame.csv")["synthetic"].all()
    assert pd.read_parquet(tmp_path / "out" / "frame.parquet")["synthetic"].all()
    assert all(row["synthetic"] for row in json.loads((tmp_path / "out" / "frame.json").read_text()))
    with pytest.raises(UserError, match=r"\.csv, \.parquet, \.json"):
        export(store, tmp_path / "frame.xlsx")


def test_show_and_compare(store: Store, sweep: Sweep) -> None:
    one, other = (run_of(sweep, f"table5.{row}.top1") for row in ("folds", "masked"))
    found = show(store, one.id[:14])
    assert (found["id"], found["state"], found["failure"]) == (one.id, "done", None)
    assert found["config"] == dump(one.config)
    difference = compare(store, one.needs[0], other.needs[0])
    assert difference["config"] == {"method.teacher.view": ["folds", "masked"], "method.teacher.folds": [3, None]}
    assert compare(store, one.id, one.id)["config"] == {}
    a, b, gap = compare(store, one.id, other.id)["metrics"]["top1"]
    assert gap == b - a
