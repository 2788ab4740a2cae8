"""Slurm as a model in one process, with a clock of its own and faults: what the reconciler is proved against.

`World` is the clock and the processes: code of ours that runs in a simulated process may sleep, be frozen or killed at
any of its pauses, and lives on a node. `FakeSlurm` has the methods of `slurm.cluster.Slurm`; it reads real sbatch texts
and its tasks call what the array's pickle holds. Nothing here waits for the wall clock.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from submitit.core.utils import DelayedSubmission

from sdae.errors import RunFailed
from sdae.store import SUBMISSION
from slurm.cluster import Busy, Limits, Refused, Task

EPOCH = 1.7e9
LOGIN = "login1"
TURNS = 200_000  # events after which a world is stopped
KILL_WAIT = 30.0  # seconds from SIGTERM to SIGKILL


class Gone(BaseException):
    """Ends a thread whose process was killed, when the world is closed."""


class ScontrolFailed(OSError):
    """As `subprocess.CalledProcessError`."""


class NoScontrol(FileNotFoundError):
    """A node has no scontrol."""


class Process:
    """A process on a node. `exited` is called with its exit code where it was not killed."""

    def __init__(self, world: World, host: str, work: Callable[[], int], exited: Callable[[int], None] | None = None):
        self.world, self.host, self.work, self.exited = world, host, work, exited
        self.pid = next(world.pids)
        self.alive, self.over = True, False
        self.frozen = 0.0  # until when
        self.lag = 0.0  # how many seconds ago it sees the names in folders
        self.wakes = itertools.count()
        self.waits_for = 0  # the wake-up that ends its pause
        self.submission: str | None = None  # its environment's
        self.signals: set[int] = set()  # that its loop got
        self.loops = False  # is in the run's loop
        self.task = "", 0  # of Slurm's, and its restart
        self.handler: Callable[[int], None] | None = None  # of signals, called within a pause; may raise
        self.pending: list[int] = []
        self.usr2: Callable[..., object] = lambda *_: None  # as set by `signal.signal`
        self.life: int | None = None  # pauses until it is killed
        self.death: type[BaseException] | None = None  # what is raised then, None for SIGKILL
        self.worker: _Worker | None = None

    def kill(self) -> None:
        """As by SIGKILL: what it holds on disk stays."""
        self.alive = False
        if self.world.current is self:
            self.world._park(self)

    def signal(self, number: int) -> None:
        if self.alive:
            self.pending.append(number)
            if self.world.current is not self:
                self.world.wake(self)


class _Worker(threading.Thread):
    """A thread that processes use, one after the other."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.go = threading.Lock()
        self.go.acquire()
        self.process: Process
        self.start()

    def run(self) -> None:
        while True:
            self.go.acquire()
            process, code = self.process, 0
            try:
                code = process.work()
            except Gone:
                pass
            except BaseException as error:  # told by the world's `errors`
                process.world.errors.append(error)
                code = 1
            process.over, ended = True, process.alive
            process.alive, process.worker = False, None
            if ended and process.exited and not process.world.closed:
                process.exited(code)
            world = process.world
            del process
            World.idle.append(self)
            world.back.release()


class World:
    """Time, chance, and processes that take turns."""

    idle: ClassVar[list[_Worker]] = []

    def __init__(self, seed: int | str = 0):
        self.random = random.Random(seed)
        self.now = EPOCH
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.order = itertools.count()
        self.pids = itertools.count(10_000_001)
        self.processes: list[Process] = []
        self.current: Process | None = None
        self.back = threading.Lock()
        self.back.acquire()
        self.errors: list[BaseException] = []
        self.skew: dict[str, float] = {}  # of clocks, by host
        self.closed = False
        self.turns = 0
        self.horizon = self.now  # until when time is let go by

    @property
    def process(self) -> Process:
        """The process that calls."""
        assert self.current is not None
        return self.current

    # What patched modules ask
    def time(self) -> float:
        return self.now + self.skew.get(self.host(), 0.0)

    def host(self) -> str:
        return self.current.host if self.current else LOGIN

    def pid(self) -> int:
        return self.current.pid if self.current else 10_000_000

    def process_start(self, pid: int) -> str | None:
        if pid == 10_000_000:
            return "main"
        there = any(p.pid == pid and p.alive and p.host == self.host() for p in self.processes)
        return str(pid) if there else None

    # Events
    def at(self, delay: float, action: Callable[[], object]) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), action))

    def advance(self, seconds: float) -> None:
        """Lets so much time go by; not within a process."""
        self.horizon = end = self.now + seconds
        while self.events and self.events[0][0] <= end:
            when, _, action = heapq.heappop(self.events)
            self.now = max(self.now, when)
            self.turns += 1
            if self.turns > TURNS:
                raise AssertionError(f"something goes round and round: {TURNS} events")
            action()
        self.now = max(self.now, end)

    def chance(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    # Processes
    def start(
        self, host: str, work: Callable[[], int], exited: Callable[[int], None] | None = None, delay: float = 0.0
    ) -> Process:
        process = Process(self, host, work, exited)
        self.processes.append(process)
        self.at(delay, lambda: self._wake(process, 0))
        return process

    def pause(self, seconds: float) -> None:
        """Sleeps, as the process that calls it. Here it may be frozen, killed, or get a signal."""
        process = self.current
        if process is None:
            self.advance(seconds)
            return
        if self.closed:
            raise Gone
        if process.life is not None:
            process.life -= 1
            if process.life < 0:
                process.life = None
                if process.death is not None:
                    raise process.death
                process.kill()
        wake = self.now + seconds
        if not process.pending and wake <= self.horizon and not (self.events and self.events[0][0] <= wake):
            self.now = wake  # nothing else happens until then
            return
        while True:
            process.waits_for = number = next(process.wakes) + 1
            self.at(max(0.0, wake - self.now), partial(self._wake, process, number))
            self._park(process)
            if self.now >= wake:
                return

    def wait(self, condition: Callable[[], bool]) -> None:
        """Pauses a process until `wake` is called for it and the condition holds."""
        process = self.current
        assert process is not None
        while not condition():
            process.waits_for = next(process.wakes) + 1
            self._park(process)

    def wake(self, process: Process) -> None:
        number = process.waits_for
        self.at(0.0, lambda: self._wake(process, number))

    def _wake(self, process: Process, number: int) -> None:
        if not process.alive or number != process.waits_for:
            return
        if process.frozen > self.now:
            self.at(process.frozen - self.now + 0.01, lambda: self._wake(process, number))
            return
        if process.worker is None:
            process.worker = World.idle.pop() if World.idle else _Worker()
            process.worker.process = process
        self._enter(process)

    def _enter(self, process: Process) -> None:
        self.current = process
        if process.submission is None:
            os.environ.pop(SUBMISSION, None)
        else:
            os.environ[SUBMISSION] = process.submission
        assert process.worker is not None
        process.worker.go.release()
        self.back.acquire()
        process.submission = os.environ.pop(SUBMISSION, None)
        self.current = None

    def _park(self, process: Process) -> None:
        assert process.worker is not None
        worker = process.worker
        self.back.release()
        worker.go.acquire()
        if self.closed:
            raise Gone
        while process.pending:
            number = process.pending.pop(0)
            if process.handler is not None:
                process.handler(number)

    def close(self) -> None:
        """Ends all threads; what they do then is of no interest."""
        self.closed = True
        for process in self.processes:
            for _ in range(20):
                if process.worker is None:
                    break
                self._enter(process)
        self.processes.clear()
        self.events.clear()


@dataclass
class Faults:
    """Seconds, or shares of calls. The defaults: none."""

    lag: float = 0.0  # rows of sacct come up to so late
    purge: float | None = None  # sacct forgets a task so long after its end
    sacct: bool = True  # False: there is no accounting
    busy: float = 0.0  # a command gets no answer
    unheard: float = 0.0  # sbatch gets no answer, but had been accepted
    late: float = 0.0  # sbatch gets no answer, and is accepted up to 40 s later
    twice: float = 0.0  # sbatch is accepted twice
    hold: float = 0.0  # a requeued task is held
    no_scontrol: float = 0.0  # a node has no scontrol, or it does not work there


@dataclass
class Element:
    """A task of an array."""

    array: Array
    index: int
    submitted: float
    state: str = "PENDING"
    reason: str = "None"
    node: str = ""
    eligible: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    code: str = "0:0"
    restart: int = 0
    held: bool = False
    visible: float = 0.0  # in squeue until, after its end
    hidden: float = 0.0  # missing from squeue until
    odd: float = 0.0  # in a state that nobody knows until
    process: Process | None = None

    @property
    def id(self) -> str:
        return f"{self.array.job}_{self.index}"

    @property
    def over(self) -> bool:
        return self.ended > 0

    def row(self) -> Task:
        return Task(
            self.array.name, self.array.job, self.index, self.state.split()[0], self.state, self.code, self.node,
            self.submitted, self.started, self.ended,
        )  # fmt: skip


@dataclass
class Array:
    """One accepted sbatch."""

    job: str
    name: str
    pickle: Path
    limit: int
    minutes: float
    warn: float
    requeue: bool
    kill: bool  # kill-on-invalid-dep
    after: tuple[str, list[tuple[Array, int | None]]] | None  # kind, and arrays with an index or all of them
    elements: dict[int, Element] = field(default_factory=dict)


class FakeSlurm:
    def __init__(self, world: World, nodes: int = 3, slots: int = 2, faults: Faults | None = None):
        self.world, self.faults = world, faults or Faults()
        self.nodes = {f"node{i + 1}": True for i in range(nodes)}  # whether it is up
        self.bare: set[str] = set()  # nodes without scontrol
        self.slots = slots
        self.arrays: dict[str, Array] = {}
        self.next = 100
        self.accounting: list[tuple[float, tuple[str, int, int], Task]] = []
        self.array_limit, self.task_limit = 1001, 10_000_000
        self.others = 0  # tasks of the same user that are not ours
        self.deaf: set[str] = set()  # commands that get no answer
        self.secret = False  # whether `limits` keeps the limit of tasks to itself
        self.dark = 0.0  # until when the controller answers nobody
        self.calls: dict[tuple[int, str], int] = {}  # by process and command
        self.delay = (1.0, 15.0)  # seconds from a task's start to its Python
        self.kicked = False
        self.on_start: Callable[[Element], None] | None = None
        self.on_boot: Callable[[Process], None] | None = None
        self.on_end: Callable[[Element], None] | None = None

    # Commands
    def submit(self, script: Path) -> str:
        self._call("sbatch")
        faults, world = self.faults, self.world
        text = script.read_text()
        if world.chance(faults.late):
            world.at(world.between(0.5, 40), partial(self._accept_quietly, text, script))
            raise Busy("sbatch: no answer in 60 s")
        job = self._accept(text, script)
        if world.chance(faults.twice):
            job = world.random.choice([job, self._accept_quietly(text, script) or job])
        world.pause(world.between(0.01, 1))
        if world.chance(faults.unheard):
            world.pause(world.between(1, 60))
            raise Busy("sbatch: Unable to contact slurm controller (connect failure)")
        return job

    def queue(self, users: Iterable[str] = ()) -> list[Task]:
        self._call("squeue")
        found, now = [], self.world.now
        for array in self.arrays.values():
            for element in array.elements.values():
                if now >= element.hidden and (not element.over or now < element.visible):
                    state = "EXPEDITING" if now < element.odd else "COMPLETING" if element.over else element.state
                    found.append(replace(element.row(), state=state, reason=element.reason))
        found += [Task("other", "7", i, "RUNNING") for i in range(self.others)]
        return found

    def history(self, names: Sequence[str], since: float, jobs: Sequence[str] = ()) -> list[Task] | None:
        self._call("sacct")
        if not self.faults.sacct:
            return None
        now, latest = self.world.now, {}
        for visible, key, task in self.accounting:
            if visible <= now:
                latest[key] = task
        purge = self.faults.purge
        tasks = [
            task for task in latest.values()
            if task.name in names
            and (not jobs or task.job in jobs)
            and not (purge is not None and task.ended and now - task.ended > purge)
        ]  # fmt: skip
        return sorted(tasks, key=lambda task: (task.submitted, task.started, task.ended or float("inf")))

    def cancel(self, ids: Iterable[str]) -> None:
        waiting = sorted(set(ids))
        if waiting:
            self._call("scancel")
        for identity in waiting:
            job, _, index = identity.partition("_")
            elements = self.arrays[job].elements if job in self.arrays else {}
            for element in [elements[int(index)]] if index and int(index) in elements else list(elements.values()):
                self.end(element, "CANCELLED by 1000")

    def release(self, ids: Iterable[str]) -> None:
        for identity in ids:
            self._call("scontrol")
            job, _, index = identity.partition("_")
            element = self.arrays[job].elements[int(index)]
            if not element.over and element.held:
                element.held, element.reason, element.state = False, "None", "PENDING"
                self._record(element)
        self._kick()

    def config(self) -> dict[str, str]:
        return {"MaxArraySize": str(self.array_limit)}

    def limits(self) -> Limits:
        self._call("limits")
        told = self.task_limit < 10_000_000 and not self.secret
        return Limits(self.array_limit, self.task_limit if told else None)

    def _call(self, command: str) -> None:
        key = self.world.pid(), command
        self.calls[key] = self.calls.get(key, 0) + 1
        self.world.pause(self.world.between(0.01, 1))
        if self.world.now < self.dark or command in self.deaf or self.world.chance(self.faults.busy):
            self.world.pause(self.world.between(0, 60))
            raise Busy(f"{command}: Unable to contact slurm controller (connect failure)")

    # Arrays
    def _accept_quietly(self, text: str, script: Path) -> str | None:
        try:
            return self._accept(text, script)
        except Refused:
            return None

    def _accept(self, text: str, script: Path) -> str:
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
        spec, _, limit = options["array"].partition("%")
        indices: list[int] = []
        for part in spec.split(","):
            first, _, last = part.partition("-")
            indices += range(int(first), int(last or first) + 1)
        if max(indices) >= self.array_limit:
            raise Refused("sbatch: error: Batch job submission failed: Invalid job array specification")
        queued = sum(not e.over for a in self.arrays.values() for e in a.elements.values()) + self.others
        if queued + len(indices) > self.task_limit:
            raise Refused(
                "sbatch: error: QOSMaxSubmitJobPerUserLimit Batch job submission failed: Job violates accounting/QOS "
                "policy (job submit limit, user's size and/or time limits)"
            )
        after = None
        if "dependency" in options:
            kind, *jobs = options["dependency"].split(":")
            if any(job.partition("_")[0] not in self.arrays for job in jobs):
                raise Refused("sbatch: error: Batch job submission failed: Job dependency problem")
            parts = (job.partition("_") for job in jobs)
            after = kind, [(self.arrays[job], int(index) if index else None) for job, _, index in parts]
        warn = re.fullmatch(r"USR2@(\d+)", options["signal"])
        assert warn is not None
        assert "requeue" in options or "no-requeue" in options
        pickle = re.search(r"cp (\S+job\.pkl) ", text)
        assert pickle is not None
        while str(self.next) in self.arrays:
            self.next += 1
        array = Array(
            str(self.next), options["job-name"], Path(pickle[1]), int(limit or 1_000_000), float(options["time"]),
            float(warn[1]), "requeue" in options, options.get("kill-on-invalid-dep") == "yes", after,
        )  # fmt: skip
        self.next += 1
        array.elements = {index: Element(array, index, self.world.now) for index in indices}
        self.arrays[array.job] = array
        for element in array.elements.values():
            self._record(element)
        self._kick()
        return array.job

    def reuse_ids(self) -> None:
        """Arrays that are over are forgotten; ids begin again."""
        self.arrays = {j: a for j, a in self.arrays.items() if not all(e.over for e in a.elements.values())}
        self.next = 100

    def all(self) -> list[Element]:
        return [e for a in self.arrays.values() for e in a.elements.values()]

    def element(self, name: str, index: int) -> list[Element]:
        """Live tasks of a job name."""
        return [e for e in self.all() if e.array.name == name and e.index == index and not e.over]

    def mine(self) -> Element:
        """The task that the calling process is of."""
        return next(e for e in self.all() if e.process is self.world.current)

    def running(self) -> list[Element]:
        return [e for e in self.all() if e.state == "RUNNING" and not e.over]

    # The scheduler
    def _kick(self) -> None:
        if not self.kicked:
            self.kicked = True
            self.world.at(self.world.between(0.1, 3), self._schedule)

    def _schedule(self) -> None:
        self.kicked = False
        now = self.world.now
        running = self.running()
        used: dict[str, int] = {}
        for element in running:
            used[element.node] = used.get(element.node, 0) + 1
        free = [node for node, up in self.nodes.items() if up for _ in range(self.slots - used.get(node, 0))]
        self.world.random.shuffle(free)
        for array in list(self.arrays.values()):
            busy = sum(e.array is array for e in running)
            for element in array.elements.values():
                if element.over or element.state != "PENDING" or element.held:
                    continue
                if element.eligible > now:
                    element.reason = "BeginTime"
                    continue
                met = self._met(array, element.index)
                if met is None:
                    element.reason = "Dependency"
                elif not met:
                    if array.kill:
                        self.end(element, "CANCELLED")
                    else:
                        element.reason = "DependencyNeverSatisfied"
                elif not free or busy >= array.limit:
                    element.reason = "Resources" if not free else "JobArrayTaskLimit"
                else:
                    busy += 1
                    self._start(element, free.pop())

    def _met(self, array: Array, index: int) -> bool | None:
        """Whether a task's dependency is met; None: not yet."""
        if array.after is None:
            return True
        kind, jobs = array.after
        needs: list[Element] = []
        for need, number in jobs:
            chosen = [index] if kind == "aftercorr" else list(need.elements) if number is None else [number]
            needs += [need.elements[i] for i in chosen if i in need.elements]
        if kind != "afterany" and any(e.over and e.state != "COMPLETED" for e in needs):
            return False
        return True if all(e.over for e in needs) else None

    def _start(self, element: Element, node: str) -> None:
        world, restart = self.world, element.restart
        element.state, element.reason, element.node, element.started = "RUNNING", "None", node, world.now
        self._record(element)
        if self.on_start:
            self.on_start(element)

        def same() -> bool:
            return not element.over and element.restart == restart and element.state == "RUNNING"

        def boot() -> None:
            if same() and self.nodes[node]:
                process = world.start(
                    node, lambda: self._work(element), lambda code: self._exited(element, restart, code)
                )
                process.handler = lambda number: self._handler(element, process, number)
                process.usr2 = lambda *_: self._requeue_from_inside(element, process)
                element.process, process.task = process, (element.id, restart)
                if self.on_boot:
                    self.on_boot(process)

        def warn() -> None:
            if same() and element.process:
                element.process.signal(signal.SIGUSR2)

        def limit() -> None:
            if same():
                self.end(element, "TIMEOUT")

        world.at(world.between(*self.delay), boot)
        seconds = 60 * element.array.minutes
        world.at(max(1.0, seconds - element.array.warn - world.between(0, 60)), warn)
        world.at(seconds + world.between(0, 60), limit)

    def _work(self, element: Element) -> int:
        """What the batch script does."""
        if not element.array.pickle.exists():
            return 1
        job = DelayedSubmission.load(element.array.pickle)
        try:
            job.function()
        except (RunFailed, NoScontrol, ScontrolFailed):
            return 1
        except SystemExit:
            return 255
        return 0

    def _handler(self, element: Element, process: Process, number: int) -> None:
        """submitit's: SIGUSR2 requeues, other signals are ignored. Within the run's loop signals are kept for it."""
        if process.loops:
            process.signals.add(number)
        elif number == signal.SIGUSR2:
            process.usr2(number, None)

    def _requeue_from_inside(self, element: Element, process: Process) -> None:
        """submitit's `checkpoint_and_try_requeue`, within the task."""
        self.world.pause(self.world.between(0.01, 1))
        if element.node in self.bare:
            if self.world.chance(0.5):
                raise NoScontrol("scontrol")
            raise ScontrolFailed("scontrol: Socket timed out on send/recv operation")
        if element.process is process:  # Slurm requeues jobs that have ended, too
            if not element.array.requeue:
                raise ScontrolFailed("scontrol: Requested operation is presently disabled")
            self.requeue(element, "REQUEUED")
        raise SystemExit(-1)

    def _exited(self, element: Element, restart: int, code: int) -> None:
        if not element.over and element.restart == restart and element.state == "RUNNING":
            self.end(element, "FAILED" if code else "COMPLETED", f"{code}:0")

    # What happens to tasks
    def end(self, element: Element, state: str, code: str = "0:0") -> None:
        """A task's end, by itself or by force: then its process has `KILL_WAIT` seconds from a SIGTERM on."""
        if element.over:
            return
        if element.state == "PENDING":
            element.node = "None assigned"
        element.state, element.code, element.ended = state, code, self.world.now
        element.visible = self.world.now + self.world.between(0, 5)
        self._record(element)
        self._terminate(element)
        if self.on_end:
            self.on_end(element)
        self._kick()

    def _terminate(self, element: Element) -> None:
        process = element.process
        if process is not None and process.alive and process is not self.world.current:
            process.signal(signal.SIGTERM)
            self._kill_later(process, KILL_WAIT)
            element.visible = max(element.visible, self.world.now + KILL_WAIT)

    def _kill_later(self, process: Process, delay: float) -> None:
        def kill() -> None:
            if process.frozen > self.world.now:
                self._kill_later(process, process.frozen - self.world.now + 1)
            else:
                process.kill()

        self.world.at(delay, kill)

    def requeue(self, element: Element, state: str) -> None:
        """Runs a task again: its row ends as `state`, another one begins."""
        now, world = self.world.now, self.world
        key = (element.array.job, element.index, element.restart)
        if not element.over:
            last = replace(element.row(), state=state, reason=state, ended=now)
            self.accounting.append((now + world.between(0, self.faults.lag), key, last))
            self._terminate(element)
        element.restart += 1
        element.state, element.reason, element.node, element.process = "PENDING", "BeginTime", "", None
        element.submitted, element.started, element.eligible = now, 0.0, now + world.between(5, 130)
        element.ended, element.code = 0.0, "0:0"
        if world.chance(self.faults.hold):
            self.hold(element)
        self._record(element)
        world.at(element.eligible - now + 0.1, self._kick)

    def hide(self, element: Element) -> None:
        """squeue does not have a task for a moment; that happens once to it."""
        if not element.hidden:
            element.hidden = self.world.now + self.world.between(1, 60)

    def hold(self, element: Element) -> None:
        element.held, element.reason = True, "launch failed requeued held"
        if self.world.chance(0.3):
            element.state = "REQUEUE_HOLD"

    def kill(self, element: Element, state: str, code: str) -> None:
        """SIGKILL of a task's process, by whoever."""
        if element.process is not None and element.process.alive:
            element.process.kill()
            later = partial(self._killed, element, element.restart, state, code)
            self.world.at(self.world.between(0, 2), later)

    def _killed(self, element: Element, restart: int, state: str, code: str) -> None:
        if not element.over and element.restart == restart:
            self.end(element, state, code)

    def preempt(self, element: Element, requeue: bool, warned: bool) -> None:
        if warned and element.process:
            element.process.signal(signal.SIGUSR2)
        elif requeue and element.array.requeue:
            self.requeue(element, "PREEMPTED")
        else:
            self.end(element, "PREEMPTED")

    def lose_node(self, node: str, notice: float, back: float) -> None:
        """A power cut. notice: seconds until Slurm sees it; back: until the node is up again."""
        self.nodes[node] = False
        for process in self.world.processes:
            if process.host == node and process.alive:
                process.kill()
        self._leave(node, notice)
        self.world.at(back, lambda: self._return(node))

    def freeze_node(self, node: str, seconds: float, notice: float) -> None:
        """Its processes stand still; where that lasts longer than `notice` Slurm thinks that the node is dead."""
        until = self.world.now + seconds
        mine = [p for p in self.world.processes if p.host == node and p.alive]
        for process in mine:
            process.frozen = until
        if seconds > notice:
            self.nodes[node] = False
            self._leave(node, notice)
            late = seconds + self.world.between(0.5, 60)  # slurmd comes back, and ends what should not be there

            def clean() -> None:
                current = {e.process for e in self.running()}
                for process in mine:
                    if process.alive and process not in current:
                        process.kill()
                self._return(node)

            self.world.at(late, clean)

    def _leave(self, node: str, notice: float) -> None:
        gone = [(e, e.restart) for e in self.running() if e.node == node]

        def see() -> None:
            for element, restart in gone:
                if not element.over and element.restart == restart:
                    element.process = None  # no signal reaches it
                    if element.array.requeue:
                        self.requeue(element, "NODE_FAIL")
                    else:
                        self.end(element, "NODE_FAIL")

        self.world.at(notice, see)

    def _return(self, node: str) -> None:
        self.nodes[node] = True
        self._kick()

    def _record(self, element: Element) -> None:
        lag = self.world.between(0, self.faults.lag)
        key = (element.array.job, element.index, element.restart)
        self.accounting.append((self.world.now + lag, key, element.row()))
