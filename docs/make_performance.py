"""Writes docs/performance.md and docs/scaling.md.

    python docs/make_performance.py                       # from results/performance/*.json
    python docs/make_performance.py --results DIR --check # write nothing; exit code 1 where a page is out of date

performance.md shows what was measured and names the file of each table; scaling.md is computed, from a measured speed
where some file has one and from the range that is assumed elsewhere in the suite where none has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ablations.cost import MFU, PEAK
from ablations.planner import plan
from ablations.scale import PAPER_PICTURES
from ablations.scaling import BUCKET, COUNTS, Cluster, paper_hours, step, trained_weights
from sdae.config import Pretrain, parse
from sdae.models.flops import per_image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "performance"
PERFORMANCE, SCALING = ROOT / "docs" / "performance.md", ROOT / "docs" / "scaling.md"

HEAD = """# Performance

Written by `python docs/make_performance.py` from `results/performance/*.json`; no figure here was typed by hand. Each
file holds the raw repeats, the commit, the versions and the hardware. Where a section says nothing else, variants of
one table took turns in one process, and figures are medians over the repeats. MFU is FLOP by formula
(`sdae/models/flops.py`) over the peak that the same machine reached in a dense matrix product of the same precision.

{gpu}

## How to measure

```bash
python benchmarks/pretrain_step.py --json step.json          # the step: views, eager and compiled, precisions, batches
python benchmarks/changes.py --json changes.json             # what each change that makes it fast is worth by itself
python benchmarks/plain.py --json plain.json                 # beside a plain reading of the paper on timm's blocks
python benchmarks/input.py --workers 2 --json input.json     # pictures a second: PIL, files, packed shards, raw
python benchmarks/data_wait.py --json data_wait.json         # the share of real steps that waits for pictures
python benchmarks/orchestration.py --json orchestration.json # planning, reading, status, tables: 100 to 10,000 runs
python benchmarks/gpu.py --out evidence --store runs         # a GPU's evidence within 9 minutes; again to go on
```
"""
NO_GPU = (
    "**No GPU figure exists: `results/performance` has no file of a GPU.** What is measured below was measured on\n"
    "CPUs and says nothing of a GPU. `benchmarks/gpu.py` makes what is missing."
)
LEGENDS = {
    "input": """Pictures per second of processor time, one core, from the page cache; `total` is by the clock, of all
processes at once. `pil` is torchvision's v1 pipeline from the file to the normalized tensor. `jpeg`, `shards` and
`raw` are what a core does before the device has the batch: read, decode, cut and flip to uint8; raw pictures are only
copied out of the map, the device cuts them. With `+cpu` the core does everything, down to the normalized floats, as
`pil` does: those rows compare like with like. `ratio` is that of neighbours in one repeat, to `pil`; `goal` what was
asked for; `scaling` the total over that of a core times the processes. Made JPEGs of 500 x 375.
""",
    "orchestration": """Each store in processes of its own; the least of the repeats, which are in the file. `growth` is
the time of the largest size over that of the one before, per run: 1 is linear. `start_s`: until a process has started
and ended, medians.
""",
    "plain": """`plain` is a reading of the paper on timm's blocks, written for this comparison, in turns with ours. The
goal is 1.5 x the authors' own programme, which was not measured: its licence keeps it out of this repository.
""",
    "changes": """Eager steps of SdAE, three folds, the teacher's update in each; one change undone, the others as they
are: `ratio` is the step without it over the step with it. `losses`: how far those of 200 steps at a small size lie
apart with and without, the largest relative difference; 0: the same bits. What compiling and CUDA graphs are worth
stands with `pretrain_step`.
""",
    "data_wait": """Real runs, one after another; median, least and most over the rows of a run's log after the first.
""",
}
WHAT = """
## What makes the step fast, and what it may change

| setting | where | numbers |
| :-- | :-- | :-- |
| student, teacher, masks, loss as one compiled graph of fixed shapes | `efficiency.compile`, GPUs | rounding, 1e-5 |
| CUDA graphs | `efficiency.cuda_graphs` | those of the compiled step |
| the attention kernel that is fastest at the run's tokens | `efficiency.attention: auto`, GPUs | rounding |
| two plain products in place of the fused kernel for short rows (bf16: up to 512 tokens) | always on CPUs | rounding |
| oneDNN's product with its bias inside (`sdae/models/linear.py`) | always on CPUs in fp32 | rounding |
| mask noise and stochastic depth drawn a step ahead, in pinned memory | always on GPUs | none: the same bits |
| nothing read from the GPU between two rows of the log | always | none |
| teacher without gradient | always | none |
| what is embedded, and the last block's MLP and norm, for the wanted tokens only | always | rounding |
| fused AdamW | always | rounding |
| the teacher's update in two calls over all weights | always | none: the same bits |
| activation checkpointing | `efficiency.checkpointing` | none: the same bits |
| micro-batches, gradients exchanged with the last one | `efficiency.micro_batch` | rounding, 1e-5 |
| DDP whose exchange overlaps the backward pass | several processes | rounding, 1e-5 |
| FSDP2, weights and optimizer state shared | `efficiency.fsdp` | rounding, 1e-5; the same files |
| gradients exchanged in bf16 | `optim.bf16_gradients` | changes them, so it is part of the id |

Rounding: losses of 200 steps with and without it lie apart by no more than 1e-5 of their size in fp32 and 2e-2 in bf16,
which has eight bits of precision. What a setting switches is compared by `tests/test_speed.py` (on a GPU, where steps
are fewer and limits wider, by `tests/test_gpu.py`), what is always so by `benchmarks/changes.py`, which fails above
these limits; a test holds the file below to them. The attention kernel is measured once, when a run starts, and kept
when it goes on.
"""

SCALE = """# Scaling

Written by `python docs/make_performance.py`; the formulas are `ablations/scaling.py`. **Nothing here was measured on
several GPUs.** {basis}

- A run's global batch is part of its id, so n GPUs have batch / n pictures each. A step takes (batch / n) x FLOP of a
  picture / speed; that the speed holds for few pictures is assumed, and optimistic at 64 GPUs.
- Gradients are {weights:,} float32 numbers (SdAE, ViT-B/16): {size:.0f} MB a step, half with `optim.bf16_gradients`.
  Rings move 2 (n - 1) / n of them, at {within:.0f} GB/s within a node of {per_node} GPUs; between nodes at {one:.0f}
  GB/s for each network card of a node, and no faster than within; each of the 2 (n - 1) messages waits
  {latency:.0f} µs. These are assumptions: put your own cluster's in their place (`ablations.scaling.Cluster`).
- The exchange overlaps the backward pass (two thirds of the student's arithmetic); what does not is the last bucket of
  {bucket} MiB and what is longer than the pass.

## One step of SdAE-300, ViT-B/16, three folds, batch {batch}

{steps}
## The whole paper

{hours}
Hours are GPU-hours over GPUs where runs go side by side, each on one node's GPUs; a run spread over more GPUs pays the
efficiency of the table above. Validation, start-up and Table 1's cost runs on other machines are left out.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    options = parser.parse_args()
    files = read(options.results)
    pages = {PERFORMANCE: performance(files), SCALING: scaling(files)}
    if options.check:
        stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
        sys.exit(f"out of date: {', '.join(stale)} (run python docs/make_performance.py)" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """By file name; what was only a trial of the path (`dry`) is left out."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: values for name, values in found.items() if not values.get("dry")}


# performance.md


def performance(files: dict[str, dict[str, Any]]) -> str:
    devices = sorted({gpu for values in files.values() if on_gpu(values) for gpu in values.get("gpus") or []})
    head = HEAD.format(gpu=f"Measured on: {', '.join(devices)}." if devices else NO_GPU)
    parts = [section(name, values) for name, values in files.items()]
    if not parts:
        parts = ["\n## What was measured\n\nNothing yet: `results/performance` has no file.\n"]
    return head + WHAT + "".join(parts)


def on_gpu(values: dict[str, Any]) -> bool:
    """Whether the figures of a file are a GPU's: a CPU benchmark on a machine that has one is not."""
    measured = values.get("measured") or values
    if measured.get("device", "cpu") != "cpu":
        return True
    return any(row.get("device", "cpu") != "cpu" for row in rows_of(values))


def rows_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    rows = (values.get("measured") or values).get("rows") or []
    return [row for row in rows if isinstance(row, dict)]


def section(name: str, values: dict[str, Any]) -> str:
    """A file's tables: its rows, the parts of its steps, and else the numbers that it holds."""
    kind = str(values.get("benchmark") or Path(name).stem)
    where = ", ".join(values.get("gpus") or []) if on_gpu(values) else values.get("cpu")
    packages = values.get("packages") or {}
    made = [f"`results/performance/{name}`", f"commit `{str(values.get('commit'))[:10]}`"]
    made += ["changed since" for _ in range(bool(values.get("dirty")))]
    made += [str(where), f"{values.get('cores')} cores", f"torch {packages.get('torch')}"]
    out = [f"\n## {kind}\n", ", ".join(part for part in made if "None" not in part) + ".\n"]
    if kind in LEGENDS:
        out.append(LEGENDS[kind])
    if values.get("failed") or values.get("skipped"):
        out.append(f"Not measured: {values.get('failed') or values.get('skipped')}.\n")
    measured = values.get("measured") or values
    if rows := rows_of(values):
        short = [{k: v for k, v in row.items() if not k.endswith("_repeats")} for row in rows]
        out.append(table(short if kind in ("orchestration", "input") else rows))
        beside = flat({key: measured[key] for key in BESIDE if key in measured})
        out += [table([{"what": key, "found": value} for key, value in beside.items()])] if beside else []
    for part in measured.get("parts") or []:
        setting = ", ".join(f"{key} {part[key]}" for key in ("view", "mode", "precision", "batch") if key in part)
        out += [f"Parts of the step: {setting}.\n", table(roofline(part["parts"]))]
    if measured.get("parts"):
        out.append(LEFT.strip() + "\n")
    if not rows:
        plain = {key: value for key, value in flat(measured).items() if key not in NOT_FOUND}
        out.append(table([{"what": key, "found": value} for key, value in plain.items()]) if plain else "")
    return "\n".join(out)


def roofline(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts with the milliseconds that their FLOP would take at the peak, and what they take beyond: of the step."""
    rows, step = [], next(part["seconds"] for part in parts if part["part"] == "step")
    for part in parts:
        ideal = part["seconds"] * (part["mfu"] or 0.0)
        beyond = part["seconds"] - ideal
        rows.append({
            "part": part["part"], "ms": 1e3 * part["seconds"], "at the peak (ms)": 1e3 * ideal,
            "left on the table (ms)": 1e3 * beyond, "of the step (%)": 100 * beyond / step, "MFU": part["mfu"],
            "GB/s": part.get("gb_per_s"), "ms of the repeats": [1e3 * seconds for seconds in part["repeats"]],
        })  # fmt: skip
    return rows


LEFT = """
What is left lies in work that has no FLOP in the count or cannot reach the peak: attention's softmax, GELU, LayerNorm,
residuals and the loss move memory (a compiler fuses what touches the same numbers); matrices of few tokens or narrow
layers, the decoder's first of all, fill the units badly; the optimizer and the moving average have no FLOP to count and
are bound by memory (GB/s: the fewest bytes that they can move, over their time). The step's own row is the whole one:
what it has beyond the sum of its parts is masks, loss and the gaps between kernels.
"""
BESIDE = ("growth", "start_s")  # numbers that stand beside a file's rows
NOT_FOUND = {
    "benchmark", "dry", "commit", "dirty", "diff_sha256", "python", "platform", "cpu", "cores", "cuda", "device",
    "seconds", "exit_code", "summary", "failed", "skipped",
}  # fmt: skip


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers in a mapping of mappings; versions, commands and lists of words are not among them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("packages", "options", "limits"):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns that say something; lists of numbers as median and spread, columns of one value for all as a line."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    texts = {name: [told(row.get(name)) for row in rows] for name in names}
    texts = {name: column for name, column in texts.items() if any(column)}
    same = {name: column[0] for name, column in texts.items() if len(rows) > 1 and len(set(column)) == 1}
    shown = [name for name in texts if name not in same]
    line = "All rows: " + ", ".join(f"{name} {value}" for name, value in same.items()) + ".\n\n" if same else ""
    head = [name.replace("_", " ") for name in shown]
    numbers = [all(isinstance(row.get(name), int | float | list | None) for row in rows) for name in shown]
    sides = ["--:" if number else ":--" for number in numbers]
    return line + grid(head, sides, *([texts[name][i] for name in shown] for i in range(len(rows))))


def grid(*lines: Iterable[str]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def told(value: Any) -> str:
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return f"{statistics.median(value):,.4g} ({min(value):,.4g} to {max(value):,.4g}, n {len(value)})"
    return ", ".join(map(str, value))[:80] if isinstance(value, list) else ""


# scaling.md


def measured_speed(files: dict[str, dict[str, Any]]) -> tuple[float, str] | None:
    """FLOP/s that SdAE's ViT-B/16 with three folds reached on a GPU, and the file that says so; the fastest counts."""
    found = []
    for name, values in files.items():
        for row in rows_of(values) if on_gpu(values) else ():
            if (row.get("arch"), row.get("view"), row.get("folds")) == ("vit_base_patch16", "folds", 3):
                found.append((row["images_per_s"] * row["gflop_per_image"] * 1e9, name))
    return max(found, default=None)


def scaling(files: dict[str, dict[str, Any]]) -> str:
    config, cluster = parse({"stage": "pretrain"}), Cluster()
    assert isinstance(config, Pretrain)
    measured = measured_speed(files)
    if measured:
        speeds = {"measured speed": measured[0]}
        basis = (
            f"The speed of one GPU is measured: {measured[0] / 1e12:.0f} TFLOP/s (`results/performance/{measured[1]}`)."
        )
    else:
        speeds = {f"{share:.0%} of the peak".replace("%", " %"): share * PEAK for share in MFU}
        basis = (
            f"No file holds a GPU's speed, so {MFU[0]:.0%} and {MFU[1]:.0%} of an H200's {PEAK / 1e12:.0f} TFLOP/s are "
            "assumed,\nthe range that well-made training reaches."
        ).replace("%", " %")
    steps = "".join(
        f"At {name} ({speed / per_image(config):,.0f} pictures a second and GPU):\n\n{of_steps(config, speed)}\n"
        for name, speed in speeds.items()
    )
    weights = trained_weights(config)
    return SCALE.format(
        basis=basis, weights=weights, size=4 * weights / 1e6, within=cluster.within / 1e9, per_node=cluster.per_node,
        one=cluster.card / 1e9, latency=1e6 * cluster.latency, bucket=BUCKET // 2**20,
        batch=config.optim.batch_size, steps=steps, hours=hours(measured[0] if measured else None),
    )  # fmt: skip


def of_steps(config: Pretrain, speed: float) -> str:
    """One row a number of GPUs, for nodes with one network card and for nodes with one for each GPU."""
    epochs, rows = config.optim.epochs * PAPER_PICTURES / config.optim.batch_size, []
    for gpus in COUNTS:
        one, many = (step(config, gpus, speed, Cluster(cards=cards)) for cards in (1, Cluster.per_node))
        cells = [str(gpus), f"{many.batch:g}", f"{1e3 * many.compute:.1f}"]
        for s in (one, many):
            hours = epochs * s.seconds / 3600
            cells += [f"{1e3 * s.exchange:.1f}", f"{100 * s.efficiency:.0f} %", f"{hours:.1f}", f"{hours * gpus:,.0f}"]
        rows.append(cells)
    head = ["GPUs", "pictures each", "arithmetic (ms)"]
    for cards in ("1 card", f"{Cluster.per_node} cards"):
        head += [f"{cards}: exchange (ms)", "efficiency", "hours", "GPU-hours"]
    return grid(head, ["--:"] * len(head), *rows)


def hours(speed: float | None) -> str:
    """GPU-hours of every run of the paper, one seed, by stage; and hours where so many GPUs work side by side."""
    sweep = plan((), "paper", content="0" * 16)
    by_stage = paper_hours(sweep)
    if speed is not None:  # the upper share of the peak was assumed; the measured one takes its place
        by_stage = {stage: (low * MFU[1] * PEAK / speed,) * 2 for stage, (low, _) in by_stage.items()}
    counts = {stage: sum(run.config.stage == stage for run in sweep.runs.values()) for stage in by_stage}
    total = tuple(sum(pair[end] for pair in by_stage.values()) for end in (0, 1))
    rows = [[stage, str(counts[stage]), between(by_stage[stage])] for stage in by_stage]
    rows.append(["all", str(sum(counts.values())), between(total)])
    side = [[str(n), *(between([end / n / unit for end in total]) for unit in (1, 24))] for n in COUNTS]
    text = grid(["stage", "runs", "GPU-hours"], [":--", "--:", "--:"], *rows)
    return text + "\n" + grid(["GPUs side by side", "hours", "days"], ["--:"] * 3, *side)


def between(pair: Iterable[float]) -> str:
    texts = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in pair]
    return " to ".join(dict.fromkeys(texts))


if __name__ == "__main__":
    main()
