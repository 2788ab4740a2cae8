"""The planner: what the paper's artifacts become at every scale, and what it says to bad files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.artifact import METRICS
from ablations.cost import calibrate, gpu_hours, plan_document
from ablations.planner import MISSING, NEEDS_RELEASED, Sweep, available, load_artifact, plan
from ablations.scale import PAPER_PICTURES, load_scale, recipes, scale_momentum, scale_tokens, scales
from sdae.config import STAGES, count_masked, dump, parse, run_id
from sdae.errors import UserError
from sdae.models.flops import per_image
from sdae.store import Store

SCALES = ("smoke", "mini", "small", "paper")
MOMENTA = {
    "epoch": ("0.90", "0.92", "0.94", "0.96", "0.98", "0.99"),
    "iteration": ("0.995", "0.996", "0.997", "0.998", "0.999", "0.9999"),
}  # fmt: skip
OTHERS = ("deit-300", "moco-v3-300", "dino-400", "beit-300", "beit-800", "mae-300", "mae-1600", "cae-300", "sdae-300")


@pytest.fixture(scope="module", params=SCALES)
def sweep(request: pytest.FixtureRequest) -> Sweep:
    return plan(scale=request.param, content="0" * 16)


def config_of(sweep: Sweep, cell: str):
    """The config of the run that feeds a cell, and that of its need."""
    run = sweep.runs[sweep.cells[cell][0][1]]
    return run.config, sweep.runs[run.needs[0]].config if run.needs else None


def test_cell_names_are_those_of_the_contract(sweep: Sweep) -> None:
    table2 = ["scratch", "moco-v3-300", "dino-400", "beit-300", "cae-300", "mae-100", "mae-300", "mae-1600"]
    table2 += ["sdae-100", "sdae-300"]
    figure4b = ["crop-36", "crop-49", "crop-79", "crop-122", "masked", "full", "folds-2", "folds-3", "folds-4"]
    figure4a = [f"{every}-{m}-{epochs}" for every, all_m in MOMENTA.items() for m in all_m for epochs in (100, 300)]
    figure4c = [f"{w}-{epoch}" for w in ("student", "teacher") for epoch in range(20, 301, 20)]
    wanted = {
        "table1": (["mae", "full", "masked", "crop", "folds"], ["time", "memory", "overhead"]),
        "table2": (table2, ["finetune", "linear"]),
        "table3": (OTHERS, ["miou"]),
        "table4": (OTHERS, ["apb", "apb50", "apb75", "apm", "apm50", "apm75"]),
        "table5": (["full-raw", "full", "masked", "folds"], ["top1"]),
        "figure4a": (figure4a, ["top1"]),
        "figure4b": (figure4b, ["top1"]),
        "figure4c": (figure4c, ["top1"]),
    }
    cells = {f"{a}.{row}.{column}" for a, (rows, columns) in wanted.items() for row in rows for column in columns}
    assert {name for artifact in sweep.artifacts for name in artifact.cells} == cells
    assert cells - set(sweep.cells) == {"table2.scratch.linear", *sweep.blocked}
    paper = sweep.scale.name == "paper"
    unpublished = {"moco-v3-300", "beit-300", "beit-800", "cae-300"} | (set() if paper else {"deit-300", "dino-400"})
    others = {cell for cell in cells if cell.split(".")[1] in unpublished}  # of methods that this suite does not train
    assert sweep.blocked == dict.fromkeys(others, MISSING if paper else NEEDS_RELEASED)


def test_runs_are_shared_ordered_and_counted(sweep: Sweep) -> None:
    theirs = 6 if sweep.scale.name == "paper" else 0  # DINO in Tables 2-4, DeiT in 3 and 4, from timm
    assert (sweep.requested, sweep.unique) == (138 + theirs, 127 + theirs)
    seen: set[str] = set()
    for identity, run in sweep.runs.items():
        assert identity == run.id == run_id(run.config)
        assert seen.issuperset(run.needs)
        assert run.feeds
        seen.add(identity)
    folds = config_of(sweep, "table2.sdae-300.finetune")[0].init.run
    feeds = sweep.runs[folds].feeds
    assert {
        "table2.sdae-300.linear",
        "table5.folds.top1",
        "figure4c.student-20.top1",
        "figure4c.teacher-300.top1",
    } <= set(feeds)
    assert sweep.cells["table2.sdae-100.finetune"] == sweep.cells["figure4b.folds-3.top1"]
    assert sweep.cells["table2.sdae-300.finetune"] == sweep.cells["table5.folds.top1"]
    assert all(parse(dump(run.config)) == run.config for run in sweep.runs.values())


def test_lengths_keep_their_proportion(sweep: Sweep) -> None:
    lengths = [config_of(sweep, f"table2.mae-{e}.finetune")[1].optim.epochs for e in (100, 300, 1600)]
    assert lengths[1] == 3 * lengths[0]
    assert lengths[2] == 16 * lengths[0]
    assert lengths[1] % 15 == 0  # Figure 4(c)'s fifteen checkpoints
    sdae = config_of(sweep, "table2.sdae-300.finetune")[1]
    assert sdae.optim.epochs == lengths[1]
    assert sdae.optim.warmup_epochs == pytest.approx(0.2 * lengths[1])
    mae = config_of(sweep, "table2.mae-1600.finetune")[1]
    assert mae.optim.warmup_epochs / mae.optim.epochs == pytest.approx(40 / 1600)
    assert config_of(sweep, "figure4c.student-20.top1")[0].init.epoch == lengths[1] // 15
    assert config_of(sweep, "figure4c.teacher-300.top1")[0].init.weights == "teacher"


def test_arms_stay_distinct(sweep: Sweep) -> None:
    for artifact in ("figure4a", "figure4b", "figure4c", "table5"):
        runs = [runs for cell, runs in sweep.cells.items() if cell.startswith(artifact)]
        assert len(runs) == len({tuple(run) for run in runs})
    tokens = [config_of(sweep, f"figure4b.crop-{n}.top1")[1].method.teacher.tokens for n in (36, 49, 79, 122)]
    assert tokens == {196: [36, 49, 79, 122], 64: [12, 16, 26, 40], 16: [3, 4, 6, 10]}[sweep.scale.tokens]


def test_momentum_forgets_as_much_as_in_the_paper(sweep: Sweep) -> None:
    for cell, paper in (("figure4a.epoch-0.90-100.top1", 0.9**100), ("figure4a.epoch-0.99-300.top1", 0.99**300)):
        config = config_of(sweep, cell)[1]
        assert config.method.ema.momentum**config.optim.epochs == pytest.approx(paper, rel=1e-6)
        assert config.method.ema.momentum_end is None
    config = config_of(sweep, "figure4a.iteration-0.9999-100.top1")[1]
    steps = config.optim.epochs * (sweep.scale.pictures // config.optim.batch_size)
    assert config.method.ema.momentum**steps == pytest.approx(0.9999 ** (100 * (PAPER_PICTURES // 768)), rel=1e-6)
    if sweep.scale.name != "paper":
        assert sweep.runs[run_id(config)].paper["method.ema.momentum"] == 0.9999


def test_the_paper_scale_is_the_paper() -> None:
    sweep = plan(scale="paper")
    sdae = config_of(sweep, "table2.sdae-300.finetune")[1]
    assert sdae.optim.model_dump(exclude={"name", "layer_decay", "clip", "weight_ema", "min_lr", "bf16_gradients"}) == {
        "epochs": 300, "batch_size": 768, "base_lr": 2.666e-4, "weight_decay": 0.04, "betas": (0.9, 0.95),
        "warmup_epochs": 60,
    }  # fmt: skip
    assert (sdae.model.width, sdae.model.depth, sdae.model.decoder_depth, sdae.model.drop_path) == (768, 12, 8, 0.25)
    assert (sdae.method.ema.momentum, sdae.method.ema.momentum_end, sdae.method.teacher.folds) == (0.96, 0.99, 3)
    mae = config_of(sweep, "table2.mae-1600.finetune")[1]
    assert (mae.optim.batch_size, mae.optim.base_lr, mae.optim.warmup_epochs, mae.model.drop_path) == (
        4096,
        1.5e-4,
        40,
        0.0,
    )
    tuned = config_of(sweep, "table5.full.top1")[0]
    assert (tuned.optim.epochs, tuned.optim.layer_decay, tuned.data.augment.mixup, tuned.model.drop_path) == (
        100,
        0.65,
        0.8,
        0.1,
    )
    probe = config_of(sweep, "table2.sdae-300.linear")[0]
    assert (probe.optim.name, probe.optim.batch_size, probe.head.norm) == ("lars", 16384, "batch")
    assert config_of(sweep, "table2.scratch.finetune")[0].optim.epochs == 300
    assert config_of(sweep, "figure4c.student-20.top1")[0].optim.epochs == 5
    assert all(not run.paper for run in sweep.runs.values())
    assert sweep.provisional  # no ImageNet here


def test_flop_of_the_paper() -> None:
    sweep = plan(["table1"], "paper")
    found = {
        row: per_image(config_of(sweep, f"table1.{row}.time")[0]) / 1e9
        for row in ("mae", "full", "masked", "crop", "folds")
    }
    wanted = {"mae": 58.46, "full": 93.58, "masked": 84.63, "crop": 67.27, "folds": 84.44}
    assert {row: round(value, 2) for row, value in found.items()} == wanted


def test_gpu_hours_follow_finished_cost_runs(tmp_path: Path) -> None:
    sweep, store = plan(["table1", "table5"], "paper"), Store(tmp_path)
    run = next(r for r in sweep.runs.values() if r.config.stage == "pretrain")
    low, high = gpu_hours(run)
    assert 0 < low < high
    cost = config_of(sweep, "table1.full.time")[0]
    folder = store.run(run_id(cost))
    folder.create(cost)
    folder.finish({"metrics": {"images_per_s": 1000.0}})
    low, high = gpu_hours(run, calibrate(store))
    assert low < 300 * PAPER_PICTURES / 1000 / 3600 < high  # the very view that was measured
    assert plan_document(sweep, store)["done"] == 1


def test_seeds_and_fingerprint() -> None:
    sweep = plan(["table5"], "small", (0, 1, 2), content="a" * 16)
    assert sweep.unique == 24
    assert [seed for seed, _ in sweep.cells["table5.folds.top1"]] == [0, 1, 2]
    for seed, identity in sweep.cells["table5.folds.top1"]:
        config = sweep.runs[identity].config
        assert (config.seed, config.data.fingerprint) == (seed, "a" * 16)
        assert sweep.runs[config.init.run].config.seed == seed
    assert not sweep.provisional
    elsewhere = plan(["table5"], "small", (0,), content="a" * 16, data_path="/somewhere/else")
    assert set(elsewhere.runs) <= set(sweep.runs)  # where the pictures lie is not part of an id


def test_every_metric_is_known_and_every_recipe_is_whole() -> None:
    for name in available():
        for cell in load_artifact(name).cells.values():
            assert cell.metric is None or any(cell.metric in metrics for metrics in METRICS.values())
    assert set(scales()) == set(SCALES)
    assert {recipe["stage"] for recipe in recipes().values()} == set(STAGES)


@given(st.integers(1, 147), st.integers(2, 32), st.integers(1, 147))
def test_token_counts_keep_their_order_and_share(n: int, side: int, other: int) -> None:
    tokens = side * side
    here = scale_tokens(n, tokens, 0.75)
    assert abs(here - n * tokens / 196) <= 1
    assert (here <= scale_tokens(other, tokens, 0.75)) or n > other
    assert scale_tokens(196, tokens, 0.75) == tokens
    assert scale_tokens(147, tokens, 0.75) == count_masked(tokens, 0.75)
    assert scale_tokens(n, 196, 0.75) == n


@given(st.floats(0.5, 0.9999), st.floats(1, 100))
def test_momentum_rule(momentum: float, shortening: float) -> None:
    assert scale_momentum(momentum, 1) == momentum
    assert scale_momentum(momentum, shortening) == pytest.approx(momentum**shortening, rel=1e-11)


OWN = """
title: Does the mask ratio matter?
columns: {top1: {run: finetune, metric: top1}}
runs: {finetune: {recipe: finetune, init: {run: pretrain}}}
rows:
  "ratio-{mask_ratio}":
    grid: {mask_ratio: [0.5, 0.75]}
    runs: {pretrain: {recipe: sdae, optim: {epochs: 100}, method: {mask_ratio: "{mask_ratio}"}}}
paper: {ratio-0.75.top1: 83.5}
"""


def write(folder: Path, text: str, name: str = "own.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_own_artifact(tmp_path: Path) -> None:
    sweep = plan(["table2", write(tmp_path, OWN)], "smoke")
    own = sweep.artifacts[1]
    assert (own.name, own.paper) == ("own", {"own.ratio-0.75.top1": 83.5})
    assert [row.label for row in own.rows] == ["ratio-0.5", "ratio-0.75"]
    assert config_of(sweep, "own.ratio-0.5.top1")[1].method.mask_ratio == 0.5
    assert sweep.cells["own.ratio-0.75.top1"] == sweep.cells["table2.sdae-100.finetune"]  # shared with the paper's
    assert sweep.requested - sweep.unique == 2


def test_own_network_is_that_of_the_pretraining(tmp_path: Path) -> None:
    text = OWN.replace(
        'method: {mask_ratio: "{mask_ratio}"}', 'model: {width: 64}, method: {mask_ratio: "{mask_ratio}"}'
    )
    tuned, need = config_of(plan([write(tmp_path, text)], "smoke"), "own.ratio-0.5.top1")
    assert tuned.model.width == need.model.width == 64


def test_own_scale(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: smoke\ndata: {train_pictures: 512}\nepochs: {pretrain: 0.1}\n", "longer.yaml")
    scale = load_scale(path)
    assert (scale.name, scale.pictures, scale.epochs.finetune) == ("longer", 512, 0.02)
    sweep = plan(["table5"], path)
    assert config_of(sweep, "table5.full.top1")[1].optim.epochs == 30
    assert sweep.scale.title.startswith("longer: builtin, 512 pictures of 32 px, ViT 32 x 2")


CYCLE = OWN.replace(
    "finetune: {recipe: finetune, init: {run: pretrain}}",
    "finetune: {recipe: finetune, init: {run: probe}}, probe: {recipe: finetune, init: {run: finetune}}",
)
BAD = {
    "cycle": (CYCLE, "finetune -> probe -> finetune: these runs need each other"),
    "tab": (OWN.replace("  grid", "\tgrid"), "not valid YAML"),
    "unknown key": (OWN + "colour: red\n", "colour: unknown key (allowed: title, kind,"),
    "unknown row key": (OWN.replace("    grid:", "    gird: {}\n    grid:"), "{mask_ratio}.gird: unknown key"),
    "unknown recipe": (OWN.replace("recipe: sdae", "recipe: sdea"), "recipe: 'sdea' is unknown (allowed: sdae, mae,"),
    "unknown metric": (OWN.replace("metric: top1", "metric: top2"), "top1.metric: 'top2' is unknown for finetune"),
    "metric alone": (OWN.replace("run: finetune, metric", "metric"), "run and metric go together"),
    "unknown run": (OWN.replace("run: pretrain", "run: pretain"), "no run 'pretain' (there are: finetune, pretrain"),
    "unknown column run": (OWN.replace("{run: finetune,", "{run: tune,"), "wants the run 'tune'"),
    "unknown config key": (OWN.replace("optim: {epochs", "optim: {epoch"), "optim.epoch: unknown key"),
    "bad value": (OWN.replace("[0.5, 0.75]", "[0.5, 0.75, 1.75]"), "method.mask_ratio: 1.75"),
    "wrong type": (OWN.replace("epochs: 100", "epochs: many"), "optim.epochs: 'many'"),
    "wrong warm-up": (OWN.replace("epochs: 100", "epochs: 100, warmup_epochs: 2x"), "optim.warmup_epochs: '2x'"),
    "no such placeholder": (OWN.replace('"{mask_ratio}"}', '"{ratio}"}'), "{ratio} is not a key of the row's grid"),
    "rows of one name": (OWN.replace('"ratio-{mask_ratio}"', '"ratio"'), "two rows are named 'ratio'"),
    "seed": (OWN.replace("recipe: sdae,", "recipe: sdae, seed: 3,"), "seed: is set by --seeds"),
    "paper": (OWN.replace("paper: {ratio-0.75", "paper: {ratio-0.85"), "paper.ratio-0.85.top1: no such cell"),
    "no checkpoint": (OWN.replace("{run: pretrain}", "{run: pretrain, epoch: 30}"), "init.epoch: 30 of 100"),
    "not a mapping": ("- 1\n", "[1]: expected a mapping of keys"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_artifacts_are_told_in_one_line(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        plan([path], "smoke")
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


def crop(tokens: int) -> str:
    return OWN.replace('method: {mask_ratio: "{mask_ratio}"}', f"method: {{teacher: {{view: crop, tokens: {tokens}}}}}")


@pytest.mark.parametrize(
    ("tokens", "message"), [(150, "allowed: 1 to 147, or 196"), (1, "become 0 of 64"), (0, "allowed: 1")]
)
def test_bad_token_counts(tokens: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan([write(tmp_path, crop(tokens))], "smoke")


def test_arms_that_would_become_one_run(tmp_path: Path) -> None:
    tiny = write(tmp_path, "extends: smoke\ndata: {image_size: 8}\n", "tiny.yaml")
    with pytest.raises(UserError, match=r"crop-36.top1 and figure4b.crop-49.top1 become the same run.*36 and 49"):
        plan(["figure4b"], tiny)


def test_names_given_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two artifacts are named 'table5'"):
        plan(["table5", "table5"], "smoke")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="two artifacts are named 'own'"):
        plan([write(tmp_path, OWN), write(tmp_path / "a", OWN)], "smoke")
    with pytest.raises(UserError, match="one of the suite's own; rename it"):
        plan([write(tmp_path, OWN, "table5.yaml")], "smoke")
    with pytest.raises(UserError, match="seeds: 1 is given twice"):
        plan(["table5"], "smoke", (0, 1, 1))
    with pytest.raises(UserError, match="artifact 'table6' is unknown"):
        plan(["table6"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: smok\n", "scale 'smok' is unknown (allowed: mini, paper, small, smoke"),
        ("extends: odd.yaml\n", "is a circle"),
        ("extends: smoke\ndata: {image_sise: 3}\n", "data.image_sise: unknown key"),
        ("extends: smoke\nmodel: {heads: 5}\n", "5 does not divide the width 32"),
        ("extends: smoke\nepoch: {}\n", "epoch: unknown key"),
        ("extends: smoke\nepochs: {pretrain: 0.013}\n", "does not leave 100 epochs whole"),
        ("extends: smoke\nepochs: {pretrain: 2}\n", "epochs.pretrain: 2"),
        ("extends: smoke\nrecipes: {sdea: {}}\n", "recipes.sdea: unknown recipe"),
        ("extends: smoke\nrecipes: {sdae: {optim: {lr: 1}}}\n", "recipes.sdae: optim.lr: unknown key"),
        ("data: {name: builtin}\n", "pictures: missing"),
        ("data: {name: builtin}\npictures: 0\n", "pictures: 0"),
        ("- 1\n", "expected a mapping"),
    ],
)  # fmt: skip
def test_bad_scales(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_scale(write(tmp_path, text, "odd.yaml"))
    assert "\n" not in str(caught.value)
