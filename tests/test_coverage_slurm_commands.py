"""Slurm's commands as they are called and read, with programs on the PATH that answer what a test has written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from calling import ROOT, assert_refused, call, spawn

from ablations.planner import plan
from sdae.errors import UserError
from sdae.store import Store
from slurm import cluster, doctor, snapshot
from slurm.cluster import Busy, Limits, NoSlurm, Refused, Slurm, Unanswered
from slurm.ledger import Ledger
from slurm.look import find, log_of, queued
from slurm.machine import cpus
from slurm.profile import load_profile
from slurm.status import progress
from slurm.sweep import end, hand_over, look, preview, profile_of, take_back

PROFILE = ROOT / "examples/profiles/cpu.yaml"


class Programs:
    """A PATH of programs that write down how they were called and answer from files."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sacctmgr"):
            self.answer(name, "")

    def answer(self, name: str, text: str, code: int = 0, error: str = "", wait: float = 0.0) -> None:
        """What a program says from now on."""
        (self.folder / f"{name}.out").write_text(text)
        (self.folder / f"{name}.err").write_text(error)
        program = self.folder / name
        body = f'#!/bin/sh\necho "$0 $*" >>"{self.folder}/calls"\n/bin/sleep {wait}\n'
        body += f'/bin/cat "$0.out"\n/bin/cat "$0.err" >&2\nexit {code}\n'
        program.write_text(body)
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return [line.replace(f"{self.folder}/", "") for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(made.folder))
    monkeypatch.setattr(cluster, "me", lambda: "ann")
    return made


def test_no_slurm_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSlurm, match=r"sbatch is not on the PATH .*module load slurm"):
        Slurm()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(NoSlurm, match="squeue is not on the PATH"):
        Slurm().queue()


def test_refusals_and_silence(programs: Programs) -> None:
    programs.answer("sbatch", "", 1, "sbatch: error: invalid partition specified: gpu\nsbatch: error: no")
    with pytest.raises(Refused, match=r"sbatch: error: invalid partition specified: gpu sbatch: error: no"):
        Slurm().submit(Path("x.sh"))
    programs.answer("sbatch", "", 3)
    with pytest.raises(Refused, match="sbatch: exit code 3"):
        Slurm().submit(Path("x.sh"))
    programs.answer("sbatch", "", 1, "sbatch: error: Socket timed out on send/recv operation")
    with pytest.raises(Busy, match="Socket timed out"):
        Slurm().submit(Path("x.sh"))
    programs.answer("squeue", "", wait=2)
    with pytest.raises(Busy, match="squeue: no answer in 0 s"):
        Slurm(timeout=0.2).queue()
    programs.answer("sbatch", "12;cluster\n")
    assert Slurm().submit(Path("x.sh")) == "12"


def test_the_queue_is_read(programs: Programs) -> None:
    programs.answer("squeue", "slurm_load: a warning\nsdae-a|12|3|RUNNING|None|n1|ann|100|200\n"
                              "other|13|N/A|PENDING|Priority||bob|100|N/A\n")  # fmt: skip
    (task,) = Slurm().queue(["bob"])
    assert (task.name, task.job, task.index, task.state, task.node, task.user) == (
        "sdae-a",
        "12",
        3,
        "RUNNING",
        "n1",
        "ann",
    )
    assert (task.submitted, task.started) == (100.0, 200.0)
    assert "--user=ann,bob" in programs.calls[-1]


def test_accounting_is_read(programs: Programs) -> None:
    programs.answer("sacct", "sdae-a|12_[0-1,4%2]|CANCELLED by 0|0:0|None assigned|100|Unknown|150\n"
                             "sdae-a|12_7|COMPLETED|0:0|n1|90|100|120\nother|9_1|FAILED|1:0|n1|1|2|3\n"
                             "sdae-a|44|FAILED|1:0|n1|1|2|3\n")  # fmt: skip
    tasks = Slurm().history(["sdae-a"], time.time()) or []
    assert [(task.index, task.state) for task in tasks] == [
        (7, "COMPLETED"), (0, "CANCELLED"), (1, "CANCELLED"), (4, "CANCELLED"),
    ]  # fmt: skip
    Slurm().history(["sdae-a"], time.time(), ["12"])
    assert "--jobs=12" in programs.calls[-1]
    programs.answer("sacct", "", 1, "Slurm accounting storage is disabled")
    assert Slurm().history(["sdae-a"], time.time()) is None
    programs.answer("sacct", "", 1, "sacct: error: Invalid user")
    with pytest.raises(Refused, match="Invalid user"):
        Slurm().history(["sdae-a"], time.time())


def test_tasks_are_ended_and_released(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "AT_ONCE", 2)
    Slurm().cancel(["12_1", "12_2", "12_1", "13"])
    Slurm().release(["12_1"])
    assert programs.calls == ["scancel --quiet 12_1 12_2", "scancel --quiet 13", "scontrol release 12_1"]


@pytest.mark.parametrize(
    ("config", "code", "account", "limits"),
    [
        ("MaxArraySize = 500\nMaxJobCount = 1000\nClusterName = c\n", 0, "200\n\n300\n", Limits(500, 200)),
        ("MaxArraySize = 0\nMaxJobCount = 1000\n", 0, "", Limits(1, 1000)),
        ("nothing\n", 1, "", Limits(1001, None)),
        ("MaxArraySize = 500\nMaxJobCount = 1000\n", 0, "0\n300\n", Limits(500, 300)),  # an account that is closed
        ("MaxArraySize = 500\nMaxJobCount = 1000\n", 0, "0\n\n", Limits(500, 1000)),
        ("MaxArraySize = 500\nMaxJobCount = 1000\n", 0, "0\n0\n", Limits(500, 0)),
    ],
)
def test_limits(config: str, code: int, account: str, limits: Limits, programs: Programs) -> None:
    programs.answer("scontrol", config)
    programs.answer("sacctmgr", account, code, "no accounting" if code else "")
    assert Slurm().limits() == limits


def test_a_job_around_us_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_CONF", "SQUEUE_STATES", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "x")
    found = cluster.environment("squeue")
    assert (found["SLURM_CONF"], found["SLURM_TIME_FORMAT"]) == ("x", "%s")
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_STATES", "SCANCEL_INTERACTIVE"} & found.keys()
    monkeypatch.setattr(cluster.pwd, "getpwuid", lambda uid: {}[uid])
    assert cluster.me() == str(os.getuid())


# A sweep from its submission to its end


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def runs() -> list[Any]:
    return list(plan(["table5"], "smoke").runs.values())


def queue_of(store: Store) -> str:
    """What squeue says while all that was handed over waits."""
    ledger, rows = Ledger(store), []
    for token in ledger.tokens():
        submission = ledger.read(token)
        assert submission is not None
        rows += [f"sdae-{token}|12|{n}|PENDING|Priority||ann|{int(time.time())}|N/A\n" for n in submission.runs]
    return "".join(rows)


def test_a_sweep_is_handed_over_looked_at_and_taken_back(programs: Programs, store: Store) -> None:
    profile = load_profile(PROFILE)
    programs.answer("scontrol", "MaxArraySize = 500\nMaxJobCount = 1000\n")
    shown = preview(runs(), store, profile)
    assert len(shown.report.submitted) == 8
    assert not store.root.exists()
    programs.answer("sbatch", "12\n")
    outcome = hand_over(runs(), store, profile, "smoke")
    assert sorted(outcome.report.submitted) == sorted(run.id for run in runs())
    assert {array["job"] for array in outcome.report.arrays} == {"12"}
    assert Ledger(store).waiting(store) == {run.id for run in runs()}
    assert hand_over(runs(), store, profile, "smoke").report.submitted == []
    assert profile_of(store, None) == profile
    one = runs()[0].id
    assert queued(store, one)
    assert find(store, one[:12]).id == one
    token = Ledger(store).holder(one).token
    log = Ledger(store).folder(token) / "12_0_0_log.err"
    log.write_text("slurmstepd: no such python\n")
    index = {i: n for n, i in (Ledger(store).read(token) or pytest.fail("no submission")).runs.items()}[one]
    assert log_of(store, one) == (log if index == 0 else store.run(one).log)
    programs.answer("squeue", queue_of(store))
    assert {s.state for s in look(runs(), store).standings.values()} <= {"queued", "waiting"}
    found, identities = take_back(runs(), store)
    assert len(identities) == 8
    assert sorted(end(identities, found)) == sorted(identities)
    assert any(line.startswith("scancel") for line in programs.calls)
    assert Ledger(store).waiting(store) == set()
    with pytest.raises(UserError, match=r"expected|no run"):
        find(store, "linprobe-")


def test_a_silent_slurm_is_told_and_nothing_is_done(programs: Programs, store: Store) -> None:
    programs.answer("sbatch", "12\n")
    hand_over(runs(), store, load_profile(PROFILE), "smoke")
    programs.answer("squeue", "", 1, "Unable to contact slurm controller (connect failure)")
    for action in (lambda: take_back(runs(), store), lambda: hand_over(runs(), store, load_profile(PROFILE), "smoke")):
        with pytest.raises(Unanswered, match=r"Unable to contact slurm controller .*: nothing was"):
            action()
    told = call("sweep", "cancel", "--yes", "--store", store.root)
    assert (told.code, told.err.count("\n")) == (1, 1), told
    programs.answer("squeue", "", 1, "Invalid user: nobody")
    with pytest.raises(UserError, match="Invalid user: nobody: nothing was cancelled"):
        take_back(runs(), store)
    programs.answer("squeue", queue_of(store))
    programs.answer("scancel", "", 1, "Unable to contact slurm controller (connect failure)")
    found, identities = take_back(runs(), store)
    with pytest.raises(Unanswered, match=r"the runs are taken back, .*; cancel again"):
        end(identities, found)
    programs.answer("scancel", "")
    found, left = take_back(runs(), store)  # it has the tasks still
    before = len(programs.calls)
    assert sorted(left) == sorted(identities)
    assert sorted(end(left, found)) == sorted(identities)
    assert any(line.startswith("scancel --quiet 12_") for line in programs.calls[before:])
    programs.answer("squeue", "")
    assert take_back(runs(), store)[1] == []
    with pytest.raises(UserError, match="--profile: missing"):
        profile_of(Store(store.root / "other"), None)


def test_what_a_retry_that_is_refused_had_failed_of_is_told_on(programs: Programs, store: Store) -> None:
    run, profile = runs()[0], load_profile(PROFILE)
    folder = store.run(run.id)
    folder.create(run.config)
    folder.fail("ValueError", "the real reason")
    programs.answer("sbatch", "", 1, "sbatch: error: invalid partition specified")
    with pytest.raises(UserError, match="invalid partition"):
        hand_over(runs(), store, profile, "smoke", failed=True)
    assert (folder.failure() or {})["message"] == "the real reason"
    programs.answer("sbatch", "12\n")
    assert run.id in hand_over(runs(), store, profile, "smoke", failed=True).report.submitted
    assert folder.failure() is None


def test_commands_take_only_what_is_named(programs: Programs, store: Store) -> None:
    """Seeds of cancel and heal count; heal submits nothing that was never handed over, nor believes a copy."""
    programs.answer("sbatch", "12\n")
    hand_over(runs(), store, load_profile(PROFILE), "smoke")
    programs.answer("squeue", queue_of(store))
    where = ("--store", store.root)
    assert call("sweep", "cancel", "--seeds", "1", "--yes", *where).out == "0 runs ended\n"
    assert_refused(call("sweep", "cancel", "table5", "--seeds", "", "--yes", *where), "--seeds '': ")
    assert_refused(call("sweep", "submit", "table5", "--seeds", "", "--dry-run", *where), "--seeds '': ")
    assert_refused(call("sweep", "cancel", "--data", "x", "--yes", *where), "--data: wants artifacts or a --scale")
    healed = call("sweep", "heal", "figure4c", *where, "--json")
    assert (healed.code, json.loads(healed.out)["submitted"]) == (0, [])
    programs.answer("squeue", queue_of(store) + "sdae-train.sh|77|0|PENDING|DependencyNeverSatisfied||ann|1|N/A\n")
    (Ledger(store).root / "jobs" / ".DS_Store").touch()
    assert call("sweep", "heal", *where).code == 0
    for link in list(Ledger(store).links.iterdir()):
        link.unlink()
    copied = call("sweep", "heal", *where)
    assert (copied.code, copied.out) == (0, "")
    assert "nothing to put right" in copied.err


def test_options_that_mean_nothing_are_refused(programs: Programs, store: Store) -> None:
    where = ("--store", store.root)
    for command in ("submit", "retry"):
        called = call("sweep", command, "table5", *where, "--on", "slurm", "--profile", PROFILE, "--jobs", 2)
        assert_refused(called, "--jobs 2: only on this machine", "array_parallelism")
        assert_refused(call("sweep", command, "table5", *where, "--profile", PROFILE), "only with --on slurm")
    assert_refused(call("sweep", "status", "--watch", "--json", *where), "--watch: not with --json")
    assert not programs.calls


def test_what_would_be_tried_again_as_json(store: Store) -> None:
    (run, *_) = runs()
    store.run(run.id).create(run.config)
    store.run(run.id).fail("ValueError", "no")
    called = call("sweep", "retry", "table5", "--store", store.root, "--dry-run", "--json")
    assert called.code == 0, called
    assert run.id in {row["id"] for row in json.loads(called.out)["runs"]}
    assert store.run(run.id).failure()


def test_the_warning_is_the_signal_that_runs_hear(store: Store) -> None:
    """SUBMITIT_PREEMPT_SIGNAL would have submitit ask Slurm for another."""
    text = spawn(
        "sweep", "submit", "table5", "--store", store.root, "--on", "slurm", "--profile", PROFILE, "--dry-run",
        SUBMITIT_PREEMPT_SIGNAL="USR1",
    ).out  # fmt: skip
    assert "#SBATCH --signal=USR2@" in text
    assert "export SUBMITIT_PREEMPT_SIGNAL=USR2" in text
    assert "USR1" not in text


def test_without_seeds_all_that_were_handed_over_are_meant(programs: Programs, store: Store) -> None:
    programs.answer("sbatch", "12\n")
    hand_over(list(plan(["table5"], "smoke", (1, 2)).runs.values()), store, load_profile(PROFILE), "smoke")
    programs.answer("squeue", queue_of(store))
    told = json.loads(call("sweep", "status", "table5", "--store", store.root, "--json").out)
    assert {store.run(row["id"]).id for row in told["runs"]} == set(plan(["table5"], "smoke", (1, 2)).runs)
    ended = json.loads(call("sweep", "cancel", "table5", "--yes", "--store", store.root, "--json").out)
    assert len(ended["cancelled"]) == len(told["runs"])


def test_a_retry_s_dry_run_writes_nothing(programs: Programs, store: Store) -> None:
    programs.answer("sbatch", "12\n")
    hand_over(runs(), store, load_profile(PROFILE), "smoke")
    programs.answer("squeue", "")
    programs.answer("sacct", "".join(f"sdae-x|12_{n}|FAILED|1:0||1|1|1|ann\n" for n in range(20)))
    files = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    words = ("--store", store.root, "--on", "slurm", "--profile", PROFILE, "--dry-run")
    assert call("sweep", "retry", "table5", *words).code == 0
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    "change",
    [
        {"token": 7},
        {"token": "../x"},
        {"time": "yesterday"},
        {"user": None},
        {"job": 7},
        {"runs": {"0": [1]}},
        {"scale": 1},
    ],
)
def test_records_of_arrays_of_other_types_are_none(change: dict[str, Any], programs: Programs, store: Store) -> None:
    programs.answer("sbatch", "12\n")
    hand_over(runs(), store, load_profile(PROFILE), "smoke")
    for record in Ledger(store).root.glob("jobs/*/submission.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | change))
    for words in (["status"], ["heal"]):
        called = call("sweep", *words, "--store", store.root)
        assert called.code in (0, 2), called
        assert "Traceback" not in called.err


# The copy of the code


def test_the_copy_of_the_code_is_made_once_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(Store(tmp_path / "runs"))
    assert not snapshot.snapshot(ledger, make=False).exists()
    ledger.open()
    made = snapshot.snapshot(ledger)
    assert (made / "sdae/store.py").read_bytes() == (ROOT / "sdae/store.py").read_bytes()
    assert snapshot.snapshot(ledger) == made
    assert [path.name for path in ledger.codes.iterdir()] == [made.name]
    monkeypatch.setattr(snapshot, "ROOMS", ("sdae",))
    monkeypatch.setattr(snapshot.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="code: cannot be written: No space left on device"):
        snapshot.snapshot(ledger)
    assert [path.name for path in ledger.codes.iterdir()] == [made.name], "no half copy is left"


# The machine


def test_the_doctor_tells_what_to_do_about_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    called = call("doctor", "--store", tmp_path / "runs")
    assert called.code == 0, called
    assert any(line.startswith("ok ") and " python " in line for line in called.out.splitlines())
    absent = [line for line in called.out.splitlines() if line.startswith("absent")]
    assert any("${SDAE_DATA} is not set: export it" in line for line in absent)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setitem(doctor.NEEDED, "torch", (99, 0))
    monkeypatch.setitem(doctor.NEEDED, "no-such-package", (1, 0))
    monkeypatch.setattr("sdae.provenance.environment", lambda: (_ for _ in ()).throw(ImportError("libcudart")))
    rows = {row["check"]: row for row in doctor.examine(Store(tmp_path))}
    assert not rows["torch"]["ok"]
    assert "99.0 or newer" in rows["torch"]["detail"]
    assert rows["no-such-package"]["detail"] == "not installed (1.0 or newer)"
    assert rows["devices"]["detail"] == "torch cannot be imported: libcudart"
    assert cpus() >= 1


def test_how_fast_this_machine_feeds(tmp_path: Path) -> None:
    rows = doctor.feeding(Store(tmp_path), "smoke", seconds=0.2)
    checks = [row["check"] for row in rows]
    assert checks[-2:] == ["model takes", "input"]
    assert "images/s" in rows[-2]["detail"]
    assert "are wanted" in rows[-1]["detail"]


def test_commands_without_a_submission(programs: Programs, tmp_path: Path) -> None:
    assert_refused(call("sweep", "submit", "table5", "--on", "slurm", "--store", tmp_path / "s"), "--profile: missing")
    called = call("sweep", "heal", "--store", tmp_path / "s")
    assert (called.code, "nothing was handed to Slurm" in called.err) == (0, True)


def test_a_rate_of_next_to_nothing_tells_no_end(tmp_path: Path) -> None:
    run = next(iter(plan(["table5"]).runs.values()))
    folder = Store(tmp_path).run(run.id)
    folder.path.mkdir()
    beat = {"step": 1, "steps": 1e14, "images_per_s": 1e-300}
    (folder.path / "heartbeat.json").write_text(json.dumps(beat))
    assert progress(folder, run) == beat | {"epoch": None, "epochs": None, "eta_s": None, "heard_s": None}
