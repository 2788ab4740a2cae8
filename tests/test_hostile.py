"""Files from strangers: nothing of them is run, none leads out of its folder or takes the machine, none writes into a
page what a reader's browser or LaTeX would take for more than text. `docs/security.md` says what is promised."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bad import makers
from calling import call
from conftest import tiny
from guard import Outcome, confined
from safetensors.torch import save_file

from ablations.artifact import load_artifact
from ablations.planner import plan
from analysis.export import show
from analysis.figures import draw
from analysis.frame import collect
from analysis.publish import publish
from cli.output import printable
from sdae.config import dump, load, parse, run_id
from sdae.data.coco import parsed
from sdae.data.datasets import MOST_PIXELS, UnreadableError, read
from sdae.data.scenes import read_labels
from sdae.errors import UserError
from sdae.parity import replay
from sdae.released import header, home_of
from sdae.store import Store
from sdae.training.checkpoints import load_weights
from sdae.weights import encoder_of_run, import_weights, read_any
from slurm.ledger import Ledger
from slurm.profile import Profile
from slurm.snapshot import snapshot
from slurm.submit import Array, _Sender

REFUSALS = (UserError, UnreadableError)
SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
TEX = r"\input{/etc/passwd} $\write18{x y}$ % & # _ ^ ~ {"


def refused(function: Callable[[], Any], *allowed: Path, part: str = "") -> Outcome:
    """The call, in a child, ends with a refusal: one line with `part`, in time and memory, with nothing written."""

    def call_it() -> None:
        function()
        raise AssertionError("it was not refused")

    outcome = confined(call_it, *allowed, refusals=REFUSALS)
    assert outcome.problem is None, outcome.problem
    assert part in outcome.value, outcome.value
    return outcome


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = makers.good(tmp_path_factory.mktemp("good"))
    collect(Store(root / "store"))  # pyarrow sets memory aside at its first use
    return root


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Code in files


class Runs:
    """Unpickled, it makes the file `ran`, in one of several ways."""

    def __init__(self, how: Callable[..., Any], *words: Any):
        self.how, self.words = how, words

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, self.words


PICKLES: dict[str, Callable[[Path], object]] = {
    "system": lambda path: torch.save({"model": Runs(os.system, "touch ran")}, path),
    "exec": lambda path: torch.save({"model": Runs(exec, "open('ran', 'w')")}, path),
    "popen": lambda path: torch.save({"model": Runs(subprocess.Popen, ("touch", "ran"))}, path),
    "open": lambda path: torch.save({"model": Runs(open, "ran", "w")}, path),
    "old": lambda path: torch.save({"model": Runs(os.system, "touch ran")}, path, _use_new_zipfile_serialization=False),
    "bare": lambda path: path.write_bytes(pickle.dumps(Runs(os.system, "touch ran"))),
    "protocol 0": lambda path: path.write_bytes(pickle.dumps({"model": Runs(os.system, "touch ran")}, 0)),
    "global": lambda path: path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR."),
    "numpy": lambda path: np.save(path.open("wb"), np.array([Runs(os.system, "touch ran")], object), allow_pickle=True),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_with_code_is_not_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    PICKLES[name](path)
    refused(lambda: read_any(path), part="x.pth: not a whole checkpoint")
    out = tmp_path / "out.safetensors"
    refused(lambda: import_weights(path, "mae", out), part="x.pth")
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [touch ran]", "seed: !!python/name:os.system", "a: !!python/module:os",
        "!!python/object/new:os.system [touch ran]", "optim: !!python/object:sdae.store.Store {root: x}",
        "%TAG ! tag:yaml.org,2002:python/\n---\nseed: !object/apply:os.system [touch ran]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [load, lambda path: load_artifact(path, "smoke")], ids=["config", "artifact"])
def test_yaml_makes_plain_values_only(text: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    refused(lambda: read(path), part="own.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_stored_config_with_code_is_not_run(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "pretrain-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("!!python/object/apply:os.system [touch ran]\n")
    assert collect(Store(tmp_path / "store"))["state"].tolist() == ["started"]
    assert not (tmp_path / "ran").exists()


# More than a machine has


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, levels)]
    return "\n".join(lines)


YAMLS = {
    "aliases": f"{bomb()}\nseed: *a8\n",
    "merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}" for i in range(1, 9)),
    "itself": "seed: &a [*a]\n",
    "lists": "seed: " + 50_000 * "[",
    "mappings": 50_000 * "{a: ",
    "indented": "\n".join(f"{i * ' '}a:" for i in range(600)),
    "large": "seed: 1 #" + 10_000_000 * "x",
    "number": "seed: " + 100_000 * "9",
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_grows(name: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(YAMLS[name])
    refused(lambda: load(path), part="own.yaml")
    folder = tmp_path / "store" / "pretrain-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(YAMLS[name])
    outcome = confined(lambda: collect(Store(tmp_path / "store"))["state"].tolist(), tmp_path)
    assert (outcome.problem, outcome.value) == (None, ["started"])


def test_brackets_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(YAMLS["lists"])
    before = time.process_time()
    with pytest.raises(UserError, match="nested too deeply"):
        load(path)
    assert time.process_time() - before < 1  # 0.002; the scanner's own way takes 2.3


@pytest.mark.parametrize("maker", ["huge_png", "huge_jpeg", "huge_gif", "huge_bmp", "huge_tiff", "huge_ppm"])
def test_pictures_that_promise_a_gigapixel(maker: str, tmp_path: Path) -> None:
    name = f"x.{maker[5:]}"
    getattr(makers, maker)(tmp_path, name)
    for look in (lambda: read(str(tmp_path / name)), lambda: read_labels(str(tmp_path / name), 2)):
        refused(look, part="pixels (allowed")


def test_a_png_whose_pixels_are_really_there(tmp_path: Path) -> None:
    """A few hundred kilobytes that unpack to 300 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), b""
    for _ in range(200):
        rows += packer.compress(bytes(1 + 15_000) * 100)
    head = struct.pack(">IIBBBBB", 15_000, 20_000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(content)
    assert len(content) < 1_000_000 < MOST_PIXELS < 300_000_000
    refused(lambda: read(str(tmp_path / "x.png")), part="15,000 x 20,000 pixels")
    refused(lambda: read_labels(str(tmp_path / "x.png"), 2), part="15,000 x 20,000 pixels")


def test_a_moving_picture_of_many_frames(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("P", (3000, 3000), i) for i in range(60)]  # 1.6 GB as tensors
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    outcome = confined(lambda: tuple(read(str(tmp_path / "x.gif")).shape), seconds=20)
    assert (outcome.problem, outcome.value) == (None, (3, 3000, 3000))


def test_damaged_png_does_not_end_the_process(tmp_path: Path) -> None:
    """torchvision's decoder does: libpng's jump out of an error passes C++ frames."""
    makers.png(tmp_path, "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    at = content.index(b"IDAT") + 100
    for value in (0, 5, 99, 255):
        content[at : at + 40] = bytes([value]) * 40
        (tmp_path / "x.png").write_bytes(content)
        outcome = confined(lambda: read(str(tmp_path / "x.png")) is not None, refusals=REFUSALS)
        assert outcome.problem is None, outcome.problem


@pytest.mark.parametrize("words", [("overlap",), ("beyond",), ("falling",), ("huge",), ("negative",), ("type",)])
def test_safetensors_whose_head_lies(words: tuple[str], tmp_path: Path) -> None:
    makers.tensors(tmp_path, *words)
    refused(lambda: load_weights(tmp_path / "bad.safetensors"), part="not a whole safetensors file")
    refused(lambda: replay(tmp_path / "bad.safetensors"), part="bad.safetensors")


@pytest.mark.parametrize("size", ["99999999999", "90000000", "18446744073709551615", "9000000"])
def test_safetensors_with_a_huge_head(size: str, tmp_path: Path) -> None:
    makers.header(tmp_path, size)
    for look in (load_weights, header, replay):
        refused(lambda look=look: look(tmp_path / "bad.safetensors"), part="not a")  # type: ignore[misc]


def test_safetensors_with_a_million_tensors(tmp_path: Path) -> None:
    text = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(lambda: load_weights(tmp_path / "x.safetensors"), part="a head of")


def test_a_checkpoint_that_unpacks_to_more(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.pth", io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1000)}}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry) + bytes(50_000_000))
    refused(lambda: read_any(path), part="is compressed")


def test_a_checkpoint_of_one_number_seen_as_a_trillion(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1).expand(1_000_000, 1_000_000)}}, tmp_path / "x.pth")
    refused(lambda: read_any(tmp_path / "x.pth"), part="w: not a plain tensor")


def test_weights_and_a_config_that_asks_for_another_network(good: Path, tmp_path: Path) -> None:
    """The config of a store from elsewhere says 60,000 wide: refused before a tensor is made."""
    subprocess.run(["cp", "-r", good / "store", tmp_path / "store"], check=True)
    (run,) = (tmp_path / "store").glob("finetune-*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"width": 60_000, "depth": 40}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    makers.png(tmp_path, "a.png")
    from sdae.predict import predict

    refused(
        lambda: predict(Store(tmp_path / "store"), run.name, [tmp_path / "a.png"], tmp_path / "out", 0.3), tmp_path,
        part="weights of another network",
    )  # fmt: skip


def test_a_golden_file_of_another_network(tmp_path: Path) -> None:
    makers.golden(tmp_path, "embed_dim=60000")
    refused(lambda: replay(tmp_path / "bad.safetensors"), part="weights of another network")


def test_an_index_of_more_rows_than_it_has_bytes_for(good: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    subprocess.run(["cp", "-r", good / "store", tmp_path / "store"], check=True)
    expected = collect(Store(tmp_path / "store"))
    metadata = pq.read_schema(tmp_path / "store" / "index.parquet").metadata
    table = pa.table({name: pa.nulls(30_000_000, pa.string()) for name in ("id", "stamp", "own")})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "store" / "index.parquet")
    del table
    outcome = confined(lambda: collect(Store(tmp_path / "store"))["id"].tolist(), tmp_path)
    assert (outcome.problem, outcome.value) == (None, expected["id"].tolist())


# Ways out of a folder


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".hidden", "..", "-x", "", "a\0b", "~root"])
def test_names_of_weights(name: str) -> None:
    with pytest.raises(UserError, match="expected a bare name"):
        home_of(name)


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", ".", ".slurm"])
def test_ids_of_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run's id"):
        Store(tmp_path).run(name)
    with pytest.raises(UserError):
        parse({"stage": "finetune", "init": {"run": f"pretrain-{name}"}})


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "a/../../b.png", "..", "", "a\0b"])
def test_file_names_in_coco(name: str, good: Path, tmp_path: Path) -> None:
    values = makers._coco()
    values["images"][0]["file_name"] = name
    (tmp_path / "x.json").write_text(json.dumps(values))
    refused(lambda: parsed(str(tmp_path / "x.json"), (0, 0), True), part="is none of a file in the folder")


@pytest.mark.parametrize("name", ["a b", "x\ny", "--x", ".x", "<b>", "$x$"])
def test_names_of_artifacts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sub" / f"{name}.yaml"
    path.parent.mkdir()
    path.write_text("title: x\n")
    with pytest.raises(UserError, match="has other signs than letters"):
        load_artifact(path, "smoke")


@pytest.mark.parametrize("name", ["../x", "a\n\\input{x}", "-->", "<b>", "a b", "%", "$x$", "a/b"])
@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_names_of_rows_and_columns(kind: str, name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "title": "x", "columns": {"loss": {"run": "a", "metric": "loss"}},
        "rows": {"only": {"runs": {"a": {"recipe": "sdae"}}}},
    }  # fmt: skip
    values[kind] = {name: next(iter(values[kind].values()))}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"name may have letters|is not a key of the row's grid"):
        load_artifact(tmp_path / "own.yaml", "smoke")


def test_tokens_of_arrays(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    for token in ("../../x", "/etc", "a/b", ".."):
        with pytest.raises(UserError, match="is not an array's token"):
            ledger.folder(token)


def test_a_result_that_names_weights_elsewhere(good: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", good / "store", tmp_path / "store"], check=True)
    (run,) = (tmp_path / "store").glob("pretrain-*")
    save_file({"w": torch.zeros(3)}, tmp_path / "secret.safetensors")
    result = json.loads((run / "result.json").read_text())
    for name in ("student-epoch-../../../secret.safetensors", "student-epoch-00001/../../../../secret.safetensors"):
        (run / "result.json").write_text(json.dumps(result | {"weights": {name: "x"}}))
        folder = Store(tmp_path / "store").run(run.name)
        refused(lambda folder=folder: encoder_of_run(folder, "student", "last"), part="has no student")  # type: ignore[misc]


@pytest.mark.parametrize("what", ["folder", "checkpoints", "log.txt", "metrics.jsonl", "attempts.jsonl"])
def test_links_out_of_a_store_are_not_written_through(what: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    config = tiny("pretrain")
    folder = tmp_path / "store" / run_id(config)
    if what == "folder":
        outside.mkdir()
        folder.parent.mkdir()
        folder.symlink_to(outside)
    else:
        folder.mkdir(parents=True)
        outside.mkdir() if what == "checkpoints" else outside.write_text("mine\n")
        (folder / what).symlink_to(outside)
    run = Store(tmp_path / "store").run(folder.name)
    with pytest.raises(UserError, match="a link; what a run writes must lie in the store itself"):
        run.create(config)
    if what.endswith("jsonl"):
        with pytest.raises((OSError, UserError), match="symbolic links"):
            run.note("start") if what.startswith("attempts") else run.append_metrics({"step": 1})
    assert not outside.is_dir() or not list(outside.iterdir())
    assert outside.is_dir() or outside.read_text() == "mine\n"


def test_a_claim_whose_token_is_a_path(tmp_path: Path) -> None:
    run = Store(tmp_path / "store").run("pretrain-0123456789abcdef")
    run.path.mkdir(parents=True)
    for claim in ('{"host": "h", "token": "/../../../gone"}', '["x"]', "3", '{"time": "x"}', '{"pid": []}'):
        (run.path / "claim.json").write_text(claim)
        with run.claim() as mine:
            assert mine
    assert {path.name for path in tmp_path.rglob("*")} == {"store", run.id}


def test_records_of_other_shapes_are_no_records(good: Path, tmp_path: Path) -> None:
    """Whatever stands in a run folder in place of a record, lists are printed and nothing is raised."""
    for odd in ("[1]", "3", '"x"', "null", 100_000 * "[", "{", "\xff", '{"class": [1], "message": {"a": 1}}'):
        folder = tmp_path / "store" / "pretrain-0123456789abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("failure", "heartbeat", "claim", "provenance", "metrics", "attempts"):
            name += ".jsonl" if name in ("metrics", "attempts") else ".json"
            (folder / name).write_bytes(odd.encode("latin-1"))
        store = Store(tmp_path / "store")
        assert len(collect(store)) == 1
        assert show(store, folder.name)["state"] in ("failed", "started", "new")
        assert store.run(folder.name).notes() == [] or odd.startswith('{"class"')
        called = call("results", "list", "--store", store.root)
        assert (called.code, called.err) == (0, "")


# Names in pages


class Page(HTMLParser):
    """The elements of a page, and the attributes that would run something."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.handlers.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is published of an artifact and a store whose every free text is an attack."""
    root = tmp_path_factory.mktemp("pages")
    attack = f"{SCRIPT} {IMAGE} {TEX} --> ]]> </style></title>\u2028 'x' `x` | {{{{7*7}}}} \\VAR{{7*7}}"
    own: dict[str, Any] = {
        "title": attack, "kind": "figure", "notes": [attack],
        "columns": {"loss": {"run": "a", "metric": "loss", "label": attack, "unit": attack}},
        "rows": {f"r{i}": {"label": f"{attack} {i}", "meta": {attack[:40]: attack, "x": i}, "runs": {"a": {
            "recipe": "sdae", "optim": {"epochs": 100 + i}}}} for i in (0, 300)},
        "paper": {"r0.loss": 1.0},
    }  # fmt: skip
    (root / "own.yaml").write_text(yaml.safe_dump(own, allow_unicode=True))
    sweep = plan([str(root / "own.yaml")], "smoke", (0,))
    store = Store(root / "store")
    from synthetic import result

    first, second = sweep.runs.values()
    folder = store.run(first.id).path
    folder.mkdir(parents=True)
    values = result(first.config, first.id, {}, synthetic=False)
    values |= {"device": attack, "model": attack}
    values["dataset"]["name"] = attack
    values["provenance"]["commit"] = attack
    (folder / "result.json").write_text(json.dumps(values))
    (folder / "provenance.json").write_text(json.dumps({"host": attack, "python": attack, "gpus": [attack]}))
    (folder / "log.txt").write_text(attack)
    other = store.run(second.id)
    other.create(second.config)
    other.fail(attack, attack, attack)
    odd = store.root / f"pretrain-{SCRIPT.replace('/', '_')}"
    odd.mkdir()
    (odd / "failure.json").write_text(json.dumps({"class": attack, "message": attack}))
    files = publish(store, sweep.artifacts, "smoke", (0,), root / "out")
    kinds = (".html", ".tex", ".md", ".svg")
    return {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in kinds}


def test_pages_hold_no_element_of_a_name(pages: dict[str, str]) -> None:
    for name in ("report.html", "own.html"):
        page = Page(pages[name])
        assert page.handlers == [], name
        assert "alert(1)" in page.text, "the attack is shown as text"
        assert page.tags.count("script") == (2 if name == "report.html" else 0)  # the report's data and its program
        assert not {"iframe", "object", "embed", "base"} & set(page.tags)
    images = re.findall(r"<img [^>]*src=\"(.{0,20})", pages["report.html"])
    assert images
    assert all(source.startswith("data:image/") for source in images)
    assert "default-src 'none'" in pages["report.html"]
    assert "49" not in Page(pages["own.html"]).text, "a template in a name is text"


def test_pictures_hold_no_element_of_a_name(pages: dict[str, str]) -> None:
    page = Page(pages["own.svg"])
    assert "script" not in page.tags
    assert page.handlers == []
    assert "img" not in page.tags


def test_latex_holds_no_command_of_a_name(pages: dict[str, str]) -> None:
    for name in ("own.tex", "report.tex"):
        text = pages[name]
        for command in (r"\input{/etc", r"\write18", r"\VAR{", "7*7}}$"):
            assert command not in text.replace(r"\textbackslash{}", ""), (name, command)
        assert r"\textbackslash{}input\{/etc/passwd\}" in text
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", re.sub(r"(?<!\\)%.*", "", text)):
            depth += 1 if brace == "{" else -1
            assert depth >= 0, f"{name}: a name closes a group of the page's"
        assert depth == 0, f"{name}: a name opens a group"


def test_markdown_holds_no_element_of_a_name(pages: dict[str, str]) -> None:
    for name in ("own.md", "README.md", "claims.md"):
        text = re.sub(r"<!--.*?-->", "", pages[name], flags=re.S)
        left = set(re.findall(r"<\s*/?\s*([a-zA-Z!][\w-]*)", text))
        assert left <= {"sup", "sub"}, (name, left)
        assert "script" not in "".join(re.findall(r"<!--.*?-->", pages[name], flags=re.S))


def test_lists_on_a_terminal_hold_no_command_of_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "pretrain-0123456789abcdef"
    folder.mkdir(parents=True)
    escape = "\x1b]0;mine\x07\x1b[2J\x1b[31mred\r\n\x9b31m"
    config = dump(tiny("pretrain", scale=escape))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "failure.json").write_text(json.dumps({"class": escape, "message": escape}))
    for words in (["results", "list"], ["results", "show", folder.name]):
        called = call(*words, "--store", tmp_path / "store")
        assert called.code == 0, called
        assert not set("\x1b\x07\x9b\r") & set(called.out + called.err), words
    assert printable(f"a{escape}b\ud800").isprintable()
    (tmp_path / "own.yaml").write_text(f'"{escape.encode("unicode_escape").decode()}": 1\n')
    refusal = call("run", tmp_path / "own.yaml", "--store", tmp_path / "none")
    assert refusal.code == 2
    assert refusal.err.count("\n") == 1
    assert not set("\x1b\x07\x9b\r") & set(refusal.err)


def test_a_label_that_is_no_formula(tmp_path: Path) -> None:
    """matplotlib takes text between dollars for a formula, and raises at a wrong one."""
    own = {
        "title": r"$\frac{1}$", "kind": "figure",
        "columns": {"loss": {"run": "a", "metric": "loss", "label": r"$\x$ $"}},
        "rows": {"r": {"label": r"$\notacommand{$ {", "meta": {"x": 1}, "runs": {"a": {"recipe": "sdae"}}}},
        "paper": {"r.loss": 1.0},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    files = draw(Store(tmp_path / "store"), str(tmp_path / "own.yaml"), "smoke", tmp_path / "out")
    assert {path.suffix for path in files} == {".png", ".svg", ".pdf"}


# What is the user's own


def test_jobs_and_code_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        ledger = Ledger(Store(tmp_path / "store"))
        ledger.open()
        code = snapshot(ledger)
        assert stat.S_IMODE(code.stat().st_mode) == 0o700
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        other = snapshot(ledger, make=False)
        assert other != code, "code that somebody else has left there is not run"
    finally:
        os.umask(before)


def test_the_pickle_of_an_array_is_private(tmp_path: Path) -> None:
    """Others of a shared store read the record, by its name; they list nothing, and what is unpickled is not theirs."""
    before = os.umask(0)
    try:
        sweep = plan(["table5"], "smoke", (0,))
        array = Array(Profile(time="1h").resources("pretrain"), {0: next(iter(sweep.runs.values()))})
        ledger = Ledger(Store(tmp_path / "store"))
        ledger.open()
        token = "0123456789ab"
        attempt = _Sender.__new__(_Sender)
        attempt.__dict__ |= {
            "store": Store(tmp_path / "store"), "ledger": ledger, "array": array, "token": token,
            "code": tmp_path / "c", "target": "x:y", "scale": "smoke",
        }  # fmt: skip
        attempt._write(Profile(time="1h"))
    finally:
        os.umask(before)
    folder = ledger.folder(token)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711
    assert stat.S_IMODE((folder / "job.pkl").stat().st_mode) == 0o600
