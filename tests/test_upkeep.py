"""Long use: what `results check` finds and mends, what `results prune` removes, and stores of other formats."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from calling import ROOT, assert_refused, call, spawn
from conftest import tiny
from synthetic import run_of, write

from ablations.planner import plan
from analysis import frame as frames
from analysis.prune import remove, survey
from sdae.config import run_id
from sdae.run import execute
from sdae.store import FORMAT_FILE, STORE_FORMAT, Store, SyntheticStore, migrate
from sdae.upkeep import DISCARDED, PRUNED, encoder, prune, pruned
from slurm.ledger import CANCELLED, Ledger

FIRST = Path(__file__).parent / "store-1"  # as the first commits wrote it; git keeps no modes
LONG_AGO = time.time() - 100_000


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: time of change and content."""
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()
    }


def aged(path: Path, text: str = "half") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(text)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A store with a pre-training of three epochs, and a fine-tuning that starts from it."""
    root = tmp_path_factory.mktemp("made") / "runs"
    first = execute(tiny(), Store(root))["id"]
    second = execute(tiny("finetune", optim={"epochs": 1, "warmup_epochs": 0}, init={"run": first}), Store(root))["id"]
    frames.collect(Store(root))
    return root, first, second


@pytest.fixture
def real(made: tuple[Path, str, str], tmp_path: Path) -> tuple[Store, str, str]:
    shutil.copytree(made[0], tmp_path / "runs")
    frames.collect(Store(tmp_path / "runs"))
    return Store(tmp_path / "runs"), made[1], made[2]


# results check

Damage = Callable[[Store, str, str], object]


def half(name: str) -> Damage:
    def damage(store: Store, pretrain: str, finetune: str) -> None:
        path = store.root / name.format(pretrain=pretrain, finetune=finetune)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def copied(store: Store, pretrain: str, finetune: str) -> None:
    shutil.copytree(store.root / finetune, store.root / f"{finetune}-copy")


def renamed(store: Store, pretrain: str, finetune: str) -> None:
    (store.root / finetune).rename(store.root / "finetune-0123456789abcdef")


def without_need(store: Store, pretrain: str, finetune: str) -> None:
    store.remove(pretrain)


def other_config(store: Store, pretrain: str, finetune: str) -> None:
    file = store.root / finetune / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0\n", "seed: 7\n"))


def rewritten(**changes: Any) -> Damage:
    def damage(store: Store, pretrain: str, finetune: str) -> None:
        file = store.root / finetune / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def other_code(store: Store, pretrain: str, finetune: str) -> None:
    rewritten(provenance={"commit": None, "dirty": False, "substance": "0" * 16})(store, finetune, pretrain)


def lost_weights(store: Store, pretrain: str, finetune: str) -> None:
    (store.run(finetune).path / "result.json").unlink()
    (store.run(pretrain).checkpoints / "student-epoch-00003.safetensors").unlink()


def new_result(store: Store, pretrain: str, finetune: str) -> None:
    os.utime(store.root / finetune / "result.json")


def wrong_index(store: Store, pretrain: str, finetune: str) -> None:
    file = store.root / frames.INDEX
    table = frames._load(file, frames._version(store))
    assert table is not None
    index = table.schema.get_field_index("seed")
    frames._save(store.root, table.set_column(index, "seed", frames._array([7, 7], frames.WHOLE)))


def checkpoint(name: str) -> Damage:
    return lambda store, pretrain, _: aged(store.run(pretrain).checkpoints / name)


FAULTS: list[tuple[str, Damage, str, str, str]] = [
    # the fault, the kind of finding, what it says, and whether --repair mends it
    ("torn result", half("{finetune}/result.json"), "torn", "result.json: not a whole JSON document", "mended"),
    ("no metrics", rewritten(metrics=None), "torn", "result.json: holds no metrics", "mended"),
    ("strange metrics", rewritten(dataset=[1]), "torn", "has not the expected form", "mended"),
    ("torn config", half("{finetune}/config.yaml"), "torn", "config.yaml: not a run's whole config", "mended"),
    ("torn provenance", half("{pretrain}/provenance.json"), "torn", "provenance.json: not whole JSON", "mended"),
    ("torn metrics", half("{pretrain}/metrics.jsonl"), "torn", "is not whole JSON", "mended"),
    ("torn index", half("index.parquet"), "torn", "index.parquet: cannot be read", "mended"),
    ("index that lies", wrong_index, "torn", "index.parquet: does not say what the runs say", "mended"),
    ("old index", new_result, "stale", "index.parquet: is older than the runs: 1 came", "mended"),
    ("newer result", rewritten(format=9), "torn", "format 9, this version reads 1; next: update the suite", "left"),
    ("half weights", checkpoint("model.safetensors"), "", "", ""),
    ("weights gone", lambda s, p, _: (s.run(p).checkpoints / "model.safetensors").unlink(), "torn", "and gone", "left"),
    ("empty weights", lambda s, p, _: (s.run(p).checkpoints / "model.safetensors").write_bytes(b""), "torn",
     "its sha256 differs", "left"),
    ("unlisted weights", checkpoint("student-epoch-00009.safetensors"), "orphaned", "nobody lists it", "left"),
    ("old state", checkpoint("state-00000009.safetensors"), "orphaned", "of a run that is done", "mended"),
    ("weights of a need", lost_weights, "orphaned", "its weights, student-epoch-00003.safetensors of pre", "left"),
    ("copy", copied, "duplicate", "a copy of finetune-", "left"),
    ("another name", renamed, "orphaned", "holds the run finetune-", "left"),
    ("need removed", without_need, "orphaned", "which is not in this store; next: bring the folder pretrain-", "left"),
    ("another config", other_config, "orphaned", "(config.yaml); next: rename it to finetune-", "left"),
    ("made up", rewritten(synthetic=True), "orphaned", "move the folder finetune-", "left"),
    ("other code", other_code, "stale", "has changed in substance since", "left"),
    ("not a run", lambda s, *_: aged(s.root / "my-notes/todo.txt"), "orphaned", "move it out of the store", "left"),
    ("empty run", lambda s, *_: (s.root / "pretrain-0123456789abcdef/checkpoints").mkdir(parents=True), "orphaned",
     "an empty run folder", "mended"),
    ("temporary file", lambda s, p, _: aged(s.root / p / ".result.json.0123abcd.tmp"), "orphaned",
     ".result.json.0123abcd.tmp: a temporary file of a process that is gone", "mended"),
    ("temporary weights", checkpoint(".model.safetensors.0123abcd.tmp"), "orphaned", "a temporary file", "mended"),
    ("temporary index", lambda s, *_: aged(s.root / ".index.parquet.0123abcd.tmp"), "orphaned", "a temp", "mended"),
    ("half prune", lambda s, *_: aged(s.root / DISCARDED / "finetune-x.1/log.txt"), "orphaned", "goes on", "mended"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "says", "end"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_every_fault_is_named_and_told_what_to_do(
    damage: Damage, kind: str, says: str, end: str, real: tuple[Store, str, str]
) -> None:
    store = real[0]
    damage(*real)
    for folder in store.root.iterdir():
        if folder.is_dir():
            os.utime(folder, (LONG_AGO, LONG_AGO))
    before = files(store.root)
    called = call("results", "check", "--store", store.root)
    assert files(store.root) == before, "check only reads"
    assert called.err == ""
    found = [line for line in called.out.splitlines() if line.startswith(kind or "nothing") and says in line]
    if not kind:  # the fault cannot be seen without reading all of it
        assert called.code == 0
        return
    assert called.code == 1, called
    assert found, called.out
    assert all("; next: " in line for line in called.out.splitlines()[:-1])
    repaired = call("results", "check", "--repair", "--store", store.root)
    again = call("results", "check", "--store", store.root)
    assert repaired.code == again.code == (end == "left"), (repaired, again)
    if end == "mended":
        assert "; repaired" in repaired.out
        assert "nothing wrong" in again.out


def test_a_whole_store_has_nothing_wrong(real: tuple[Store, str, str], tmp_path: Path) -> None:
    called = call("results", "check", "--deep", "--store", real[0].root, "--json")
    report = json.loads(called.out)
    assert (called.code, report["findings"], report["runs"], report["format"]) == (0, [], 2, STORE_FORMAT)
    assert_refused(call("results", "check", "--store", tmp_path / "none"), "none: there is no such folder in ")
    assert not (tmp_path / "none").exists()


def test_deep_reads_every_checkpoint_and_every_line(real: tuple[Store, str, str]) -> None:
    store, pretrain, _ = real
    run = store.run(pretrain)
    for path in (run.checkpoints / "teacher-epoch-00002.safetensors", run.metrics_file):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))
    other = tiny(seed=3)
    started = store.run(run_id(other))
    started.create(other)
    aged(started.checkpoints / "state-00000002.safetensors")
    aged(started.checkpoints / "state-00000002.sha256.json", '{"sha256": "0"}')
    frames.collect(store)
    assert call("results", "check", "--store", store.root).code == 0
    report = json.loads(call("results", "check", "--deep", "--store", store.root, "--json").out)
    names = {Path(finding["where"]).name for finding in report["findings"]}
    assert names == {"teacher-epoch-00002.safetensors", "metrics.jsonl", "state-00000002.safetensors"}
    assert report["counts"] == {"torn": 3, "orphaned": 0, "duplicate": 0, "stale": 0}
    call("results", "check", "--deep", "--repair", "--store", store.root)
    assert list(started.checkpoints.iterdir()) == []


def test_a_run_set_aside_is_done_again(real: tuple[Store, str, str]) -> None:
    store, pretrain, _ = real
    run = store.run(pretrain)
    before = run.result() or {}
    (run.path / "result.json").write_text("{")
    assert call("results", "check", "--repair", "--store", store.root).code == 0
    assert (run.path / "result.json.torn").read_text() == "{"
    assert run.state() == "started"
    after = execute(tiny(), store)
    assert (after["weights"], after["metrics"]["loss"]) == (before["weights"], before["metrics"]["loss"])


def test_a_run_that_runs_is_left_alone(real: tuple[Store, str, str]) -> None:
    store, _, finetune = real
    (store.root / finetune / "result.json").unlink()
    with store.run(finetune).claim():
        path = aged(store.root / finetune / ".metrics.jsonl.0123abcd.tmp")
        (store.root / finetune / "heartbeat.json").write_text("{")
        frames.collect(store)
        assert call("results", "check", "--repair", "--store", store.root).code == 0
        assert path.exists()


def test_reservations_that_point_nowhere(real: tuple[Store, str, str]) -> None:
    store, pretrain, finetune = real
    ledger = Ledger(store)
    ledger.open()
    for identity, token in ((pretrain, "0123456789ab"), (finetune, CANCELLED)):
        (ledger.links / f"{identity}.1").symlink_to(token)
        os.utime(ledger.links / f"{identity}.1", (LONG_AGO, LONG_AGO), follow_symlinks=False)
    aged(ledger.folder("ba9876543210") / "job.pkl")
    os.utime(ledger.folder("ba9876543210"), (LONG_AGO, LONG_AGO))
    called = call("results", "check", "--store", store.root)
    assert called.code == 1
    assert (
        f"{pretrain}.1: points to the array 0123456789ab, which is not there; next: `sdae-cli sweep heal`" in called.out
    )
    assert "ba9876543210: an array that was never handed over" in called.out
    assert CANCELLED not in called.out


def test_unreadable_is_not_torn(real: tuple[Store, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment must not cost a result."""
    store, pretrain, _ = real
    path = store.root / pretrain / "result.json"
    path.unlink()
    path.symlink_to(path.name)  # ELOOP for whoever reads it, root too
    called = call("results", "check", "--repair", "--store", store.root)
    assert called.code == 1
    assert "cannot be read: " in called.out
    assert path.is_symlink()


def test_many_alike_are_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(12):
        aged(store.root / f".index.parquet.{number:08x}.tmp")
    called = call("results", "check", "--store", tmp_path)
    assert called.out.count("\n") == 2
    assert "orphaned: 12 times: a temporary file" in called.out
    assert len(json.loads(call("results", "check", "--store", tmp_path, "--json").out)["findings"]) == 12


@pytest.mark.slow
def test_ten_thousand_runs_are_checked_in_seconds(tmp_path: Path) -> None:
    """About 3 s on an idle machine; the bound leaves room for a busy one."""
    from analysis.check import check

    sweep = plan(["table5"], "smoke", content="synthetic")
    run = run_of(sweep, "table5.folds.top1")
    store = SyntheticStore(tmp_path / "runs")
    write(store, sweep.runs[run.needs[0]].config, run.needs[0], {"loss": 1.0})
    template = json.loads((store.root / run.needs[0] / "result.json").read_text())
    text = yaml.safe_dump(template["config"], sort_keys=False)
    for seed in range(1, 10_000):
        config = json.loads(json.dumps(template["config"])) | {"seed": seed}
        template["config"]["seed"] = template["seed"] = seed
        template["id"] = identity = f"pretrain-{frames.config_hash(config)[0]}"
        store.put(identity, {
            "config.yaml": text.replace("seed: 0\n", f"seed: {seed}\n"), "provenance.json": "{}",
            "result.json": json.dumps(template),
        })  # fmt: skip
    before = time.process_time()
    report = check(store)
    assert time.process_time() - before < 60
    assert (report["runs"], report["findings"]) == (10_000, [])


# results prune


@pytest.fixture(scope="module")
def published() -> Any:
    sweep = plan(["table2", "table5", "figure4c"], "smoke", content="synthetic")

    def tables(store: Store, out: Path, seeds: list[int] | None = None) -> dict[str, bytes]:
        from analysis.render import render
        from analysis.study import study

        found = study(store, [a.name for a in sweep.artifacts], "smoke", seeds)
        return {name: render(table, "json").encode() for name, table in found.tables.items()}

    return tables


OWN = """
title: One of my own
columns: {top1: {run: finetune, metric: top1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain, epoch: 160}}}
rows: {only: {runs: {pretrain: {recipe: sdae, method: {mask_ratio: 0.6}}}}}
"""


def grown(root: Path, own: Path, seeds: tuple[int, ...]) -> Store:
    """A made-up store of the suite and of an ablation that nobody wants any more, with weights."""
    from synthetic import fill

    store = SyntheticStore(root)
    own.write_text(OWN)
    sweep = plan(["table2", "table5", "figure4c", own], "smoke", seeds, content="synthetic")
    fill(store, sweep, {"table5.folds.top1": 60.0})
    for identity, run in sweep.runs.items():
        folder = store.run(identity)
        folder.checkpoints.mkdir(exist_ok=True)
        if run.config.stage == "pretrain":
            for epoch in range(1, run.config.optim.epochs + 1):
                for which in ("student", "teacher"):
                    (folder.checkpoints / f"{which}-epoch-{epoch:05d}.safetensors").write_bytes(b"0" * 100)
        (folder.checkpoints / "model.safetensors").write_bytes(b"0" * 50)
    frames.collect(store)
    return store


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_what_no_artifact_needs_goes_and_tables_stay(seeds: tuple[int, ...], published: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    store = grown(tmp_path / "runs", own, seeds)
    before, ids = published(store, tmp_path), set(store.ids())
    mine = set(plan([own], "smoke", seeds, content="synthetic").runs) - set(
        plan((), "smoke", seeds, content="synthetic").runs
    )
    assert len(mine) == 2 * len(seeds)
    words = ("--scale", "smoke", "--store", store.root)
    with_mine = json.loads(call("results", "prune", own, *words, "--dry-run", "--json").out)
    assert with_mine["runs"] == []
    assert all(item["run"] in ids for item in with_mine["files"])
    dry = json.loads(call("results", "prune", *words, "--dry-run", "--json").out)
    assert {item["run"] for item in dry["runs"]} == mine
    assert set(store.ids()) == ids
    size = sum(p.stat().st_size for p in store.root.glob("*/checkpoints/*"))
    called = call("results", "prune", *words, "--yes", "--json")
    assert called.code == 0, called
    document = json.loads(called.out)
    assert set(document["removed"]) >= mine
    assert sum(p.stat().st_size for p in store.root.glob("*/checkpoints/*")) < size / 2
    assert published(store, tmp_path) == before
    assert store.synthetic
    # With several seeds an arm's variance is pooled, so the numbers stay and the weights go
    assert set(store.ids()) == (ids if len(seeds) > 1 else ids - mine)
    assert "nothing to remove" in call("results", "prune", *words, "--yes").out
    assert call("results", "check", "--store", store.root).code == 0
    assert json.loads(call("results", "prune", *words, "--yes", "--json").out)["bytes"] == 0


def test_what_runs_ask_for_stays(published: Any, tmp_path: Path) -> None:
    store = grown(tmp_path / "runs", tmp_path / "own.yaml", (0,))
    assert call("results", "prune", "--store", store.root, "--yes").code == 0
    sweep = plan((), "smoke", content="synthetic")
    asked = [run.config.init for run in sweep.runs.values() if getattr(getattr(run.config, "init", None), "run", None)]
    for init in asked:
        folder = store.run(init.run)
        if folder.done:
            names = os.listdir(folder.checkpoints)
            assert encoder(names, init.weights, None if init.epoch == "last" else init.epoch), init
    assert not any(pruned(store.run(i)) for i in store.ids() if i.startswith("finetune"))
    assert all((store.run(i).checkpoints / "model.safetensors").exists() for i in store.ids())


def test_explicit_seeds_are_those_that_stay(published: Any, tmp_path: Path) -> None:
    store = grown(tmp_path / "runs", tmp_path / "own.yaml", (0, 1))
    before = published(store, tmp_path, [0])
    assert call("results", "prune", "--seeds", "0", "--store", store.root, "--yes").code == 0
    assert published(store, tmp_path, [0]) == before
    kept = set(plan((), "smoke", [0], content="synthetic").runs)
    assert all(not any(store.run(i).checkpoints.iterdir()) for i in store.ids() if i not in kept)


def test_whose_run_it_is_that_nobody_needs(tmp_path: Path) -> None:
    """A run that somebody runs, or that Slurm may start, stays with what it starts from; so does a link."""
    own = tmp_path / "own.yaml"
    store = grown(tmp_path / "runs", own, (0,))
    mine = plan([own], "smoke", content="synthetic")
    pretrain, finetune = (next(i for i in mine.runs if i.startswith(s)) for s in ("pretrain", "finetune"))
    (store.root / finetune / "result.json").unlink()
    (store.root / finetune / "config.yaml").write_text(
        yaml.safe_dump(json.loads(mine.runs[finetune].config.model_dump_json()))
    )
    with store.run(finetune).claim():
        assert survey(store).runs == []
    assert {item.run for item in survey(store).runs} == {pretrain, finetune}
    assert survey(store, held={finetune}).runs == []
    Ledger(store).open()
    (Ledger(store).links / f"{finetune}.1").symlink_to("0123456789ab")
    assert json.loads(call("results", "prune", "--store", store.root, "--dry-run", "--json").out)["runs"] == []
    (Ledger(store).links / f"{finetune}.1").unlink()

    found = survey(store)
    with store.run(finetune).claim():  # it was taken up while the user was asked
        assert finetune not in {item.run for item in remove(found, survey(store))[0]}
        assert finetune in store.ids()
        gone, skipped = remove(found, found)
    assert skipped == [finetune]
    assert [item.run for item in gone if not item.files] == [pretrain]
    elsewhere = tmp_path / "elsewhere"
    (store.root / finetune).rename(elsewhere)
    (store.root / finetune).symlink_to(elsewhere)
    assert call("results", "prune", "--store", store.root, "--yes").code == 0
    assert (elsewhere / "config.yaml").exists()


def test_runs_of_other_scales_and_single_runs_stay(real: tuple[Store, str, str]) -> None:
    before = files(real[0].root)
    assert "nothing to remove" in call("results", "prune", "--store", real[0].root, "--yes").out
    assert files(real[0].root) == before


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_prune_goes_on(
    stop: int, published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the N-th removal, what is left is a whole store, and the same command ends as if nothing had been."""
    stores = [grown(tmp_path / name / "runs", tmp_path / "own.yaml", (0,)) for name in "ab"
              if (tmp_path / name).mkdir() is None]  # fmt: skip
    before = published(stores[0], tmp_path)
    left = [stop]

    def cut(function: Any) -> Any:
        def one(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut(shutil.rmtree))
        patch.setattr(Path, "unlink", cut(Path.unlink))
        found = survey(stores[0])
        with pytest.raises(KeyboardInterrupt):
            remove(found, found)
    assert published(stores[0], tmp_path) == before
    for store in stores:
        found = survey(store)
        remove(found, found)
    assert stores[0].ids() == stores[1].ids()
    assert {n for n in files(stores[0].root) if n != frames.INDEX} == {
        n for n in files(stores[1].root) if n != frames.INDEX
    }
    assert published(stores[0], tmp_path) == before


@pytest.mark.slow
def test_killed_while_it_removes(published: Any, tmp_path: Path) -> None:
    store = grown(tmp_path / "runs", tmp_path / "own.yaml", (0, 1))
    before = published(store, tmp_path)
    words = [sys.executable, "-m", "cli.main", "results", "prune", "--yes", "--store", str(store.root)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(store.root.glob(f"*/{PRUNED}")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert published(store, tmp_path) == before
    assert spawn("results", "prune", "--yes", "--store", store.root).code == 0
    assert published(store, tmp_path) == before
    assert survey(store).bytes == 0


def test_it_asks_and_is_refused_where_nobody_can_be_asked(tmp_path: Path) -> None:
    store = grown(tmp_path / "runs", tmp_path / "own.yaml", (0,))
    ids = store.ids()
    called = spawn("results", "prune", "--store", store.root)
    assert_refused(called, "--dry-run lists them, --yes does it")
    assert store.ids() == ids
    for word, removed in (("n\n", False), ("y\n", True)):
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "results", "prune", "--store", str(store.root)],
            cwd=ROOT, stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.write(parent, word.encode())
        out, err = process.communicate(timeout=600)
        os.close(parent)
        os.close(child)
        assert "Remove " in err
        assert " bytes from " in err
        assert ("no artifact needs it" in out, process.returncode) == (True, not removed)
        assert (store.ids() != ids) == removed


def test_a_fine_tuning_of_pruned_weights_is_told_so(real: tuple[Store, str, str]) -> None:
    store, pretrain, _ = real
    prune(store.run(pretrain), {"student-epoch-00001.safetensors": 100})
    assert call("results", "check", "--deep", "--store", store.root).code == 0
    with pytest.raises(Exception, match=r"student-epoch-00001\.safetensors: .*results prune") as refused:
        execute(tiny("finetune", optim={"epochs": 1}, init={"run": pretrain, "epoch": 1}), store)
    assert type(refused.value).__name__ == "UserError"


# The store's format


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A store as the first commits wrote it: weights for their owner only, a claim that was renamed, no FORMAT."""
    root = tmp_path / "first"
    shutil.copytree(FIRST, root)
    for file in root.glob("*/checkpoints/*.safetensors"):
        file.chmod(0o600)
    return root


def modes(root: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in root.glob("*/checkpoints/*.safetensors")}


def test_a_store_of_the_first_format_is_read_as_it_is(first: Path) -> None:
    before = files(first)
    assert Store(first).format == 1
    frame = frames.collect(Store(first)).set_index("id")
    assert frame["state"].to_dict() == {
        "finetune-33cad62c5546cbd6": "failed", "finetune-88030226bbf14d70": "started",
        "finetune-e530cd41ad612d24": "done", "pretrain-5e34e34357acb46d": "done",
    }  # fmt: skip
    assert {k: v for k, v in files(first).items() if k != frames.INDEX} == before
    assert modes(first) == {0o600}


def test_a_store_of_the_first_format_is_migrated_when_a_run_is_written(first: Path) -> None:
    store = Store(first)
    execute(tiny(optim={"epochs": 1, "warmup_epochs": 0}), store)
    assert store.format == STORE_FORMAT
    assert modes(first) == {0o644}
    assert not list(first.glob("*/.claim.*"))
    assert frames.collect(store)["id"].to_list() == store.ids()
    assert call("results", "check", "--deep", "--store", first).code == 0


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_migration_goes_on(stop: int, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, chmod = [stop], Path.chmod

    def cut(path: Path, mode: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        chmod(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", cut)
        with pytest.raises(KeyboardInterrupt):
            migrate(Store(first))
    assert Store(first).format == 1
    migrate(Store(first))
    assert (Store(first).format, modes(first)) == (STORE_FORMAT, {0o644})


def test_a_newer_store_is_refused(real: tuple[Store, str, str], tmp_path: Path) -> None:
    store = real[0]
    (store.root / FORMAT_FILE).write_text("3\n")
    before = files(store.root)
    for words in (
        ("results", "list"),
        ("results", "prune", "--yes"),
        ("paper", "table", "5"),
        ("sweep", "plan", "table5"),
    ):
        assert_refused(call(*words, "--store", store.root), "a store of format 3", "knows 1 to 2", "update the suite")
    assert_refused(call("reproduce", "table5", "--store", store.root, "--out", tmp_path / "out"), "format 3")
    assert files(store.root) == before
    (store.root / FORMAT_FILE).write_text("two\n")
    assert_refused(call("results", "list", "--store", store.root), "FORMAT: expected", "'two\\n'")


def test_new_stores_say_their_format(real: tuple[Store, str, str], tmp_path: Path) -> None:
    assert (real[0].root / FORMAT_FILE).read_text() == f"{STORE_FORMAT}\n"
    assert SyntheticStore(tmp_path / "made-up").format == STORE_FORMAT
