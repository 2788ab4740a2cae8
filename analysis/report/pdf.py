"""The report's LaTeX as a PDF, with whichever engine is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sdae.errors import RunFailed
from sdae.files import write_atomically

ENGINES = ("pdflatex", "tectonic")
SECONDS = 300  # for one pass
PASSES = 4  # a long table asks for two or three, until its columns have settled


def engine() -> str | None:
    """The path of the first engine that is there."""
    return next(filter(None, map(shutil.which, ENGINES)), None)


def typeset(document: Path, date: int, program: str) -> Path:
    """DOCUMENT.pdf beside it. `date`: Unix seconds that the PDF bears, so that the same text gives the same bytes.

    Raises RunFailed with the line of LaTeX's log that says what is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="sdae-report-") as folder:
        made = Path(folder) / document.with_suffix(".pdf").name
        if Path(program).stem == "tectonic":
            words = [program, "--untrusted", "--keep-logs", "--outdir", folder, document.name]
        else:
            words = [program, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]
            words += ["-file-line-error", f"-output-directory={folder}", document.name]
        wide = {"max_print_line": "1000"}  # else the log breaks its lines at 79 characters
        environment = os.environ | wide | {"SOURCE_DATE_EPOCH": str(date), "FORCE_SOURCE_DATE": "1"}
        for _ in range(PASSES):
            try:
                done = subprocess.run(
                    words, cwd=document.parent, env=environment, capture_output=True, timeout=SECONDS,
                    stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{document}: {words[0]} was stopped after {SECONDS} s") from None
            log = (done.stdout + done.stderr).decode(errors="replace")
            if done.returncode or not made.exists():
                raise RunFailed(f"{document}: {Path(program).name}: {_trouble(log)}")
            if "Rerun" not in log:
                break
        target = document.with_suffix(".pdf")
        write_atomically(target, made.read_bytes())
    return target


def _trouble(log: str) -> str:
    """The line of the log that names the error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = ("! ", "error: ", ".tex:")
    return next((line for line in lines if any(mark in line for mark in marks)), lines[-1] if lines else "no output")
