"""What a sweep shows while it runs, on stderr: a table that changes on a terminal, a line per event in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from cli.output import note, printable

if TYPE_CHECKING:
    from ablations.planner import Sweep
    from slurm.local import Summary

EVERY = 30.0  # seconds between two lines of progress in a pipe


class Live:
    """`with Live(sweep) as live: run_local(.., on_update=live)`."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.began = self.told = time.monotonic()
        self.last: dict[str, str] | None = None
        self.heard: dict[str, tuple[float, int]] = {}  # when a run was first heard of, and its step then
        console = Console(stderr=True)
        self.rich = RichLive(console=console, auto_refresh=False, transient=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Live:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich:
            self.rich.stop()

    def __call__(self, summary: Summary) -> None:
        if self.rich:
            self.rich.update(self._drawn(summary), refresh=True)
        else:
            self._lines(summary)

    def _counts(self, summary: Summary) -> str:
        counts = Counter(summary.states.values())
        parts = [
            f"{counts[s]} {s}" for s in ("done", "running", "elsewhere", "ready", "waiting", "failed") if counts[s]
        ]
        minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
        return f"{self.sweep.scale.name}: {len(summary.states)} runs: {', '.join(parts)}; {minutes}:{seconds:02d}"

    def _what(self, identity: str) -> str:
        feeds = self.sweep.runs[identity].feeds
        more = f" and {len(feeds) - 1} more" if len(feeds) > 1 else ""
        return f"{identity} ({feeds[0]}{more})" if feeds else identity

    def _left(self, told: dict[str, Any]) -> str:
        """The time to the run's end, at the pace since it was first heard of."""
        now, step, steps = time.monotonic(), told.get("step") or 0, told.get("steps") or 0
        began, first = self.heard.setdefault(str(told.get("id")), (now, step))
        if step <= first:
            return ""
        seconds = round((now - began) / (step - first) * (steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _drawn(self, summary: Summary) -> Group:
        running = Table("run", "for", "epoch", "images/s", "left", box=None)
        for identity in summary.having("running"):
            told = summary.progress.get(identity, {})
            feeds = self.sweep.runs[identity].feeds
            running.add_row(identity, feeds[0] if feeds else "", epoch(told), speed(told), self._left(told))
        lines = [f"failed: {self._what(i)}: {summary.messages.get(i, '')}" for i in summary.having("failed")[-3:]]
        failed = [Text(printable(line), style="red", no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(Text(self._counts(summary), style="bold"), running, *failed)

    def _lines(self, summary: Summary) -> None:
        before, self.last = self.last, dict(summary.states)
        if before is None:
            note(self._counts(summary))
            return
        for identity, state in summary.states.items():
            if state != before[identity] and state in ("done", "failed"):
                self.told = time.monotonic()
                done = sum(s == "done" for s in summary.states.values())
                reason = f": {summary.messages.get(identity, '')}" if state == "failed" else ""
                note(f"[{done}/{len(summary.states)}] {state}: {self._what(identity)}{reason}")
        if time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            told = [f"{i} {epoch(p)} {speed(p)}".rstrip() for i, p in summary.progress.items()]
            note("; ".join([self._counts(summary), *told]))


def epoch(told: dict[str, Any]) -> str:
    return f"{told['epoch']:.4g}/{told['epochs']}" if told.get("epochs") and told.get("epoch") is not None else ""


def speed(told: dict[str, Any]) -> str:
    return f"{told['images_per_s']:,.0f}" if told.get("images_per_s") else ""


def left(told: dict[str, Any]) -> str:
    """`1:02:03` until a run ends."""
    seconds = told.get("eta_s")
    if seconds is None:
        return ""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def status_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of `sweep status`; runs that nobody has begun are only counted."""
    columns = ["run", "state", "epoch", "images/s", "left", "job", "Slurm says", "feeds"]
    rows = []
    for row in document["runs"]:
        if row["state"] != "new":
            task = row.get("slurm", {})
            said = _said(task) or row.get("detail", "")
            first = row["feeds"][0] if row["feeds"] else ""
            rows.append([row["id"], row["state"], epoch(row), speed(row), left(row), task.get("job"), said, first])
    return columns, rows


def _said(task: dict[str, Any]) -> str:
    """`PENDING Dependency`, `RUNNING node3`, `CANCELLED by 1000`."""
    state, reason = task.get("state", ""), task.get("reason", "")
    if reason.startswith(state):  # sacct's state in full
        return str(reason)
    return " ".join(filter(None, (state, reason if reason != "None" else task.get("node"))))


def watched(look: Callable[[], dict[str, Any]], every: float) -> None:
    """Shows how runs stand until none is queued or running, or Ctrl-C: a table that changes on a terminal, in a pipe a
    line whenever the counts change."""
    console, before = Console(), None
    drawn = RichLive(console=console, auto_refresh=False) if console.is_terminal else None
    with drawn or contextlib.nullcontext(), contextlib.suppress(KeyboardInterrupt):
        while True:
            document = look()
            counts = ", ".join(f"{n} {state}" for state, n in document["counts"].items())
            if drawn:
                columns, rows = status_rows(document)
                table = Table(*columns, box=None)
                shown = [row for row in rows if row[1] != "done"][: max(5, console.height - 5)]
                for row in shown:
                    table.add_row(*("" if cell is None else printable(str(cell)).replace("[", r"\[") for cell in row))
                trouble = [Text(printable(str(document["trouble"])), style="red")] if document["trouble"] else []
                drawn.update(Group(Text(counts, style="bold"), table, *trouble), refresh=True)
            elif counts != before:
                before = counts
                print(f"{time.strftime('%H:%M:%S')} {counts}", flush=True)
            if not document["counts"].keys() & {"queued", "running", "unknown"}:
                return
            time.sleep(every)
