"""Every table and figure of a sweep as files in one folder, with a page that holds them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ablations.planner import Artifact, available
from ablations.scale import load_scale
from analysis.figures import PANELS, draw
from analysis.render import name_of, render
from analysis.table import build
from sdae.errors import UserError
from sdae.store import Store, write_atomically

SUFFIXES = {"md": "md", "latex": "tex", "html": "html", "csv": "csv", "json": "json"}


def publish(
    store: Store,
    artifacts: Sequence[Artifact],
    scale: str | Path,
    seeds: Sequence[int],
    out: Path,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Writes OUT/ARTIFACT.{md,tex,html,csv,json}, OUT/FIGURE.{png,svg,pdf} and OUT/README.md; returns their paths."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    files: list[Path] = []
    page = [f"# Regenerated at scale {load_scale(scale).title}", ""]
    names = [artifact.name for artifact in artifacts]
    if set(PANELS) <= set(names):
        files += draw(store, "4", scale, out, seeds)
        page += ["![Figure 4](figure4.png)", ""]
    for artifact in artifacts:
        tell(artifact.name)
        source = artifact.name if artifact.name in available() else artifact.path
        table = build(store, source, scale, seeds)
        for format, suffix in SUFFIXES.items():
            files.append(out / f"{artifact.name}.{suffix}")
            write_atomically(files[-1], render(table, format))
        links = [f"[{suffix}]({artifact.name}.{suffix})" for suffix in SUFFIXES.values()]
        page += [f"## {name_of(artifact.name)}", ""]
        if artifact.kind == "figure":
            drawn = draw(store, source, scale, out, seeds)
            files += drawn
            links += [f"[{path.suffix[1:]}]({path.name})" for path in drawn]
            page += [f"![{name_of(artifact.name)}]({artifact.name}.png)", ""]
        page += [render(table, "md").strip(), "", f"Files: {', '.join(links)}", ""]
    files.append(out / "README.md")
    write_atomically(files[-1], "\n".join(page))
    return files
