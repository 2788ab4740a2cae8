"""The campaign of tests/mutation_campaign.py: its mutants are wrong code, what it explains is code that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="mutmut is not installed")
from mutation_campaign import ROOMS, ROOT, chosen, explained, mutants

SEED = int(os.environ.get("SDAE_SEED", "0"))  # of the mutants that the slow test tries; 0: those of `make trust`
SHARE = 0.9  # that a room's tests kill


@pytest.mark.parametrize("room", ROOMS)
def test_mutants_have_names_of_their_own_and_tests_that_exist(room: str) -> None:
    names = [mutant.name for mutant in mutants(ROOMS[room])]
    assert len(names) == len(set(names)) >= 40
    for mutant in chosen(room, SEED, 2):
        source = mutant.source()
        assert source is not None and source != mutant.module.code
        compile(source, mutant.file, "exec")
    for test in (*ROOMS[room].tests, *ROOMS[room].without):
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()
    assert (
        [m.name for m in chosen(room, 3, 9)]
        == [m.name for m in chosen(room, 3, 9)]
        != [m.name for m in chosen(room, 4, 9)]
    )


def test_explanations_are_of_mutants_that_there_are() -> None:
    """One that is not there any more is to be taken out of tests/mutation/explained.yaml."""
    there = {mutant.name for room in ROOMS.values() for mutant in mutants(room)}
    assert set(explained()) <= there, set(explained()) - there
    assert all(len(why) > 20 for why in explained().values())


@pytest.mark.slow
def test_half_a_minute_of_the_campaign(tmp_path: Path) -> None:
    """Some mutants of every room, and the campaign goes on where it was."""
    print(f"SDAE_SEED={SEED}")
    out = tmp_path / "mutation.json"
    tried = []
    for seconds in (22, 8):
        words = ["tests/mutation_campaign.py", "--out", out, "--seed", SEED, "--seconds", seconds]
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        assert done.stdout.startswith("mutation: ")
        rooms = json.loads(out.read_text())["rooms"]
        tried.append({name: set(room["results"]) for name, room in rooms.items()})
    first, second = tried
    assert sum(map(len, second.values())) > 0
    assert all(first[name] <= second[name] for name in first), "what was tried is kept"
    wrong = [mutant for room in rooms.values() for mutant in room["unexplained"]]
    assert len(wrong) <= 1 + (1 - SHARE) * sum(room["tried"] for room in rooms.values()), wrong
