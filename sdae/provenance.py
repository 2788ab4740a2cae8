"""Where a number comes from: code, command, versions, hardware, job; and which code can change it at all."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from sdae.errors import UserError

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pydantic", "safetensors", "faster-coco-eval")
DIFF_LIMIT = 200_000
SNAPSHOT = "snapshot.json"  # beside a copy of the code: what `code()` said of the original
STAGE_MODULES = {
    "pretrain": "pretrain",
    "finetune": "classify",
    "linprobe": "classify",
    "segment": "segment",
    "detect": "detect",
    "cost": "cost",
}

# Of what a stage imports, this cannot change its numbers, and why. Whatever is not named here can.
NO_NUMBERS = {
    "sdae.errors": "how the suite says no",
    "sdae.store": "where files lie",
    "sdae.files": "writes them whole",
    "sdae.upkeep": "removes them",
    "sdae.yamls": "how files are read; what they say is in the run's id",
    "sdae.provenance": "this module",
    "sdae.drawing": "draws what was found",
    "sdae.training.checkpoints": "gives back the bits that it was given",
    "sdae.training.telemetry": "watches; but a cost run's numbers are its",
    "sdae.models.flops": "counts for telemetry; likewise",
}
NUMBERS_OF = {"cost": ("sdae.training.telemetry", "sdae.models.flops")}
# All values of a run's config are in its id, so of that module only what is computed from them counts.
PARTS: dict[str, tuple[str, ...]] = {
    "sdae.config": ("Run.tokens", "_Masked.masked", "count_masked"),
    "sdae.sections": (),
}


@lru_cache(maxsize=1)
def code() -> dict[str, Any]:
    """Commit and uncommitted changes of the checkout that this code runs from; nulls outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(FileNotFoundError):
        return json.loads((root / SNAPSHOT).read_text())  # type: ignore[no-any-return]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    rooms = ["sdae", "ablations", "slurm", "analysis", "cli"]
    diff = git("diff", "HEAD", "--", *rooms) if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "diff": diff[:DIFF_LIMIT] if diff else None,
    }


def origin() -> dict[str, Any]:
    """What a committed figure says of itself: commit, versions and hardware, not the machine's name or its paths."""
    return {k: v for k, v in record().items() if k not in ("diff", "host", "slurm", "command", "platform")}


@cache
def substance(stage: str) -> str:
    """16 hex digits over the code that can change the numbers of a stage's runs: its imports, and theirs, below sdae/.

    Comments, docstrings, annotations and imports that nothing uses do not count. Read from the sources, nothing is
    imported; the same under every version of Python. KeyError for a stage that there is not.
    """
    return hashlib.sha256(repr(sorted(_closure(stage).items())).encode()).hexdigest()[:16]


def _closure(stage: str) -> dict[str, str]:
    """Module -> digest."""
    without = NO_NUMBERS.keys() - NUMBERS_OF.get(stage, ())
    todo, digests = [f"sdae.stages.{STAGE_MODULES[stage]}"], dict[str, str]()
    while todo:
        module = todo.pop()
        if module not in digests and module not in without and (found := _module(module)):
            digests[module], imported = found
            todo += imported
    return digests


@cache
def _module(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(digest, what it imports) of a module below sdae/; null for what is none."""
    root = Path(__file__).resolve().parent
    parts = name.split(".")
    path = root.joinpath(*parts[1:])
    package = path.is_dir()
    path = path / "__init__.py" if package else path.with_suffix(".py")
    if parts[0] != root.name or not path.is_file():
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{path}: line {error.lineno}: not valid Python: {error.msg}") from None
    if name in PARTS:
        tree.body = list(_parts(tree.body, PARTS[name]))
    text, imports, used = [""], list[ast.Import | ast.ImportFrom](), set[str]()
    _write(tree, text, imports, used)
    here = name if package else name.rpartition(".")[0]
    names, modules = set[str](), [".".join(parts[:n]) for n in range(1, len(parts))]
    for node in imports:
        source = "" if isinstance(node, ast.Import) else resolve_name("." * node.level + (node.module or ""), here)
        for alias in node.names:
            modules += [source, f"{source}.{alias.name}"] if source else [alias.name]
            if package or (alias.asname or alias.name).partition(".")[0] in used:  # a package hands on what it imports
                names.add(f"{source} {alias.name} {alias.asname}")
    text[0] = repr(sorted(names))
    return hashlib.sha256("".join(text).encode()).hexdigest(), tuple(modules)


def _parts(body: list[ast.stmt], names: Iterable[str]) -> Iterator[ast.stmt]:
    """The definitions with these names; of `Class.method` that method alone."""
    for node in body:
        for name in names:
            owner, _, inner = name.partition(".")
            if getattr(node, "name", None) == owner:
                yield from _parts(node.body, [inner]) if inner and isinstance(node, ast.ClassDef) else [node]


_SAYS_NOTHING = {"ctx", "kind", "annotation", "returns", "type_comment", "simple"}


def _write(node: Any, out: list[str], imports: list[ast.Import | ast.ImportFrom], used: set[str]) -> None:
    """A tree as text, without docstrings, annotations and imports; notes the imports and the names that are used.

    Empty fields are left out, so that those which a newer Python has besides change nothing.
    """
    if isinstance(node, list):
        for item in node:
            _write(item, out, imports, used)
    elif not isinstance(node, ast.AST):
        out.append(repr(node))
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        imports.append(node)
    elif not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ):
        if isinstance(node, ast.Name):
            used.add(node.id)
        annotated = isinstance(node, ast.AnnAssign) and node.value is not None
        out.append("(Assign" if annotated else f"({type(node).__name__}")
        for field in node._fields:
            value = getattr(node, field, None)
            if value is not None and value != [] and field not in _SAYS_NOTHING:
                out.append(" targets=" if annotated and field == "target" else f" {field}=")
                _write(value, out, imports, used)
        out.append(")")


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, platform, CPU, cores and GPUs of this machine."""
    import torch

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "packages": packages, "platform": platform.platform(),
        "cpu": _cpu(), "cores": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda if gpus else None,
    }  # fmt: skip


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def record(stage: str | None = None) -> dict[str, Any]:
    """All of it, for `provenance.json`; of a run of some stage."""
    slurm = {k: v for k, v in os.environ.items() if k in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")}
    mine = {"substance": substance(stage)} if stage else {}
    return {**code(), **mine, "command": sys.argv, **environment(), "host": platform.node(), "slurm": slurm}
