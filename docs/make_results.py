"""Writes docs/results.md and its pictures from the committed results.

    python docs/make_results.py               # from results/*/runs
    python docs/make_results.py --add mini runs  # first copies the finished runs of a store to results/mini/runs

A folder results/NAME holds `about.yaml` (title, scale, artifacts, what was found; the artifact's file where it is not
the suite's own) and `runs/ID/result.json`, of dense tasks `evaluation.json` too: the numbers, their configs and
commits, no weights, no logs and no photographs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from ablations.planner import plan
from analysis.dense import evaluation_of, plot_evaluation, summary
from analysis.figures import PANELS, draw
from analysis.frame import collect
from analysis.render import render
from analysis.study import build
from analysis.table import STALE, Table
from sdae.store import Store
from sdae.yamls import read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "figures"
INTRO = """# Results

Written by `python docs/make_results.py` from the runs under `results/`; no number here was typed by hand but those in
the paragraphs "What was found", which quote the tables above them. None of these runs is at the paper's scale, so none
of them confirms or refutes the paper: its values stand beside them to show what the suite regenerates.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "STORE"))
    options = parser.parse_args()
    if options.add:
        add(ROOT / "results" / options.add[0], Store(options.add[1]))
    PAGE.write_text(page())


def add(folder: Path, store: Store) -> None:
    """Copies result.json of the finished runs that the folder's artifacts ask for."""
    about = read_yaml(folder / "about.yaml")
    sweep = plan(artifacts_of(folder, about), scale_of(folder, about), about["seeds"])
    if sweep.provisional:
        sys.exit("the pictures are not here, so the runs' ids are not known (set SDAE_DATA)")
    for identity in sweep.runs:
        run, target = store.run(identity), folder / "runs" / identity
        if run.done:
            target.mkdir(parents=True, exist_ok=True)
            for file in filter(Path.exists, (run.path / "result.json", run.path / "evaluation.json")):
                shutil.copy(file, target)


def page() -> str:
    """The whole page; draws the pictures on the way."""
    files = sorted((ROOT / "results").glob("*/about.yaml"))
    return "\n".join([INTRO, *(section(file.parent, read_yaml(file)) for file in files)])


def section(folder: Path, about: dict[str, object]) -> str:
    store = Store(folder / "runs")
    scale = scale_of(folder, about)
    frame = collect(store)
    done = frame[frame["state"] == "done"]
    commits = ", ".join(f"`{c[:10]}`" for c in sorted(set(done["commit"].dropna())))
    hours = done["seconds"].sum() / 3600
    artifacts = artifacts_of(folder, about)
    out = [
        f"## {about['title']}", "", str(about["setting"]).strip(), "",
        f"{len(done)} runs, {hours:.1f} hours of one worker, at {commits}.", "",
    ]  # fmt: skip
    seeds = [int(s) for s in about["seeds"]]  # type: ignore[attr-defined]
    if set(PANELS) <= set(artifacts):
        out += [picture(store, "4", scale, seeds, folder.name)]
    for name in artifacts:
        if name.startswith("figure") and not set(PANELS) <= set(artifacts):
            out += [picture(store, name, scale, seeds, folder.name)]
        out += [render(recorded(build(store, name, scale, seeds)), "md").strip(), ""]
    for run, words in dict(about.get("evaluations", {})).items():  # type: ignore[call-overload]
        out += [evaluation(store, run, words, folder.name)]
    return "\n".join([*out, "### What was found", "", str(about["found"]).strip(), ""])


def recorded(table: Table) -> Table:
    """The table without marks of stale cells: the page is of the commits that it names, whatever has changed since."""
    for cell in table.cells():
        cell.stale = False
    table.notes = [note for note in table.notes if not note.startswith(STALE)]
    return table


def picture(store: Store, name: str, scale: str | Path, seeds: list[int], folder: str) -> str:
    for path in draw(store, name, scale, PICTURES, seeds):
        if path.suffix == ".png":
            target = path.replace(path.with_name(f"{folder}-{path.name}"))
        else:
            path.unlink()
    label = f"Figure {name.removeprefix('figure')}"
    return f"![{label} regenerated at the scale {folder}](figures/{target.name})\n"


def evaluation(store: Store, run: str, words: str, folder: str) -> str:
    """The classes of a dense run."""
    found = evaluation_of(store.run(run))
    name = f"{folder}-{run}.png"
    plot_evaluation(found, words).savefig(PICTURES / name, dpi=110, metadata={"Software": None})
    return f"![{words}: {summary(found)}](figures/{name})\n"


def artifacts_of(folder: Path, about: dict[str, Any]) -> list[str]:
    """Names of the suite's own, and files of the folder."""
    return [str(folder / name) if (folder / name).exists() else name for name in map(str, about["artifacts"])]


def scale_of(folder: Path, about: dict[str, object]) -> str | Path:
    return folder / "scale.yaml" if (folder / "scale.yaml").exists() else str(about["scale"])


if __name__ == "__main__":
    main()
