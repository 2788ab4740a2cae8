"""sdae-cli as its users call it: start-up, JSON on stdout, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablations.planner import plan
from cli.main import main
from sdae.config import dump
from sdae.store import Store
from slurm import local

HEAVY = ("torch", "torchvision", "timm", "pandas", "matplotlib", "scipy", "pyarrow")
COMMANDS = [
    ["reproduce"], ["run"], ["parity"], ["doctor"], ["sweep", "list"], ["sweep", "plan"], ["sweep", "submit"],
    ["sweep", "retry"], ["sweep", "status"], ["sweep", "logs"], ["sweep", "heal"], ["sweep", "cancel"],
    ["results", "collect"], ["results", "list"], ["results", "show"], ["results", "compare"], ["results", "export"],
    ["paper", "table"], ["paper", "figure"], ["paper", "audit"], ["data", "list"], ["weights", "import"],
    ["weights", "export"], ["weights", "list"], ["predict"],
]  # fmt: skip


class Called:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls sdae-cli in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["sdae-cli", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Called(int(ended.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps run pretended runs."""
    monkeypatch.setattr(
        local.run_local, "__kwdefaults__", {**local.run_local.__kwdefaults__, "target": "local_target:execute"}
    )


def timed(code: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of processor time, which others on the machine hardly change, and what came of it."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sdae-cli', '--help']\nfrom cli.main import main\n"
        f"try: main()\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    seconds, done = timed(code)
    assert done.stderr.strip() == "[]"
    assert "reproduce" in done.stdout
    assert seconds < 2  # 0.25 on an idle machine


def test_a_plan_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys; sys.argv = 'sdae-cli sweep plan --scale paper --json'.split()\nfrom cli.main import main\n"
        f"try: main()\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    seconds, done = timed(code)
    assert seconds < 4  # 0.5 on an idle machine
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["unique"] == 133


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: list[str], cli: Any) -> None:
    called = cli(*words, "--help")
    assert called.code == 0
    assert words[-1] in called.out


def test_sweep_plan_document(cli: Any) -> None:
    called = cli("sweep", "plan", "table5", "figure4b", "--seeds", "0,1", "--json")
    document = called.json()
    assert called.code == 0
    assert list(document) == ["scale", "runs", "requested", "unique", "done", "gpu_hours", "artifacts", "blocked"]
    assert (document["scale"], document["requested"], document["unique"], document["done"]) == ("smoke", 52, 52, 0)
    run = document["runs"][1]
    assert {"id", "stage", "config", "needs", "feeds", "state"} <= set(run)
    assert (run["needs"], run["state"]) == ([document["runs"][0]["id"]], "new")
    assert run["config"]["init"]["run"] == run["needs"][0]
    assert run["config"]["data"]["fingerprint"]
    assert set(document["gpu_hours"]) == {"low", "high"}
    assert document["blocked"] == []
    theirs = cli("sweep", "plan", "table3", "--json").json()["blocked"]
    assert {"cell": "table3.beit-300.miou", "reason": "needs weights"} in theirs
    assert len(theirs) == 6


def test_a_sweep_from_submit_to_tables(cli: Any, fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("sweep", "status", "table5", "--json").json()["counts"] == {"new": 8}
    assert cli("sweep", "submit", "table5", "--dry-run", "--json").json()["done"] == 0
    assert not Path("runs").exists()
    monkeypatch.setenv("FAKE_FINETUNE", "fail")
    called = cli("sweep", "submit", "table5", "--on", "local", "--json")
    assert called.code == 1
    assert sorted(run["state"] for run in called.json()["runs"]) == ["done"] * 4 + ["failed"] * 4
    assert "NonFiniteLoss" in cli("sweep", "status", "table5").out
    monkeypatch.delenv("FAKE_FINETUNE")
    assert cli("sweep", "submit", "table5").code == 1  # what failed stays failed
    called = cli("sweep", "retry", "table5", "--jobs", "1")
    assert called.code == 0
    assert called.err.count("] done: finetune-") == 4
    assert cli("sweep", "plan", "table5", "--json").json()["done"] == 8
    rows = {row["artifact"]: row for row in cli("sweep", "list", "--json").json()}
    assert rows["table5"]["done"] == 8
    identity = cli("sweep", "status", "table5", "--json").json()["runs"][0]["id"]
    assert cli("sweep", "logs", identity[:14], "-f").out.splitlines()[-1].startswith("ended")


def test_reproduce_interrupted(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = local.Summary({"a-b": "ready"}, interrupted=True)
    monkeypatch.setattr(local, "run_local", lambda *_, **__: stopped)
    called = cli("reproduce", "table5")
    assert called.code == 130
    assert "the same command goes on" in called.err


def test_run_says_how_it_ended(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdae.run
    from sdae.errors import Interrupted, RunFailed

    config = next(iter(plan(["table5"], "smoke").runs.values())).config
    Path("run.yaml").write_text(yaml.safe_dump(dump(config)))
    asked: list[Any] = []

    def execute(config: Any, store: Store, *, progress: Any) -> dict[str, Any]:
        asked.append(config)
        if progress is not None:
            progress({"id": "x"})
        return {"id": "x-1", "metrics": {"loss": 0.5, "repeats": [1]}}

    monkeypatch.setattr(sdae.run, "execute", execute)
    assert cli("run", "run.yaml", "-s", "optim.epochs=9", "-s", "seed=4").out == "x-1 loss=0.5\n"
    assert (asked[0].optim.epochs, asked[0].seed) == (9, 4)
    assert cli("run", "run.yaml", "--json").json()["id"] == "x-1"
    monkeypatch.setenv("RANK", "1")
    assert cli("run", "run.yaml").out == ""
    for error, code in ((Interrupted("saved"), 75), (RunFailed("nan"), 1)):

        def fails(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(sdae.run, "execute", fails)
        called = cli("run", "run.yaml")
        assert (called.code, called.err) == (code, f"error: {error}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "plan", "table6"], "artifact 'table6' is unknown (allowed: table1"),
        (["sweep", "plan", "--scale", "huge"], "scale 'huge' is unknown (allowed: mini, paper, small, smoke"),
        (["sweep", "plan", "--seeds", "0,0"], "seeds: 0 is given twice"),
        (["sweep", "plan", "--seeds", "a"], "--seeds 'a': expected whole numbers"),
        (["sweep", "plan", "--seeds=-1"], "seeds are 0 or more"),
        (["sweep", "plan", "none.yaml"], "none.yaml: no such file"),
        (["sweep", "plan", "tab.yaml"], "a tab"),
        (["sweep", "submit", "--on", "cloud"], "'cloud' is not"),
        (["sweep", "submit", "--jobs", "0"], "--jobs"),
        (["sweep", "submit", "--scale", "paper", "--data", "nowhere"], "nowhere"),
        (["sweep", "logs", "pretrain-0"], "no run named 'pretrain-0'"),
        (["reproduce", "table5", "--store", "file"], "file: the store must be a folder"),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["run", "key.yaml"], "key.yaml: optim.lr: unknown key (allowed: name, epochs"),
        (["run", "good.yaml", "-s", "method.teacher.folds=0"], "method.teacher.folds: 0"),
        (["run", "good.yaml", "-s", "nonsense"], "expected key=value"),
        (["weights", "export", "pretrain-0", "--out", "x.safetensors", "--epoch", "first"], "--epoch 'first'"),
        (["paper", "table", "9"], "'table9' is unknown"),
        (["results", "show", "pretrain-0"], "no run named"),
        (["results", "export", "--out", "x.doc"], ".csv, .parquet, .json"),
        (["nonsense"], "No such command 'nonsense'"),
        (["reproduce", "--colour", "red"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str, cli: Any) -> None:
    Path("tab.yaml").write_text("title:\n\tx: 1\n")
    Path("file").write_text("")
    Path("key.yaml").write_text("stage: pretrain\noptim: {lr: 1}\n")
    Path("good.yaml").write_text("stage: pretrain\n")
    called = cli(*words)
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith("error: ")
    assert called.err.count("\n") == 1
    assert message in called.err


def test_an_empty_store_is_not_an_error(cli: Any) -> None:
    assert cli("results", "list", "--json").json() == []
    assert cli("results", "collect", "--json").json()["runs"] == 0
    document = cli("paper", "table", "5", "--json").json()
    cell = document["rows"][3]["cells"]["top1"]
    assert (cell["cell"], cell["paper"], cell["measured"], cell["runs"]) == (
        "table5.folds.top1",
        84.1,
        None,
        cell["runs"],
    )
    assert "84.1" in cli("paper", "table", "table5", "--format", "csv").out
    assert len(cli("paper", "figure", "4", "--json").json()) == 3
    assert not Path("runs").exists()


def test_data_list_and_doctor(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDAE_DATA", raising=False)
    rows = {(row["scale"], row["stage"]): row for row in cli("data", "list", "--json").json()}
    assert (rows["smoke", "pretrain"]["train"], rows["smoke", "pretrain"]["problem"]) == (256, None)
    assert (rows["smoke", "segment"]["classes"], rows["paper", "detect"]["name"]) == (11, "coco")
    assert all("SDAE_DATA" in row["problem"] for (scale, _), row in rows.items() if scale in ("small", "paper"))
    called = cli("doctor", "--json")
    assert called.code == 0
    assert {check["check"]: check["ok"] for check in called.json()}["pictures of scale paper"] is None
    Path("file").write_text("")
    called = cli("doctor", "--store", "file/store")
    assert called.code == 1
    assert "FAILED" in called.out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m cli.main sweep plan --json | head -c 10"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=dict(os.environ)
    )
    assert done.stderr == ""
