"""notebook: JupyterLab on a copy of the notebooks."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cli.output import ScaleName, StoreDir, note, store_at
from sdae.errors import UserError


def notebook(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Open this one first.")] = None,
    store: StoreDir = Path("runs"),
    scale: ScaleName = "smoke",
    out: Annotated[Path, typer.Option("--out", help="Folder of your copies.")] = Path("notebooks"),
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser, or only say where.")] = True,
    port: Annotated[int, typer.Option("--port", min=0, help="The next free one where it is taken.")] = 8888,
) -> None:
    """Open JupyterLab on notebooks over a store: figure4, tables, claims, one_arm, dense, cost.

    They are copied into ./notebooks (--out) where they are not there yet. A copy is yours: it is never written over;
    delete it to get it anew. They show --store at --scale, and Ctrl-C ends JupyterLab.
    """
    from ablations.scale import load_scale

    load_scale(scale), store_at(store)  # a wrong one is refused here, not in every cell
    here = sorted((files("analysis") / "notebooks").iterdir(), key=lambda file: file.name)
    ours = {file.name.removesuffix(".ipynb"): file for file in here if file.name.endswith(".ipynb")}
    if name is not None and (name := name.removesuffix(".ipynb")) not in ours:
        raise UserError(f"notebook {name!r} is unknown (allowed: {', '.join(ours)})")
    if find_spec("jupyterlab") is None:
        raise UserError("JupyterLab is not installed: pip install -e '.[notebook]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, file in ours.items():
            if not (copy := out / f"{key}.ipynb").exists():
                copy.write_bytes(file.read_bytes())
                note(f"new: {copy}")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    # Kernels start in the folder of their notebook, so paths are made absolute
    os.environ["SDAE_STORE"] = str(store.resolve())
    os.environ["SDAE_SCALE"] = str(Path(scale).resolve()) if Path(scale).is_file() else scale
    words = ["-m", "jupyterlab", str(out), f"--ServerApp.port={port}"]
    words += [f"--LabApp.default_url=/lab/tree/{name}.ipynb"] if name else []
    words += [] if browser else ["--no-browser"]
    words += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    os.execv(sys.executable, [sys.executable, *words])
