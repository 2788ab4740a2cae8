"""Mutation testing of the rooms whose numbers everything rests on: does a test fail when the code is wrong?

`python tests/mutation_campaign.py --out FILE --seed S --room NAME --count 300` changes one place of a room's code at a
time (mutmut's operators: numbers, operators, comparisons, strings, arguments, assignments, branches) and runs the
room's tests until the first one fails. Every mutant is a forked child of a process that has imported torch, pandas
and pytest, but nothing of the suite: the child imports all of it anew, the mutated module from its changed source.

The seed chooses and orders the mutants. Each is written down as it is finished, and the same command goes on: what
was killed stays killed while the code is the same, survivors are tried again when the room's tests have changed.
Survivors that no test can kill, or that change no more than a message's wording, are explained in
`tests/mutation/explained.yaml`; any other makes the exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
import yaml
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "tests" / "mutation" / "explained.yaml"
HEAVY = (
    "torch", "torch.nn.functional", "torchvision.transforms.v2", "timm", "timm.data", "timm.optim", "numpy", "pandas",
    "pyarrow.parquet", "scipy.special", "scipy.stats", "pydantic", "pytest", "hypothesis.strategies", "rich.console",
    "typer", "submitit", "safetensors.torch", "PIL.Image",
)  # fmt: skip
MEMORY = 8 * 2**30  # bytes of data that a mutant may take
PATIENCE = 6.0  # a mutant that takes so many times as long as no mutant, and LEAST seconds, hangs: killed
LEAST = 15.0
FORMAT = 1


@dataclass(frozen=True)
class Room:
    """files: which functions (and methods, `Class.name`) of each file are mutated; none named: all of it.

    tests: pytest's names, the fastest and nearest first, as the first failure ends a mutant. without: those of them
    that take long and tell nothing new.
    """

    files: Mapping[str, tuple[str, ...]]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()

    def digest(self, of: str) -> str:
        """Of the code (`files`) or of the tests: results are those of both."""
        if of == "files":
            paths = sorted(self.files)
        else:
            paths = sorted({test.partition("::")[0] for test in self.tests} | {"tests/conftest.py"})
        text = (
            b"".join((ROOT / path).read_bytes() for path in paths) + repr(self.tests if of == "tests" else ()).encode()
        )
        return hashlib.sha256(text).hexdigest()[:16]


def tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}::{name}" for name in names) or (f"tests/{file}",)


METHOD = (*tests("test_method.py"), *tests("test_metamorphic.py"))
SLOW = (  # and about other rooms
    *tests("test_method.py", "test_shapes_of_the_table_are_timm_s", "test_initialization"),
    *tests("test_metamorphic.py", "test_detection_scores_of_mirrored_pictures"),
)
PLANS = "test_metamorphic_plans.py"
PLANNED = (
    "test_the_order_of_artifacts_does_not_matter", "test_sharing_never_changes_a_config_and_parts_make_the_whole",
    "test_seeds_add_up", "test_some_cells_are_a_part_of_the_plan",
)  # fmt: skip
ROOMS = {
    "views": Room({"sdae/views.py": ()}, METHOD, SLOW),
    "objective": Room({"sdae/objective.py": ()}, METHOD, SLOW),
    "ema": Room(
        {
            "sdae/training/optimizers.py": ("ema_momentum",),
            "sdae/methods/sdae.py": (),
            "sdae/stages/pretrain.py": ("PretrainTask.momentum", "PretrainTask.after_step"),
        },
        (*METHOD, *tests("test_trainer.py", "test_when_the_teacher_moves")),
        SLOW[:1],
    ),
    "planner": Room(
        {"ablations/planner.py": ()},
        (*tests("test_plan_rules.py"), *tests("test_ablations.py"), *tests(PLANS, *PLANNED)),
    ),
    "reconciler": Room(
        {"slurm/reconcile.py": ()}, (*tests("test_judge.py"), *tests("test_reconcile.py", "test_story"))
    ),
    "claims": Room(
        {"analysis/claims.py": (), "analysis/inference.py": (), "analysis/verdicts.py": ()},
        (*tests("test_claims_rules.py"), *tests("test_claims.py"), *tests("test_audit.py"), *tests(PLANS)),
        (
            *tests("test_claims.py", "test_holm_is_that_of_statsmodels", "test_power_is_what_judging_finds"),
            *tests(
                "test_audit.py",
                "test_every_quote_is_the_papers",
                "test_a_row_is_the_papers",
                "test_a_row_is_the_artifacts",
            ),
            *tests(PLANS, *PLANNED),
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Mutant:
    """One changed place. `name` tells it by its function and its text, so that it outlives edits elsewhere."""

    name: str
    file: str
    line: int
    module: cst.Module
    node: cst.CSTNode
    new: cst.CSTNode

    @functools.cache  # noqa: B019
    def source(self) -> str | None:
        """The file with the change; None where that is no Python, or no change."""
        try:
            changed = self.module.deep_replace(self.node, self.new).code  # type: ignore[arg-type]
            return None if ast.dump(ast.parse(changed)) == _meaning(self.module.code) else changed
        except (SyntaxError, cst.CSTValidationError, TypeError):
            return None


@functools.cache
def _meaning(code: str) -> str:
    return ast.dump(ast.parse(code))


def mutants(room: Room) -> list[Mutant]:
    """All of a room, in the order of the source."""
    return [mutant for file, parts in room.files.items() for mutant in _of_file(file, parts)]


@functools.cache
def _of_file(file: str, parts: tuple[str, ...]) -> tuple[Mutant, ...]:
    return tuple(_changes(file, parts))


def _changes(file: str, parts: tuple[str, ...]) -> Iterator[Mutant]:
    wrapper = MetadataWrapper(cst.parse_module((ROOT / file).read_text()), unsafe_skip_copy=True)
    lines = wrapper.resolve(PositionProvider)
    seen: Counter[str] = Counter()
    for where, node in _places(wrapper.module, ""):
        if parts and where not in parts:
            continue
        for kind, operator in mutation_operators:
            for new in operator(node) if isinstance(node, kind) else ():
                was, becomes = (" ".join(wrapper.module.code_for_node(n).split()) for n in (node, new))
                name = f"{file} {where}: {was} -> {becomes}"
                seen[name] += 1
                name += f" #{seen[name]}" if seen[name] > 1 else ""
                yield Mutant(name, file, lines[node].start.line, wrapper.module, node, new)


def _places(node: cst.CSTNode, where: str) -> Iterator[tuple[str, cst.CSTNode]]:
    """The nodes that run, each with the name of its function: no imports, annotations or decorators."""
    if isinstance(node, cst.Import | cst.ImportFrom | cst.Annotation | cst.Decorator):
        return
    if isinstance(node, cst.Subscript) and isinstance(node.value, cst.Name) and node.value.value == "Literal":
        return
    if isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", None) == "__all__":
        return
    if isinstance(node, cst.FunctionDef | cst.ClassDef):
        where = f"{where}.{node.name.value}".removeprefix(".")
    yield where, node
    for child in node.children:
        yield from _places(child, where)


def chosen(room: str, seed: int, count: int) -> Iterator[Mutant]:
    """Up to `count` mutants of a room, by the seed; what is no Python is not counted."""
    every = mutants(ROOMS[room])
    random.Random(f"{seed} {room}").shuffle(every)
    return itertools.islice((mutant for mutant in every if mutant.source() is not None), count)


def explained() -> dict[str, str]:
    """Why a mutant may survive, by its name."""
    entries = yaml.safe_load(EXPLAINED.read_text()) or []
    return {name: entry["why"] for entry in entries for name in entry["mutants"]}


# One mutant, in a child
class _Loader(importlib.machinery.SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, file: str, source: str):
        self.module, self.path, self.source = file.removesuffix(".py").replace("/", "."), ROOT / file, source

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        loader = _Loader(fullname, str(self.path))
        loader.source = self.source
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class _First:
    """pytest's plugin that remembers the first failure."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (import)"


def run_tests(room: Room, changed: tuple[str, str] | None, folder: Path) -> dict[str, Any]:
    """pytest's exit code and the first failure, in this process; `changed`: a file and its mutated source."""
    import hypothesis
    import pytest

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    if changed is not None:
        sys.meta_path.insert(0, _Finder(*changed))  # type: ignore[arg-type]
    generate = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure need not be a small one
    hypothesis.settings.register_profile(
        "mutation", database=None, derandomize=True, deadline=None, phases=generate, max_examples=40
    )
    hypothesis.settings.load_profile("mutation")
    first = _First()
    words = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow", "--no-header", "--tb=no"]
    words += [f"--basetemp={folder}/t", *(f"--deselect={test}" for test in room.without)]
    code = 0
    for _, group in itertools.groupby(
        room.tests, lambda test: test.partition("::")[0]
    ):  # a file's tests, then the next
        code = code or int(pytest.main([*words, *group], plugins=[first]))
    return {"code": code, "test": first.name}


def forked(work: Callable[[Path], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What the work returns in a child, or {"code": -1} where it took longer, or -2 where it died."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    answer = folder / "answer.json"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.setsid()
            os.chdir(ROOT)
            for number in (1, 2):
                os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            result = work(folder)
            (folder / "half").write_text(json.dumps(result))
            (folder / "half").rename(answer)
        os._exit(0)
    end = time.monotonic() + seconds
    pause = 0.005
    try:
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                return {"code": -1}
            time.sleep(pause)
            pause = min(0.05, pause * 1.2)
        return json.loads(answer.read_text()) if answer.exists() else {"code": -2}
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def outcome(result: Mapping[str, Any]) -> str:
    """killed | timeout | died (both are kills, too) | survived. RuntimeError where pytest could not do its work."""
    code = result["code"]
    if code in (3, 4, 5) and not result.get("test"):
        raise RuntimeError(f"pytest ended with {code}")
    return {0: "survived", -1: "timeout", -2: "died"}.get(code, "killed")


# The campaign
class Campaign:
    """Results in a JSON file, rewritten by rename after each mutant."""

    def __init__(self, out: Path, seed: int, count: int):
        self.out, self.seed, self.count = out, seed, count
        self.rooms: dict[str, dict[str, Any]] = {}
        if out.exists():
            before = json.loads(out.read_text())
            if (before["format"], before["seed"]) == (FORMAT, seed):
                self.rooms = before["rooms"]
        self.origin = forked(_origin, 60)

    def open(self, name: str) -> Iterator[None]:
        """The mutants of a room that are not done, one a step."""
        room, why = ROOMS[name], explained()
        files, tested = room.digest("files"), room.digest("tests")
        before = self.rooms.get(name, {})
        results = before.get("results", {}) if before.get("code") == files else {}
        plain, alone = f"{files} {tested}", before.get("plain_seconds", 0.0)
        if before.get("plain") != plain:
            began = time.monotonic()
            if (unchanged := forked(lambda folder: run_tests(room, None, folder), 600))["code"] != 0:
                raise SystemExit(f"mutation: {name}: its tests fail without a mutant: {unchanged}")
            alone = time.monotonic() - began
        names = {mutant.name for mutant in mutants(room)}
        results = {
            mutant: entry for mutant, entry in results.items()
            if mutant in names and (entry["outcome"] != "survived" or entry["tests"] == tested)
        }  # fmt: skip
        self.rooms[name] = {
            "code": files, "plain": plain, "plain_seconds": round(alone, 2), "there_are": len(names),
            "results": results,
        }  # fmt: skip
        self._sum(name, why)
        for mutant in chosen(name, self.seed, self.count):
            if mutant.name in results:
                continue
            began = time.monotonic()
            changed = (mutant.file, str(mutant.source()))
            result = forked(lambda folder: run_tests(room, changed, folder), max(LEAST, PATIENCE * alone))  # noqa: B023
            results[mutant.name] = {
                "line": mutant.line, "outcome": outcome(result), "by": result.get("test", ""), "tests": tested,
                "seconds": round(time.monotonic() - began, 2),
            }  # fmt: skip
            self._sum(name, why)
            self._write()
            yield

    def _sum(self, name: str, why: Mapping[str, str]) -> None:
        room = self.rooms[name]
        ends = Counter(entry["outcome"] for entry in room["results"].values())
        survived = [mutant for mutant, entry in room["results"].items() if entry["outcome"] == "survived"]
        tried = sum(ends.values())
        room |= {
            "tried": tried, "killed": tried - ends["survived"], "by_timeout": ends["timeout"] + ends["died"],
            "share": round((tried - ends["survived"]) / tried, 4) if tried else None,
            "explained": [mutant for mutant in survived if mutant in why],
            "unexplained": [mutant for mutant in survived if mutant not in why],
        }  # fmt: skip

    def _write(self) -> None:
        document = {"format": FORMAT, "seed": self.seed, "count": self.count, "origin": self.origin}
        half = self.out.with_name(self.out.name + ".half")
        half.write_text(json.dumps({**document, "rooms": self.rooms}, indent=1, ensure_ascii=False))
        half.rename(self.out)

    def told(self) -> str:
        return "mutation: " + "; ".join(
            f"{name} {room['killed']}/{room['tried']} killed, {len(room['explained'])} survivors explained, "
            f"{len(room['unexplained'])} not"
            for name, room in self.rooms.items()
        )


def _origin(_: Path) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from sdae.provenance import origin

    return origin()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", action="append", choices=ROOMS, help="all rooms where none is named")
    parser.add_argument("--count", type=int, default=300, help="mutants of each room, or all where it has fewer")
    parser.add_argument("--seconds", type=float, default=1e9, help="end by then; the same command goes on")
    words = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    if mine := [name for name in sys.modules if name.partition(".")[0] in ("sdae", "ablations", "slurm", "analysis")]:
        raise RuntimeError(f"already imported, so no mutant of these would be: {mine}")
    words.out.parent.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(words.out, words.seed, words.count)
    end = time.monotonic() + words.seconds
    turns = [campaign.open(name) for name in words.room or ROOMS]
    while turns and time.monotonic() < end:  # in turns, so that a short campaign sees every room
        turn = turns.pop(0)
        if next(turn, False) is None:
            turns.append(turn)
    campaign._write()
    print(campaign.told())
    return 1 if any(room["unexplained"] for room in campaign.rooms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
