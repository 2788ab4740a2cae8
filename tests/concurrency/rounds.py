"""One round: a storm of actors, each a process, then peace, then what must hold.

In the storm actors do what they like, in an order of their own, and some die in the middle of it. In peace time goes on
by hours, the commands are given again, and every run must get done.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from concurrency import pretend, stale
from concurrency.processes import Clock, Machine, forked
from concurrency.queue import Controller, Job, Queue
from submitit.core.utils import DelayedSubmission

import sdae.run
from ablations.planner import Sweep
from analysis.check import check, mend
from analysis.frame import INDEX, collect
from sdae.errors import Interrupted, RunFailed, UserError
from sdae.store import Store
from slurm.cluster import Busy
from slurm.heal import cancellable
from slurm.ledger import CANCELLED
from slurm.local import failed_part, run_local
from slurm.look import recorded, wanted
from slurm.profile import Profile
from slurm.reconcile import NEVER
from slurm.sweep import end, hand_over, look, take_back

ACTORS = 8
STORM = 0.3  # seconds
PATIENCE = 120.0  # seconds after which a process hangs
HOURS = 3 * 3600.0  # that go by between a storm and the next commands
DAY = 25 * 3600.0  # after which what was being written on other machines is taken for left
RACES = 0.5  # share of rounds that begin with all actors at one run
TRIES = 8  # times that commands are given before a run counts as lost
LAGS = (0.0, 0.02, 0.1, 0.5)  # seconds, against the 3 to 60 of NFS and runs of hours
KINDS = {"Pretended", "WorkerDied", "Killed", "JobFailed", "Lost", "NodeFailure", "Preempted", "TimedOut", "Cancelled",
         "BadInput", "NoProgress"}  # fmt: skip
OWNER = re.compile(r"-(?P<pid>\d+)-\w+\.[0-9a-f]+\.tmp$")  # of a temporary file: machine, process, when that began


class Round:
    def __init__(self, seed: str, folder: Path, sweep: Sweep):
        self.seed, self.folder, self.sweep = seed, folder, sweep
        self.random = random.Random(seed)
        self.store = Store(folder / "store")
        self.counts: Counter[str] = Counter(runs=len(sweep.runs))
        self.runs = list(sweep.runs.values())
        self.children: set[int] = set()
        self.controller = Controller(folder, self._start)
        self.number = 0
        self.nfs = self.random.random() < 0.5
        self.deadly = self.random.random() < 0.7
        self.faults = self.random.choice((0.0, 0.0, 0.1))
        self.counts["rounds over NFS" if self.nfs else "rounds on one machine"] += 1
        self.profile = Profile(
            time="60", requeue=True, sbatch={"kill-on-invalid-dep": self.random.random() < 0.6},
            array_parallelism=self.random.choice((None, None, 1)),
        )  # fmt: skip
        pretend.BOOK = pretend.Logbook(folder / "log")
        pretend.BOOK.folder.mkdir(parents=True)
        self._settle(storm=True)

    def _settle(self, storm: bool) -> None:
        pretend.BOOK.peace = not storm
        deaths = 0.35 if storm and self.deadly else 0.0
        Machine.settings = {"lags": LAGS if self.nfs else (0.0,), "deaths": deaths, "dawdle": True}

    # Processes
    def fork(self, work: Callable[[], int], name: str, host: str | None = None) -> int:
        self.number += 1
        Machine.host = (host or f"host{self.number}") if self.nfs else "here"
        pid = forked(work, name, f"{self.seed} {self.number}", self.folder)
        Machine.host = "here"
        self.children.add(pid)
        return pid

    def _start(self, job: Job) -> int:
        return self.fork(lambda: self._task(job), "task", f"node{self.random.randint(1, 3)}")

    def _task(self, job: Job) -> int:
        """What a batch script of `slurm.submit` and submitit do."""
        task, folder = job.task, Path(job.script).parent
        os.environ |= {
            "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(folder), "SLURM_JOB_ID": task.job,
            "SLURM_ARRAY_JOB_ID": task.job, "SLURM_ARRAY_TASK_ID": str(task.index), "SLURM_PROCID": "0",
            "SLURM_RESTART_COUNT": str(job.restart),
        }  # fmt: skip

        def requeue(*_: object) -> None:
            self.controller.requeue(task.id)
            raise SystemExit(255)

        log = os.open(self.folder / "tasks.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            signal.signal(signal.SIGTERM, lambda *_: None)  # submitit's handler lets it pass
            signal.signal(signal.SIGUSR2, requeue)
            DelayedSubmission.load(folder / "job.pkl").function()
        except RunFailed:
            return 1
        except SystemExit:
            return 255
        return 0

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Lets tasks start and end until something holds or so many seconds are over; whether it held."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                return False
            self.controller.step(self.reap())
            time.sleep(0.004)
        return True

    def reap(self) -> dict[int, int]:
        found = {}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                found[pid] = status
                self.children.discard(pid)
                if os.WIFSIGNALED(status):
                    pretend.BOOK.write("struck", pid)
                    self.counts["killed"] += 1
        return found

    # What actors do
    def slurm(self) -> Queue:
        return Queue(self.folder, f"{Machine.seed}", 0.0 if pretend.BOOK.peace else self.faults)

    def submit(self, failed: bool = False) -> None:
        hand_over(self.runs, self.store, self.profile, "smoke", failed=failed, slurm=self.slurm())  # type: ignore[arg-type]

    def retry(self) -> None:
        self.submit(failed=True)

    def heal(self) -> None:
        runs = wanted(recorded(self.store), self.store)
        if runs:
            hand_over(runs, self.store, self.profile, "smoke", slurm=self.slurm())  # type: ignore[arg-type]

    def cancel(self) -> None:
        found, mine = take_back(self.runs, self.store, self.slurm())  # type: ignore[arg-type]
        draw = random.Random(Machine.seed)  # type: ignore[arg-type]
        left = set(mine) - set(cancellable(found))  # of a cancel before, whose scancel was not answered
        assert all(found.reservations[i].token == CANCELLED for i in left), left
        end([i for i in mine if draw.random() < 0.5], found, self.slurm())  # type: ignore[arg-type]

    def status(self) -> None:
        look(self.runs, self.store, slurm=self.slurm())  # type: ignore[arg-type]

    def collect(self) -> None:
        frame = collect(self.store)
        done = set(frame.loc[frame["state"] == "done", "id"])
        assert done <= set(self.sweep.runs), done

    def local(self) -> None:
        run_local(self.sweep, self.store, jobs=random.Random(str(Machine.seed)).randint(1, 2))

    def local_retry(self) -> None:
        run_local(failed_part(self.sweep, self.store), self.store, jobs=1, retry=True)

    def run(self) -> None:
        """`sdae-cli run`, of a run whose needs are done."""
        ready = [run for run in self.runs if all(self.store.run(need).done for need in run.needs)]
        with contextlib.suppress(RunFailed):
            sdae.run.execute(random.Random(str(Machine.seed)).choice(ready).config, self.store)

    def race(self) -> None:
        """All at the same time for the same run."""
        pretend.BOOK.write("ready")
        end = time.monotonic() + 1
        while len(pretend.BOOK.lines("ready")) < ACTORS and time.monotonic() < end:
            time.sleep(0.001)
        with contextlib.suppress(RunFailed):
            sdae.run.execute(self.runs[0].config, self.store)

    def dead_claim(self) -> int:
        Clock.ahead -= HOURS
        folder = self.store.run(self.runs[0].id)
        folder.create(self.runs[0].config)
        with folder.claim():
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def act(self, script: list[str]) -> int:
        stop = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        for number, name in enumerate(script):
            Machine.seed = f"{Machine.seed} {number}"
            try:
                getattr(self, name)()
            except (Busy, Interrupted):
                outcome = f"{name}: no"
            except UserError as error:
                outcome = f"{name}: {error}"
            else:
                outcome = f"{name}: yes"
            pretend.BOOK.write("acts", outcome.replace("\n", " "))
        signal.signal(signal.SIGTERM, stop)
        return 0

    # A round
    def play(self) -> Counter[str]:
        verbs = (
            "submit",
            "submit",
            "retry",
            "heal",
            "cancel",
            "status",
            "collect",
            "collect",
            "local",
            "local_retry",
            "run",
        )
        storm = self.random.uniform(0.5, 1.5) * STORM
        race = self.random.random() < RACES
        if race and self.random.random() < 0.5:
            self.fork(self.dead_claim, "dead")
            self.wait(self.settled, PATIENCE)
        first = ["submit", "local", "collect", "cancel", "retry", "heal", "local", "status"]  # each of them somewhere
        for number in range(ACTORS):
            script = [first[number], *self.random.choices(verbs, k=self.random.randint(1, 3))]
            self.random.shuffle(script)
            script = ["race", *script] if race else script
            self.fork(lambda script=script: self.act(script), "actor")  # type: ignore[misc]
        over = time.monotonic() + storm
        while time.monotonic() < over and not self.settled():
            self.wait(self.settled, self.random.uniform(0.02, 0.15))
            if self.random.random() < 0.3:
                self.controller.signal(
                    self.random, self.random.choice((signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL))
                )
        self.end_all()
        self._settle(storm=False)
        for _ in range(TRIES):
            Clock.jump(HOURS)
            if all(self.store.run(run.id).done for run in self.runs) and not self.left():
                break
            self.counts["commands again"] += 1
            for script in (["retry", "collect"], ["local_retry", "local", "collect"], ["heal", "collect"], ["local"]):
                self.fork(lambda script=script: self.act(script), "actor")  # type: ignore[misc]
            if not self.wait(self.settled, PATIENCE):
                told = self.stacks()
                self.end_all()
                raise AssertionError(f"no end in {PATIENCE:.0f} s of peace{told}")
        self.check()
        return self.counts

    def settled(self) -> bool:
        """Whether nobody does anything any more, orphans included."""
        return not self.children and not self.living()

    def living(self) -> list[int]:
        """Processes below this one; those that have ended are among them until they are waited for."""
        found, todo = [], [os.getpid()]
        while todo:
            with contextlib.suppress(OSError):
                pid = todo.pop()
                todo += (below := [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()])
                found += below
        return found

    def end_all(self) -> None:
        """Everybody is told to end, and does."""
        for pid in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not self.wait(self.settled, 0.5):  # a task waits for the claim of a lost node, as it should
            for pid in self.living():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(self.settled, PATIENCE)

    def stacks(self) -> str:
        """Where those are that should have ended."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "".join(f"\n{f.name}\n{f.read_text()}" for f in self.folder.glob("stack-*") if f.stat().st_size)

    def left(self) -> list[str]:
        """Tasks that are queued; those that wait in vain go when the next `submit` or `heal` has something to do."""
        return [task for task in self.controller.left() if NEVER not in task]

    # What must hold
    def check(self) -> None:
        wrong = self.folder / "wrong"

        def judge() -> int:
            stale.use(stale.Disk(str(self.store.root), 0, clock=Clock.of))
            wrong.write_text("\n".join(self.wrongs()))
            return 0

        self.fork(judge, "judge")
        self.wait(self.settled, PATIENCE)
        errors = [file.read_text() for file in sorted((self.folder / "errors").glob("*"))]
        lines = wrong.read_text().splitlines() if wrong.exists() else ["the judge has failed"]
        for run in self.runs:
            for line in pretend.BOOK.lines(run.id):
                self.counts[line[0]] += 1
        for line in pretend.BOOK.lines("acts"):
            self.counts[" ".join(line[:2])] += line[1] in ("yes", "no") or 0
        if errors or lines:
            raise AssertionError("\n".join([*lines, *errors]))

    def wrongs(self) -> list[str]:
        found = []
        for run in self.runs:
            folder, lines = self.store.run(run.id), [line[0] for line in pretend.BOOK.lines(run.id)]
            result = folder.result()
            if result is None:
                found.append(f"{run.id} is lost: {folder.state()}, {folder.failure()}")
                continue
            if lines.count("finished") != 1:
                found.append(f"{run.id} was finished {lines.count('finished')} times")
            if "twice" in lines:
                found.append(f"{run.id} was run by two at a time")
            metrics = pretend.expected(run.id)
            if any(result["metrics"].get(key) != value for key, value in metrics.items()):
                found.append(f"{run.id} has the numbers {result['metrics']}, not {metrics}")
            if folder.claimed():
                found.append(f"{run.id} is done and claimed: {folder.claimed()}")
            with folder.claim() as mine:
                if not mine:
                    found.append(f"{run.id} cannot be claimed")
        failures = {" ".join(line[:-1]) for line in pretend.BOOK.lines("failures") if line[0] not in KINDS}
        found += [f"a run failed of {failure}" for failure in sorted(failures)]
        found += [f"{task} is left in the queue" for task in self.left()]
        known = collect(self.store)
        (self.store.root / INDEX).unlink(missing_ok=True)
        anew = collect(self.store)
        if not known.equals(anew):
            found.append(f"the index is wrong:\n{known.compare(anew) if len(known) == len(anew) else (known, anew)}")
        killed = {line[0] for line in pretend.BOOK.lines("struck")}
        for path in strays(self.store.root):
            owner = OWNER.search(path.name)
            if owner["pid"] not in killed if owner else not killed:
                found.append(f"{path.relative_to(self.store.root)} is a stray of a process that was not killed")
        Clock.jump(DAY)
        mend(check(self.store)["findings"])  # what the killed ones left: `results check --repair`
        found += [f"{path.relative_to(self.store.root)} is left" for path in strays(self.store.root)]
        found += [f"{finding.where}: {finding.problem}" for finding in check(self.store, deep=True)["findings"]]
        return found


def strays(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name.startswith((".claim.", ".probe.")) or path.suffix == ".tmp"]
