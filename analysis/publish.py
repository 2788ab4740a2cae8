"""Every table, figure and claim of a sweep as files in one folder, the report, and a page that holds them together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ablations.planner import Artifact, available
from analysis.figures import PANELS, drawn, save
from analysis.render import name_of, render
from analysis.report import report
from analysis.study import study
from analysis.verdicts import judge_study
from analysis.verdicts import render as render_claims
from sdae.files import make_folder, write_atomically
from sdae.store import Store

SUFFIXES = {"md": "md", "latex": "tex", "html": "html", "csv": "csv", "json": "json"}


def publish(
    store: Store, artifacts: Sequence[Artifact], scale: str | Path, seeds: Sequence[int], out: Path
) -> list[Path]:
    """Writes OUT/ARTIFACT.{md,tex,html,csv,json}, OUT/FIGURE.{png,svg,pdf}, OUT/claims.{md,json}, OUT/report.{html,tex}

    and OUT/README.md; returns their paths.
    """
    make_folder(out)
    sources = [artifact.name if artifact.name in available() else artifact.path for artifact in artifacts]
    found = study(store, sources, scale, seeds)
    verdicts = judge_study(found)
    files: list[Path] = []
    drawings: dict[str, dict[str, bytes]] = {}
    page = [f"# Regenerated at scale {found.scale.title}", ""]
    if found.synthetic:
        page += ["**SYNTHETIC RESULTS**, made up to test these pages; no model was trained.", ""]
    counts = Counter(entry["verdict"] for entry in verdicts)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "none over these cells"
    page += [
        f"All on one page, with what is known of each cell: [report.html](report.html). [Claims](claims.md): {told}.",
        "",
    ]
    panels = [found.tables[name] for name in PANELS if name in found.tables]
    if len(panels) == len(PANELS):
        files += save(panels, out, "figure4")
        page += ["![Figure 4](figure4.png)", ""]
    for table in found.tables.values():
        contents: dict[str, str | bytes] = {suffix: render(table, format) for format, suffix in SUFFIXES.items()}
        if table.kind == "figure":
            drawings[table.artifact] = drawn([table])
            contents |= drawings[table.artifact]
        written = [out / f"{table.artifact}.{suffix}" for suffix in contents]
        for path, content in zip(written, contents.values(), strict=True):
            write_atomically(path, content)
        files += written
        page += [f"## {name_of(table.artifact)}", ""]
        if table.kind == "figure":
            page += [f"![{name_of(table.artifact)}]({table.artifact}.png)", ""]
        links = ", ".join(f"[{path.suffix[1:]}]({path.name})" for path in written)
        page += [render(table, "md").strip(), "", f"Files: {links}", ""]
    files += [out / "claims.md", out / "claims.json"]
    write_atomically(files[-2], render_claims(verdicts, found))
    write_atomically(files[-1], json.dumps(verdicts, indent=1, allow_nan=False) + "\n")
    files += [path for path in report(found, verdicts, out, drawings) if path not in files]
    files.append(out / "README.md")
    write_atomically(files[-1], "\n".join(page))
    return files
