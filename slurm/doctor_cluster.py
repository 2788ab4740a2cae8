"""Whether a cluster can run what a profile asks for, check by check; nothing is submitted and nothing is changed."""

from __future__ import annotations

import functools
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdae.config import STAGES
from slurm.cluster import Busy, NoSlurm, Refused, Slurm, me
from slurm.profile import Profile, Resources, to_minutes

TIMEOUT = 20.0  # seconds that one question to Slurm may take
MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
AWAY = ("down", "drain", "drng", "fail", "unk", "inval")  # how sinfo's states of nodes that take no job begin

Row = dict[str, Any]
Rows = Iterator[Row]


class Nodes(NamedTuple):
    """So many nodes that are alike. gpus: by type, "" where Slurm was told none."""

    number: int
    cpus: int
    megabytes: int
    gpus: dict[str, int]
    away: bool


def examine_cluster(profile: Profile, store: Path, timeout: float = TIMEOUT) -> list[Row]:
    """[{"check", "ok": true | false | null (absent, and need not be there), "detail"}], at most `timeout` s a call."""
    rows: list[Row] = []
    name = "slurm"
    try:
        slurm = Slurm(timeout)
        missing = [p for p in ("squeue", "scancel", "scontrol", "sinfo", "srun") if shutil.which(p) is None]
        absent = f"; not on the PATH: {', '.join(missing)}" if missing else ""
        rows.append(finding(name, not missing, slurm.call("sbatch", "--version").strip() + absent))
        name = "controller"
        answer = " ".join(slurm.call("scontrol", "ping").split())
        rows.append(finding(name, "is UP" in answer, answer))
        doctor = _Doctor(profile, slurm)
    except (Busy, Refused, NoSlurm) as error:
        hint = " (does SLURM_CONF name a file, does slurmctld run?)" if isinstance(error, Busy) else ""
        return [*rows, finding(name, False, f"{error}{hint}")]
    for name, check in doctor.checks():
        try:
            rows.extend(check)
        except (Busy, Refused, NoSlurm) as error:
            rows.append(finding(name, False, str(error)))
    told = f"every compute node must have {store.resolve()} and {profile.python or sys.executable}"
    return [*rows, finding("shared", True, f"{told} under these paths, which cannot be told from here")]


class _Doctor:
    """What the checks of one cluster share. `groups`: the distinct resources of the stages, by their stages' names."""

    def __init__(self, profile: Profile, slurm: Slurm):
        self.profile, self.slurm = profile, slurm
        self.config = slurm.config()
        text = slurm.call("scontrol", "--all", "--oneliner", "show", "partition")
        self.partitions = {record["PartitionName"]: record for record in _records(text, "PartitionName")}
        self.default = ",".join(name for name, record in self.partitions.items() if record.get("Default") == "YES")
        stages: dict[str, list[str]] = {}
        for stage in STAGES:
            stages.setdefault(profile.resources(stage).key, []).append(stage)
        self.groups = {", ".join(names): profile.resources(names[0]) for names in stages.values()}
        self.nodes: dict[str, list[Nodes]] = {}
        self.enforced = set(self.config.get("AccountingStorageEnforce", "").split(",")) - {"none", "(null)", ""}

    def checks(self) -> Iterator[tuple[str, Rows]]:
        """Each check's name, and its rows, which Slurm is asked for when they are taken."""
        for name in self.everywhere():
            yield f"partition {name}", self.partition(name)
        for stages, asked in self.groups.items():
            label = f" ({stages})" if len(self.groups) > 1 else ""
            several = "," in (asked.partition or self.default)
            for name in self.asked(asked):
                where = f"{label} on {name}" if several else label
                if name in self.partitions:
                    yield f"nodes{where}", self.fits(name, asked, where)
            yield f"sbatch{label}", self.accepted(asked, label)
        for check in (
            self.account, self.qos, self.reservation, self.arrays, self.queue, self.accounting, self.preemption,
            self.requeue, self.warning,
        ):  # fmt: skip
            yield check.__name__, check()

    def everywhere(self) -> list[str]:
        return list(dict.fromkeys(name for asked in self.groups.values() for name in self.asked(asked)))

    def asked(self, resources: Resources) -> list[str]:
        """The partitions that a job may go to; [""] where neither the profile nor the cluster names one."""
        return (resources.partition or self.default).split(",")

    def partition(self, name: str) -> Rows:
        record = self.partitions.get(name)
        if record is None:
            there = ", ".join(self.partitions)
            said = f"there is no partition {name}" if name else "partition: missing, and the cluster has no default"
            yield finding(f"partition {name}".strip(), False, f"{said} (allowed: {there})")
        else:
            state = record.get("State", "unknown")
            told = f"{state}, {record.get('TotalNodes')} nodes, MaxTime {record.get('MaxTime')}"
            yield finding(f"partition {name}", state == "UP", told)

    def fits(self, name: str, asked: Resources, where: str) -> Rows:
        """Time, nodes, cpus, memory and GPUs beside what the partition and its nodes have."""
        record, nodes = self.partitions[name], self.found(name)
        longest = _limit(record.get("MaxTime", ""))
        told = f"{asked.time} of at most {record.get('MaxTime')}"
        cure = "" if longest is None or asked.minutes <= longest else "; take less: a run that needs more is requeued"
        yield finding(f"time{where}", not cure, told + cure)
        cpus = asked.tasks_per_node * asked.cpus
        most = max((n.cpus for n in nodes), default=0)
        told = f"tasks {asked.tasks_per_node} x cpus {asked.cpus} = {cpus} a node; the largest of {name} has {most}"
        yield finding(f"cpus{where}", cpus <= most, told)
        memory = _megabytes(asked.memory)
        most = max((n.megabytes for n in nodes), default=0)
        told = f"{asked.memory or self.default_memory(record)} a node; the largest of {name} has {most} MB"
        yield finding(f"memory{where}", memory <= most, told)
        if asked.gpus:
            types = {kind: max(n.gpus.get(kind, 0) for n in nodes) for n in nodes for kind in n.gpus}
            has = ", ".join(f"{count} {kind or 'without a type'}" for kind, count in sorted(types.items())) or "none"
            most = max((_gpus(n, asked.gpu_type) for n in nodes), default=0)
            told = f"{asked.gpus} {asked.gpu_type or ''}".strip() + f" a node; nodes of {name} have at most {has}"
            select = self.config.get("SelectType", "select/cons_tres").removeprefix("select/")
            told += "" if select == "cons_tres" else f"; --gpus-per-node wants SelectType cons_tres, this is {select}"
            yield finding(f"gpus{where}", asked.gpus <= most and select == "cons_tres", told)
        fit = [n for n in nodes if n.cpus >= cpus and n.megabytes >= memory and _gpus(n, asked.gpu_type) >= asked.gpus]
        count, away = sum(n.number for n in fit), sum(n.number for n in fit if n.away)
        allowed = record.get("MaxNodes", "")
        told = f"{asked.nodes} of {count} that fit in {name}" + f", {away} of which are down or drained" * bool(away)
        over = allowed.isdigit() and int(allowed) < asked.nodes
        yield finding(f"nodes{where}", count >= asked.nodes and not over, told + f" (MaxNodes={allowed} a job)" * over)

    def found(self, name: str) -> list[Nodes]:
        if name not in self.nodes:
            text = self.slurm.call("sinfo", "--exact", "-h", f"--partition={name}", "--format=%D|%c|%m|%G|%t")
            rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
            self.nodes[name] = [
                Nodes(_number(count), _number(cpus), _number(memory), _types(gres), state.startswith(AWAY))
                for count, cpus, memory, gres, state in rows
            ]
        return self.nodes[name]

    def default_memory(self, record: dict[str, str]) -> str:
        for source in (record, self.config):
            for key in ("DefMemPerNode", "DefMemPerCPU", "DefMemPerGPU"):
                if source.get(key, "").isdigit():
                    return f"the default, {key}={source[key]} MB,"
        return "the default, all,"

    def accepted(self, asked: Resources, label: str) -> Rows:
        """Slurm's own word on the very options, without a job."""
        from submitit.slurm.slurm import _make_sbatch_string

        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "doctor.sh")
            options: dict[str, Any] = {"job_name": "sdae-doctor", "map_count": 1, **asked.parameters()}
            script.write_text(_make_sbatch_string("true", folder, **options))
            self.slurm.call("sbatch", "--test-only", str(script))
        yield finding(f"sbatch{label}", True, "a job with these options is accepted (sbatch --test-only)")

    def account(self) -> Rows:
        user = me()
        cluster = self.config.get("ClusterName", "")
        found = self.accounts("show", "assoc", f"user={user}", f"cluster={cluster}", "Account")
        if found is None:
            yield finding("account", None, "there is no accounting (sacctmgr) to ask for accounts")
            return
        there = sorted({name for (name,) in found})
        unknown = sorted({asked.account for asked in self.groups.values() if asked.account} - set(there))
        told = f"accounts of {user}: {', '.join(there) or 'none'}"
        told = f"{', '.join(unknown)} is none of the {told}" if unknown else told
        if self.enforced:
            yield finding("account", bool(there) and not unknown, told)
        else:
            yield finding("account", True, f"{told} (AccountingStorageEnforce is off, so any will do)")

    @functools.cached_property
    def known(self) -> dict[str, tuple[str, str, str, str]] | None:
        """MaxWall, MaxSubmitJobsPerUser, PreemptMode and GraceTime of every qos; None without accounting."""
        found = self.accounts("show", "qos", "Name,MaxWall,MaxSubmitPU,PreemptMode,GraceTime")
        return None if found is None else {name: (wall, most, mode, grace) for name, wall, most, mode, grace in found}

    def qos(self) -> Rows:
        for name in sorted({asked.qos for asked in self.groups.values() if asked.qos}):
            minutes, text = max((a.minutes, a.time) for a in self.groups.values() if a.qos == name)
            if self.known is None:
                yield finding("qos", None, f"{name}: there is no accounting (sacctmgr) to ask")
            elif name not in self.known:
                any_will_do = "qos" not in self.enforced
                told = f"there is no qos {name} (allowed: {', '.join(self.known)})"
                yield finding("qos", any_will_do, told + "; not enforced, so any will do" * any_will_do)
            else:
                wall = self.known[name][0]
                over = minutes > (_limit(wall) or minutes) and bool(self.enforced & {"limits", "safe"})
                told = f"{name}, MaxWall {wall or 'none'}"
                yield finding("qos", not over, told + f", but time: {text}" * over)

    def reservation(self) -> Rows:
        wanted = sorted({asked.reservation for asked in self.groups.values() if asked.reservation})
        if wanted:
            text = self.slurm.call("scontrol", "--oneliner", "show", "reservation")
            there = {r["ReservationName"]: r for r in _records(text, "ReservationName")}
            for name in wanted:
                if name in there:
                    told = f"{name} is {there[name].get('State')}, ends {there[name].get('EndTime')}"
                else:
                    told = f"there is no reservation {name} (allowed: {', '.join(there) or 'none exists'})"
                yield finding("reservation", name in there, told)

    def arrays(self) -> Rows:
        most = self.slurm.limits().array
        told = f"at most {most} tasks in one (MaxArraySize); more runs become more arrays"
        yield finding("arrays", most > 1, told if most > 1 else "MaxArraySize: arrays are switched off")

    def queue(self) -> Rows:
        limits = self.slurm.limits()
        submit = [f"{name} {most}" for name, (_, most, _, _) in (self.known or {}).items() if most.isdigit()]
        told = (
            f"{'no limit told' if limits.tasks is None else limits.tasks} (the least of MaxJobCount and MaxSubmitJobs)"
        )
        told += f"; MaxSubmitJobsPerUser of qos: {', '.join(submit)}" if submit else ""
        yield finding("queue", True, f"tasks at a time: {told}")

    def accounting(self) -> Rows:
        if self.slurm.history(["sdae-doctor"], time.time()) is None:
            yield finding("accounting", None, "off: states come from squeue and from the runs' heartbeats alone")
        else:
            yield finding("accounting", True, "sacct answers")

    def preemption(self) -> Rows:
        kind = self.config.get("PreemptType", "none").removeprefix("preempt/")
        for name in self.everywhere():
            if record := self.partitions.get(name):
                yield finding("preemption", True, f"{name}: {self.preempted(record, kind)}")

    def preempted(self, record: dict[str, str], kind: str) -> str:
        """What becomes of a job of the profile's that has to give way."""
        mode, grace = self.config.get("PreemptMode", "OFF"), record.get("GraceTime", "0")
        if kind == "partition_prio":
            mode = record.get("PreemptMode", mode)
            tiers = [_number(other.get("PriorityTier", "")) for other in self.partitions.values()]
            if _number(record.get("PriorityTier", "")) == max(tiers):
                return "not preempted: no partition has a higher PriorityTier"
        elif kind == "qos":
            _, _, own, grace = (self.known or {}).get(self.profile.qos or "normal", ("", "", "cluster", grace))
            mode = mode if own == "cluster" else own
        modes = set(mode.upper().split(","))
        if kind in ("none", "(null)", "") or modes & {"OFF", "DISABLED"}:
            return "jobs are not preempted"
        if "SUSPEND" in modes:
            return "a preempted job is suspended, and goes on by itself"
        if "REQUEUE" in modes and self.profile.requeue:
            fate = "a preempted job is requeued by Slurm, and goes on from its last checkpoint"
        else:
            fate = "a preempted job is cancelled; `sdae-cli sweep heal` submits it again"
        told = self.config.get("SlurmctldParameters", "") + self.config.get("PreemptParameters", "")
        signal = "the warning signal" if "send_user_signal" in told else "SIGTERM"
        if "send_user_signal" in told and "REQUEUE" not in modes and self.profile.requeue:
            fate = "a preempted job requeues itself where nodes have scontrol, else `sdae-cli sweep heal` submits again"
        warned = f"{signal} comes first, and it has GraceTime={grace} (KillWait where that is 0) to save"
        short = _seconds(grace) < self.profile.warn_seconds
        return f"{fate}; {warned}" + f", less than warn_seconds: {self.profile.warn_seconds}" * short

    def requeue(self) -> Rows:
        if not all(asked.requeue for asked in self.groups.values()):
            told = "off in the profile: after a time limit or a node failure `sdae-cli sweep heal` submits again"
        else:
            told = "asked for by each job" + ", JobRequeue=0 being the default" * (self.config.get("JobRequeue") == "0")
            told += "; a job at its time limit calls scontrol: where nodes lack it, `sdae-cli sweep heal` submits again"
        yield finding("requeue", True, told)

    def warning(self) -> Rows:
        seconds = ", ".join(str(n) for n in sorted({asked.warn_seconds for asked in self.groups.values()}))
        told = f"{seconds} s before the time limit (up to 60 s earlier), to save and requeue in"
        yield finding(
            "warning", True, f"{told}; killed KillWait={self.config.get('KillWait', 'unknown')} after the limit"
        )

    def accounts(self, *words: str) -> list[list[str]] | None:
        """Rows of sacctmgr, the last word being the columns; None where there is nobody to ask."""
        *command, columns = words
        try:
            text = self.slurm.call("sacctmgr", "--noheader", "--parsable2", *command, f"format={columns}")
        except (Refused, NoSlurm):
            return None
        return [row for line in text.splitlines() if len(row := line.split("|")) == columns.count(",") + 1]


def finding(name: str, ok: bool | None, detail: str) -> Row:
    return {"check": name, "ok": ok, "detail": detail}


def _records(text: str, first: str) -> list[dict[str, str]]:
    """`Key=value Key=value` lines of scontrol --oneliner that begin with the key `first`."""
    lines = (line for line in text.splitlines() if line.startswith(f"{first}="))
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


def _number(text: str) -> int:
    match = re.match(r"\d+", text.strip())
    return int(match[0]) if match else 0


def _limit(text: str) -> int | None:
    """Minutes of a MaxTime; None where there is none."""
    try:
        return to_minutes(text)
    except ValueError:  # UNLIMITED, NONE, nothing
        return None


def _seconds(text: str) -> int:
    """Of a GraceTime: 20 of a partition, 00:00:20 of a qos."""
    return sum(int(part) * 60**i for i, part in enumerate(reversed(re.findall(r"\d+", text))))


def _megabytes(memory: str | None) -> float:
    return int(memory[:-1]) * MEGABYTES[memory[-1]] if memory not in (None, "0") else 0


def _types(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),gpu:v100:2,nvme:1` -> {"a100": 4, "v100": 2}."""
    counts: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", gres):
        counts[kind] = counts.get(kind, 0) + int(count)
    return counts


def _gpus(nodes: Nodes, kind: str | None) -> int:
    return nodes.gpus.get(kind, 0) if kind else sum(nodes.gpus.values())
