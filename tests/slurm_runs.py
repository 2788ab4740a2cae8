"""A sweep of pretended or real runs on a test's Slurm: sdae-cli as a user calls it, and what it left in the store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from calling import ROOT, Called
from slurm_cluster import PATIENCE
from slurm_target import metrics_of

from ablations.planner import PlannedRun, plan
from sdae.files import read_json
from sdae.store import RunFolder, Store

if TYPE_CHECKING:
    from slurm_cluster import Cluster

T = TypeVar("T")
PRETENDED = Path(__file__).with_name("slurm_target.py")
ROOMS = ("sdae", "ablations", "slurm", "analysis", "cli")
RATIOS = [round(0.05 * n, 2) for n in range(2, 20)]
PRETRAIN = {"pretrain": {"recipe": "sdae", "optim": {"epochs": 300}, "method": {"mask_ratio": "{ratio}"}}}
FINETUNE = {"finetune": {"recipe": "finetune", "init": {"run": "pretrain", "weights": "student"}}}


def checkout(folder: Path, pretend: bool = True) -> Path:
    """A copy of the suite; its runs pretend, unless they are to be real."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    if pretend:
        shutil.copyfile(PRETENDED, folder / "sdae" / "run.py")
    return folder


class Yard:
    """A folder with a profile, an artifact, and a store `runs`; a checkout that its commands are run from."""

    def __init__(self, cluster: Cluster, folder: Path, house: Path = ROOT, **profile: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster, self.folder, self.house = cluster, folder, house
        self.store = Store(folder / "runs")
        self.env = cluster.env | {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
        self.profile(**profile)

    def profile(self, **keys: Any) -> Path:
        """Writes profile.yaml; one CPU and ten minutes on main where nothing else is said."""
        file = self.folder / "profile.yaml"
        file.write_text(yaml.safe_dump({"partition": "main", "time": "10", "warn_seconds": 10, **keys}))
        return file

    def orders(self, **told: dict[str, Any]) -> None:
        """What pretended runs do from now on (see slurm_target)."""
        file = self.folder / "orders.json"
        file.with_suffix(".new").write_text(json.dumps(told))
        file.with_suffix(".new").replace(file)

    def artifact(self, runs: int = 1, chain: bool = False, name: str = "own") -> Path:
        """An artifact file with so many pre-trainings, each with a fine-tuning where a chain is asked for."""
        run, metric = ("finetune", "top1") if chain else ("pretrain", "loss")
        file = self.folder / f"{name}.yaml"
        row = {"grid": {"ratio": RATIOS[:runs]}, "runs": PRETRAIN | (FINETUNE if chain else {})}
        columns = {metric: {"run": run, "metric": metric}}
        file.write_text(yaml.safe_dump({"title": "Own", "columns": columns, "rows": {"r-{ratio}": row}}))
        return file

    def planned(self, *artifacts: Path | str, seeds: Sequence[int] = (0,)) -> dict[str, PlannedRun]:
        return plan(artifacts, "smoke", seeds).runs

    # Commands
    def start(self, *words: object, first: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """sdae-cli, running. first: a folder to be first on the PATH."""
        env = self.env | environment
        if first:
            env["PATH"] = f"{first}:{env['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *map(str, words)], cwd=self.folder, env=env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def cli(self, *words: object, first: Path | None = None, **environment: str) -> Called:
        return ended(self.start(*words, first=first, **environment))

    def submit(self, *words: object, **options: Any) -> dict[str, Any]:
        """`sweep submit`, or another command of `words`, with this yard's profile; its JSON."""
        verb = words[0] if words and words[0] in ("retry", "heal") else "submit"
        rest = words[1:] if words and words[0] == verb else words
        where = () if verb == "heal" else ("--on", "slurm")
        profile = () if verb == "heal" else ("--profile", "profile.yaml")
        called = self.cli("sweep", verb, *rest, *where, *profile, "--json", **options)
        assert called.code == 0, called
        return json.loads(called.out)  # type: ignore[no-any-return]

    def heal(self, grace: float = 1.0) -> dict[str, Any]:
        return self.submit("heal", "--grace", grace)

    def rows(self, grace: float = 1.0) -> dict[str, dict[str, Any]]:
        """`sweep status`, by run."""
        called = self.cli("sweep", "status", "--grace", grace, "--json")
        assert called.code == 0, called
        document = json.loads(called.out)
        assert not document["trouble"], document
        return {row["id"]: row for row in document["runs"]}

    def states(self, grace: float = 1.0) -> dict[str, str]:
        return {identity: row["state"] for identity, row in self.rows(grace).items()}

    def cancel(self) -> Called:
        return self.cli("sweep", "cancel", "--yes")

    def forget(self) -> None:
        """Ends what is left of the store's jobs."""
        names = ",".join(f"sdae-{path.name}" for path in self.store.root.glob(".slurm/jobs/*"))
        for words in (["--signal=KILL"], []) if names else ():  # those that run need not save anything
            with contextlib.suppress(AssertionError):
                self.cluster.run("scancel", *words, f"--name={names}")

    # The runs
    def ids(self, runs: int, chain: bool = False) -> list[str]:
        """Writes own.yaml; the ids of its runs, needs first."""
        return list(self.planned(self.artifact(runs, chain)))

    def in_queue(self) -> list[str]:
        """The runs that this store's arrays have in the queue, one entry a task."""
        rows = [line.split() for line in self.cluster.squeue("--me", "--array", "--format=%K %j").splitlines()]
        found = [self.members(name).get(int(index)) for index, name in rows if index.isdigit()]
        return sorted(run for run in found if run)

    def finished(self, *runs: str) -> None:
        """Lets the runs come to their ends; they do, once, with the numbers of runs that nothing disturbed."""
        self.orders()
        self.done(runs)
        for run in runs:
            assert (self.run(run).result() or {})["metrics"] == metrics_of(run)
        once(self, runs)

    def run(self, identity: str) -> RunFolder:
        return self.store.run(identity)

    def jobs(self, identity: str) -> list[str]:
        """The tasks under which Slurm has the run now."""
        names = {f"sdae-{os.readlink(link)}" for link in (self.store.root / ".slurm" / "runs").glob(f"{identity}.*")}
        rows = [line.split("|") for line in self.cluster.squeue("--array", "--format=%F_%K|%j").splitlines()]
        index = {str(i) for name in names for i, each in self.members(name).items() if each == identity}
        return [task for task, name in rows if name in names and task.rpartition("_")[2] in index]

    def members(self, name: str) -> dict[int, str]:
        """The runs of the array of this job name, by index."""
        file = self.store.root / ".slurm" / "jobs" / name.removeprefix("sdae-") / "submission.json"
        return {int(i): run for i, run in (read_json(file) or {"runs": {}})["runs"].items()}

    def until(self, condition: Callable[[], T], what: str, identities: Sequence[str], seconds: float = PATIENCE) -> T:
        """`Cluster.until`, with all that is known of these runs in its message."""
        return self.cluster.until(condition, lambda: f"{what} of {identities}\n{self.tell(identities)}", seconds)

    def stepped(self, identity: str, step: int = 2) -> dict[str, Any]:
        """Waits until the run has come so far; its heartbeat."""

        def beat() -> dict[str, Any] | None:
            beat = self.run(identity).heartbeat() or {}
            return beat if beat.get("step", 0) >= step and self.run(identity).claimed() else None

        return self.until(beat, f"step {step}", [identity]) or {}

    def done(self, identities: Iterable[str], seconds: float = PATIENCE) -> None:
        """Waits until these runs have results."""
        wanted = list(identities)
        self.until(lambda: all(self.run(i).done for i in wanted), "results", wanted, seconds)

    def noted(self, identity: str, event: str = "end", count: int = 1) -> list[dict[str, Any]]:
        """Waits for so many notes of a kind."""

        def notes() -> list[dict[str, Any]] | None:
            found = [note for note in self.run(identity).notes() if note["event"] == event]
            return found if len(found) >= count else None

        return self.until(notes, f"{count} x {event}", [identity]) or []

    def starts(self, identity: str) -> list[int]:
        """The steps at which the run's attempts began."""
        return [note["step"] for note in self.run(identity).notes() if note["event"] == "start"]

    def settled(self, identity: str, *states: str, grace: float = 1.0) -> dict[str, Any]:
        """Waits until `sweep status` says one of these of a run; its row."""

        def row() -> dict[str, Any] | None:
            row = self.rows(grace)[identity]
            return row if row["state"] in states else None

        return self.until(row, " or ".join(states), [identity]) or {}

    def tell(self, identities: Iterable[str]) -> str:
        """All that is known, for messages."""
        parts = [self.cluster.queue()]
        for identity in identities:
            folder = self.run(identity)
            if not folder.done:
                parts += [identity, *map(str, folder.notes()), str(folder.failure()), str(folder.heartbeat())]
                parts += [folder.log.read_text()[-2000:] if folder.log.exists() else "no log"]
        for log in sorted((self.store.root / ".slurm").glob("jobs/*/*_log.*"))[:40]:
            if text := log.read_text()[-700:]:
                parts += [f"-- {log.name}", text]
        return "\n".join(parts)


def ended(process: subprocess.Popen[str], timeout: float = PATIENCE) -> Called:
    out, err = process.communicate(timeout=timeout)
    return Called(process.returncode, out, err)


def wrapper(folder: Path, name: str, text: str) -> Path:
    """A folder with a shell script of this name, to be put first on the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return folder


def once(yard: Yard, identities: Iterable[str]) -> None:
    """Each run is done; one attempt came to its end, and none began after that."""
    for identity in identities:
        folder = yard.run(identity)
        assert folder.done, yard.tell([identity])
        notes = folder.notes()
        began = {(note["job"], note["restart"]) for note in notes if note["event"] == "start"}
        ends = [(note["job"], note["restart"]) for note in notes if note.get("outcome") == "done"]
        assert len(began.intersection(ends)) <= 1, notes  # 0: killed between its result and its note
        written = (folder.path / "result.json").stat().st_mtime
        assert all(note["time"] <= written for note in notes if note["event"] == "start"), (written, notes)


def healed(yard: Yard, identities: Sequence[str], grace: float) -> None:
    """Calls `sweep heal` again and again, as cron would, until these runs are done."""
    end = time.monotonic() + PATIENCE
    while not all(yard.run(identity).done for identity in identities):
        assert time.monotonic() < end, f"not in time: {yard.rows()}\n{yard.tell(identities)}"
        yard.heal(grace)
        time.sleep(3)
