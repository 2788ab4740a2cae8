"""What a review found in stores, folders and files of strangers: pipes and devices in place of files, records that take
many times their bytes, claims that compute, links to pictures. Each is refused at once, in one line."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import assert_refused, call
from conftest import tiny
from PIL import Image
from synthetic import fill, write

from ablations.planner import plan
from analysis import frame
from analysis.claims import load
from analysis.dense import pictures_of
from analysis.frame import collect
from sdae.config import run_id
from sdae.data import packing
from sdae.data.fingerprint import manifest
from sdae.data.packed import index_of
from sdae.data.segmentation import classes_of
from sdae.errors import UserError
from sdae.files import LARGEST, MOST_NESTED, parse_json, read_json
from sdae.store import RunFolder, Store
from slurm.profile import load_profile

ZERO = "/dev/zero"
CELL = "table5.folds.top1"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to(ZERO)


odd = pytest.mark.parametrize("odd", [pipe, device])
Odd = Callable[[Path], None]


# Pipes and devices
@odd
def test_a_stores_format_that_is_no_file(tmp_path: Path, odd: Odd) -> None:
    odd(tmp_path / "FORMAT")
    assert_refused(call("results", "list", "--store", tmp_path), "FORMAT: cannot be read: Not a plain file")


def test_a_stores_format_without_end(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("2" * 10_001)
    with pytest.raises(UserError, match=r"FORMAT: cannot be read: 10,001 bytes \(allowed: 10,000\)"):
        Store(tmp_path)


@odd
def test_an_index_that_is_no_file_is_made_again(tmp_path: Path, odd: Odd) -> None:
    config = tiny()
    write(Store(tmp_path), config, run_id(config), {"loss": 1.0}, synthetic=False)
    odd(tmp_path / frame.INDEX)
    assert list(collect(Store(tmp_path))["state"]) == ["done"]
    index = tmp_path / frame.INDEX
    assert index.is_file() and not index.is_symlink()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in (tmp_path / "in" / split / name for split in ("train", "val") for name in ("ant", "bee")):
        folder.mkdir(parents=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(folder / "0.jpg")
    packing.prepare(tmp_path / "in", tmp_path / "out", "shards", side=32)
    return tmp_path / "out"


@odd
def test_a_packed_file_that_is_no_file(packed: Path, odd: Odd) -> None:
    facts = manifest(packed)
    for name in ("train.npy", facts["parts"]["train"][0]):
        content = (packed / name).read_bytes()
        (packed / name).unlink()
        odd(packed / name)
        with pytest.raises(UserError, match=r"not a plain file \(pack the pictures again\)"):
            manifest(packed)
        if name == "train.npy":
            with pytest.raises(UserError, match="not the index of the files beside it"):
                index_of(packed, "train", facts)
        (packed / name).unlink()
        (packed / name).write_bytes(content)
    manifest(packed)


@odd
def test_class_names_that_are_no_file(tmp_path: Path, odd: Odd) -> None:
    odd(tmp_path / "classes.txt")
    with pytest.raises(UserError, match=r"classes\.txt: cannot be read: .*Not a plain file"):
        classes_of(tmp_path, "segmentation-folder")


@odd
def test_a_profile_below_slurm_that_is_no_file(tmp_path: Path, odd: Odd) -> None:
    folder = tmp_path / ".slurm/jobs/token"
    folder.mkdir(parents=True)
    odd(folder / "profile.json")
    with pytest.raises(UserError, match=r"profile\.json: cannot be read: Not a plain file"):
        load_profile(folder / "profile.json")


def test_a_users_profile_may_be_a_pipe() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b'time: "1:00:00"\n')
    os.close(theirs)
    try:
        assert load_profile(f"/dev/fd/{ours}").minutes == 60
    finally:
        os.close(ours)


def test_of_a_huge_log_its_end_is_read_and_nothing_is_lost_where_it_is_cut(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    row = json.dumps({"step": 1, "note": "x" * 900_000}) + "\n"
    run.metrics_file.write_text(row * 40 + '{"step": 2}\n{"step": 3}\n')
    rows = run.metrics()
    assert len(rows) < 40 and [row["step"] for row in rows[-3:]] == [1, 2, 3]
    run.truncate_metrics(2)
    assert run.metrics_file.read_text() == row * 40 + '{"step": 2}\n'


def test_a_log_of_holes_is_read_in_no_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with open(run.metrics_file, "wb") as file:
        file.truncate(2**40)
    assert run.metrics() == []


# Records that take many times their bytes
@pytest.mark.parametrize("unit", ["[],", "[" * 90 + "]" * 90 + ",", '{"a":0},'])
def test_a_record_of_nothing_but_brackets_is_refused_before_it_is_parsed(tmp_path: Path, unit: str) -> None:
    text = "[" + unit * (3_000_000 // len(unit)) + "0]"
    (tmp_path / "result.json").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="lists and mappings"):
            parse_json(text.encode())
        assert tracemalloc.get_traced_memory()[1] < 10 * len(text)
    finally:
        tracemalloc.stop()
    assert read_json(tmp_path / "result.json") is None


def test_what_the_suite_writes_itself_is_read() -> None:
    rows = [[i, 812, 32, 32] for i in range(MOST_NESTED + 10)]  # a packed part of very small pictures
    assert parse_json(json.dumps({"rows": rows}, indent=1).encode())["rows"] == rows
    assert LARGEST > 10_000 * 2_000  # runs.json of an array of ten thousand runs


@pytest.mark.parametrize(("metrics", "state"), [(1000, "done"), (1001, "torn")])
def test_a_result_of_more_metrics_than_columns(tmp_path: Path, metrics: int, state: str) -> None:
    config = tiny()
    mine = {f"m{i}": 1.0 for i in range(metrics - 5)}  # five come with each pre-training
    write(Store(tmp_path), config, run_id(config), mine, synthetic=False)
    found = collect(Store(tmp_path))
    assert list(found["state"]) == [state]
    assert ("m1" in found.columns) == (state == "done")
    if state == "torn":
        assert found["message"].item() == "result.json holds 1,001 metrics (allowed: 1,000)"


# Claims
def claim(tmp_path: Path, **keys: Any) -> Any:
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps([{"id": "x", "quote": "so", **keys}]))
    return load(file)[0]


@pytest.mark.parametrize("weight", ["1/0", "1e300000000", "1/3/3", "nan", "inf", "٣", 1e300, "1" * 5000])
def test_weights_that_compute(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(UserError, match=r"claim x: terms: .* is no weight \(allowed: a number below 10\^9"):
        claim(tmp_path, kind="sum", terms={CELL: weight if weight != "1" * 5000 else "1" * 150}, value="1")


@pytest.mark.parametrize(
    ("weight", "value"), [("-1", -1), (0.5, 0.5), ("1/4", 0.25), (1, 1), (1e-05, 1e-05), (0.1 + 0.2, 0.1 + 0.2)]
)
def test_weights_that_stand(tmp_path: Path, weight: Any, value: float) -> None:
    (contrast,) = claim(tmp_path, kind="sum", terms={CELL: weight}, value="1").contrasts
    assert float(contrast.terms[CELL]) == value


@pytest.mark.parametrize("name", ["{.x}", "{:>4000000000}", "{0.__class__}", "{0!r:>9}", "{", "}", "{{}}", "{10}"])
def test_templates_that_compute(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"claim x: .*only \{\} or \{0\}, \{1\}, \.\. may stand in braces"):
        claim(tmp_path, kind="greater", of=name, than=CELL)


def test_what_is_too_long_for_a_claim(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        claim(tmp_path, kind="greater", of="{}" * 5000, than=CELL)
    with pytest.raises(UserError, match="too long"):
        claim(tmp_path, kind="greater", of="{}", than=CELL, each=["x" * 5000])
    with pytest.raises(UserError, match=r"claim x: value: .* characters"):
        claim(tmp_path, kind="within", cells={CELL: f"[0, {'9' * 4000}]"})


# Pictures
def test_no_picture_is_taken_through_a_link(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    pictures = run.path / "pictures"
    pictures.mkdir(parents=True)
    (tmp_path / "key").write_text("secret")
    (pictures / "0.jpg").write_bytes(b"a picture")
    (pictures / "1.jpg").symlink_to(tmp_path / "key")
    (pictures / "3.jpg").symlink_to(ZERO)
    os.mkfifo(pictures / "2.jpg")
    (pictures / "4.jpg").mkdir()
    assert pictures_of(run) == [pictures / "0.jpg"]
    pictures.rename(tmp_path / "elsewhere")
    pictures.symlink_to(tmp_path / "elsewhere")
    assert pictures_of(run) == []


# What others have recorded, told on pages and terminals


@pytest.mark.parametrize(
    "record",
    [{"packages": [1]}, {"gpus": 5}, {"gpus": {"a": 1}}, {"packages": "x", "host": 3}, {"host": "\x1b[31mred"}],
)
def test_odd_provenance_stops_no_page(record: dict[str, Any], tmp_path: Path) -> None:
    store, cell, sweep = Store(tmp_path / "runs"), "table5.masked.top1", plan(["table5"], "smoke")
    fill(store, sweep, synthetic=False)
    run = store.run(sweep.cells[cell][0][1])
    run.write("provenance.json", record)
    run.log.write_text("\x1b[2Jgone\n")
    explained = call("paper", "explain", cell, "--store", store.root)
    assert (explained.code, explained.err.count("Traceback")) == (0, 0), explained.err
    assert "\x1b" not in explained.out and "\\x1b[2Jgone" in explained.out
    reported = call("paper", "report", "table5", "--store", store.root, "--out", tmp_path / "out")
    assert (reported.code, reported.err.count("Traceback")) == (0, 0), reported.err
