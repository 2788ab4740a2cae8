"""Slurm's commands as they are called and read, with programs on the PATH that answer what a test has written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from calling import ROOT, assert_refused, call

from ablations.planner import plan
from sdae.errors import UserError
from sdae.store import Store
from slurm import cluster, doctor, snapshot
from slurm.cluster import Busy, Limits, NoSlurm, Refused, Slurm
from slurm.ledger import Ledger
from slurm.look import find, log_of, queued
from slurm.machine import cpus
from slurm.profile import load_profile
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
    ],
)
def test_limits(config: str, code: int, account: str, limits: Limits, programs: Programs) -> None:
    programs.answer("scontrol", config)
    programs.answer("sacctmgr", account, code, "no accounting" if code else "")
    assert Slurm().limits() == limits


def test_a_job_around_us_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    found = cluster.environment("squeue")
    assert (found["SLURM_CONF"], found["SLURM_TIME_FORMAT"]) == ("x", "%s")
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION"} & found.keys()
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
        with pytest.raises(UserError, match=r"Unable to contact slurm controller .*: nothing was"):
            action()
    programs.answer("squeue", queue_of(store))
    programs.answer("scancel", "", 1, "Unable to contact slurm controller (connect failure)")
    found, identities = take_back(runs(), store)
    with pytest.raises(UserError, match=r"the runs are taken back, .*; cancel again"):
        end(identities, found)
    with pytest.raises(UserError, match="--profile: missing"):
        profile_of(Store(store.root / "other"), None)


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
