"""Runs a sweep on this machine.

Several workers (`slurm.worker`) take runs whose needs are done, the longest chain first, so that they end together.
What is done is never run again, what failed only with `retry`; a failure, a dead worker or a refused run stops nothing
but what needs it. Two such processes on one store share the work: a run that another one has claimed is waited for.
A cost run measures this machine, so it runs alone, after the others.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ablations.cost import flop
from ablations.planner import PlannedRun, Sweep
from sdae.config import dump
from sdae.errors import UserError
from sdae.files import plain_file
from sdae.store import RunFolder, Store
from slurm.machine import THREADS, cpus, gpus
from slurm.reconcile import LOST

TICK = 0.5  # seconds between looks at the store and calls of `on_update`
EXECUTE = "sdae.run:execute"


@dataclass
class Summary:
    """How a sweep stands. `states`: done | failed | waiting | running | elsewhere | ready, by run."""

    states: dict[str, str]
    messages: dict[str, str] = field(default_factory=dict)
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: int = 0
    interrupted: bool = False
    seconds: float = 0.0

    def having(self, state: str) -> list[str]:
        return [identity for identity, s in self.states.items() if s == state]

    @property
    def ok(self) -> bool:
        return all(state == "done" for state in self.states.values())


def run_local(
    sweep: Sweep,
    store: Store,
    *,
    jobs: int | None = None,
    on_update: Callable[[Summary], None] | None = None,
    retry: bool = False,
    target: str = EXECUTE,
) -> Summary:
    """Runs what of a sweep is not done and says how each run ended.

    jobs: workers at a time (null: cores / threads of a run; on GPUs the scale's `jobs` for each). target: the function
    that executes a run, as `module:name`. Raises `UserError` where the pictures or the store are missing.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    store.must_be_real()
    began = time.monotonic()
    executor = _Executor(sweep, store, jobs, on_update, retry, target)
    executor.look(("ready",))
    if not executor.finished():
        check_pictures(sweep)
        store.open()
        executor.run()
    executor.summary.seconds = time.monotonic() - began
    executor.report()
    return executor.summary


def check_pictures(sweep: Sweep) -> None:
    """`UserError` where a run's pictures are not on this machine, before anything is started."""
    if sweep.provisional:
        from sdae.data.fingerprint import listing

        for run in sweep.runs.values():
            if run.config.data.fingerprint is None and run.config.stage != "cost":
                listing(run.config.data)


def failed_part(sweep: Sweep, store: Store, further: Collection[str] = ()) -> Sweep:
    """The failed runs of a sweep, `further` ones of it, and all that need them."""
    store.must_be_real()
    chosen = {i for i in sweep.runs if i in further or store.run(i).state() == "failed"}
    for run in sweep.runs.values():
        if chosen.intersection(run.needs):
            chosen = chosen | {run.id}
    runs = {i: run for i, run in sweep.runs.items() if i in chosen}
    return replace(sweep, runs=runs, requested=len(runs))


class _Worker:
    """One worker process and its run."""

    def __init__(self, target: str, store: Store, threads: int, gpu: str | None):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTHONUNBUFFERED="1")
        environment |= dict.fromkeys(THREADS, str(threads))
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(threads, 4)))  # else as many as there are cores
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.gpu = gpu
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slurm.worker", target, str(store.root)], env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True,
        )  # fmt: skip  # a session of its own: Ctrl-C reaches us alone, and we tell the workers
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.orders, self.answers = self.process.stdin, self.process.stdout
        os.set_blocking(self.answers.fileno(), False)
        self.ready = False
        self.run: PlannedRun | None = None
        self.buffer = b""

    def start(self, run: PlannedRun) -> None:
        self.run = run
        with contextlib.suppress(OSError):  # dead: its end of file is about to be read
            self.orders.write((json.dumps({"id": run.id, "config": dump(run.config)}) + "\n").encode())

    def read(self) -> Iterator[dict[str, Any]]:
        """The answers that have come; an `exit` where the process has ended."""
        while True:
            try:
                chunk = self.answers.read(65536)
            except OSError:
                chunk = b""
            if chunk is None:
                return
            if not chunk:
                yield {"event": "exit", "code": self.process.wait()}
                return
            *lines, self.buffer = (self.buffer + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def tell(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.orders.close()
        self.answers.close()
        self.errors.close()

    def last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()


class _Executor:
    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        jobs: int | None,
        on_update: Callable[[Summary], None] | None,
        retry: bool,
        target: str,
    ):
        self.sweep, self.store, self.on_update, self.retry, self.target = sweep, store, on_update, retry, target
        self.summary = Summary(dict.fromkeys(sweep.runs, "ready"))
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.stops = 0  # how often we were told to stop
        self.devices = gpus() if sweep.scale.efficiency.get("device", "auto") != "cpu" else []
        threads = sweep.scale.efficiency.get("threads")
        if jobs is None and self.devices:
            jobs = len(self.devices) * (sweep.scale.jobs or 1)
        self.jobs = jobs or max(1, cpus() // (threads or cpus()))
        self.threads = int(threads or max(1, cpus() // self.jobs))
        self.rank = _critical_path(sweep)
        self.looked = 0.0
        self.changed = True  # since the last report

    # What is to be done
    def look(self, states: tuple[str, ...] = ("elsewhere",)) -> None:
        """Takes from the store what became of runs in these states, and finds what waits in vain."""
        for identity, state in self.summary.states.items():
            if state in states:
                self.summary.states[identity] = self._from_store(identity)
        for identity, run in self.sweep.runs.items():  # topological: one pass
            if self.summary.states[identity] in ("ready", "waiting"):
                missing = next((need for need in run.needs if self._hopeless(need)), None)
                if missing is not None:
                    self.summary.states[identity] = "waiting"
                    self.summary.messages[identity] = f"waits for {missing}, which is not done"
        self.looked = time.monotonic()

    def _from_store(self, identity: str) -> str:
        """done | elsewhere (another living process has it) | failed | ready."""
        folder = self.store.run(identity)
        if folder.done:
            return "done"
        if folder.claimed():
            return "elsewhere"
        failure = None if self.retry else folder.failure()
        if failure is not None and str(failure.get("class")) not in LOST:
            self.summary.messages[identity] = f"{failure.get('class')}: {failure.get('message')}"
            return "failed"
        return "ready"

    def _hopeless(self, need: str) -> bool:
        """Whether a need will not be done here: failed, itself waiting, or neither planned nor done."""
        if need in self.summary.states:
            return self.summary.states[need] in ("failed", "waiting")
        return not self.store.run(need).done

    def finished(self) -> bool:
        return not any(state in ("ready", "running", "elsewhere") for state in self.summary.states.values())

    def _next(self) -> PlannedRun | None:
        """The ready run that begins the longest chain; a cost run only when nothing else runs or is left."""
        states = self.summary.states
        busy = [r for i, r in self.sweep.runs.items() if states[i] == "running"]
        left = [r for i, r in self.sweep.runs.items() if states[i] == "ready"]
        only_costs = all(r.config.stage == "cost" for r in left)
        if busy and (only_costs or busy[0].config.stage == "cost"):
            return None
        free = [r for r in left if all(states.get(need, "done") == "done" for need in r.needs)]
        ready = [r for r in free if only_costs or r.config.stage != "cost"]
        return max(ready, key=lambda r: self.rank[r.id], default=None)

    # Doing it
    def run(self) -> None:
        with self._signals():
            try:
                while not self.finished():
                    if self.stops:
                        if not any(w.run for w in self.workers):
                            break
                    else:
                        self._dispatch()
                    if time.monotonic() - self.looked > TICK:
                        self.look()
                        self.changed = True
                    if self.changed:
                        self.report()
                    for key, _ in self.selector.select(TICK):
                        self._hear(key.data)
                    for worker in [w for w in self.workers if w.process.poll() is not None]:
                        self._hear(worker)  # its last words; its end too, unless a child of it has the pipe still
                        if worker in self.workers:
                            self._died(worker, worker.process.returncode)
                self.summary.interrupted = bool(self.stops)
            finally:
                self._end_workers()

    def _dispatch(self) -> None:
        idle = [w for w in self.workers if w.run is None]
        while (run := self._next()) is not None:
            if not idle and len(self.workers) < self.jobs:
                idle.append(self._new_worker())
            if not idle:
                return
            worker = idle.pop()
            self.summary.states[run.id] = self._from_store(run.id)
            if self.summary.states[run.id] == "ready":  # else another process was faster
                self.summary.states[run.id] = "running"
                self.summary.messages.pop(run.id, None)
                self.changed = True
                worker.start(run)
            else:
                idle.append(worker)

    def _new_worker(self) -> _Worker:
        taken = [w.gpu for w in self.workers]
        gpu = min(self.devices, key=taken.count) if self.devices else None
        worker = _Worker(self.target, self.store, self.threads, gpu)
        self.workers.append(worker)
        self.selector.register(worker.answers, selectors.EVENT_READ, worker)
        return worker

    def _hear(self, worker: _Worker) -> None:
        for answer in worker.read():
            if answer["event"] == "ready":
                worker.ready = True
            elif answer["event"] == "progress":
                self.summary.progress[str(answer["id"])] = answer
            elif answer["event"] == "end" and worker.run is not None:
                run, worker.run = worker.run, None
                self._ended(run, answer["outcome"], answer.get("message", ""))
            elif answer["event"] == "exit":
                self._died(worker, answer["code"])

    def _ended(self, run: PlannedRun, outcome: str, message: str) -> None:
        self.summary.progress.pop(run.id, None)
        self.summary.ran += outcome in ("done", "failed")
        if outcome == "interrupted":
            outcome, message = "waiting", message or "was told to stop; its state is saved"
        if outcome == "refused":
            outcome = "failed"
        self.summary.states[run.id] = outcome
        if outcome != "done" and outcome != "elsewhere":
            self.summary.messages[run.id] = message
        self.look()
        self.changed = True

    def _died(self, worker: _Worker, code: int) -> None:
        self.selector.unregister(worker.answers)
        self.workers.remove(worker)
        words, run = worker.last_words(), worker.run
        worker.close()
        if run is None:
            return
        folder = self.store.run(run.id)
        if self.stops:
            self._ended(run, "interrupted", "")
        elif not worker.ready:
            self.summary.states[run.id] = "ready"
            reason = words.splitlines()[-1] if words else f"exit code {code}"
            raise UserError(f"a worker could not start: {reason} (`sdae-cli doctor` checks this machine)")
        elif folder.done:
            self._ended(run, "done", "")
        elif folder.claimed():  # the claim of a dead process was free to be taken
            self._ended(run, "elsewhere", "")
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            message = f"the worker process ended with {how}" + " (often: out of memory)" * (code == -signal.SIGKILL)
            folder.create(run.config)
            folder.fail("WorkerDied", message, words)
            self._ended(run, "failed", f"WorkerDied: {message}")

    # Stopping
    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the runs to save their state and end; a second one kills them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            self.stops += 1
            for worker in self.workers:
                worker.tell(signal.SIGTERM if self.stops == 1 else signal.SIGKILL)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_workers(self) -> None:
        for worker in self.workers:
            if worker.run is not None:  # an error of ours: the runs save their state
                worker.tell(signal.SIGTERM)
            with contextlib.suppress(OSError):
                worker.orders.close()
        for worker in self.workers:
            try:
                worker.process.wait(60)
            except subprocess.TimeoutExpired:
                worker.tell(signal.SIGKILL)
                worker.process.wait()
            worker.close()
        self.workers.clear()
        self.selector.close()

    def report(self) -> None:
        self.changed = False
        if self.on_update is not None:
            self.on_update(self.summary)


def _critical_path(sweep: Sweep) -> dict[str, float]:
    """Work of a run and of the longest chain of runs that wait for it; a run's start counts as 1 s at 5 GFLOP/s."""
    rank: dict[str, float] = {}
    after: dict[str, float] = {}
    for run in reversed(sweep.runs.values()):
        rank[run.id] = flop(run.config, sweep.scale.pictures) + 5e9 + after.get(run.id, 0.0)
        for need in run.needs:
            after[need] = max(after.get(need, 0.0), rank[run.id])
    return rank


def followed(run: RunFolder, position: int, sleep: Callable[[float], None], queued: bool = False) -> Iterator[str]:
    """What is added to a run's log after `position` bytes, until nobody has the run; queued: until it has ended."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a sign may be written by halves
    while True:
        over = run.claimed() is None and (not queued or run.state() in ("done", "failed"))
        with contextlib.suppress(FileNotFoundError), open(run.log, "rb", opener=plain_file) as file:
            file.seek(position)
            if text := file.read():
                position += len(text)
                yield decode(text)
        if over:
            return
        sleep(TICK)


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a file, without reading all of it; none where it is absent."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
