"""The corpus of bad input in tests/bad: each case through the command line, with the line that it must be told.

A file has `bases` (good inputs) and `cases`; what a case may say is in `_prepare`. In its line TMP stands for the
folder that it was called in, GOOD for that of the good things, PRETRAIN, FINETUNE for the store's runs.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad import makers
from calling import ROOT, Called, call
from guard import PATIENCE, SECONDS, tree, watched

CORPUS = sorted((Path(__file__).parent / "bad").glob("*.yaml"))
NAMES = {
    r"pretrain-(?!0123456789abcdef)[0-9a-f]{16}": "PRETRAIN", r"finetune-(?!0123456789abcdef)[0-9a-f]{16}": "FINETUNE",
    r"(segment|detect)-[0-9a-f]{16}": "RUN", r"\b[0-9a-f]{64}\b": "SHA", r"(?<=train-00000-)[0-9a-f]{16}": "SHA",
}  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    """By FILE-NAME, complete: what a file says for all its cases is put under what a case says."""
    found = {}
    for file in CORPUS:
        corpus = yaml.safe_load(file.read_text(encoding="utf-8"))
        common = {key: value for key, value in corpus.items() if key != "cases"}
        for name, case in corpus["cases"].items():
            found[f"{file.stem}-{name}"] = {**common, **case}
    return found


CASES = cases()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also loads what commands import, so that a case's time is its own."""
    root = makers.good(tmp_path_factory.mktemp("good"))
    (store,) = root.glob("store/finetune-*")
    picture = root / "pictures" / "val" / "ant" / "0.png"
    assert call("predict", store.name, picture, "--store", root / "store", "--out", root / "out").code == 0
    assert call("parity", makers.GOLDEN).code == 0
    assert call("paper", "figure", "none").code == 2
    return root


def text_of(parts: str | list[Any]) -> str:
    """Text, or a list of text and [text, times]."""
    return parts if isinstance(parts, str) else "".join(p if isinstance(p, str) else p[0] * p[1] for p in parts)


def put(values: Any, dotted: str, value: Any) -> None:
    *above, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
    for part in above:
        values = values[part] if isinstance(values, list) else values.setdefault(part, {})
    values[last] = value


def make(folder: Path, words: str) -> None:
    name, *arguments = words.split(" ")
    getattr(makers, name)(folder, *arguments)


def _prepare(case: dict[str, Any], folder: Path, good: Path) -> None:
    """Writes a case's files into its folder.

    copy: good things. remove, write, bytes_of, cut (to so many bytes), json (dotted keys): what is done to files, whose
    names may have stars. file: what is written of `base` (the first one) with `set` and `drop`, or of `text`, `bytes`.
    before, make: a function of makers.py with its words, called before and behind all that.
    """
    if "before" in case:
        make(folder, case["before"])
    for name in case.get("copy", ()):
        shutil.copytree(good / name, folder / name)
    if case.get("file"):
        bases = case["bases"]
        values = copy.deepcopy(bases[case.get("base", next(iter(bases)))])
        for key, value in case.get("set", {}).items():
            put(values, key, value)
        for dotted in case.get("drop", ()):
            *above, last = dotted.split(".")
            owner = values
            for part in above:
                owner = owner[part]
            del owner[last]
        need = next(iter(folder.glob("store/pretrain-*")), folder).name
        content = yaml.safe_dump(values, sort_keys=False).replace("'{pretrain}'", need)
        content = text_of(case.get("text", content))
        raw = bytes.fromhex(case["bytes"]) if "bytes" in case else content.encode()
        (folder / case["file"]).write_bytes(raw)
    for pattern in case.get("remove", ()):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern, content in case.get("write", {}).items():
        path = makers._found(folder, pattern)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for pattern, content in case.get("bytes_of", {}).items():
        makers._found(folder, pattern).write_bytes(bytes.fromhex(content))
    for pattern, changes in case.get("json", {}).items():
        path = makers._found(folder, pattern)
        values = json.loads(path.read_text())
        for key, value in changes.items():
            put(values, key, value)
        path.write_text(json.dumps(values))
    if "make" in case:
        make(folder, case["make"])
    for pattern, size in case.get("cut", {}).items():
        path = makers._found(folder, pattern)
        assert path.stat().st_size > size, f"{path}: not cut"
        path.write_bytes(path.read_bytes()[:size])


def said(text: str, folder: Path, good: Path) -> str:
    """A line in which nothing hangs on the machine or on the run."""
    places = {str(folder): "TMP", str(good): "GOOD", str(ROOT): "ROOT"}
    for pattern, name in [*((re.escape(path), name) for path, name in places.items()), *NAMES.items()]:
        text = re.sub(pattern, name, text)
    return text


def tried(case: dict[str, Any], folder: Path, good: Path, patch: pytest.MonkeyPatch) -> tuple[Called, list[str]]:
    """What a case comes to, and what is wrong beside its line."""
    patch.chdir(folder)
    for name, value in (("HOME", folder / "home"), ("XDG_CACHE_HOME", folder / "home" / "cache")):
        patch.setenv(name, str(value))
    for name in ("SDAE_DATA", "SDAE_STORE", "SDAE_WEIGHTS"):
        patch.delenv(name, raising=False)
    for name, value in case.get("env", {}).items():
        patch.setenv(name, value)
    _prepare(case, folder, good)
    before = tree(folder)
    began, clock = time.process_time(), time.monotonic()
    with watched(folder) as written:
        called = call(*shlex.split(text_of(case["command"])))
    wrong = [f"wrote or started {what}" for what in written[:3]]
    if (seconds := time.process_time() - began) > SECONDS:
        wrong.append(f"took {seconds:.1f} s")
    if time.monotonic() - clock > PATIENCE * SECONDS:
        wrong.append("hung")
    after = tree(folder)
    ours = ("home", *case.get("outside", "").split(), *(["store"] if case.get("recorded") else []))
    changed = sorted(
        path for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and Path(path).relative_to(folder).parts[0] not in ours
        and not (path not in before and str(Path(path).relative_to(folder)) in ("store", "store/FORMAT"))
    )  # fmt: skip
    wrong += [f"changed {said(path, folder, good)}" for path in changed[:3]]
    return called, wrong


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    called, wrong = tried(case, tmp_path, good, monkeypatch)
    line = f"error: {case['line']}\n" if case["line"] else ""
    assert (said(called.err, tmp_path, good), called.code, wrong) == (line, case.get("code", 2), [])
    assert case.get("told", "") in said(called.out, tmp_path, good)
    if called.code == 2:  # one line at most, of work that was begun
        assert called.out == "" or ("told" in case and called.out.count("\n") == 1)


def test_the_corpus_is_large_and_its_lines_are_lines() -> None:
    assert len(CASES) >= 500
    for name, case in CASES.items():
        assert "\n" not in case["line"], name
        assert len(case["line"]) < 900, name


# The cases of words and of weights change files that other tests know to be good
@pytest.mark.parametrize(
    "file", [file for file in CORPUS if file.stem not in ("words", "weights")], ids=lambda file: file.stem
)
def test_what_is_damaged_was_good(file: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file's first base as it is: not refused, or not for what a case changes in it."""
    corpus = yaml.safe_load(file.read_text(encoding="utf-8"))
    case = {key: value for key, value in corpus.items() if key != "cases"}
    case.setdefault("copy", ["pictures"] if file.stem == "data" else [])
    called, _ = tried(case | {"outside": "store paper"}, tmp_path, good, monkeypatch)
    assert called.code == 0, called
