"""A Slurm that takes every array and starts none: four programs whose queue outlives whoever asks them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ablations.planner import plan
from sdae.store import Store
from slurm.cluster import me
from slurm.ledger import Ledger

ARTIFACT = "table5"
SBATCH = """
for file; do :; done
name= array=
while read -r line; do
    case $line in
        "#SBATCH --job-name="*) name=${{line#*=}} ;;
        "#SBATCH --array="*) array=${{line#*=}} ;;
    esac
done < "$file"
job=100
while [ -e {queue}/$job ]; do job=$((job + 1)); done
echo "$name $array" > {queue}/$job
echo $job"""
SQUEUE = """
for file in {queue}/*; do
    [ -e "$file" ] || continue
    read -r name array < "$file"
    IFS=,
    for part in $array; do
        index=${{part%-*}}
        while [ $index -le ${{part#*-}} ]; do
            echo "$name|${{file##*/}}|$index|PENDING|Resources||{user}|1700000000|N/A"
            index=$((index + 1))
        done
    done
    unset IFS
done"""
OTHERS = {"sacct": "", "scontrol": "echo 'MaxArraySize = 1001'", "sacctmgr": "exit 1", "scancel": "exit 1"}


def install(programs: Path, queue: Path) -> None:
    """Writes the programs; their queue is a folder with a file for each array."""
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, **OTHERS}.items():
        (programs / name).write_text("#!/bin/sh\n" + text.format(queue=queue, user=me()).lstrip() + "\n")
        (programs / name).chmod(0o755)


def handed_over(root: Path, queue: Path) -> dict[str, Any]:
    """What must be: every run once in the queue, no task for nothing, a copy of the code as its name says."""
    store = Store(root / "runs")
    ledger, tasks = Ledger(store), Counter[str]()
    held = {identity: reservation.token for identity, reservation in ledger.reservations().items()}
    for file in queue.iterdir():
        name, array = file.read_text().split()
        token = name.removeprefix("sdae-")
        submission = ledger.read(token)
        for part in array.split(","):
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                identity = submission.runs.get(index) if submission else None
                tasks[identity if identity and held.get(identity) == token else "for nothing"] += 1
        for needed in ("job.pkl", "runs.json", "submission.sh", "profile.json"):
            if not (ledger.folder(token) / needed).read_bytes():
                tasks[f"{needed} is empty"] += 1
    planned = plan([ARTIFACT], "smoke").runs
    strays = [path.name for path in (root / "runs").rglob("*.tmp")]
    copies = {_copy_is_whole(code) for code in ledger.codes.iterdir() if not code.name.startswith(".")}
    wanted = {identity: tasks.pop(identity, 0) for identity in planned}
    return {"runs": wanted, "others": dict(tasks), "strays": strays, "code": copies, "empty": _empty(ledger)}


def _copy_is_whole(folder: Path) -> bool:
    """As `slurm.snapshot` computes the name."""
    from slurm.snapshot import KINDS, ROOMS

    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((folder / room).rglob("*")):
            if path.suffix in KINDS:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16] == folder.name


def _empty(ledger: Ledger) -> int:
    """Folders of arrays of which nothing is known: nobody will ever look at them."""
    return sum(ledger.read(token) is None for token in os.listdir(ledger.root / "jobs"))
