"""sdae-cli called by tests: in this process where torch is loaded already, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.main import main

ROOT = Path(__file__).resolve().parents[1]


class Called(NamedTuple):
    code: int
    out: str
    err: str


def call(*words: object) -> Called:
    """sdae-cli in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["sdae-cli", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Called(code, out.getvalue(), err.getvalue())


def spawn(*words: object, cwd: Path | None = None, timeout: float = 600, **environment: str) -> Called:
    """sdae-cli as its users start it."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, words)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return Called(done.returncode, done.stdout, done.stderr)


def assert_refused(called: Called, *parts: str) -> None:
    """Exit code 2, exactly one line on stderr, nothing on stdout; the line holds each part."""
    assert (called.code, called.out) == (2, ""), called
    assert called.err.startswith("error: ")
    assert called.err.endswith("\n")
    assert called.err.count("\n") == 1, called.err
    for part in parts:
        assert part in called.err, called.err


def assert_ends(program: str, error: str) -> None:
    """A Python program that an error ends: it does end, and says it."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1
    assert error in ended.stderr
