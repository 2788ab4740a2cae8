"""Commands are killed and their disks, power and clocks taken away; the same command again must end as if nothing had
been. `python tests/crash_campaign.py --out FILE --kills N --seed S [--seconds T] [--every FAULT ..]`; called again it
goes on, and first plays again what failed.

With --every these faults come first, at each operation of each command. Then case after case is drawn from the seed, in
turn each fault at every operation of a command, in random order, none twice before all have had their turn. Every third
is random: up to three faults in a row, each in a call of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crash.commands import Command, commands
from crash.harness import FAULTS, Fault, Yard, compiler

from sdae import provenance
from sdae.files import write_atomically

TOGETHER = ("kill", "term", "int")  # what commands of several processes are struck with
MEMORY = Path("/dev/shm")  # nothing is flushed to a disk there, so flushing costs nothing
Case = dict[str, Any]
Plan = list[tuple[Fault, int]]


def schedule(yard: Yard, chosen: dict[str, Command], seed: int) -> Iterator[tuple[str, Command, Plan]]:
    """Cases without end: a name, the command, its faults and at which operations."""
    turns: dict[tuple[str, str], tuple[random.Random, list[int]]] = {}
    for number in itertools.count():
        draw = random.Random(f"{seed} {number}")
        (command,) = draw.choices([*chosen.values()], [command.weight for command in chosen.values()])
        count = yard.prepare(command)
        known = [fault for fault in FAULTS.values() if not command.several or fault.name in TOGETHER]
        faults = draw.choices(known, [fault.weight for fault in known], k=3)
        if number % 3 == 2:
            plan = [(fault, draw.randint(1, count)) for fault in faults[: draw.randint(1, 3)]]
        else:
            key = (command.name, faults[0].name)
            own, left = turns.setdefault(key, (random.Random(f"{seed} {key}"), []))
            if not left:
                left += own.sample(range(1, count + 1), count)
            plan = [(faults[0], left.pop())]
        yield f"{number}", command, plan


def everywhere(yard: Yard, chosen: dict[str, Command], faults: Sequence[str]) -> Iterator[tuple[str, Command, Plan]]:
    """These faults at each operation of each command."""
    for command in chosen.values():
        if not command.several:
            for fault, at in itertools.product(faults, range(1, yard.prepare(command) + 1)):
                yield f"{command.name} {fault} {at}", command, [(FAULTS[fault], at)]


def run(
    yard: Yard, seed: int, kills: int, seconds: float, chosen: dict[str, Command], every: Sequence[str],
    done: dict[str, Case],
) -> Iterator[tuple[str, Case]]:  # fmt: skip
    """Cases that are not done yet or went wrong, until there were so many kills or so many seconds have passed."""
    end = time.monotonic() + seconds
    again = {name for name, case in done.items() if case["wrong"]}
    random_ones = schedule(yard, chosen, seed)
    for name, command, faults in itertools.chain(everywhere(yard, chosen, every), random_ones):
        enough = name.isdecimal() and sum(killed(case) for case in done.values()) >= kills
        if (enough and not any(map(str.isdecimal, again))) or time.monotonic() > end:
            return
        if name in again or not (enough or name in done):
            again.discard(name)
            began = time.monotonic()
            struck: list[int] = []
            wrong = yard.case(command, faults, random.Random(f"{seed} {name}"), struck)
            yield name, {
                "command": command.name, "faults": [[fault.name, at] for fault, at in faults], "struck": struck,
                "wrong": wrong,
                "seconds": round(time.monotonic() - began, 2),
            }  # fmt: skip


def killed(case: Case) -> int:
    """How many of its faults ended a process; not those whose operation was never come to."""
    return sum(FAULTS[name].kills and at > 0 for (name, _), at in zip(case["faults"], case["struck"], strict=True))


def report(seed: int, counts: dict[str, int], cases: dict[str, Case]) -> dict[str, Any]:
    """Counts by command and fault, how many operations were struck (of those of several processes: milliseconds), what
    failed, and where this was made."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    struck: dict[str, set[int]] = defaultdict(set)
    for case in cases.values():
        for (fault, asked), at in zip(case["faults"], case["struck"], strict=True):
            if at:
                table[case["command"]][fault] += 1
                if FAULTS[fault].kills and at == asked + 1:  # a write is done by half, and the kill comes behind it
                    at = asked
                if fault != "power-after" and at <= counts[case["command"]]:  # a later call may have more operations
                    struck[case["command"]].add(at)
    return {
        "seed": seed, "cases": len(cases), "faults": sum(map(Counter.total, table.values())),
        "kills": sum(map(killed, cases.values())), "failed": sum(bool(case["wrong"]) for case in cases.values()),
        "by_command": {name: dict(sorted(faults.items())) for name, faults in sorted(table.items())},
        "operations": {name: {"all": counts[name], "struck": len(struck[name])} for name in sorted(table)},
        "by_milliseconds": [name for name in sorted(table) if commands()[name].several],
        "failures": {name: case for name, case in cases.items() if case["wrong"]},
        "origin": provenance.origin(), "done": cases,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; a case that is in it is not run again")
    parser.add_argument("--kills", type=int, default=500, help="that are to be done, other faults aside")
    parser.add_argument("--seed", type=int, help="else that of FILE, or any")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so many")
    parser.add_argument("--every", nargs="*", choices=FAULTS, default=[], help="first these at each operation")
    parser.add_argument("--only", nargs="*", choices=sorted(commands()), help="only these commands")
    options = parser.parse_args(words)
    if compiler() is None:
        print("crash campaign: skipped, this needs Linux and a C compiler")
        return 0
    before = json.loads(options.out.read_text()) if options.out.exists() else {"done": {}}
    seed = before.get("seed", random.randrange(2**32)) if options.seed is None else options.seed
    if seed != before.get("seed", seed):
        parser.error(f"--seed {seed}: {options.out} goes on with {before['seed']}; name another file")
    cases = before["done"]
    counts = {name: entry["all"] for name, entry in before.get("operations", {}).items()}
    began, known = time.monotonic(), len(cases)
    chosen = {name: command for name, command in commands().items() if not options.only or name in options.only}
    home = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sdae-crash-", dir=home) as folder, Yard(Path(folder).resolve()) as yard:
        for name, case in run(yard, seed, options.kills, options.seconds, chosen, options.every, cases):
            cases[name] = case
            counts |= yard.counts
            write_atomically(options.out, json.dumps(report(seed, counts, cases), indent=1) + "\n")
            for line in case["wrong"]:
                print(f"{name} {case['command']} {case['faults']}: {line}", file=sys.stderr)
    found = report(seed, counts, cases)
    print(
        f"crash campaign, seed {seed}: {found['kills']} kills and {found['faults'] - found['kills']} other faults in "
        f"{found['cases']} cases ({len(cases) - known} now, {time.monotonic() - began:.0f} s), {found['failed']} failed"
    )
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
