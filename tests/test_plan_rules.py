"""Plans, rule by rule: what a scale makes of an artifact's numbers, what is noted of the paper's, what is refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablations.planner import PlannedRun, Sweep, content_key, plan
from ablations.scale import PAPER_PICTURES, tidy
from sdae.config import count_masked, run_id
from sdae.errors import UserError

SCALES = Path(__file__).parents[1] / "ablations" / "scales"
HEAD = "title: Own\ncolumns: {top1: {run: finetune, metric: top1}}\n"
TUNED = "finetune: {recipe: finetune, init: {run: pretrain}}"


def planned(
    tmp_path: Path, pretrain: str, scale: str | Path = "smoke", tuned: str = TUNED, head: str = HEAD, **keys: Any
) -> Sweep:
    """An artifact of one row, whose pre-training has these keys."""
    own = tmp_path / "own.yaml"
    own.write_text(f"{head}runs: {{{tuned}, pretrain: {{{pretrain}}}}}\nrows: {{a: {{runs: {{}}}}}}\n")
    return plan([own], scale, **keys)


def both(sweep: Sweep) -> tuple[PlannedRun, PlannedRun]:
    """The fine-tuning and its pre-training."""
    first = sweep.runs[sweep.cells["own.a.top1"][0][1]]
    return first, sweep.runs[first.needs[0]]


def refused(tmp_path: Path, pretrain: str, message: str, **keys: Any) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(tmp_path, pretrain, **keys)
    assert "\n" not in str(caught.value) and f"{tmp_path}/own.yaml: rows.a.runs" in str(caught.value)


def test_what_is_asked_of_a_plan() -> None:
    with pytest.raises(UserError, match=r"^seeds: at least one is needed, e\.g\. 0,1,2$"):
        plan(["table5"], seeds=())
    with pytest.raises(UserError, match=r"^seeds: 4 is given twice$"):
        plan(["table5"], seeds=(4, 5, 4))
    sweep = plan(["table5"], "small", content="a" * 16, data_path="/pictures")
    assert {run.config.data.path for run in sweep.runs.values()} == {"/pictures"}
    assert plan(["table5"]).scale.name == "smoke"


def test_lengths_and_what_the_paper_has(tmp_path: Path) -> None:
    tuned, need = both(planned(tmp_path, "recipe: sdae, optim: {epochs: 100, warmup_epochs: 20%}"))
    assert (need.config.optim.epochs, need.config.optim.warmup_epochs) == (5, 1.0)
    assert need.paper["optim.epochs"] == 100 and need.paper["optim.warmup_epochs"] == 20.0
    assert tuned.config.optim.epochs == 2 and tuned.paper["optim.epochs"] == 100
    assert tuned.origin == tuned.paper | {f"pretrain's {key}": value for key, value in need.origin.items()}
    assert need.origin == need.paper
    _, need = both(planned(tmp_path, 'recipe: sdae, optim: {epochs: 300, warmup_epochs: "12.5 %"}'))
    assert (need.config.optim.epochs, need.config.optim.warmup_epochs) == (15, 1.875)
    tuned, need = both(planned(tmp_path, "recipe: sdae, optim: {epochs: 100}", "paper", content="a" * 16))
    assert (need.config.optim.epochs, need.paper, tuned.paper) == (100, {}, {})
    for wrong in ("2x", "20", "%", "1.%", "20%%"):
        refused(
            tmp_path,
            f"recipe: sdae, optim: {{epochs: 100, warmup_epochs: '{wrong}'}}",
            f"optim.warmup_epochs: '{wrong}'",
        )


def test_momentum_of_epochs_and_of_iterations(tmp_path: Path) -> None:
    ema = "method: {{ema: {{every: {}, momentum: 0.9, momentum_end: {}}}}}"
    _, need = both(planned(tmp_path, f"recipe: sdae, optim: {{epochs: 100}}, {ema.format('epoch', 0.99)}"))
    found = need.config.method.ema
    assert (found.momentum, found.momentum_end) == (tidy(0.9**20), tidy(0.99**20))
    assert (need.paper["method.ema.momentum"], need.paper["method.ema.momentum_end"]) == (0.9, 0.99)
    _, need = both(planned(tmp_path, f"recipe: sdae, optim: {{epochs: 100}}, {ema.format('iteration', 'null')}"))
    found = need.config.method.ema
    steps = 100 * (PAPER_PICTURES // 768) / (5 * (256 // 64))
    assert (found.momentum, found.momentum_end) == (tidy(0.9**steps), None)
    assert "method.ema.momentum_end" not in need.paper
    _, need = both(
        planned(tmp_path, f"recipe: sdae, optim: {{epochs: 100, batch_size: 512}}, {ema.format('iteration', 'null')}")
    )
    assert need.config.method.ema.momentum == tidy(0.9 ** (100 * (PAPER_PICTURES // 512) / (5 * 1))), "a step at least"
    near_one = "method: {ema: {every: iteration, momentum: 0.99999, momentum_end: null}}"
    _, need = both(planned(tmp_path, f"recipe: sdae, optim: {{epochs: 100, batch_size: 512}}, {near_one}"))
    assert need.config.method.ema.momentum == tidy(0.99999 ** (100 * (PAPER_PICTURES // 512) / 5)) > 0.5
    for every in ("epoch", "iteration"):
        keys = f"recipe: sdae, optim: {{epochs: 100, batch_size: 512}}, {ema.format(every, 0.99)}"
        _, need = both(planned(tmp_path, keys, "paper", content="a" * 16))
        assert (need.config.method.ema.momentum, need.paper) == (0.9, {}), "the paper's, whatever the batch"
    refused(tmp_path, f"recipe: sdae, {ema.format('epoch', 1.5)}", "method.ema.momentum_end: 1.5")
    _, need = both(planned(tmp_path, "recipe: mae, optim: {epochs: 100}"))
    assert need.config.method.ema is None and set(need.paper) == {"optim.epochs", "optim.warmup_epochs"}


def scale_file(tmp_path: Path, **changes: Any) -> Path:
    """The paper's scale with other keys."""
    values = yaml.safe_load((SCALES / "paper.yaml").read_text()) | changes
    file = tmp_path / "own-scale.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("changes", "shortening"),
    [
        ({"recipes": {"sdae": {"optim": {"batch_size": 2048}}}}, 1),  # as long as the paper's, whatever the batch
        ({"epochs": {"pretrain": 0.5, "finetune": 1, "linprobe": 1}}, 2),
        ({"pictures": PAPER_PICTURES // 10}, (PAPER_PICTURES // 768) / (PAPER_PICTURES // 10 // 768)),
    ],
)
def test_momentum_of_iterations_at_scales_near_the_papers(
    changes: dict[str, Any], shortening: float, tmp_path: Path
) -> None:
    keys = "recipe: sdae, optim: {epochs: 100}, method: {ema: {every: iteration, momentum: 0.9, momentum_end: null}}"
    _, need = both(planned(tmp_path, keys, scale_file(tmp_path, **changes), content="a" * 16))
    assert need.config.method.ema.momentum == (0.9 if shortening == 1 else tidy(0.9**shortening))
    assert need.paper.get("method.ema.momentum") == (None if shortening == 1 else 0.9)


def test_steps_of_dense_stages(tmp_path: Path) -> None:
    scale = scale_file(tmp_path, epochs={"pretrain": 1, "finetune": 1, "linprobe": 1, "detect": 0.02})
    head = HEAD.replace("metric: top1", "metric: apb")
    for milestones, here in (([500, 900], (10, 18)), ([10, 20, 900], (1, 18))):
        optim = f"{{steps: 1000, warmup_steps: 100, milestones: {milestones}, schedule: steps}}"
        detect = f"finetune: {{recipe: detect, init: {{run: pretrain}}, optim: {optim}}}"
        tuned, _ = both(planned(tmp_path, "recipe: sdae", scale, detect, head, content="a" * 16))
        assert (tuned.config.optim.warmup_steps, tuple(tuned.config.optim.milestones)) == (2, here)
        assert (tuned.config.optim.steps, tuned.paper["optim.steps"]) == (20, 1000)


def test_crops_keep_their_share(tmp_path: Path) -> None:
    crop = "recipe: sdae, optim: {{epochs: 100}}, method: {{mask_ratio: {}, teacher: {{view: crop, tokens: {}}}}}"
    for ratio, tokens, here, noted in ((0.75, 49, 16, True), (0.5, 49, 16, True), (0.5, 90, 29, True)):
        _, need = both(planned(tmp_path, crop.format(ratio, tokens)))
        assert need.config.method.teacher.tokens == here
        assert need.paper.get("method.teacher.tokens") == (tokens if noted else None)
    for ratio, tokens, view in ((0.75, 147, "masked"), (0.5, 98, "masked"), (0.5, 196, "full"), (0.75, 196, "full")):
        _, need = both(planned(tmp_path, crop.format(ratio, tokens)))
        assert need.config.method.teacher.view == view and "method.teacher.tokens" not in need.paper
        assert need.config.masked == count_masked(64, ratio)
    _, need = both(planned(tmp_path, crop.format(0.75, 49), "paper", content="a" * 16))
    assert need.config.method.teacher.tokens == 49 and need.paper == {}
    refused(
        tmp_path,
        crop.format(0.5, 120),
        "method.teacher.tokens: 120 of the paper's 196 patches (allowed: 1 to 98, or 196)",
    )
    refused(tmp_path, crop.format(0.75, 1), "method.teacher.tokens: 1 of 196 patches become 0 of 64 (at least 1)")
    given = "ema: {every: epoch, momentum: 0.9}, teacher: {view: crop, tokens: 49}"
    _, need = both(planned(tmp_path, f"recipe: mae, method: {{{given}}}"))
    assert set(need.paper) == {"optim.epochs", "optim.warmup_epochs"}, "MAE has no teacher"
    cost = "finetune: {recipe: cost, method: {teacher: {view: crop, tokens: 147}}}"
    (alone,) = planned(tmp_path, "recipe: sdae", tuned=cost, head=HEAD.replace("top1}", "time}")).runs.values()
    assert alone.config.method.teacher.view == "masked", "the ratio that a method has by default"
    with pytest.raises(UserError, match=r"tokens: 150 of the paper's 196 patches \(allowed: 1 to 147, or 196\)"):
        planned(tmp_path, "recipe: sdae", tuned=cost.replace("147", "150"), head=HEAD.replace("top1}", "time}"))
    plain = "recipe: sdae, method: {teacher: {view: crop, tokens: 147}}"
    assert both(planned(tmp_path, plain))[1].config.method.teacher.view == "masked", "the recipe's own mask ratio"


def test_checkpoints_lie_where_the_papers_do(tmp_path: Path) -> None:
    at = "finetune: {{recipe: finetune, init: {{run: pretrain, epoch: {}, weights: teacher}}}}"
    long = "recipe: sdae, optim: {epochs: 300}"
    for epoch in (20, 140, 300):
        tuned, need = both(planned(tmp_path, long, tuned=at.format(epoch)))
        assert (tuned.config.init.epoch, tuned.config.init.weights) == (epoch // 20, "teacher")
        assert tuned.config.init.run == need.id == run_id(need.config)
        assert tuned.paper["init.epoch"] == epoch
        tuned, _ = both(planned(tmp_path, long, "paper", tuned=at.format(epoch), content="a" * 16))
        assert tuned.config.init.epoch == epoch and "init.epoch" not in tuned.paper
    for epoch in (0, -20, 30, 320):
        refused(
            tmp_path, long, f"init.epoch: {epoch} of 300: encoders are kept every 20 epochs", tuned=at.format(epoch)
        )
    refused(
        tmp_path,
        "recipe: sdae, optim: {epochs: 75}",
        "init.epoch: 5 of 75 becomes 0.266667 of 4 epochs",
        tuned=at.format(5),
    )
    tuned, _ = both(
        planned(tmp_path, "recipe: sdae, optim: {epochs: 15}", "paper", tuned=at.format(1), content="a" * 16)
    )
    assert tuned.config.init.epoch == 1, "the first of all"
    tuned, _ = both(planned(tmp_path, long, tuned=at.format("last")))
    assert tuned.config.init.epoch == "last" and "init.epoch" not in tuned.paper


def test_needs(tmp_path: Path) -> None:
    other = "pretrain-" + "0123456789abcdef"
    sweep = planned(tmp_path, "recipe: sdae", tuned=f"finetune: {{recipe: finetune, init: {{run: {other}}}}}")
    (only,) = sweep.runs.values()
    assert (only.needs, only.config.init.run, sweep.requested) == ((other,), other, 1), "a run that is there already"
    for wrong in (other[:-1], other + "0", "finetune-0123456789abcdef", "pretrain-0123456789ABCDEF"):
        message = f"finetune.init.run: no run {wrong!r} (there are: finetune, pretrain, or a run's id)"
        refused(tmp_path, "recipe: sdae", message, tuned=f"finetune: {{recipe: finetune, init: {{run: {wrong}}}}}")
    given = "finetune: {recipe: finetune, init: {run: pretrain, weights: 'timm:vit_base_patch16_224.dino'}}"
    refused(tmp_path, "recipe: sdae", "finetune: init.weights: 'timm:", tuned=given)
    for key, option in (("seed", "--seeds"), ("scale", "--scale")):
        refused(tmp_path, f"recipe: sdae, {key}: 1", f"runs.pretrain.{key}: is set by {option}, not by an artifact")
    refused(tmp_path, "recipe: sdae, data: {path: 2026-01-02}", "data.path")
    refused(tmp_path, "recipe: nothing", "runs.pretrain.recipe: 'nothing' is unknown (allowed: ")
    for shape in ("width: 64", "depth: 3", "heads: 4", "patch_size: 8", "mlp_ratio: 2"):
        tuned, need = both(planned(tmp_path, f"recipe: sdae, model: {{{shape}}}"))
        key, value = shape.split(": ")
        assert getattr(tuned.config.model, key) == getattr(need.config.model, key) == int(value)


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_every_seed_s_run_has_the_id_of_its_config(seed: int, tmp_path: Path) -> None:
    sweep = planned(tmp_path, "recipe: sdae", seeds=(1, seed), content="a" * 16)
    for identity, run in sweep.runs.items():
        assert identity == run.id == run_id(run.config)
    assert [number for number, _ in sweep.cells["own.a.top1"]] == [1, seed]
    assert sorted({run.config.seed for run in sweep.runs.values()}) == sorted({1, seed})
    for wrong in (-1, 2**63):
        with pytest.raises(UserError, match=f"seed: {wrong}"):
            planned(tmp_path, "recipe: sdae", seeds=(seed, wrong), content="a" * 16)


def test_two_artifacts_of_one_name_are_told_by_their_files(tmp_path: Path) -> None:
    text = f"{HEAD}runs: {{{TUNED}, pretrain: {{recipe: sdae}}}}\nrows: {{a: {{runs: {{}}}}}}\n"
    files = [tmp_path / name / "own.yaml" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(text)
    with pytest.raises(UserError, match=f"two artifacts are named 'own': {files[0]} and {files[1]}"):
        plan(files)


def test_pictures_differ_by_each_of_their_keys(tmp_path: Path) -> None:
    """Two rows of other pictures have other fingerprints, and so other runs."""
    for key, values in (
        ("train_pictures", (64, 128)),
        ("val_pictures", (50, 60)),
        ("classes", (4, 5)),
        ("name", ("cifar10", "cifar100")),
    ):
        own = tmp_path / "own.yaml"
        rows = ", ".join(
            f"{name}: {{runs: {{pretrain: {{recipe: sdae, data: {{{key}: {v}}}}}}}}}"
            for name, v in zip("ab", values, strict=True)
        )
        own.write_text(f"{HEAD}runs: {{{TUNED}, pretrain: {{recipe: sdae}}}}\nrows: {{{rows}}}\n")
        content = {"cifar10": "a" * 16, "cifar100": "b" * 16}
        runs = [r for r in plan([own], "smoke", content=content).runs.values() if r.config.stage == "pretrain"]
        assert len({run.config.data.fingerprint for run in runs}) == 2, key


def test_what_is_known_of_pictures_elsewhere() -> None:
    assert (content_key("finetune", "imagefolder"), content_key("segment", "ade20k")) == (
        "imagefolder",
        "segment ade20k",
    )
    assert content_key("detect", "coco-json") == "detect coco-json"
    known = plan(["table5"], "paper", content={"imagefolder": "b" * 16})
    assert not known.provisional
    assert {run.config.data.fingerprint for run in known.runs.values()} == {"b" * 16}
    dense = plan(["table3"], "paper", content={"imagefolder": "b" * 16, "segment ade20k": "c" * 16})
    found = {run.config.data.fingerprint for run in dense.runs.values() if run.config.stage == "segment"}
    assert found == {"c" * 16}
    for content in (None, {"other": "b" * 16}):
        unknown = plan(["table5"], "paper", content=content)
        assert unknown.provisional and {run.config.data.fingerprint for run in unknown.runs.values()} == {None}
    assert not plan(["table1"], "paper").provisional, "a cost run takes no pictures"


def test_released_weights_are_known_by_their_digest(tmp_path: Path) -> None:
    cell = "table2.moco-v3-300.finetune"
    assert cell in plan(["table2"], "paper", content="a" * 16).blocked
    files = {spec["init"]["weights"] for _, spec in _released_specs() if "weights" in spec["init"]}
    content = dict.fromkeys(files, "d" * 64) | {"imagefolder": "a" * 16}
    sweep = plan(["table2"], "paper", content=content)
    assert sweep.blocked == {} and cell in sweep.cells
    run = sweep.runs[sweep.cells[cell][0][1]]
    assert (run.config.init.digest, run.needs) == ("d" * 64, ())
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"of somebody")
    own = tmp_path / "own.yaml"
    own.write_text(
        f"{HEAD}rows: {{a: {{runs: {{finetune: {{recipe: finetune, init: {{weights: 'file:{file}'}}}}}}}}}}\n"
    )
    (run,) = plan([own], "small", content="a" * 16).runs.values()
    assert run.config.init.digest == hashlib.sha256(b"of somebody").hexdigest(), "a text stands for pictures alone"


def _released_specs() -> list[tuple[str, dict[str, Any]]]:
    table = plan(["table2"], "paper", content="a" * 16).artifacts[0]
    runs = [specs[name] for name, specs in table.specs.values()]
    return [("table2", spec) for spec in runs if isinstance(spec.get("init"), dict)]


@pytest.mark.parametrize("key", ["warmup_steps", "milestones"])
def test_dense_arms_that_become_one_are_told(key: str, tmp_path: Path) -> None:
    values = ("1500", "1520") if key == "warmup_steps" else ("[65970, 80630]", "[65975, 80630]")
    own = tmp_path / "own.yaml"
    stage = "segment" if key == "warmup_steps" else "detect"
    metric = "miou" if stage == "segment" else "apb"
    run = f"recipe: {stage}, init: {{run: pretrain, weights: student}}"
    rows = ", ".join(
        f"{n}: {{runs: {{x: {{{run}, optim: {{{key}: {v}}}}}}}}}" for n, v in zip("ab", values, strict=True)
    )
    own.write_text(
        f"title: X\ncolumns: {{m: {{run: x, metric: {metric}}}}}\n"
        f"runs: {{x: {{{run}}}, pretrain: {{recipe: sdae}}}}\n"
        f"rows: {{{rows}}}\n"
    )
    with pytest.raises(UserError, match=f"become the same run: optim.{key} is"):
        plan([own], "small")
