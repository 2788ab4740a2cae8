"""What the report says, as plain values: the templates of the page and of the LaTeX are filled from the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.audit import audit, release
from analysis.figures import alternative
from analysis.render import name_of
from analysis.study import Study
from analysis.verdicts import VERDICTS, found
from sdae.store import number

AGREES = {False: "disagrees", None: "cannot be told", True: "agrees"}
# Of the list of runs: name, heading, and the decimals of those that are numbers
COLUMNS: list[tuple[str, str, int | None]] = [
    ("id", "Run", None), ("stage", "Stage", None), ("state", "State", None), ("scale", "Scale", None),
    ("seed", "Seed", 0), ("feeds", "Feeds", None), ("epochs", "Epochs", 0), ("top1", "Top-1 (%)", 2),
    ("loss", "Loss", 4), ("minutes", "Minutes", 1), ("ended", "Ended (UTC)", None), ("device", "Device", None),
    ("commit", "Commit", None), ("message", "Message", None),
]  # fmt: skip


def contents(study: Study, verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entries = [(t, {"name": t.artifact, "title": name_of(t.artifact), "kind": t.kind}) for t in study.tables.values()]
    return {
        "scale": study.scale.name,
        "synthetic": study.synthetic,
        "facts": facts(study),
        "summary": summary(study, verdicts),
        "tables": [entry for table, entry in entries if table.kind == "table"],
        "figures": [entry | {"alt": alternative(table)} for table, entry in entries if table.kind == "figure"],
        "claims": claims(verdicts),
        "audit": _audited(audit(), "quote"),
        "release": _audited(release(), "setting"),
        "runs": runs(study),
    }


def newest(study: Study) -> pd.Timestamp | None:
    """When the last of the study's runs ended."""
    ended = _mine(study)["ended"].max()
    return None if pd.isna(ended) else ended


def facts(study: Study) -> list[tuple[str, str]]:
    tables, until = study.tables.values(), newest(study)

    def all_of(values: Any) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value)) or "nothing measured yet"

    return [
        ("Scale", study.scale.title),
        ("Data set", all_of(table.dataset for table in tables)),
        ("Model", all_of(table.model for table in tables)),
        ("Commit", all_of(sorted({commit for table in tables for commit in table.commits}))),
        ("Store", str(study.store.root)),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Last run ended", f"{until:%Y-%m-%d %H:%M} UTC" if until is not None else "none has ended"),
    ]


def summary(study: Study, verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cells, mine = list(study.cells.values()), _mine(study)
    fed = [cell for cell in cells if cell.planned]
    judged, states = Counter(v["verdict"] for v in verdicts), Counter(mine["state"])
    states["not run"] = len(study.sweep.runs) - len(mine)
    gpu, cpu = hours(study)
    return {
        "claims": [(verdict, judged[verdict]) for verdict in VERDICTS],
        "measured": sum(cell.estimate is not None for cell in fed),
        "fed": len(fed),
        "paper_only": len(cells) - len(fed),
        "stale": sum(cell.stale for cell in cells),
        "states": [(state, count) for state, count in states.most_common() if count],
        "planned": len(study.sweep.runs),
        "gpu_hours": _hours(gpu),
        "cpu_hours": _hours(cpu),
    }


def hours(study: Study) -> tuple[float, float]:
    """What the study's finished runs took, by their last attempts: GPU-hours, and hours of runs without a GPU."""
    done = _mine(study).query("state == 'done'")
    seconds = done["seconds"].fillna(0.0) / 3600
    cpu = done["device"].eq("cpu").fillna(False).astype(bool)
    results = (study.store.run(str(identity)).result() or {} for identity in done.index[~cpu])
    processes = [max(number(result, "world_size"), 1) for result in results]
    return float((seconds[~cpu] * processes).sum()), float(seconds[cpu].sum())


def claims(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are read: `found` is the estimate with its interval, `needs` what it would take."""
    rows = []
    for entry in verdicts:
        row = {"quote": plain(entry["quote"]), "found": found(entry), "needs": entry["needs"] or ""}
        keys = ("claim", "where", "verdict", "target", "contrast", "printed")
        rows.append(row | {key: entry.get(key) or "" for key in keys})
    return rows


def runs(study: Study) -> dict[str, Any]:
    """A row for every run of the store and for every planned one that is not there yet, in the order of `COLUMNS`."""
    frame, planned = study.frame, study.sweep.runs
    feeds = {identity: _feeds(run.feeds) for identity, run in planned.items()}
    shown = frame[["stage", "state", "scale", "device", "message", "seed", "epochs"]].astype(object)
    for name, digits in (("top1", 2), ("loss", 4)):
        shown[name] = frame[name].round(digits)
    shown["minutes"] = (frame["seconds"] / 60).round(1)
    shown["ended"] = frame["ended"].dt.strftime("%Y-%m-%d %H:%M")
    shown["commit"] = frame["commit"].str[:10]
    shown["id"], shown["feeds"] = frame.index, [feeds.get(identity, "") for identity in frame.index]
    keys = [name for name, _, _ in COLUMNS]
    values = shown[keys].astype(object).where(shown[keys].notna(), None)
    rows = values.to_numpy().tolist()
    for identity in sorted(set(planned).difference(frame.index)):
        config = planned[identity].config
        known = {"id": identity, "stage": config.stage, "state": "not run", "seed": config.seed}
        rows.append([(known | {"feeds": feeds[identity]}).get(key) for key in keys])
    held = {key: {row[n] for row in rows} - {None, ""} for n, key in enumerate(keys)}
    used = [n for n, key in enumerate(keys) if len(held[key]) > (key == "scale") or key == "id"]
    columns = [dict(zip(("name", "label", "digits"), COLUMNS[n], strict=True)) for n in used]
    return {"columns": columns, "rows": [[row[n] for n in used] for row in rows]}


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end that."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=str, ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def plain(quote: str) -> str:
    """A quote without its TeX and HTML: `$2\\times79$` is 2 × 79."""
    words = {r"\times": " × ", r"\checkmark": "✓", "$": "", "<sup>b</sup>": "ᵇ", "<sup>m</sup>": "ᵐ"}
    for command, sign in words.items():
        quote = quote.replace(command, sign)
    return re.sub(r"\s+", " ", quote)


def _mine(study: Study) -> pd.DataFrame:
    """The planned runs that the store has."""
    return study.frame[study.frame.index.isin(list(study.sweep.runs))]


def _feeds(cells: Sequence[str]) -> str:
    return f"{cells[0]} and {len(cells) - 1} more" if len(cells) > 1 else "".join(cells)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _audited(entries: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """What disagrees first; verdicts in words."""
    order = list(AGREES)
    rows = sorted(entries, key=lambda entry: order.index(entry["agrees"]))
    return [row | {"agrees": AGREES[row["agrees"]], key: plain(row[key])} for row in rows]
