"""Tables 3 and 4 from end to end: planned, run, drawn, and runs from weights that others have released."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from calling import call, spawn
from PIL import Image
from synthetic import fill, run_of

from ablations.artifact import load_artifact
from ablations.planner import MISSING, NEEDS_RELEASED, plan
from analysis.dense import evaluation_of, pictures_of, plot_evaluation, summary
from analysis.study import build, study
from sdae.config import parse
from sdae.models.flops import per_image
from sdae.released import RELEASED
from sdae.store import Store

PICTURES = "0" * 16


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tables at the scale smoke, MAE's short pre-training left out."""
    folder = tmp_path_factory.mktemp("transfer")
    done = spawn("reproduce", "table3", "table4", "--store", folder / "runs", "--out", folder / "paper")
    assert done.code == 0, done
    return folder


@pytest.mark.slow
def test_tables_3_and_4_at_smoke(reproduced: Path) -> None:
    store = Store(reproduced / "runs")
    for artifact, columns in (("table3", 1), ("table4", 6)):
        table = build(store, artifact)
        assert table.runs == 3
        for row in table.rows:
            states = {cell.state for cell in row.cells.values()}
            ours = row.name.startswith(("mae", "sdae"))
            assert (states, len(row.cells)) == ({"measured" if ours else NEEDS_RELEASED}, columns), row.name
            assert all(0 <= cell.estimate.mean <= 100 for cell in row.cells.values() if cell.estimate)
        assert any("needs weights" in note for note in table.notes)
        assert "needs weights" in (reproduced / "paper" / f"{artifact}.md").read_text()
    page = (reproduced / "paper/report.html").read_text()
    assert page.count('class="photograph"') == 6 * 4
    assert page.count("<details>\n<summary>SdAE, 300 epochs: ") == 2


@pytest.mark.slow
def test_what_a_dense_run_leaves(reproduced: Path) -> None:
    store = Store(reproduced / "runs")
    s = study(store, ["table3", "table4"])
    for cell in ("table3.sdae-300.miou", "table4.sdae-300.apb"):
        run = store.run(s.cells[cell].runs[0])
        found = evaluation_of(run)
        assert len(pictures_of(run)) == 4
        assert all(Image.open(path).size[0] > 400 for path in pictures_of(run))  # of 32 px: enlarged, so names fit
        assert str(found["classes"][0]) in summary(found) or "classes" in summary(found)
        plot_evaluation(found).draw_without_rendering()
        if "iou" in found:  # the score is the mean of the bars
            known = [value for value in found["iou"] if value is not None]
            assert s.cells[cell].estimate.mean == pytest.approx(sum(known) / len(known))


@pytest.mark.slow
def test_predict_draws_any_picture(reproduced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photograph = Image.radial_gradient("L").convert("RGB").resize((90, 70))
    photograph.save("one.jpg")
    photograph.rotate(40).save("other.png")
    store = Store(reproduced / "runs")
    s = study(store, ["table3", "table4"])
    for cell, key in (("table3.sdae-300.miou", "shares"), ("table4.sdae-300.apb", "objects")):
        run, out = s.cells[cell].runs[0], tmp_path / key
        called = call(
            "predict", run[:14], "one.jpg", "other.png", "--store", store.root, "--out", out, "--score", 0, "--json"
        )
        assert called.code == 0, called
        entries = json.loads(called.out)
        assert [Path(entry["drawn"]).name for entry in entries] == ["one.png", "other.png"]
        for entry in entries:
            assert Image.open(entry["drawn"]).size[0] >= 90
            if key == "shares":
                assert sum(entry[key].values()) == pytest.approx(1, abs=0.01)
            else:
                assert all(0 <= side <= 90 for found in entry[key] for side in found["box"])
    refused = call("predict", run, "none.jpg", "--store", store.root)
    assert (refused.code, "none.jpg: cannot be read" in refused.err) == (2, True)
    need = next(i for i in store.ids() if i.startswith("pretrain"))
    refused = call("predict", need, "one.jpg", "--store", store.root)
    assert (refused.code, "pretrain predicts nothing" in refused.err) == (2, True)
    (tmp_path / "deeper").mkdir()
    photograph.save("deeper/one.jpg")
    refused = call("predict", run, "one.jpg", "deeper/one.jpg", "--store", store.root)
    assert (refused.code, "the same name" in refused.err) == (2, True)


def test_predict_names_the_class_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import tiny

    from sdae.run import execute

    monkeypatch.chdir(tmp_path)
    result = execute(tiny("finetune", optim={"epochs": 1}), Store("runs"))
    Image.radial_gradient("L").resize((80, 60)).save("grey.png")
    called = call("predict", result["id"], "grey.png")
    assert called.code == 0, called
    assert called.out.count("%") == 5
    assert Image.open("predictions/grey.png").size[1] > 60


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 48])
def test_predict_sees_a_picture_as_the_evaluation_did(size: int, channels: int, tmp_path: Path) -> None:
    """Grey is luma, and the odd pixel of a middle is cut off at the same side."""
    import numpy as np
    import torch

    from sdae.config import Finetune
    from sdae.data import Loader, open_dataset
    from sdae.data.datasets import read
    from sdae.models.classifier import Classifier
    from sdae.predict import probabilities

    draws = np.random.default_rng(0)
    for folder in (tmp_path / split / name for split in ("train", "val") for name in ("one", "other")):
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(draws.integers(0, 256, (40 + 7 * i, 53 + 5 * i, 3), np.uint8)).save(folder / f"{i}.png")
    model = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8, "channels": channels}
    config = parse({
        "stage": "finetune", "model": model,
        "data": {"name": "imagefolder", "path": str(tmp_path), "image_size": size},
    })  # fmt: skip
    assert isinstance(config, Finetune)
    module = Classifier(config.model, size, config.head, 2).eval()
    module.init_weights(1.0)
    pictures = open_dataset(config.data, "val")
    (batch,) = Loader(pictures, config.data, seed=0, batch_size=6, train=False, channels=channels).epoch(0)
    with torch.no_grad():
        evaluated = module(batch.images).softmax(1)
    said = torch.stack([probabilities(module, config, read(pictures.path_of(i))) for i in range(6)])
    torch.testing.assert_close(said, evaluated, atol=1e-5, rtol=0)


# Released weights


def test_missing_weights_block_a_cell_until_they_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDAE_WEIGHTS", str(tmp_path / "weights"))
    cell = "table3.beit-800.miou"
    before = plan(["table3"], "paper", content=PICTURES)
    assert before.blocked[cell] == MISSING
    assert cell not in before.cells
    assert build(Store(tmp_path / "none"), "table3", "paper").rows[4].cells["miou"].state == MISSING
    file = tmp_path / "weights/beit-800.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"any content")
    after = plan(["table3"], "paper", content=PICTURES)
    assert cell not in after.blocked
    config = run_of(after, cell).config
    assert config.init.digest == hashlib.sha256(b"any content").hexdigest()
    assert (config.model.positions, config.model.layer_scale) == ("relative", True)
    assert run_of(after, "table3.sdae-300.miou").id == run_of(before, "table3.sdae-300.miou").id
    store = Store(tmp_path / "runs")
    fill(store, after, {cell: 46.0}, 0.0)
    file.unlink()  # the store is read on a machine without the file: the run's own digest stands for it
    assert build(store, "table3", "paper").rows[4].cells["miou"].estimate.mean == pytest.approx(46.0)


def test_rows_of_others_ask_for_the_network_that_was_released() -> None:
    for name in ("table2", "table3", "table4"):
        artifact = load_artifact(name, "paper")
        for cell, (run, specs) in artifact.specs.items():
            row = artifact.cells[cell].row
            spec = specs[run]
            if row not in RELEASED:
                assert spec.get("init", {}).get("run") == "pretrain" or row == "scratch"
                continue
            known = RELEASED[row]
            wanted = f"timm:{known.timm}" if known.timm else f"file:{row}.safetensors"
            assert spec["init"] == {"weights": wanted}
            model = {"positions": "absolute", "layer_scale": False} | spec.get("model", {})
            assert model == known.model, cell


def test_a_scale_shortens_steps_milestones_and_warm_up() -> None:
    paper, small = (plan(["table4"], scale, content=PICTURES) for scale in ("paper", "small"))
    long, short = (run_of(sweep, "table4.sdae-300.apb").config.optim for sweep in (paper, small))
    assert (long.steps, long.milestones, long.warmup_steps) == (87_960, (65_970, 80_630), 500)
    assert short.steps == round(0.05 * 87_960)
    assert [m / short.steps for m in short.milestones] == pytest.approx([9 / 12, 11 / 12], abs=1e-3)
    assert run_of(small, "table4.sdae-300.apb").paper["optim.steps"] == 87_960


@pytest.mark.parametrize("stage", ["segment", "detect"])
def test_flop_of_a_step_are_those_that_torch_counts(stage: str) -> None:
    """Of the network without detection's proposals, whose number is a setting."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdae.config import parse
    from sdae.models.dense import Pyramid
    from sdae.models.flops import dense, embedding, encoder
    from sdae.models.linear import plain
    from sdae.sections import Backbone

    size, patch, width = 64, 8, 32
    values = {
        "stage": stage, "model": {"width": width, "depth": 4, "heads": 2, "patch_size": patch},
        "data": {"name": "builtin", "image_size": size},
    }  # fmt: skip
    config = parse(values)
    assert per_image(config) == dense(config)
    pyramid = Pyramid(config.model, size, Backbone())
    images = torch.randn(1, 3, size, size)
    math = torch.nn.attention.SDPBackend.MATH
    with plain(), torch.no_grad(), torch.nn.attention.sdpa_kernel(math), FlopCounterMode(display=False) as counter:
        pyramid(images)
    tokens = (size // patch) ** 2
    wanted = encoder(config.model, tokens) + embedding(config.model, tokens) + 8 * width**2 * 6 * tokens
    assert counter.get_total_flops() == pytest.approx(wanted, rel=1e-3)
    if stage == "segment":
        from sdae.models.flops import _upernet
        from sdae.stages.segment import network

        module = network(config, 11).eval()
        maps = pyramid(images)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.classifier(module.features(maps))
        whole = _upernet(config, width, (16 * tokens, 4 * tokens, tokens, tokens / 4), 11)
        aux = (18 * width * 256 + 2 * 256 * 11) * tokens
        assert counter.get_total_flops() == pytest.approx(whole - aux, rel=1e-3)
