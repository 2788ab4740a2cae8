"""A sweep on a `fake_slurm`: the suite's own commands and jobs, training pretended, and watched by one who knows.

Within `patched` the suite lives in the world of a `laboratory`. A run's task is the real `slurm.job.SweepJob`; only
the training is a clock that runs. `Lab` knows what truly became of every run and raises a `Violation` where the suite
lets a run be done twice or by two at a time, or tells of it what is not so. `Schedule` plays random sweeps with random
faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fake_slurm import EPOCH, Element, FakeSlurm, Faults, Process, World

import sdae.store
import slurm.heal
import slurm.job
import slurm.ledger
import slurm.look
import slurm.submit
import slurm.sweep
import slurm.worker
from ablations.planner import PlannedRun
from sdae.config import Config, parse, run_id
from sdae.errors import Interrupted, RunFailed, UserError
from sdae.store import GRACE_SECONDS, RunFolder, Store
from slurm.job import Place
from slurm.ledger import Ledger, Reservation, Submission, job_name
from slurm.look import Survey
from slurm.profile import Profile
from slurm.reconcile import LOST, PATIENCE, stuck

MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
BEAT = 60.0  # seconds between heartbeats; really 10


def plans() -> list[list[PlannedRun]]:
    """Pre-trainings, each with what may follow it."""
    data = {"name": "builtin", "image_size": 32, "fingerprint": "0" * 16}
    optim = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}
    model = {"width": 24, "depth": 2, "heads": 2, "patch_size": 8}
    decoder = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
    found = []
    for seed in range(3):
        values = {"stage": "pretrain", "seed": seed, "data": data, "model": model | decoder, "optim": optim}
        first = parse(values)
        need = run_id(first)
        family = [PlannedRun(need, first, ())]
        for stage, number in (("finetune", 0), ("linprobe", 0), ("finetune", 1)):
            values = {"stage": stage, "seed": 10 * seed + number, "data": data, "model": model, "optim": optim}
            config = parse(values | {"init": {"run": need}})
            family.append(PlannedRun(run_id(config), config, (need,)))
        found.append(family)
    return found


PLANS = plans()
PATHS: dict[tuple[str, object], PurePath] = {}
LAB: Lab


class AlreadyRunning(UserError):
    pass


class Violation(AssertionError):
    """What must never be."""


@dataclass
class Truth:
    """What really became of a run. tries: tasks that started since it last got on or was retried."""

    work: int  # seconds that it takes
    every: int  # seconds between its checkpoints; 0: it never gets on
    finished: list[float] = field(default_factory=list)
    causes: set[str] = field(default_factory=set)  # classes of failure that it has reason for
    doomed: bool = False  # the next attempt raises
    raised: tuple[str, float, str, int] | None = None  # submission, time, task and restart of its last exception
    tries: int = 0
    process: Process | None = None  # that executes it
    folder: RunFolder | None = None
    beat: float = 0.0  # of its heart, the last


class Lab:
    """A sweep on a fake Slurm, and all that is true of it."""

    def __init__(self, seed: int | str, root: Path, talk: bool = False):
        self.world, self.talk = World(seed), talk
        self.root = root / "store"
        self.store, self.ledger = Store(self.root), Ledger(Store(self.root))
        self.slurm = FakeSlurm(self.world)
        self.slurm.on_start, self.slurm.on_end = self.started, self.ended
        self.profile = Profile(time="60")
        self.runs: list[PlannedRun] = []
        self.truth: dict[str, Truth] = {}
        self.log: list[str] = []
        self.reserved: list[tuple[float, str, int, str | None]] = []  # token None: taken back
        self.counts: Counter[str] = Counter()  # what happened

    def add(self, *runs: PlannedRun, work: int = 200, every: int = 100) -> None:
        self.runs += runs
        self.truth |= {run.id: Truth(work, every) for run in runs}

    def say(self, text: str) -> None:
        line = f"{self.world.now - EPOCH:9.1f} {self.world.host() if self.world.current else '':7} {text}"
        self.log.append(line)
        if self.talk:
            print(line)

    def wrong(self, text: str) -> None:
        self.say(f"WRONG {text}")
        self.world.errors.append(Violation(text))
        raise self.world.errors[-1]

    # What is patched into the suite
    def execute(self, config: Config, store: Store, progress: Any = None) -> None:
        """As `sdae.run.execute`, without the training."""
        world, folder = self.world, store.run(run_id(config))
        process, truth = world.process, self.truth[folder.id]
        began = world.now - process.lag - 10
        world.pause(world.between(0.5, 5))
        if folder.result() is not None:
            return
        if (need := getattr(getattr(config, "init", None), "run", None)) and store.run(need).result() is None:
            self.wrong(f"{folder.id} begins without its need")
        self._check_owner(folder.id, os.environ[sdae.store.SUBMISSION], began)
        folder.create(config)
        with folder.claim() as mine:
            if not mine:
                raise AlreadyRunning(f"{folder.id} is being run")
            if folder.result() is not None:
                return
            self._check_alone(folder.id, process)
            folder.forget_failure()
            truth.process, truth.folder, truth.raised = process, folder, None
            self.say(f"{folder.id} runs from {folder.saved_step} of {truth.work}")
            try:
                self._train(process, folder, truth)
            finally:
                if process.alive and truth.process is process:
                    truth.process = None
                process.loops = False

    def _check_owner(self, identity: str, token: str, began: float) -> None:
        holder = REAL.reservations(self.ledger)[identity]
        if holder.token != token and holder.time < began:
            self.wrong(f"{identity} is run by {token}, though it has been {holder.token}'s for long")
        raised, (task, restart) = self.truth[identity].raised, self.world.process.task
        again = raised and raised[2] == task and raised[3] < restart  # by Slurm, which had given up its node
        if raised and raised[0] == token and not again:
            self.wrong(f"{identity} is run again, though it failed and was not retried")

    def _check_alone(self, identity: str, process: Process) -> None:
        truth = self.truth[identity]
        other = truth.process
        if other is None or other is process or not other.alive:
            return
        if self.world.now - truth.beat < GRACE_SECONDS - 20 or not truth.folder or not truth.folder.dispossessed:
            self.wrong(f"{identity} runs on {process.host} and on {other.host} at the same time")

    def _train(self, process: Process, folder: RunFolder, truth: Truth) -> None:
        world, base, began = self.world, folder.saved_step, self.world.now
        ended: list[str] = []
        stood = 0.0  # seconds that it was frozen

        def thawed(action: Callable[[], None], late: float) -> bool:
            nonlocal stood
            if ended or not process.alive:
                return False
            if process.frozen > world.now:
                world.at(process.frozen - world.now + late, action)
                return False
            return True

        def beat() -> None:
            if thawed(beat, 0.0):
                if folder.dispossessed:  # as in `telemetry.Pulse`
                    self.counts["taken over"] += 1
                    self.say(f"{folder.id} was taken from {process.host}: exits")
                    process.kill()
                    if process.exited:
                        process.exited(75)
                    return
                self._beat(process, folder, truth)
                world.at(BEAT, beat)

        def save() -> None:
            if thawed(save, 0.01):
                self._save(process, folder, truth, min(truth.work - 1, int(base + world.now - began)))
                world.at(truth.every, save)

        def finish() -> None:
            if thawed(finish, 0.02):
                ended.append("failed" if truth.doomed else "done")
                world.wake(process)

        self._beat(process, folder, truth)
        process.signals.clear()
        process.loops = True
        world.at(BEAT, beat)
        world.at(truth.every or 1e9, save)
        world.at(max(0.0, truth.work - base) * (0.5 if truth.doomed else 1), finish)
        world.wait(lambda: bool(ended or process.signals))
        if not ended:
            world.pause(world.between(0.1, 5))
            ended.append("interrupted")
            self._save(process, folder, truth, min(truth.work - 1, int(base + world.now - began)))
        self._beat(process, folder, truth)
        process.loops = False
        if ended == ["interrupted"]:
            raise Interrupted("stopped", process.signals)
        if ended == ["failed"]:
            truth.doomed = False
            truth.causes |= {"NonFiniteLoss", "JobFailed"}
            folder.fail("NonFiniteLoss", "the loss is nan")
            truth.raised = (os.environ[sdae.store.SUBMISSION], world.now, *process.task)
            raise RunFailed("the loss is nan")
        folder.finish({"id": folder.id, "metrics": {"top1": 1.0}})

    def _beat(self, process: Process, folder: RunFolder, truth: Truth) -> None:
        if truth.process is not process:
            self.wrong(f"{folder.id}: a process that had lost the run wrote to it")
        truth.beat = self.world.now
        folder.write("heartbeat.json", {"time": truth.beat + self.world.skew.get(process.host, 0.0)})

    def _save(self, process: Process, folder: RunFolder, truth: Truth, step: int) -> None:
        if truth.process is not process:
            self.wrong(f"{folder.id}: a process that had lost the run wrote a checkpoint")
        if step > folder.saved_step and truth.every:
            truth.tries = 0
            for old in folder.checkpoints.iterdir():
                old.unlink()
            (folder.checkpoints / f"state-{step:08d}.sha256.json").touch()

    def finish(self, folder: RunFolder, result: dict[str, Any]) -> None:
        truth = self.truth[folder.id]
        if truth.finished:
            self.wrong(f"{folder.id} is finished twice")
        if truth.process is not self.world.current:
            self.wrong(f"{folder.id} is finished by a process that has lost it")
        REAL.finish(folder, result)
        truth.finished.append(self.world.now)
        self.say(f"{folder.id} done")

    def fail(
        self, folder: RunFolder, kind: str, message: str, traceback: str = "", submission: str | None = None
    ) -> None:
        if self.world.closed:
            return
        truth = self.truth[folder.id]
        self.say(f"{folder.id} fails: {kind}: {message}")
        if truth.finished and not self.lag:
            self.wrong(f"{folder.id}: {kind} was recorded after it was done")
        if truth.process is not self.world.current and self._beats(truth):
            self.wrong(f"{folder.id}: {kind} was recorded while it runs")
        self.counts[f"recorded {kind}"] += 1
        self._check_class(folder.id, kind)
        REAL.fail(folder, kind, message, traceback, submission)

    def _beats(self, truth: Truth) -> bool:
        """Whether a run's process lives and its heart beats in time."""
        there = truth.process is not None and truth.process.alive
        return there and self.world.now - truth.beat < GRACE_SECONDS - 20

    def _check_class(self, identity: str, kind: str) -> None:
        truth = self.truth[identity]
        if kind in LOST or kind in truth.causes:
            return
        if kind == "NoProgress" and (truth.tries >= PATIENCE or ("TimedOut" in truth.causes and truth.tries)):
            return
        self.wrong(f"{identity} failed as {kind}, but had reason only for {sorted(truth.causes)}, tries {truth.tries}")

    def reserve(self, ledger: Ledger, identity: str, after: Reservation, token: str) -> bool:
        self.world.pause(self.world.between(0, 0.05))
        taken = REAL.reserve(ledger, identity, after, token)
        if taken:
            link = ledger.links / f"{identity}.{after.number + 1}"
            os.utime(link, (self.world.time(), self.world.now), follow_symlinks=False)
            self.reserved.append((self.world.now, identity, after.number + 1, token))
        self.counts["reserved" if taken else "raced"] += 1
        self.say(f"{identity}.{after.number + 1} -> {token} {'taken' if taken else 'raced'}")
        return taken

    def forget(self, ledger: Ledger, token: str, taken: Any) -> None:
        taken = list(taken)
        REAL.forget(ledger, token, taken)
        self.reserved += [(self.world.now, identity, after.number + 1, None) for identity, after in taken]

    def write(self, ledger: Ledger, submission: Submission) -> None:
        self.world.pause(self.world.between(0, 0.05))
        REAL.write(ledger, submission)

    @property
    def lag(self) -> float:
        process = self.world.current
        return process.lag if process else 0.0

    def done(self, folder: RunFolder) -> bool:
        if not self.lag:
            return bool(REAL.done(folder))
        return any(when <= self.world.now - self.lag for when in self.truth[folder.id].finished)

    def forgive(self, runs: list[PlannedRun], found: Survey) -> None:
        REAL.forgive(runs, found)
        for run in runs:
            self.truth[run.id].tries = 0

    def links(self) -> dict[str, dict[int, Reservation]]:
        """As a late file system shows them."""
        links: dict[str, dict[int, Reservation]] = {}
        for when, identity, number, token in self.reserved:
            if when <= self.world.now - self.lag:
                if token is None:
                    links.get(identity, {}).pop(number, None)
                else:
                    links.setdefault(identity, {})[number] = Reservation(number, token, when)
        return {identity: numbers for identity, numbers in links.items() if numbers}

    def reservations(self, ledger: Ledger) -> dict[str, Reservation]:
        if not self.lag:
            return REAL.reservations(ledger)
        return {identity: numbers[max(numbers)] for identity, numbers in self.links().items()}

    def lost(self, ledger: Ledger, identity: str, token: str) -> bool:
        if not self.lag:
            return REAL.lost(ledger, identity, token)
        numbers = self.links().get(identity, {})
        tokens = [numbers[number].token for number in sorted(numbers)]
        return token in tokens and tokens[-1] != token

    def holder(self, ledger: Ledger, identity: str) -> Reservation:
        return self.reservations(ledger).get(identity, Reservation()) if self.lag else REAL.holder(ledger, identity)

    def look(self, runs: Any, store: Store, **options: Any) -> Survey:
        """`slurm.sweep.look`, watched."""
        t0, lag, process = self.world.now, self.lag, self.world.current
        pid = process.pid if process else self.world.pid()
        slurm = self.slurm
        before = {command: slurm.calls.get((pid, command), 0) for command in ("squeue", "sacct")}
        alive = {i: truth.process for i, truth in self.truth.items() if self._beats(truth)}
        tasks = {id(e) for e in slurm.all() if not e.over}
        self.counts["looks"] += 1
        found = REAL.look(runs, store, **options)
        for command, count in before.items():
            if slurm.calls.get((pid, command), 0) > count + 1:
                self.wrong(f"one look took {slurm.calls[pid, command] - count} {command}")
        for identity, standing in found.standings.items():
            truth, state = self.truth[identity], standing.state
            if state == "done" and not REAL.done(self.store.run(identity)):
                self.wrong(f"{identity} is shown done, but has no result")
            if state in ("failed", "lost"):
                if alive.get(identity) is not None and alive[identity] is truth.process and self._beats(truth):
                    self.wrong(f"{identity} is shown {state} while it runs")
                if any(when < t0 - lag for when in truth.finished):
                    self.wrong(f"{identity} is shown {state} though it is done")
                if standing.verdict:
                    self._check_class(identity, standing.verdict[0])
            if state == "lost":
                token = found.reservations[identity].token if identity in found.reservations else ""
                if truth.raised and truth.raised[0] == token and truth.raised[1] < t0 - lag:
                    self.wrong(f"{identity} is shown lost, but raised an exception")
                if (submission := found.submissions.get(token)) is not None:
                    index = next((n for n, i in submission.runs.items() if i == identity), -1)
                    for element in slurm.element(job_name(token), index):
                        its = submission.job in (None, element.array.job)  # not a twin's
                        if its and id(element) in tasks and (standing.verdict or element.state != "RUNNING"):
                            self.wrong(f"{identity} is shown lost, but task {element.id} is {element.state}")
        return found

    def started(self, element: Element) -> None:
        self.counts["tasks started"] += 1
        if (identity := self.run_of(element)) is not None:
            self.truth[identity].tries += 1
            self.say(f"{element.id}: {identity} starts on {element.node}")

    def ended(self, element: Element) -> None:
        identity = self.run_of(element)
        self.say(f"{element.id}: {identity} ends as {element.state} {element.code}")
        if element.state == "TIMEOUT" and identity:
            self.truth[identity].causes.add("TimedOut")

    def run_of(self, element: Element) -> str | None:
        submission = self.ledger.read(element.array.name.removeprefix("sdae-"))
        return submission.runs.get(element.index) if submission else None

    # Commands, as processes
    def command(self, host: str, work: Callable[[], Any], what: str, delay: float = 0.0) -> Process:
        def go() -> int:
            self.say(what)
            try:
                work()
            except UserError as error:
                self.say(f"{what}: error: {error}")
                return 2
            except KeyboardInterrupt:
                return 130
            return 0

        return self.world.start(host, go, delay=delay)

    def hand_over(self, failed: bool = False, runs: list[PlannedRun] | None = None) -> None:
        """`sweep submit`, or `retry`."""
        chosen = self.runs if runs is None else runs
        outcome = slurm.sweep.hand_over(
            chosen,
            self.store,
            self.profile,
            "smoke",
            failed=failed,
            slurm=self.slurm,  # type: ignore[arg-type]
        )
        report = outcome.report
        self.counts["mended"] += len(outcome.mended)
        states = {i[:12]: s.state + (f" ({s.detail})" if s.detail else "") for i, s in outcome.survey.standings.items()}
        self.say(
            f"{states}, mended {outcome.mended}, submitted {report.submitted}, left {report.left}, {report.trouble}"
        )

    def heal(self) -> None:
        """`sweep heal`, which knows of the runs from the store alone."""
        if runs := slurm.look.wanted(slurm.look.recorded(self.store), self.store):
            self.hand_over(runs=runs)

    def watch(self) -> Survey:
        """`sweep status`."""
        return slurm.sweep.look(self.runs, self.store, slurm=self.slurm)  # type: ignore[arg-type]

    def take_back(self, identities: list[str]) -> None:
        """`sweep cancel`."""
        found, can = slurm.sweep.take_back(self.runs, self.store, self.slurm)  # type: ignore[arg-type]
        slurm.sweep.end([i for i in identities if i in can], found, self.slurm)  # type: ignore[arg-type]

    @property
    def all_done(self) -> bool:
        return all(truth.finished for truth in self.truth.values())


class _Real:
    """What the patches stand before."""

    def __init__(self) -> None:
        self.finish, self.fail = RunFolder.finish, RunFolder.fail
        self.done = RunFolder.done.fget  # type: ignore[attr-defined]
        self.reserve, self.forget, self.write = Ledger.reserve, Ledger.forget, Ledger.write
        self.reservations, self.holder, self.lost = Ledger.reservations, Ledger.holder, Ledger.lost
        self.look, self.forgive = slurm.sweep.look, slurm.heal.forgive


REAL = _Real()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """The suite in the world of `LAB`: its clock, hosts and processes; nothing is flushed to a disk."""
    clock = SimpleNamespace(
        time=lambda: LAB.world.time(), sleep=lambda s: LAB.world.pause(s), monotonic=lambda: LAB.world.now
    )
    net = SimpleNamespace(gethostname=lambda: LAB.world.host())

    def submission(*values: Any) -> Submission:
        world = LAB.world
        where: dict[str, Any] = {"host": world.host(), "pid": world.pid(), "started": world.process_start(world.pid())}
        return Submission(*values, **where)

    def joined(path: PurePath, name: Any, join: Any = PurePath.__truediv__) -> PurePath:
        """Faster than `/`: paths are much of what the suite makes here."""
        place = str(path), name
        if place not in PATHS:
            PATHS[place] = join(path, name)
        return PATHS[place]

    def handler(number: int) -> Any:
        return LAB.world.process.usr2

    def handle(number: int, action: Any) -> None:
        LAB.world.process.usr2 = action

    def environment() -> Any:
        element = LAB.slurm.mine()
        pickles = (LAB.root / ".slurm" / f"{element.id}_{kind}.pkl" for kind in ("submitted", "result"))
        return SimpleNamespace(paths=SimpleNamespace(submitted_pickle=next(pickles), result_pickle=next(pickles)))

    def here() -> Place:
        element = LAB.slurm.mine()
        return Place(element.array.job, element.index, element.restart, 0, LAB.world.time())

    changes: list[tuple[Any, str, Any]] = [
        *((module, "time", clock) for module in (sdae.store, slurm.job, slurm.look, slurm.submit, slurm.ledger)),
        *((module, "socket", net) for module in (sdae.store, slurm.ledger, slurm.job)),
        *((module, "process_start", lambda pid: LAB.world.process_start(pid)) for module in (sdae.store, slurm.ledger)),
        (os, "getpid", lambda: LAB.world.pid()),
        (os, "fsync", lambda _: None),
        (PurePath, "__truediv__", joined),
        (sdae.store, "flush", lambda _: None),
        (sdae.store, "yaml", SimpleNamespace(safe_dump=lambda values, **_: json.dumps(values))),  # YAML, but faster
        (slurm.job, "print", lambda *_, **__: None),
        (slurm.job, "signal", SimpleNamespace(**(vars(signal) | {"getsignal": handler, "signal": handle}))),
        (slurm.job, "submitit", SimpleNamespace(JobEnvironment=environment)),
        (Place, "here", here),
        (slurm.job, "_Late", lambda *_: LAB.execute),
        (slurm.worker, "logged", lambda _: contextlib.nullcontext()),
        (slurm.worker, "traceback", SimpleNamespace(print_exc=lambda: None, format_exc=str)),
        (slurm.submit, "Submission", submission),
        (slurm.submit, "new_token", lambda: f"{LAB.world.random.getrandbits(48):012x}"),
        (slurm.submit, "snapshot", lambda ledger: ledger.codes / "0123456789abcdef"),
        (RunFolder, "finish", lambda folder, result: LAB.finish(folder, result)),
        (RunFolder, "fail", lambda folder, *words, **options: LAB.fail(folder, *words, **options)),
        (RunFolder, "done", property(lambda folder: LAB.done(folder))),
        (Ledger, "reserve", lambda ledger, *words: LAB.reserve(ledger, *words)),
        (Ledger, "forget", lambda ledger, *words: LAB.forget(ledger, *words)),
        (Ledger, "write", lambda ledger, submission: LAB.write(ledger, submission)),
        (Ledger, "reservations", lambda ledger: LAB.reservations(ledger)),
        (Ledger, "holder", lambda ledger, identity: LAB.holder(ledger, identity)),
        (Ledger, "lost", lambda ledger, *words: LAB.lost(ledger, *words)),
        (slurm.sweep, "forgive", lambda runs, found: LAB.forgive(runs, found)),
        (slurm.sweep, "look", lambda *words, **options: LAB.look(*words, **options)),
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in changes:
            stack.enter_context(mock.patch.object(target, name, value, create=name == "print"))
        stack.enter_context(mock.patch.dict(slurm.submit.submit.__kwdefaults__, {"sleep": clock.sleep}))
        yield


@contextlib.contextmanager
def laboratory(seed: int | str, talk: bool = False) -> Iterator[Lab]:
    """A lab of its own, within `patched`."""
    global LAB
    root = MEMORY / f"sdae-{uuid.uuid4().hex}"  # not mkdtemp, which asks for the pid
    root.mkdir()
    LAB = lab = Lab(seed, root, talk)
    try:
        yield lab
    finally:
        shutil.rmtree(root, ignore_errors=True)
        PATHS.clear()
        lab.world.close()
        shutil.rmtree(root, ignore_errors=True)


# Random schedules
class Schedule:
    """A random sweep, random faults, then peace."""

    def __init__(self, lab: Lab):
        self.lab, self.world, self.slurm = lab, lab.world, lab.slurm
        self.over = False  # no more faults
        rng = self.rng = lab.world.random
        for family in rng.sample(PLANS, rng.randint(1, 3)):
            for run in [family[0], *rng.sample(family[1:], rng.randint(0, 3))]:
                if len(lab.runs) < 8:
                    lab.add(run, work=rng.choice((20, 100, 400, 1200)), every=rng.choice((50, 150, 400)))
        lab.profile = Profile(
            time=str(rng.choice((8, 20, 60))), warn_seconds=rng.choice((60, 120)), requeue=rng.random() < 0.8,
            array_parallelism=rng.choice((None, None, 1, 2)),
            sbatch={"kill-on-invalid-dep": rng.random() < 0.6},
        )  # fmt: skip
        slurm = self.slurm
        slurm.nodes = {f"node{i + 1}": True for i in range(rng.randint(2, 4))}
        slurm.slots = rng.randint(1, 3)
        slurm.array_limit = rng.choice((2, 3, 1001, 1001))
        slurm.task_limit = rng.choice((3, 6, 10_000_000, 10_000_000))
        slurm.faults = self.lasting()
        slurm.on_boot = self.blur
        if rng.random() < 0.4:
            lab.world.skew = {host: rng.uniform(-8, 8) for host in (*slurm.nodes, "login1", "login2")}

    def lasting(self) -> Faults:
        """What is not a fault but a cluster's way."""
        rng = self.rng
        return Faults(
            lag=rng.choice((0, 3, 10)), sacct=rng.random() < 0.8, purge=rng.choice((None, None, 100, 600))
        )  # fmt: skip

    def passing(self) -> None:
        """Faults of commands, while they last."""
        rng, faults = self.rng, self.slurm.faults

        def share(high: float) -> float:
            return rng.uniform(0, high) if rng.random() < 0.3 else 0.0

        faults.busy, faults.unheard, faults.late, faults.twice = share(0.2), share(0.5), share(0.5), share(0.5)
        faults.hold, self.dying = share(0.5), share(0.5)
        self.stale = share(1.0)
        if rng.random() < 0.2:
            self.slurm.bare = {node for node in self.slurm.nodes if rng.random() < 0.5}

    KINDS = (
        "node", "node", "freeze", "freeze", "kill", "oom", "preempt", "preempt", "scancel", "requeue", "raise", "hold",
        "dark", "take_back", "retry", "reuse", "others", "watch", "hide", "hide",
        "odd",
    )  # fmt: skip

    def play(self) -> None:
        lab, world, rng = self.lab, self.world, self.rng
        self.passing()
        kinds = rng.sample(self.KINDS, rng.randint(1, len(self.KINDS)))
        storm = rng.choice((600, 2000, 4000))
        for _ in range(rng.randint(0, storm // 150)):
            kind = rng.choice(kinds)
            world.at(rng.uniform(0, storm), partial(self.strike, kind))
        for _ in range(rng.choice((1, 1, 2))):
            self.submitter(rng.uniform(0, 2))
        beats = rng.choice((60, 200, 500))
        cron = 0.0
        while cron < storm:
            world.advance(beats)
            cron += beats
            self.submitter(heal=rng.random() < 0.5)
            if lab.all_done:
                break
        self.calm()
        self.peace()

    def submitter(self, delay: float = 0.0, failed: bool = False, heal: bool = False) -> None:
        rng, lab = self.rng, self.lab
        host = rng.choice(("login1", "login2"))
        what = "retry" if failed else "heal" if heal else "submit"
        process = lab.command(host, lab.heal if heal else lambda: lab.hand_over(failed), what, delay)
        if rng.random() < self.dying:
            process.life, process.death = rng.randint(0, 40), rng.choice((None, KeyboardInterrupt))
        self.blur(process)

    def blur(self, process: Process) -> None:
        if self.rng.random() < self.stale:
            process.lag = self.rng.uniform(1, 25)

    def strike(self, kind: str) -> None:
        if self.over:
            return
        lab, world, slurm, rng = self.lab, self.world, self.slurm, self.rng
        running = slurm.running()
        element = rng.choice(running) if running else None
        identity = lab.run_of(element) if element else None
        truth = lab.truth[identity] if identity else None
        lab.counts["faults"] += 1
        lab.say(f"strike: {kind} {element.id if element else ''} {identity or ''}")
        if kind in ("node", "freeze"):
            up = [node for node, there in slurm.nodes.items() if there]
            if len(up) > 1:
                node, notice = rng.choice(up), rng.uniform(20, 320)
                if kind == "node":
                    slurm.lose_node(node, notice, rng.uniform(60, 900))
                else:
                    slurm.freeze_node(node, rng.choice((30, 200, 290, 400, 900)), notice)
        elif kind == "dark":
            slurm.dark = world.now + rng.uniform(5, 300)
        elif kind == "raise":
            rng.choice(list(lab.truth.values())).doomed = True
        elif kind == "retry":
            self.submitter(failed=True)
        elif kind == "others":
            slurm.others = rng.choice((0, 1, 5))
        elif kind == "hide":
            for each in slurm.all():
                if world.chance(0.5):
                    slurm.hide(each)
        elif kind == "odd" and element:
            element.odd = world.now + rng.uniform(10, 600)
        elif kind == "reuse":
            slurm.reuse_ids()
        elif kind == "watch":
            lab.command("login2", lab.watch, "status")
        elif kind == "take_back":
            identities = rng.sample([run.id for run in lab.runs], rng.randint(1, len(lab.runs)))
            self.blur(lab.command("login1", lambda: lab.take_back(identities), "cancel"))
        elif element and truth:
            if kind == "kill":
                truth.causes |= {"Killed", "JobFailed"}
                slurm.kill(element, "FAILED", rng.choice(("0:9", "137:0", "9:0")))
            elif kind == "oom":
                truth.causes.add("OutOfMemory")
                slurm.kill(element, "OUT_OF_MEMORY", "0:125")
            elif kind == "preempt":
                slurm.preempt(element, rng.random() < 0.6, rng.random() < 0.4)
            elif kind == "scancel":
                victim = rng.choice([e for e in slurm.all() if not e.over])
                if (whose := lab.run_of(victim)) is not None:
                    lab.truth[whose].causes.add("Cancelled")
                    slurm.end(victim, "CANCELLED by 1000")
            elif kind == "requeue":
                slurm.requeue(element, "REQUEUED")
            elif kind == "hold":
                waiting = [e for e in slurm.all() if not e.over and e.state == "PENDING"]
                if waiting:
                    slurm.hold(rng.choice(waiting))

    def calm(self) -> None:
        """All faults stop, nodes come back."""
        slurm, world = self.slurm, self.world
        self.lab.say("calm")
        faults = slurm.faults
        slurm.faults = Faults(lag=faults.lag, purge=faults.purge, sacct=faults.sacct)
        slurm.dark, slurm.others, slurm.bare, self.stale, self.dying = 0.0, 0, set(), 0.0, 0.0
        for truth in self.lab.truth.values():
            truth.doomed = False
        for process in world.processes:
            process.lag, process.life = 0.0, None
        self.over = True

    def peace(self) -> None:
        """Every run gets done, by nothing but `heal` every five minutes, and `retry` of what failed."""
        lab, world, slurm = self.lab, self.world, self.slurm
        failed = False
        for number in range(60):
            if lab.all_done:
                break
            self.submitter(failed=failed, heal=not failed and number % 2 == 1)
            world.advance(300)
            failures = [lab.store.run(run.id).failure() for run in lab.runs]
            failed = any(failure and failure["class"] not in LOST for failure in failures)
            for error in world.errors:
                raise error
        else:
            lab.wrong("a run never gets done: " + str({i: lab.store.run(i).state() for i in lab.truth}))
        world.advance(2000)
        # stuck ones are ended by the next `submit` or `heal` that has anything to do
        if left := [
            f"{e.id} {e.state} {e.reason}"
            for e in slurm.all()
            if not e.over and not stuck(replace(e.row(), reason=e.reason))
        ]:
            lab.wrong(f"tasks are left in the queue: {left}")
        for error in world.errors:
            raise error
        for identity, truth in lab.truth.items():
            if len(truth.finished) != 1:
                lab.wrong(f"{identity} was finished {len(truth.finished)} times")
        lab.watch()


def play(seed: int | str, talk: bool = False) -> Counter[str]:
    """One schedule, within `patched`: what happened in it. Raises what went wrong."""
    with laboratory(seed, talk) as lab:
        try:
            Schedule(lab).play()
            for error in lab.world.errors:
                raise error
            lab.counts["runs"] = len(lab.runs)
            lab.counts["done once"] = sum(len(truth.finished) == 1 for truth in lab.truth.values())
            return lab.counts
        except BaseException as error:
            error.add_note(f"SDAE_SEED={seed}")
            raise
