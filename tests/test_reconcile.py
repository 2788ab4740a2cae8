"""The reconciler against a fake Slurm: random schedules of faults, and each of its guards by itself.

Every run is done once, none is lost, nothing wrong is told. SDAE_SEED=N plays schedule N again. From a terminal
`python tests/test_reconcile.py SEED` tells all that happens in it, and `--schedules 10000` plays so many, going on
where it was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import slurm_lab
from fake_slurm import Element
from slurm_lab import PLANS, REAL, Lab, laboratory, patched, play

import slurm.heal
import slurm.job
import slurm.ledger
import slurm.look
import slurm.reconcile
import slurm.submit
import slurm.sweep
from sdae.store import RunFolder
from slurm.job import Attempt
from slurm.ledger import Ledger, Submission
from slurm.profile import Profile

FIRST, SECOND = PLANS[0][:2]  # a pre-training and what needs it
PARTS, SHARE, BUDGET = 4, 375, 14.0  # of the random schedules: parts, schedules in each, and seconds for each
FIRST_SEED = 1_000_000


# Random schedules
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_happens_every_run_is_done_once(part: int) -> None:
    seed = os.environ.get("SDAE_SEED")
    first = int(seed) if seed else FIRST_SEED + part * SHARE  # the same ones each time; `make trust` plays others
    print(f"schedules from SDAE_SEED={first} on")
    end = time.monotonic() + BUDGET
    with patched():
        for number in range(first, first + (1 if seed else SHARE)):
            play(number)
            if time.monotonic() > end:
                break


# Guards, each with a story that goes well with it and not without
def until(lab: Lab, condition: Callable[[], Any], seconds: float = 4000) -> None:
    end = lab.world.now + seconds
    while not condition():
        for error in lab.world.errors:
            raise error
        if lab.world.now > end:
            lab.wrong(f"not within {seconds:.0f} s")
        lab.world.advance(1)


def submit(lab: Lab, host: str = "login1", failed: bool = False) -> None:
    """`sweep submit` or `retry`, from its start to its end."""
    process = lab.command(host, lambda: lab.hand_over(failed), "retry" if failed else "submit")
    until(lab, lambda: process.over)


def check(lab: Lab, holds: Any, text: str) -> None:
    if not holds:
        lab.wrong(text)


def starts(lab: Lab) -> Element:
    """The first task that starts."""
    until(lab, lambda: any(truth.process for truth in lab.truth.values()))
    return next(e for e in lab.slurm.running() if e.process in {truth.process for truth in lab.truth.values()})


def tasks(lab: Lab, identity: str = FIRST.id) -> list[Element]:
    """All tasks that Slurm ever had for a run."""
    return [element for element in lab.slurm.all() if lab.run_of(element) == identity]


def close(lab: Lab, open: bool = False) -> None:
    """No node takes a job; `open`: they do again."""
    lab.slurm.nodes = dict.fromkeys(lab.slurm.nodes, open)
    lab.slurm._kick()


def failure(lab: Lab, identity: str = FIRST.id) -> str | None:
    return (lab.store.run(identity).failure() or {}).get("class")


def peace(lab: Lab, heals: int = 20, failed: bool = False) -> None:
    """`heal` every five minutes until all is done."""
    for _ in range(heals):
        submit(lab, failed=failed)
        lab.world.advance(300)
        if lab.all_done:
            return
    lab.wrong("not done")


def a_cancelled_task_does_not_run(lab: Lab) -> None:
    lab.add(FIRST)
    close(lab)
    submit(lab)
    lab.slurm.deaf = {"scancel"}
    lab.command("login1", lambda: lab.take_back([FIRST.id]), "cancel")
    lab.world.advance(100)
    close(lab, open=True)
    lab.world.advance(1000)
    check(lab, not lab.truth[FIRST.id].finished, "it ran")
    lab.slurm.deaf = set()
    peace(lab)


def a_wrong_dependency_runs_on_nothing(lab: Lab) -> None:
    lab.add(FIRST, SECOND)
    submit(lab)
    for element in tasks(lab, SECOND.id):
        element.array.after = None
    peace(lab)


def a_lost_node_s_run_goes_on_by_itself(lab: Lab) -> None:
    lab.add(FIRST, work=600)
    submit(lab)
    node = starts(lab).node
    lab.world.advance(150)
    lab.slurm.lose_node(node, 30, 2000)
    until(lab, lambda: lab.all_done)


def of_two_submitters_one_has_a_run(lab: Lab) -> None:
    lab.add(FIRST, SECOND)
    both = [lab.command(f"login{n}", lab.hand_over, "submit") for n in (1, 2)]
    until(lab, lambda: all(process.over for process in both))
    for run in lab.runs:
        check(lab, len(tasks(lab, run.id)) == 1, "submitted twice")
    peace(lab)


def what_sbatch_did_not_say_is_found(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.faults.unheard = 1.0
    process = lab.command("login1", lab.hand_over, "submit")
    until(lab, lambda: tasks(lab))
    lab.slurm.faults.unheard = 0.0
    until(lab, lambda: process.over)
    check(lab, len(tasks(lab)) == 1, "submitted twice")
    peace(lab)


def a_row_of_sacct_is_not_the_end(lab: Lab) -> None:
    lab.add(FIRST, work=600)
    lab.slurm.delay = (20, 20)
    submit(lab)
    element = starts(lab)
    lab.slurm.lose_node(element.node, 400, 2000)  # longer than a claim holds
    until(lab, lambda: element.restart)
    lab.slurm.accounting = lab.slurm.accounting[:-1]  # the row of the next attempt is late
    element.hidden = lab.world.now + 20
    submit(lab)
    check(lab, failure(lab) is None, "lost")
    peace(lab)


def what_slurm_does_not_know_yet_is_not_lost(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.faults.lag = 1e6
    close(lab)
    submit(lab)
    tasks(lab)[0].hidden = lab.world.now + 20
    submit(lab)
    submit(lab)
    close(lab, open=True)
    peace(lab)


def what_squeue_misses_once_is_not_lost(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.faults.sacct = False
    close(lab)
    submit(lab)
    lab.world.advance(1000)
    tasks(lab)[0].hidden = lab.world.now + 20
    submit(lab)
    check(lab, failure(lab) is None, "lost")
    close(lab, open=True)
    peace(lab)


def an_array_taken_twice_is_cancelled_as_one(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.faults.twice = 1.0
    close(lab)
    submit(lab)
    lab.truth[FIRST.id].causes.add("Cancelled")
    job = next(submission.job for submission in map(lab.ledger.read, lab.ledger.tokens()) if submission)
    lab.slurm.end(lab.slurm.arrays[job or ""].elements[0], "CANCELLED by 1000")
    close(lab, open=True)
    lab.world.advance(1000)
    check(lab, not lab.all_done, "its twin ran")
    submit(lab)
    check(lab, failure(lab) == "Cancelled", "not cancelled")
    peace(lab, failed=True)


def orphans(lab: Lab) -> None:
    """An array that Slurm takes twice, and whose submitter is killed when sbatch has answered."""
    lab.slurm.faults.twice = 1.0
    process, accept = lab.command("login1", lab.hand_over, "submit"), lab.slurm._accept

    def last(*words: Any) -> str:
        process.life = 0
        return accept(*words)

    with mock.patch.object(lab.slurm, "_accept", last):
        until(lab, lambda: not process.alive)


def one_of_two_orphans_is_adopted(lab: Lab) -> None:
    lab.add(FIRST)
    close(lab)
    orphans(lab)
    submit(lab)
    check(lab, [element.over for element in tasks(lab)].count(False) == 1, "two wait")
    close(lab, open=True)
    peace(lab)


def an_orphan_s_failure_is_not_repeated(lab: Lab) -> None:
    """Nobody has said yet which of the twins counts."""
    lab.add(FIRST)
    lab.slurm.nodes, lab.slurm.slots = {"node1": True}, 1
    lab.truth[FIRST.id].doomed = True
    orphans(lab)
    lab.world.advance(2000)
    check(lab, failure(lab) == "NonFiniteLoss", "it did not fail")
    peace(lab, failed=True)


def two_do_not_choose_between_twins(lab: Lab) -> None:
    """One submitter waits for sbatch's answer while another one heals."""
    lab.add(FIRST)
    lab.slurm.faults.twice = 1.0
    accept = lab.slurm._accept

    def last(*words: Any) -> str:
        job = accept(*words)
        lab.slurm.arrays = dict(reversed(lab.slurm.arrays.items()))
        return job

    with mock.patch.object(lab.slurm, "_accept", last), mock.patch.object(lab.world.random, "choice", max):
        waiting = lab.command("login2", lab.hand_over, "submit")
        until(lab, lambda: tasks(lab))
        waiting.frozen = lab.world.now + 30
        submit(lab)
        until(lab, lambda: waiting.over)
    peace(lab)


def a_run_that_never_gets_on_is_given_up(lab: Lab) -> None:
    lab.add(FIRST, every=0, work=10_000)
    submit(lab)
    for _ in range(12):
        until(lab, lambda: failure(lab) or any(e.process and e.process.loops for e in lab.slurm.running()))
        if failure(lab):
            break
        element = lab.slurm.running()[0]
        lab.world.advance(60)
        lab.slurm.requeue(element, "REQUEUED")
        lab.world.advance(40)
    check(lab, failure(lab) == "NoProgress", "it goes on for ever")


def a_run_that_never_starts_is_given_up(lab: Lab) -> None:
    lab.add(FIRST)
    lab.profile = Profile(time="60", requeue=False)
    for _ in range(10):
        submit(lab)
        if failure(lab) == "NoProgress":
            return
        until(lab, lambda: lab.slurm.running() or failure(lab) == "NoProgress")
        lab.truth[FIRST.id].tries += 1
        for element in lab.slurm.running():
            lab.slurm.end(element, "NODE_FAIL")
        lab.world.advance(120)
    lab.wrong("it goes on for ever")


def a_retried_run_has_all_its_attempts_again(lab: Lab) -> None:
    a_run_that_never_gets_on_is_given_up(lab)
    lab.truth[FIRST.id].every, lab.truth[FIRST.id].work = 50, 100
    lab.truth[FIRST.id].tries = 0
    submit(lab, failed=True)
    until(lab, lambda: lab.all_done)


def too_short_a_time_limit_is_told_at_once(lab: Lab) -> None:
    lab.add(FIRST, every=0, work=10_000)
    lab.profile = Profile(time="10", warn_seconds=60)
    lab.truth[FIRST.id].causes.add("TimedOut")
    submit(lab)
    until(lab, lambda: failure(lab))
    check(lab, lab.truth[FIRST.id].tries == 1, f"after {lab.truth[FIRST.id].tries} attempts")


def a_process_that_comes_back_does_not_disturb(lab: Lab, work: int = 2000) -> None:
    lab.add(FIRST, work=work)
    submit(lab)
    node = starts(lab).node
    lab.world.advance(130)
    lab.slurm.freeze_node(node, 1200, 40)
    until(lab, lambda: lab.all_done)
    lab.world.advance(2000)


def a_process_that_comes_back_after_the_end_does_not_disturb(lab: Lab) -> None:
    a_process_that_comes_back_does_not_disturb(lab, work=400)


def who_waits_for_a_failed_need_is_handed_over_again(lab: Lab) -> None:
    lab.add(FIRST, SECOND)
    lab.profile = Profile(time="60", sbatch={"kill-on-invalid-dep": False})
    lab.truth[FIRST.id].doomed = True
    submit(lab)
    lab.world.advance(400)
    submit(lab)
    peace(lab, failed=True)


def a_withdrawn_task_does_not_stay_in_the_queue(lab: Lab) -> None:
    lab.add(FIRST, SECOND)
    lab.profile = Profile(time="60", sbatch={"kill-on-invalid-dep": False})
    lab.truth[FIRST.id].doomed = True
    submit(lab)
    lab.world.advance(400)
    lab.slurm.deaf = {"scancel"}
    submit(lab)
    lab.slurm.deaf = set()
    submit(lab)
    check(lab, all(e.over for e in lab.slurm.all()), "a task waits for ever")
    peace(lab, failed=True)


def a_held_task_is_released(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.faults.hold = 1.0
    submit(lab)
    lab.slurm.requeue(starts(lab), "PREEMPTED")
    lab.slurm.faults.hold = 0.0
    peace(lab)


def a_slow_submitter_elsewhere_keeps_its_runs(lab: Lab, host: str = "login2", seconds: float = 500) -> None:
    lab.add(FIRST)
    slow = lab.command(host, lab.hand_over, "submit")
    until(lab, lambda: lab.ledger.exists() and any(lab.ledger.tokens()))
    slow.frozen = lab.world.now + seconds
    lab.world.advance(seconds - 100)
    submit(lab)
    until(lab, lambda: slow.over)
    check(lab, len(tasks(lab)) == 1, "submitted twice")
    peace(lab)


def a_slow_submitter_here_keeps_its_runs(lab: Lab) -> None:
    a_slow_submitter_elsewhere_keeps_its_runs(lab, "login1", 2000)


def who_beats_is_running_whatever_slurm_says(lab: Lab) -> None:
    lab.add(FIRST, work=1000)
    lab.profile = Profile(time="60", requeue=False)
    submit(lab)
    element = starts(lab)
    lab.world.advance(350)
    lab.slurm._leave(element.node, 0)  # Slurm has lost sight of the node, which works on
    lab.world.advance(100)
    submit(lab)
    until(lab, lambda: lab.all_done)


def what_needs_a_failed_run_is_not_submitted(lab: Lab) -> None:
    lab.add(FIRST)
    lab.truth[FIRST.id].doomed = True
    submit(lab)
    until(lab, lambda: failure(lab))
    lab.add(SECOND)
    lab.world.advance(100)
    submit(lab)
    check(lab, not tasks(lab, SECOND.id), "submitted for nothing")
    peace(lab, failed=True)


def a_node_without_scontrol_loses_nothing(lab: Lab) -> None:
    lab.add(FIRST, work=1000)
    lab.profile = Profile(time="10", warn_seconds=60)
    lab.slurm.bare = set(lab.slurm.nodes)
    submit(lab)
    until(lab, lambda: failure(lab) == "TimedOut")
    peace(lab)


def nobody_answers_for_a_while(lab: Lab) -> None:
    """And what is running is told to be so, the rest to be unknown."""
    lab.add(*PLANS[0], work=1000)
    submit(lab)
    starts(lab)
    lab.slurm.dark = lab.world.now + 300
    found = lab.watch()
    states = Counter(standing.state for standing in found.standings.values())
    check(lab, states == {"running": 1, "unknown": len(PLANS[0]) - 1}, f"{states}")
    check(lab, found.trouble, "no trouble is told")
    lab.world.advance(300)
    peace(lab)


def what_a_limit_leaves_out_comes_later(lab: Lab) -> None:
    lab.add(*PLANS[0], *PLANS[1])
    lab.slurm.task_limit, lab.slurm.secret = 3, True
    peace(lab)


def what_slurm_refused_may_be_submitted_at_once(lab: Lab) -> None:
    lab.add(FIRST)
    lab.slurm.task_limit, lab.slurm.secret = 0, True
    submit(lab)
    lab.slurm.task_limit = 10
    submit(lab)
    check(lab, tasks(lab), "not submitted")
    peace(lab)


def a_warning_while_it_loads_is_no_failure(lab: Lab) -> None:
    lab.add(FIRST)
    submit(lab)
    until(lab, lambda: any(note["event"] == "start" for note in lab.store.run(FIRST.id).notes()))
    element = lab.slurm.running()[0]
    check(lab, element.process and not element.process.loops, "it runs already")
    lab.slurm.preempt(element, requeue=True, warned=True)
    until(lab, lambda: lab.all_done)


def who_is_cancelled_does_not_requeue_itself(lab: Lab) -> None:
    lab.add(FIRST, work=1000)
    submit(lab)
    element = starts(lab)
    lab.world.advance(100)
    lab.truth[FIRST.id].causes.add("Cancelled")
    lab.slurm.end(element, "CANCELLED by 1000")
    lab.world.advance(500)
    submit(lab)
    check(lab, failure(lab) == "Cancelled", "it goes on")
    peace(lab, failed=True)


def _overwrite(ledger: Ledger, identity: str, after: Any, token: str) -> bool:
    (ledger.links / f"{identity}.{after.number + 1}").unlink(missing_ok=True)
    return GUARDED.reserve(ledger, identity, after, token)


def _own(attempt: Attempt) -> bool:
    """`_superseded` without the look at the job's id."""
    return attempt.ledger.lost(attempt.folder.id, attempt.token)


def _without_needs(ledger: Ledger, token: str) -> dict[str, Any]:
    return {identity: order | {"needs": []} for identity, order in GUARDED.runs(ledger, token).items()}


def _without_lost(notes: Any, step: int, event: str = "start") -> int:
    return 0 if event == "lost" else GUARDED.stalled(notes, step, event)


def _submitit_s(*_: Any) -> None:
    lab = slurm_lab.LAB
    element = lab.slurm.mine()
    lab.slurm._requeue_from_inside(element, lab.world.process)


class GUARDED:
    """What stays when a guard is taken out."""

    reserve, runs, stalled = REAL.reserve, Ledger.runs, slurm.reconcile.stalled
    look = staticmethod(REAL.look)


Change = tuple[Any, str, Any]


def always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


STUCK: Sequence[Change] = ((slurm.reconcile, "stuck", always(None)), (slurm.heal, "stuck", always(None)))
GUARDS: dict[str, tuple[Callable[[Lab], None], Sequence[Change]]] = {
    "superseded": (a_cancelled_task_does_not_run, [(Attempt, "_superseded", always(False))]),
    "need done": (a_wrong_dependency_runs_on_nothing, [(Ledger, "runs", _without_needs)]),
    "claim wait": (a_lost_node_s_run_goes_on_by_itself, [(slurm.job, "GRACE_SECONDS", -1.0)]),
    "reserve": (of_two_submitters_one_has_a_run, [(REAL, "reserve", _overwrite)]),
    "found": (what_sbatch_did_not_say_is_found, [(slurm.submit._Sender, "found", always(None))]),
    "lag": (a_row_of_sacct_is_not_the_end, [(slurm.reconcile, "LAG", 0.0)]),
    "grace": (
        what_slurm_does_not_know_yet_is_not_lost,
        [(REAL, "look", lambda *words, **options: GUARDED.look(*words, **(options | {"grace": 0.0})))],
    ),
    "missed": (
        what_squeue_misses_once_is_not_lost,
        [(slurm.reconcile, "missed", always(True)), (slurm.look, "missed", always(True))],
    ),
    "twin": (an_array_taken_twice_is_cancelled_as_one, [(Attempt, "_superseded", _own)]),
    "adoption": (one_of_two_orphans_is_adopted, [(Submission, "awaited", True)]),
    "failed twin": (an_orphan_s_failure_is_not_repeated, [(slurm.job, "LOST", {"NonFiniteLoss"})]),
    "awaited": (
        two_do_not_choose_between_twins,
        [(Submission, "awaited", property(lambda submission: submission.submitter_lives))],
    ),
    "patience": (
        a_run_that_never_gets_on_is_given_up,
        [(slurm.job, "PATIENCE", 10**9), (slurm.reconcile, "PATIENCE", 10**9)],
    ),
    "lost is counted": (a_run_that_never_starts_is_given_up, [(slurm.reconcile, "stalled", _without_lost)]),
    "retry is noted": (a_retried_run_has_all_its_attempts_again, [(slurm.sweep, "forgive", always(None))]),
    "stalled": (too_short_a_time_limit_is_told_at_once, [(slurm.job, "stalled", always(0))]),
    "dispossessed": (a_process_that_comes_back_does_not_disturb, [(RunFolder, "dispossessed", False)]),
    "dispossessed, and done": (
        a_process_that_comes_back_after_the_end_does_not_disturb, [(RunFolder, "dispossessed", False)]
    ),
    "never satisfied": (who_waits_for_a_failed_need_is_handed_over_again, STUCK),
    "vain": (a_withdrawn_task_does_not_stay_in_the_queue, [(Ledger, "lost", always(False))]),
    "release": (a_held_task_is_released, STUCK),
    "submitting": (a_slow_submitter_elsewhere_keeps_its_runs, [(slurm.reconcile, "SUBMITTING", 0.0)]),
    "submitter lives": (a_slow_submitter_here_keeps_its_runs, [(Submission, "submitter_lives", False)]),
    "heartbeat": (who_beats_is_running_whatever_slurm_says, [(RunFolder, "heartbeat", always(None))]),
    "too many": (what_a_limit_leaves_out_comes_later, [(slurm.submit, "TOO_MANY", re.compile("$^"))]),
    "forget": (what_slurm_refused_may_be_submitted_at_once, [(REAL, "forget", always(None))]),
    "interrupt": (a_warning_while_it_loads_is_no_failure, [(slurm.job, "_interrupt", _submitit_s)]),
    "term wait": (who_is_cancelled_does_not_requeue_itself, [(slurm.job, "TERM_WAIT", 0.0)]),
}  # fmt: skip


STORIES = (what_needs_a_failed_run_is_not_submitted, a_node_without_scontrol_loses_nothing, nobody_answers_for_a_while)


def tell(story: Callable[[Lab], None], talk: bool = False) -> None:
    with laboratory(story.__name__, talk) as lab:
        story(lab)
        for error in lab.world.errors:
            raise error


@pytest.mark.parametrize("story", STORIES)
def test_story(story: Callable[[Lab], None]) -> None:
    with patched():
        tell(story)


@pytest.mark.parametrize("name", GUARDS)
def test_each_guard_is_needed(name: str) -> None:
    story, changes = GUARDS[name]
    with patched():
        tell(story)
        with contextlib.ExitStack() as stack:
            for target, attribute, value in changes:
                stack.enter_context(mock.patch.object(target, attribute, value))
            with pytest.raises(AssertionError):
                tell(story)


# Many of them, from a terminal
def digest() -> str:
    """Of the code that is tried: progress counts for it alone."""
    house, found = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted([*house.glob("slurm/*.py"), house / "sdae" / "store.py", *house.glob("tests/*slurm*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def chunk(seeds: Sequence[int]) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Plays schedules: what happened in them, and the seeds of those that went wrong, with a line each."""
    counts: Counter[str] = Counter()
    wrong = []
    with patched():
        for seed in seeds:
            counts["schedules"] += 1
            try:
                counts += play(seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append((seed, f"{type(error).__name__}: {error}"[:200]))
    return counts, wrong


def many(count: int, first: int | None, jobs: int, state: Path) -> int:
    """Plays `count` schedules, `jobs` at a time; goes on from the file `state` where it is of the same code."""
    before = json.loads(state.read_text()) if state.exists() else {}
    if before.get("code") != digest() or before.get("asked") != [count, first]:
        start = random.SystemRandom().randrange(10**9) if first is None else first
        before = {"code": digest(), "asked": [count, first], "first": start, "counts": {}, "wrong": [], "seconds": 0.0}
    start, counts, done = before["first"], Counter(before["counts"]), before["counts"].get("schedules", 0)
    began, wrong = time.monotonic() - before["seconds"], before["wrong"]
    print(f"schedules {start} to {start + count - 1}, {done} of them done before", flush=True)
    parts = [range(start + n, min(start + n + 50, start + count)) for n in range(done, count, 50)]
    with ProcessPoolExecutor(jobs) as pool:
        for part, (more, failed) in zip(parts, pool.map(chunk, parts), strict=True):
            counts += more
            wrong += failed
            seconds = time.monotonic() - began
            state.write_text(json.dumps(before | {"counts": counts, "wrong": wrong, "seconds": seconds}))
            for seed, line in failed:
                print(f"SDAE_SEED={seed}: {line}")
            if part.start // 500 != part.stop // 500:
                rate = counts["schedules"] / seconds
                print(f"{counts['schedules']} of {count}, {len(wrong)} wrong, {rate:.0f}/s", flush=True)
    summary = {"first": start, "wrong": wrong, "seconds": round(time.monotonic() - began), **counts}
    print(json.dumps(summary, sort_keys=True))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seed", nargs="?", type=int, help="one schedule, and all that happens in it")
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, help="the first seed; by default a random one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    state = Path(tempfile.gettempdir()) / f"sdae-schedules-{os.getuid()}.json"
    parser.add_argument("--state", type=Path, default=state, help=f"where progress is kept ({state})")
    words = parser.parse_args()
    if words.seed is None:
        with contextlib.suppress(KeyboardInterrupt):
            return many(words.schedules, words.first, words.jobs, words.state)
        return 130
    with patched():
        play(words.seed, talk=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
