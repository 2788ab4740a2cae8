"""What became of a run, rule by rule: `slurm.reconcile` on made-up words of the store, of squeue and of sacct."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.cluster import Task
from slurm.ledger import CANCELLED, SUBMITTING, WITHDRAWN, Reservation, Submission
from slurm.reconcile import (
    ALIVE,
    CLASSES,
    ENDED,
    LAG,
    LOST,
    PATIENCE,
    WAITING,
    Seen,
    Standing,
    judge,
    missed,
    stalled,
    stuck,
    with_needs,
)  # fmt: skip

NOW, GRACE, AGO = 1_000_000.0, 120.0, 10_000.0
HELD = Reservation(1, "token", NOW - AGO)
KILLED = "job 7_3 was killed by signal {} (9: often out of memory); see its log"
MISSED = {"event": "missed", "token": "token", "time": NOW - AGO, "step": 0}


def task(state: str, **keys: Any) -> Task:
    return Task(**{"name": "sdae-token", "job": "7", "index": 3, "state": state} | keys)


def ended(state: str, ago: float = AGO, **keys: Any) -> Task:
    return task(state, ended=NOW - ago, **keys)


def submission(job: str | None = "7", time: float = NOW - AGO, host: str = "elsewhere") -> Submission:
    return Submission("token", {3: "run"}, time, 60, 120, 1, "code", "slurm", "smoke", job, "me", host, 1, "never")


def note(event: str, step: int = 0, token: str = "token", ago: float = AGO, **keys: Any) -> dict[str, Any]:
    return {"event": event, "step": step, "token": token, "time": NOW - ago, **keys}


def judged(
    seen: Seen | None = None, queue: Any = (), history: Any = (), held: Reservation = HELD, array: Any = "one",
    grace: float = GRACE,
) -> Standing:  # fmt: skip
    array = submission() if array == "one" else array
    return judge(seen or Seen("new"), held, array, queue, history, now=NOW, grace=grace)


def failed(standing: Standing) -> tuple[str, str]:
    """Class and message of a failure."""
    assert standing.verdict is not None
    return standing.verdict


# The store's word comes first
@pytest.mark.parametrize("state", ["done", "running"])
@pytest.mark.parametrize("told", ["PENDING", "FAILED"])
def test_what_the_store_knows_slurm_cannot_change(state: str, told: str) -> None:
    there = task(told)
    assert judged(Seen(state), [there], None) == Standing(state, there)
    assert judged(Seen(state), None, None, held=Reservation()) == Standing(state)


@pytest.mark.parametrize("kind", ["Lost", "NodeFailure", "Preempted", "TimedOut", "NonFiniteLoss", "OutOfMemory", None])
def test_a_failure_that_is_written_down(kind: str | None) -> None:
    state = "lost" if kind in {"Lost", "NodeFailure", "Preempted", "TimedOut"} else "failed"
    there = task("RUNNING")
    for under in ("token", None):
        assert judged(Seen("failed", kind, under), [there]) == Standing(state, there)
    assert judged(Seen("failed", kind, "an older one"), [there]).state == "running", "of an attempt before this one"
    for token in ("", CANCELLED, WITHDRAWN):
        older = Seen("failed", kind, "an older one")
        assert judged(older, [there], held=Reservation(2, token)) == Standing("started")


@pytest.mark.parametrize("token", ["", CANCELLED, WITHDRAWN])
@pytest.mark.parametrize("state", ["new", "started"])
def test_a_run_that_nobody_has_is_what_its_folder_says(token: str, state: str) -> None:
    found = judged(Seen(state), [task("RUNNING")], held=Reservation(1, token))
    assert found == Standing(state) and found.open


# squeue
def test_what_squeue_says() -> None:
    for state in WAITING - {"REQUEUE_HOLD"}:
        waits = task(state, reason="Priority")
        assert judged(queue=[waits]) == Standing("queued", waits, detail="Priority")
        needs = Seen("new", needs_done=False)
        assert judged(needs, [waits]) == Standing("waiting", waits, detail="Priority")
    for state in (*ALIVE, "COMPLETED"):
        assert judged(queue=[task(state)]) == Standing("running", task(state))
    for state in ENDED - {"COMPLETED"}:
        assert judged(queue=[task(state)]) == Standing("running", task(state), detail=f"ends: {state}")
    assert judged(queue=[task("DREAMING")]) == Standing("unknown", task("DREAMING"), detail="DREAMING")
    assert judged(queue=None) == Standing("unknown", detail="Slurm does not answer")
    assert not judged(queue=None).open


def test_what_waits_for_ever_is_told() -> None:
    never = task("PENDING", reason="DependencyNeverSatisfied")
    assert judged(queue=[never]) == Standing("waiting", never, stuck="cancel", detail=never.reason)
    held = task("PENDING", reason="launch failed requeued held")
    assert judged(queue=[held]).stuck == stuck(task("PENDING", reason="Launch Failed requeued held")) == "release"
    assert judged(queue=[task("REQUEUE_HOLD")]).stuck == "release"
    assert judged(queue=[task("REQUEUE_HOLD", reason=never.reason)]).stuck == "cancel"
    for state in ("RUNNING", "COMPLETING"):
        assert stuck(task(state, reason=never.reason)) is stuck(task(state, reason=held.reason)) is None
    assert stuck(task("PENDING", reason="Resources")) is stuck(task("PENDING")) is None


def test_of_two_arrays_the_recorded_one_counts_and_of_rows_the_last() -> None:
    first, second = task("PENDING", job="6"), task("RUNNING", job="7")
    assert judged(queue=[second, first]).task == second
    assert judged(queue=[first, second], array=submission(None)).task == second
    assert judged(queue=[second, first], array=submission(None)).task == first
    assert judged(queue=[second, first], array=None).task == first
    assert judged(queue=[task("RUNNING"), task("COMPLETING")]).task == task("COMPLETING")
    assert judged(queue=[first], history=[ended("FAILED", job="6"), ended("TIMEOUT")]).task == ended("TIMEOUT")


# sacct
@pytest.mark.parametrize("state", sorted(ENDED))
def test_an_end_is_believed_once_it_is_old(state: str) -> None:
    for ago in (0.0, LAG - 1):
        young = ended(state, ago)
        assert judged(history=[young]) == Standing("running", young, detail="ends")
    old = ended(state, LAG)
    assert judged(history=[old]).state != "running"
    assert judged(history=[ended(state, 30)], grace=30.0).state != "running", "no longer than the grace"
    assert judged(history=[ended(state, 29)], grace=30.0).state == "running"
    assert judged(Seen("started", heard=NOW - 5), history=[old]).detail == "ends", "its heart beat after its end"


@pytest.mark.parametrize(
    ("state", "keys", "store", "kind", "message"),
    [
        ("TIMEOUT", {}, "lost", "TimedOut", "job 7_3 ended as TIMEOUT"),
        ("DEADLINE", {"node": "n1"}, "lost", "TimedOut", "job 7_3 ended as DEADLINE on n1"),
        ("NODE_FAIL", {"node": "None assigned"}, "lost", "NodeFailure", "job 7_3 ended as NODE_FAIL"),
        ("BOOT_FAIL", {}, "lost", "NodeFailure", "job 7_3 ended as BOOT_FAIL"),
        ("LAUNCH_FAILED", {}, "lost", "NodeFailure", "job 7_3 ended as LAUNCH_FAILED"),
        ("RECONFIG_FAIL", {}, "lost", "NodeFailure", "job 7_3 ended as RECONFIG_FAIL"),
        ("PREEMPTED", {"node": "n2"}, "lost", "Preempted", "job 7_3 ended as PREEMPTED on n2"),
        ("OUT_OF_MEMORY", {"node": "n2"}, "failed", "OutOfMemory", "job 7_3 ended as OUT_OF_MEMORY on n2"),
        ("CANCELLED", {"reason": "CANCELLED by 1000"}, "failed", "Cancelled", "job 7_3 ended as CANCELLED"),
        ("COMPLETED", {"code": "0:0"}, "lost", "Lost", "job 7_3 ended without a result; see its log"),
        ("FAILED", {"code": "1:0"}, "failed", "JobFailed", "job 7_3 ended as FAILED with exit code 1; see its log"),
        ("FAILED", {"code": "137:0"}, "failed", "Killed", KILLED.format(9)),
        ("FAILED", {"code": "9:0"}, "failed", "Killed", KILLED.format(9)),
        ("FAILED", {"code": "0:9"}, "failed", "Killed", KILLED.format(9)),
        ("FAILED", {"code": "1:15"}, "failed", "Killed", KILLED.format(15)),
        ("FAILED", {"code": "2:0"}, "failed", "JobFailed", "job 7_3 ended as FAILED with exit code 2; see its log"),
        ("FAILED", {"code": "128:0"}, "failed", "JobFailed", "job 7_3 ended as FAILED with exit code 128; see its log"),
        ("FAILED", {"code": "1"}, "failed", "JobFailed", "job 7_3 ended as FAILED with exit code 1; see its log"),
        ("FAILED", {"code": ""}, "failed", "JobFailed", "job 7_3 ended as FAILED with exit code ; see its log"),
        ("REVOKED", {"code": "x:y"}, "failed", "JobFailed", "job 7_3 ended as REVOKED with exit code x; see its log"),
    ],
)  # fmt: skip
def test_what_an_end_means(state: str, keys: dict[str, str], store: str, kind: str, message: str) -> None:
    one = ended(state, **keys)
    assert judged(Seen("started", step=5), history=[one]) == Standing(store, one, (kind, message))


@pytest.mark.parametrize("signal", range(1, 32))
def test_signals_that_kill(signal: int) -> None:
    deadly = signal in {4, 6, 7, 8, 9, 11, 15}
    for code in (f"{128 + signal}:0", f"{signal}:0"):
        assert (failed(judged(history=[ended("FAILED", code=code)]))[0] == "Killed") == deadly


def test_an_end_that_is_nobodys_fault() -> None:
    slurms, users = ended("CANCELLED", reason="CANCELLED"), ended("CANCELLED", reason="CANCELLED by 0")
    assert judged(history=[slurms]) == Standing("started", slurms, detail="its dependency was not met")
    assert judged(history=[users]).state == "failed"
    unmet = Seen("started", needs_done=False)
    for state in ENDED - {"CANCELLED"}:
        found = judged(unmet, history=[ended(state)])
        assert found == Standing("started", ended(state), detail="its need is not done")
    assert judged(unmet, history=[users]).state == "failed"
    for outcome in ("waiting", "interrupted"):
        seen = Seen("started", notes=[note("start"), note("end", outcome=outcome)])
        for state in ("COMPLETED", "FAILED"):
            one = ended(state, code="1:0")
            assert judged(seen, history=[one]) == Standing("started", one, detail=outcome)
        assert judged(seen, history=[ended("TIMEOUT")]).detail == ""


@pytest.mark.parametrize(
    "notes",
    [
        [note("start"), note("end", outcome="failed")],
        [note("end", outcome="waiting"), note("start")],
        [note("end", outcome="waiting", token="another")],
        [note("lost", outcome="waiting")],
        [note("start"), note("end")],
    ],
)
def test_no_such_word(notes: list[dict[str, Any]]) -> None:
    found = judged(Seen("started", notes=notes, step=1), history=[ended("COMPLETED")])
    assert failed(found)[0] == "Lost"


def test_sacct_without_an_end_is_no_end() -> None:
    for state in ("RUNNING", "PENDING", "DREAMING"):
        young = task(state, started=NOW - 10)
        assert judged(history=[young]) == Standing("running", young, detail="awaited")
        waits = task(state, submitted=NOW - 10)
        assert judged(history=[waits]) == Standing("queued", waits, detail="awaited")
        old = task(state, submitted=NOW - AGO, started=NOW - AGO)
        assert judged(history=[old]) == Standing("queued", old, detail="awaited", missed=True)
        found = judged(Seen("started", notes=[note("start"), MISSED], step=1), history=[old])
        assert failed(found) == ("Lost", f"job 7_3 is gone without a trace ({state} is the last that sacct has)")


# Neither knows of it
def test_what_slurm_does_not_know_is_awaited_missed_and_lost() -> None:
    tried = Seen("started", heard=NOW - 50, notes=[note("start")])
    assert judged(tried) == Standing("running", detail="awaited")
    assert judged(Seen("new", heard=NOW - GRACE)) == Standing("running", detail="awaited", missed=True)
    assert judged(Seen("new", notes=[note("submitted", ago=GRACE - 1)])) == Standing("queued", detail="awaited")
    assert judged(held=Reservation(1, "token", NOW - 5)) == Standing("queued", detail="awaited")
    assert judged(array=submission(time=NOW - 5)) == Standing("queued", detail="awaited")
    assert judged() == Standing("queued", detail="awaited", missed=True)
    gone = judged(Seen("new", notes=[MISSED], step=2))
    assert (gone.state, failed(gone), gone.missed) == ("lost", ("Lost", "job 7 is gone without a trace"), False)
    assert judged(Seen("new", notes=[MISSED | {"token": "another"}])).missed
    assert judged(Seen("new", notes=[MISSED, note("start")])).missed, "it was seen since"
    ending = Seen("started", notes=[note("start"), note("end", outcome="interrupted"), MISSED])
    assert judged(ending) == Standing("started", detail="interrupted")
    known = task("RUNNING", started=NOW - AGO)
    assert judged(ending, history=[known]) == Standing("started", known, detail="interrupted")
    nameless = judged(Seen("started", notes=[note("start"), MISSED], step=1), array=None)
    assert failed(nameless)[1] == "job None is gone without a trace"


def test_what_is_being_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(ago: float, here: bool = False, lives: bool = False) -> Standing:
        monkeypatch.setattr(Submission, "here", here)
        monkeypatch.setattr(Submission, "submitter_lives", lives)
        return judged(held=Reservation(1, "token", NOW - ago), array=submission(None, NOW - ago))

    sent = Standing("queued", detail="is being submitted")
    never = Standing("started", detail="was never submitted")
    assert at(SUBMITTING - 1) == at(GRACE - 1, here=True) == at(AGO, here=True, lives=True) == sent
    assert at(SUBMITTING) == at(GRACE, here=True) == never
    assert never.open and not sent.open
    assert judged(array=None) == never
    assert judged(array=None, held=Reservation(1, "token", NOW - 5)) == sent
    assert judged(array=None, held=Reservation(1, "token", NOW - AGO), grace=2 * AGO) == sent
    monkeypatch.setattr(Submission, "submitter_lives", False)
    for event in ("start", "end"):
        began = Seen("started", notes=[note(event, ago=AGO)])
        assert judged(began, array=submission(None)).missed, "sbatch was heard: it began"
    told = task("RUNNING", submitted=NOW - 10)
    assert judged(history=[told], array=submission(None)) == Standing("queued", told, detail="awaited")


# How often it may be lost
@pytest.mark.parametrize("kind", ["COMPLETED", "NODE_FAIL", "PREEMPTED"])
def test_a_run_that_never_gets_on_fails(kind: str) -> None:
    for count in range(1, PATIENCE + 2):
        for event, tries in (("start", count), ("lost", 1 + count)):
            found = judged(Seen("started", step=8, notes=[note(event, 8)] * count), history=[ended(kind)])
            assert (found.state == "failed") == (tries >= PATIENCE), (event, count)
            if found.state == "failed":
                name, message = failed(found)
                assert name == "NoProgress"
                assert message.endswith(f"; {tries} attempt(s) brought no checkpoint after step 8")
                assert message.startswith("job 7_3 ended ")
    moved = [note("start", 7)] * PATIENCE
    assert judged(Seen("started", step=8, notes=moved), history=[ended(kind)]).state == "lost"


def test_a_time_limit_that_brought_no_checkpoint_is_too_short() -> None:
    for count, state in ((0, "lost"), (1, "failed")):
        found = judged(Seen("started", step=8, notes=[note("start", 8)] * count), history=[ended("TIMEOUT")])
        assert found.state == state
    assert failed(found) == ("NoProgress", "job 7_3 ended as TIMEOUT; 1 attempt(s) brought no checkpoint after step 8")


def test_attempts_in_a_row() -> None:
    notes = [note("start", 1), note("start", 2), note("lost", 2), note("missed", 9), note("start", 2)]
    assert (stalled(notes, 2), stalled(notes, 2, "lost"), stalled(notes, 1), stalled([], 2)) == (2, 1, 0, 0)
    assert stalled([note("start", 2), note("retry", 2), note("start", 2)], 2) == 1
    assert stalled([note("start", 2), note("lost", 1), note("start", 2)], 2) == 1
    assert stalled([note("start", 2), note("end", 1), note("start", 2)], 2) == 2
    assert not missed([], "token") and missed([note("start"), MISSED], "token") and not missed([MISSED], "other")


# What it means for others
@pytest.mark.parametrize("state", ["new", "started", "lost", "queued", "done"])
@pytest.mark.parametrize("need", ["failed", "waiting", "lost", "done", "running", "queued", "new"])
def test_a_run_waits_for_what_will_not_be_done(state: str, need: str) -> None:
    before = Standing(state, detail="said")
    after = with_needs(before, ["done", need])
    if state in ("new", "started") and need in ("failed", "waiting", "lost"):
        assert after == Standing("waiting", detail="said", free=True) and after.open
    else:
        assert after == before
    assert with_needs(before, []) == before


@pytest.mark.parametrize("state", ["waiting", "queued", "running", "done", "failed", "unknown"])
def test_only_what_nobody_has_is_open(state: str) -> None:
    assert not Standing(state).open and Standing(state, free=True).open
    assert all(Standing(state).open for state in ("new", "started", "lost"))


def test_every_state_of_slurm_is_of_one_kind() -> None:
    assert not ALIVE & WAITING and not ALIVE & ENDED and not WAITING & ENDED
    assert set(CLASSES) < ENDED and LOST - {"Lost"} <= set(CLASSES.values())
    running = {
        "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
        "REQUEUED", "REQUEUE_FED", "SPECIAL_EXIT",
    }  # fmt: skip
    over = {
        "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL",
        "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
    }  # fmt: skip
    assert (running, {"PENDING", "REQUEUE_HOLD", "RESV_DEL_HOLD"}, over) == (ALIVE, WAITING, ENDED)
    assert (LAG, PATIENCE) == (60.0, 5)


events = st.sampled_from(["start", "lost", "end", "retry", "missed", "submitted"])
notes = st.lists(st.builds(note, events, st.integers(0, 2), st.sampled_from(["token", "other"])), max_size=6)
rows = st.lists(st.builds(ended, st.sampled_from(sorted(ENDED | ALIVE | WAITING)), st.floats(0, 2 * AGO)), max_size=2)


@settings(deadline=None)
@given(
    st.sampled_from(["new", "started"]), notes, st.one_of(st.none(), rows), st.one_of(st.none(), rows), st.booleans()
)
def test_nothing_is_submitted_twice_or_lost_too_soon(
    state: str, said: Any, queue: Any, history: Any, done: bool
) -> None:
    """Whatever is told: nobody else takes what Slurm has in its queue, and a run is lost by a word that is old."""
    found = judged(Seen(state, notes=said, needs_done=done), queue, history)
    if queue is None or queue:
        assert not found.open and found.verdict is None
    if history and not queue and history[-1].state in ENDED and history[-1].ended > NOW - LAG:
        assert not found.open and found.verdict is None
    if found.state in ("lost", "failed"):
        assert found.verdict and "\n" not in found.verdict[1] and found.task == (history[-1] if history else None)
    assert judged(Seen("done", notes=said), queue, history).state == "done"
