"""Writes docs/reliability.md from results/trust/*.json, which the campaigns of `make trust` write.

python docs/make_reliability.py            # write the page
python docs/make_reliability.py --check    # write nothing; exit code 1 where it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOUND, PAGE = ROOT / "results" / "trust", ROOT / "docs" / "reliability.md"
BAD = ROOT / "tests" / "bad"
ORCHESTRATION = ROOT / "results" / "performance" / "orchestration.json"
FAULTS = {
    "kill": "SIGKILL", "term": "SIGTERM", "int": "Ctrl-C", "power": "power cut",
    "power-after": "power cut after the end",
    "full": "disk full", "full-once": "disk full once", "io": "EIO", "io-once": "EIO once",
    "read-only": "read-only disk",
    "clock-back": "clock back", "clock-forward": "clock forward",
}  # fmt: skip

HEAD = """# Reliability

Written by `python docs/make_reliability.py` from `results/trust/*.json`; no figure was typed by hand. The campaigns are
`make trust`; CI runs a seeded part of each. Processes, files and the suite's own code are real. Pretended are the
training and Slurm in concurrency, Slurm in the crash matrix, and by models of them NFS's delay and what a power cut
leaves of a disk. Slurm itself is in the tests ([slurm.md](slurm.md)).

| campaign | tried | wrong at the end |
| :-- | :-- | --: |
{rows}
**Runs, results or files lost, or anything else wrong at the end of a case, a round, an input or the soak: {lost}.**
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    options = parser.parse_args()
    text = page({file.stem: json.loads(file.read_text()) for file in sorted(FOUND.glob("*.json"))})
    if options.check:
        there = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        sys.exit(0 if there == text else "out of date: reliability.md (run python docs/make_reliability.py)")
    PAGE.write_text(text, encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    rows, parts, lost = [], [], 0
    for name, tell in SECTIONS.items():
        if name in found:
            row, part, wrong = tell(found[name])
            rows.append(row)
            parts.append(part)
            lost += wrong
    rows.append(
        ["bad input", f"{len(corpus())} cases in tests/bad/, each with the line it must give", "0, else CI fails"]
    )
    text = HEAD.format(rows="".join("| " + " | ".join(row) + " |\n" for row in rows), lost=lost)
    return text + "".join(parts)


def corpus() -> list[str]:
    """The name of every case of tests/bad/*.yaml."""
    return [
        name
        for file in sorted(BAD.glob("*.yaml"))
        for name in yaml.safe_load(file.read_text(encoding="utf-8"))["cases"]
    ]


Told = tuple[list[str], str, int]


def crash(found: dict[str, Any]) -> Told:
    struck, commands = found["operations"], found["by_command"]
    kinds = [kind for kind in FAULTS if any(kind in counts for counts in commands.values())]
    body = [
        [
            name,
            *(str(commands[name].get(kind, "")) for kind in kinds),
            "–" if name in found.get("by_milliseconds", ()) else f"{struck[name]['struck']} of {struck[name]['all']}",
        ]
        for name in commands
    ]
    text = (
        "\n## Crash matrix\n\nA command is struck at one of its file operations, and then run again: the same bytes as"
        " an undisturbed run must come\nof it, timing and provenance excepted (`tests/crash/commands.py` lists what),"
        " and nothing else may lie about. Commands of several\nprocesses (–) are struck after so many milliseconds:"
        " SIGKILL ends all their processes, SIGTERM and Ctrl-C are sent to the\nfirst."
        f" Seed {found['seed']}, {found['cases']:,} cases, some with several faults.\n\n"
    )
    text += table(["command", *(FAULTS[kind] for kind in kinds), "operations struck"], body)
    tried = f"{found['kills']:,} kills and power cuts, {found['faults'] - found['kills']:,} other faults"
    return ["crash matrix", tried, str(found["failed"])], text, found["failed"]


def concurrency(found: dict[str, Any]) -> Told:
    counts, wrong = found["counts"], len(found["failures"])
    text = (
        "\n## Concurrency\n\nEight processes submit, run, collect, cancel, retry and heal on one store at once, some"
        " killed, on one machine or as over\nNFS, where what is read may be old. Each run must be executed to its end"
        f" once and the index be right.\nSeed {found['seed']}, {found['rounds']} rounds.\n\n"
    )
    text += table(["what", "times"], [[name, f"{count:,}"] for name, count in counts.items()])
    tried = f"{found['rounds']:,} rounds of 8 processes, {counts['runs']:,} runs, {counts.get('killed', 0):,} killed"
    return ["concurrency", tried, str(wrong)], text, wrong


def soak(found: dict[str, Any]) -> Told:
    slopes, wrong = found["per_10_turns"], len(found["failures"])
    growth, runs = found["memory_mib_per_10_turns"], sum(found["runs"].values())
    body = [
        [
            "memory of the long-lived process (MiB: first turn, first with full caches, last)",
            ", ".join(f"{m:.0f}" for m in found["memory_mib"]),
        ],
        ["memory, growth over 10 turns (MiB)", f"{growth:.2f}"],
        [
            "memory, growth over a run that came to the store (KiB)",
            f"{growth * 1024 / (10 * runs / found['turns']):.1f}",
        ],
        *([f"{name}, growth over 10 turns", f"{slope:g}"] for name, slope in slopes.items()),
        ["store over its predicted size", f"{found['store_of_predicted']:.4f}"],
        *([f"faults: {name}", str(count)] for name, count in found["faults"].items()),
    ]
    text = "\n## Long use\n\nSweep, faults, collect, report in a loop, in one process"
    if ORCHESTRATION.exists():  # what a run of a store's index takes, by another measurement
        least, *_, most = json.loads(ORCHESTRATION.read_text())["rows"]
        a_run = (most["peak_gib"] - least["peak_gib"]) * 2**20 / (most["runs"] - least["runs"])
        text += (
            ". Memory grows with the store, whose index is read in each\nturn: in `benchmarks/orchestration.py`, where"
            f" no process lives long, a run of it takes {a_run:.1f} KiB"
        )
    text += ".\n\n" + table(["what", "found"], body)
    tried = f"{found['seconds'] / 60:.0f} minutes, {found['turns']} turns, {runs:,} runs"
    return ["soak", tried, str(wrong)], text, wrong


def fuzz(found: dict[str, Any]) -> Told:
    targets, wrong = found["targets"], len(found["failures"])
    body = [
        [name, f"{each['inputs'] + each.get('guided', 0):,}", f"{each['refused']:,}"] for name, each in targets.items()
    ]
    guided = sum(each.get("guided", 0) for each in targets.values())
    text = (
        "\n## Fuzzing\n\nNothing but a line for the user may come of any bytes, within 5 s and 1 GiB, and nothing be"
        " written elsewhere"
        + (f".\n{guided:,} of the inputs were guided by coverage (atheris): within 5 s and 3 GB" if guided else "")
        + f". Seed {found['seed']}.\n\n"
        + table(["what is read", "inputs", "refused of those not guided"], body)
    )
    total = sum(each["inputs"] + each.get("guided", 0) for each in targets.values())
    return ["fuzzing", f"{total:,} inputs, {len(targets)} parsers and loaders", str(wrong)], text, wrong


def mutation(found: dict[str, Any]) -> Told:
    rooms, body = found["rooms"], []
    for name, room in rooms.items():
        tried, killed = room["tried"], room["killed"]
        explained, left = counted(room["explained"]), counted(room["unexplained"])
        body.append([name, f"{room['there_are']:,}", f"{tried:,}", f"{killed / tried:.1%}", str(explained), str(left)])
    text = (
        "\n## Mutation\n\nOne place of the code is changed at a time; some test must fail. Survivors that no test can"
        " kill, or that change\nthe wording of a message, are explained in `tests/mutation/explained.yaml`."
        f" Seed {found['seed']}.\n\n"
        + table(["room", "mutants there are", "tried", "killed", "survivors explained", "not explained"], body)
    )
    tried, killed = (sum(room[key] for room in rooms.values()) for key in ("tried", "killed"))
    left = sum(counted(room["unexplained"]) for room in rooms.values())
    return (
        ["mutation", f"{tried:,} mutants of {len(rooms)} rooms, {killed / tried:.1%} killed", f"{left} unexplained"],
        text,
        0,
    )


def coverage(found: dict[str, Any]) -> Told:
    rooms = found["rooms"]
    share = {room: of["taken"] / of["branches"] for room, of in rooms.items()}
    body = [
        [f"{room}{'' if '.' in room else '/'}", f"{of['branches']:,}", f"{of['taken']:,}", f"{share[room]:.1%}"]
        for room, of in rooms.items()
    ]
    text = (
        "\n## Branches\n\nWhat the fast tests take of the branches of the rooms that guard runs and numbers; what"
        " processes of their own do\nis not counted.\n"
        + (f"Tests left out: {', '.join(f'`{word}`' for word in found['words'])}.\n" if found["words"] else "")
        + ("Some tests failed in that call.\n" if found["tests"] else "")
        + "\n"
        + table(["room", "branches", "taken", "share"], body)
    )
    least = min(share, key=lambda room: share[room])
    total = sum(of["branches"] for of in rooms.values())
    tried = f"{total:,} of {len(rooms)} rooms, {share[least]:.1%} or more of each taken"
    return ["branches", tried, f"{sum(value < 0.9 for value in share.values())} rooms below 90%"], text, 0


def counted(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


SECTIONS = {
    "crash": crash, "concurrency": concurrency, "soak": soak, "fuzz": fuzz, "mutation": mutation, "coverage": coverage,
}  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = [":--"] + ["--:"] * (len(head) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, marks, *rows])


if __name__ == "__main__":
    main()
