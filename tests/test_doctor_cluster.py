"""`doctor --profile`: on clusters that are only told of, and on a real one."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from calling import call
from test_profile import load, sbatch

from slurm.cluster import Busy, Refused, Slurm
from slurm.doctor_cluster import examine_cluster

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytest_plugins = ("slurm_cluster",)

# The doctor, on clusters that are only told of

PARTITION = (
    "PartitionName=gpu Default=YES GraceTime=0 MaxNodes=UNLIMITED MaxTime=2-00:00:00 PriorityTier=1 "
    "PreemptMode={mode} State={state} TotalNodes=6"
)
CONFIG = {
    "ClusterName": "far", "SelectType": "select/cons_tres", "PreemptType": "preempt/none", "PreemptMode": "OFF",
    "KillWait": "30 sec", "JobRequeue": "1", "MaxArraySize": "1001", "MaxJobCount": "10000", "DefMemPerCPU": "2000",
    "AccountingStorageEnforce": "associations,limits,qos", "SlurmctldParameters": "(null)",
}  # fmt: skip


class Told(Slurm):
    """A Slurm that says what a test wants: by the beginning of a command, a text or an error."""

    def __init__(self, **changes: Any):
        self.timeout = 1.0
        self.calls: list[str] = []
        self.values = CONFIG | changes.pop("config", {})
        self.answers: dict[str, Any] = {
            "sbatch --version": "slurm 23.11.1",
            "scontrol ping": "Slurmctld(primary) at head is UP",
            "scontrol --all --oneliner show partition": PARTITION.format(mode="OFF", state="UP")
            + "\nPartitionName=old Default=NO MaxNodes=1 MaxTime=UNLIMITED PriorityTier=2 State=DOWN TotalNodes=1",
            "scontrol --oneliner show reservation": "ReservationName=room EndTime=tomorrow State=ACTIVE",
            "sinfo": "4|64|512000|gpu:a100:4(S:0-1)|mix\n2|64|256000|gpu:v100:8,nvme:1|drain*",
            "sbatch --test-only": "",
            "sacctmgr --noheader --parsable2 show assoc": "us\n",
            "sacctmgr --noheader --parsable2 show qos": "normal||||\nshort|01:00:00|20|cluster|00:00:00",
            "sacct ": "",
            **changes,
        }

    def config(self) -> dict[str, str]:
        return self.values

    def call(self, *words: str) -> str:
        line = " ".join(words)
        self.calls.append(line)
        key = max((key for key in self.answers if line.startswith(key)), key=len)
        answer = self.answers[key]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The doctor's rows by name, for a profile's text and what differs in Slurm's answers."""
    monkeypatch.setattr("shutil.which", lambda program: f"/bin/{program}")

    def examined(text: str, **changes: Any) -> dict[str, tuple[bool | None, str]]:
        slurm = Told(**changes)
        monkeypatch.setattr("slurm.doctor_cluster.Slurm", lambda timeout: slurm)
        default = [line for line in ("time: 4h", "account: us") if line.split()[0] not in text]
        found = examine_cluster(load(tmp_path, "\n".join([*default, text])), tmp_path / "runs")
        assert len(slurm.calls) < 25
        return {row["check"]: (row["ok"], row["detail"]) for row in found}

    return examined


def bad(found: dict[str, tuple[bool | None, str]]) -> dict[str, str]:
    return {name: detail for name, (ok, detail) in found.items() if ok is False}


def test_a_profile_that_fits(rows: Any) -> None:
    found = rows("gpus: 4\ngpu_type: a100\nnodes: 4\ncpus: 16\nmemory: 500G\nqos: normal\nreservation: room")
    assert bad(found) == {}
    assert set(found) == {
        "slurm", "controller", "partition gpu", "time", "cpus", "memory", "gpus", "nodes", "sbatch", "account", "qos",
        "reservation", "arrays", "queue", "accounting", "preemption", "requeue", "warning", "shared",
    }  # fmt: skip
    assert "30 sec" in found["warning"][1] and "120 s" in found["warning"][1]
    assert "short 20" in found["queue"][1]
    assert found["preemption"][1] == "gpu: jobs are not preempted"


def test_a_user_without_a_name(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert rows("")["account"] == (True, f"accounts of {os.getuid()}: us")


@pytest.mark.parametrize(
    ("text", "check", "parts"),
    [
        ("partition: cpu", "partition cpu", ["no partition cpu", "allowed: gpu, old"]),
        ("partition: old", "partition old", ["DOWN"]),
        ("time: 3-0", "time", ["3-0 of at most 2-00:00:00"]),
        ("cpus: 65", "cpus", ["x cpus 65", "has 64"]),
        ("memory: 501G", "memory", ["501G", "512000 MB"]),
        ("gpus: 9", "gpus", ["9 a node", "4 a100, 8 v100"]),
        ("gpus: 1\ngpu_type: h100", "gpus", ["1 h100", "4 a100, 8 v100"]),
        ("gpus: 4\ngpu_type: a100\nnodes: 5", "nodes", ["5 of 4 that fit"]),
        ("nodes: 7", "nodes", ["7 of 6 that fit in gpu, 2 of which are down or drained"]),
        ("qos: long", "qos", ["no qos long", "allowed: normal, short"]),
        ("qos: short", "qos", ["MaxWall 01:00:00", "time: 4h"]),
        ("account: them", "account", ["them is none of", "us"]),
        ("reservation: hall", "reservation", ["no reservation hall", "allowed: room"]),
    ],
)
def test_each_thing_that_does_not_fit(rows: Any, text: str, check: str, parts: list[str]) -> None:
    problems = bad(rows(text))
    assert check in problems
    for part in parts:
        assert part in problems[check]


def test_stages_that_differ_are_told_apart(rows: Any) -> None:
    found = rows("gpus: 4\npartition: gpu,old\nstages: {cost: {gpus: 9, partition: gpu}}")
    assert set(bad(found)) == {"gpus (cost)", "nodes (cost)", "partition old"}
    assert "gpus (pretrain, finetune, linprobe, segment, detect) on gpu" in found


def test_what_slurm_itself_says_of_the_options(rows: Any) -> None:
    found = rows("constraint: x", **{"sbatch --test-only": Refused("sbatch: Invalid feature specification")})
    assert bad(found) == {"sbatch": "sbatch: Invalid feature specification"}


def test_a_cluster_without_accounting(rows: Any) -> None:
    refused = Refused("sacctmgr: You are not running a supported accounting_storage plugin")
    found = rows("qos: x", sacctmgr=refused, **{
        "sacctmgr --noheader --parsable2 show assoc": refused, "sacctmgr --noheader --parsable2 show qos": refused,
        "sacct ": Refused("sacct: Slurm accounting storage is disabled"),
    })  # fmt: skip
    assert bad(found) == {}
    assert [found[name][0] for name in ("accounting", "account", "qos")] == [None] * 3
    assert "heartbeats" in found["accounting"][1]


def test_names_that_nothing_enforces_are_no_fault(rows: Any) -> None:
    found = rows("qos: x", config={"AccountingStorageEnforce": "none"})
    assert bad(found) == {} and "not enforced" in found["qos"][1] and "any will do" in found["account"][1]


@pytest.mark.parametrize(
    ("mode", "config", "profile", "said"),
    [
        ("REQUEUE", {}, "", "requeued by Slurm, and goes on from its last checkpoint; SIGTERM comes first"),
        ("CANCEL", {}, "", "cancelled; `sdae-cli sweep heal` submits it again"),
        ("REQUEUE", {}, "requeue: false", "cancelled; `sdae-cli sweep heal`"),
        ("GANG,SUSPEND", {}, "", "suspended, and goes on by itself"),
        ("OFF", {}, "", "not preempted"),
        ("REQUEUE", {"PreemptParameters": "send_user_signal"}, "", "GraceTime=0 (KillWait where that is 0)"),
        ("REQUEUE", {"PreemptParameters": "send_user_signal"}, "", "less than warn_seconds: 120"),
        ("OFF", {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, "qos: short", "requeued by Slurm"),
    ],
)
def test_what_becomes_of_preempted_jobs(rows: Any, mode: str, config: dict[str, str], profile: str, said: str) -> None:
    partitions = PARTITION.format(mode=mode, state="UP") + "\nPartitionName=vip PriorityTier=9 State=UP"
    found = rows(
        profile, config={"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"} | config,
        **{"scontrol --all --oneliner show partition": partitions},
    )  # fmt: skip
    assert said in found["preemption"][1]


def test_settings_of_the_cluster_that_matter(rows: Any) -> None:
    assert "arrays" in bad(rows("", config={"MaxArraySize": "0"}))
    assert "cons_tres" in bad(rows("gpus: 1", config={"SelectType": "select/cons_res"}))["gpus"]
    assert "JobRequeue=0" in rows("", config={"JobRequeue": "0"})["requeue"][1]
    assert "sweep heal" in rows("requeue: false")["requeue"][1]
    assert "DefMemPerCPU=2000" in rows("")["memory"][1]


def test_a_controller_that_is_away_or_falls_silent(rows: Any) -> None:
    found = rows("", **{"scontrol ping": Busy("scontrol: no answer in 1 s")})
    assert list(bad(found)) == ["controller"] == list(found)[1:]
    found = rows("", sinfo=Busy("sinfo: no answer in 1 s"))
    assert bad(found) == {"nodes": "sinfo: no answer in 1 s"}


def test_no_slurm_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SDAE_DATA", raising=False)
    (tmp_path / "p.yaml").write_text("time: 1h")
    called = call("doctor", "--json", "--store", tmp_path / "runs", "--profile", tmp_path / "p.yaml")
    row = json.loads(called.out)[-1]
    assert (called.code, row["check"], row["ok"]) == (1, "slurm", False)
    assert row["detail"].startswith("no Slurm on this machine: ")


# The doctor, on a real one


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """This process talks to the cluster of the tests."""
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster.env[key])
    yield cluster
    cluster.cancel_all()


def doctor(folder: Path, text: str) -> tuple[int, dict[str, Any]]:
    (folder / "p.yaml").write_text(text)
    called = call("doctor", "--json", "--store", folder / "runs", "--profile", folder / "p.yaml")
    return called.code, {row["check"]: row for row in json.loads(called.out)}


@pytest.mark.xdist_group("slurm")
def test_the_doctor_on_a_real_cluster(here: Cluster, tmp_path: Path) -> None:
    code, found = doctor(tmp_path, "partition: low\ntime: 1h\ngpus: 2\ncpus: 1\nmemory: 1G\nnodes: 2\nwarn_seconds: 30")
    assert code == 0, [row for row in found.values() if row["ok"] is False]
    assert found["accounting"]["ok"] and found["sbatch"]["ok"]
    assert re.match("2 of [2-9] that fit in low", found["nodes"]["detail"])
    assert "requeued by Slurm" in found["preemption"]["detail"]
    code, found = doctor(
        tmp_path, "partition: short,nope\ntime: 1-0\ngpus: 9\ngpu_type: a100\ncpus: 99\nmemory: 900G\nreservation: x"
    )
    failed = {name for name, row in found.items() if row["ok"] is False}
    where = {f"{name} on short" for name in ("time", "cpus", "memory", "gpus", "nodes")}
    assert (code, failed) == (1, where | {"partition nope", "sbatch", "reservation"})
    spot = doctor(tmp_path, "partition: spot\ntime: 1h")[1]
    assert "requeues itself where nodes have scontrol" in spot["preemption"]["detail"]
    assert "allowed: main, " in found["partition nope"]["detail"]


@pytest.mark.xdist_group("slurm")
def test_a_real_job_has_what_the_profile_asks_for(here: Cluster, tmp_path: Path) -> None:
    text = "partition: low\ntime: '1:30:00'\ngpus: 2\nmemory: 1G\nnodes: 2\nwarn_seconds: 90\narray_parallelism: 1"
    profile = load(tmp_path, f"{text}\nsbatch: {{hold: true}}")
    (tmp_path / "job.sh").write_text("\n".join(sbatch(profile.resources("pretrain"), 2)))
    told = here.run("scontrol", "--oneliner", "show", "job", here.sbatch(tmp_path / "job.sh"))
    for part in (
        "Partition=low", "TimeLimit=01:30:00", "NumNodes=2", "NumTasks=4", "Requeue=1", "mem=2G", "ArrayTaskThrottle=1",
        "gres:gpu:2", "CPUs/Task=1", "KillOInInvalidDependent=Yes",
    ):  # fmt: skip
        assert part in told, told
    assert "WCKey" not in told


@pytest.mark.xdist_group("slurm")
def test_a_controller_that_hangs_is_a_row(here: Cluster, tmp_path: Path) -> None:
    pid = int((here.dir / "run" / "slurmctld.pid").read_text())
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        found = examine_cluster(load(tmp_path, "time: 1h"), tmp_path, timeout=6)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - began < 60
    assert [(row["check"], row["ok"]) for row in found] == [("slurm", True), ("controller", False)]
    assert "no answer in 6 s" in found[-1]["detail"]
