"""Fuzzing of everything that reads a file: bytes of good files changed at random, by a seed.

    python tests/fuzz_campaign.py --minutes 10 --seed 1 --out trust/fuzz.json

Whatever is in a file, only the documented refusals may come out of its reader, within 5 s and 1 GiB, and nothing may be
written elsewhere. The same command goes on where it was cut off. Where atheris is installed, it takes half of the time,
guided by coverage. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from bad import makers
from guard import FULL, SECONDS, confined

BATCH = 40  # inputs of a child
GUIDED = 6  # every so many rounds of a reader atheris takes as long as they did
KEPT = 20_000  # bytes of an input that is written down
Reader = Callable[[Path], Any]


class Target(NamedTuple):
    """A reader; name: of the file it reads, in its folder; seeds: good contents; home: what lies around the file; size:
    inputs of a child."""

    read: Reader
    name: str
    seeds: list[bytes]
    home: Path | None = None
    kind: str = "bytes"  # or json, yaml, safetensors
    size: int = BATCH


class Result(NamedTuple):
    """inputs: how many were tried; read, refused: what became of them; failures: (number in the batch, what)."""

    inputs: int
    read: int
    refused: int
    failures: list[tuple[int, str]]


def refusals() -> tuple[type[Exception], ...]:
    from sdae.data.datasets import UnreadableError
    from sdae.errors import RunFailed, UserError

    return UserError, RunFailed, UnreadableError


# What is fuzzed


def targets(good: Path) -> dict[str, Target]:
    """By name. good: what `makers.good` has made."""
    from ablations.artifact import load_artifact
    from ablations.scale import load_scale
    from analysis.export import compare, show
    from analysis.frame import collect
    from sdae.config import load
    from sdae.data.coco import parsed
    from sdae.data.datasets import read
    from sdae.data.fingerprint import Listing, manifest
    from sdae.data.packed import open_packed
    from sdae.data.scenes import read_labels
    from sdae.data.segmentation import classes_of
    from sdae.layouts import encoders
    from sdae.parity import replay
    from sdae.released import header
    from sdae.sections import Data
    from sdae.store import Store
    from sdae.training.checkpoints import load_weights
    from sdae.weights import read_any
    from slurm.ledger import Ledger
    from slurm.look import recorded
    from slurm.profile import load_profile

    root = Path(__file__).parents[1]
    corpora = [yaml.safe_load(file.read_text()) for file in sorted((root / "tests" / "bad").glob("*.yaml"))]
    configs = [yaml.safe_dump(base).encode() for corpus in corpora for base in corpus["bases"].values()]
    configs += [b"a: &a [1, 2]\nb: {<<: {c: *a}, d: 2026-01-01, e: !!binary aGk=, f: 0x1f, g: 1:30:00, h: .inf}\n"]
    artifacts = [file.read_bytes() for file in sorted((root / "ablations").glob("[tf]*.yaml"))]
    scales = [file.read_bytes() for file in sorted((root / "ablations" / "scales").glob("*.yaml"))]
    profiles = [file.read_bytes() for file in sorted((root / "examples" / "profiles").glob("*.yaml"))]
    (run,), (tuned,) = good.glob("store/pretrain-*"), good.glob("store/finetune-*")
    store = good / "store"

    def look(file: Path) -> None:
        here = Store(file.parents[1])
        collect(here)
        show(here, file.parent.name)
        compare(here, tuned.name, run.name)
        here.run(file.parent.name).state()

    def packed(file: Path) -> None:
        data = Data(name="packed", path=str(file.parent), image_size=32)
        facts = manifest(file.parent, sizes=False)
        counts = {split: tuple(numbers) for split, numbers in facts["counts"].items()}
        found: Any = open_packed(data, "train", Listing(tuple(facts["classes"]), counts))
        for i in range(min(len(found), 3)):
            with contextlib.suppress(*refusals()):
                found.read(i)
            found.path_of(i)

    def weights(file: Path) -> None:
        for step in (header, load_weights):
            with contextlib.suppress(*refusals()):
                step(file)
        encoders(read_any(file), "auto", "file")

    def submitted(file: Path) -> None:
        here = Store(file.parents[3])
        Ledger(here).read(file.parent.name)
        recorded(here)

    pictures = [(good / "pictures/train/ant/0.png").read_bytes(), (good / "scenes/images/training/0.jpg").read_bytes()]
    maps = [(good / "scenes/annotations/training/0.png").read_bytes()]
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for maker in (makers.png, makers.jpeg):
            maker(made, "x")
            pictures.append((made / "x").read_bytes())
        for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM"):
            buffer = io.BytesIO()
            makers._noise(0, 12).save(buffer, kind)
            pictures.append(buffer.getvalue())
            maps.append(buffer.getvalue())
        makers.encoder(made)
        encoder = (made / "bad.safetensors").read_bytes()
        makers.released(made)
        released = (made / "bad.pth").read_bytes()
        (made / "store").mkdir()
        makers.slurm(made, "fine")
        ledger = good / "ledger"
        if not ledger.exists():
            shutil.copytree(made / "store", ledger, symlinks=True)
        collect(Store(store))
    record = next(ledger.glob(".slurm/jobs/*/submission.json"))
    orders = record.with_name("runs.json")
    golden = makers.GOLDEN.read_bytes()
    coco = (good / "coco/annotations/instances_train2017.json").read_bytes()
    rle = json.loads(coco)
    rle["annotations"][0]["segmentation"] = {"size": [40, 40], "counts": [100, 200, 1300]}
    rle["annotations"][1]["segmentation"] = {"size": [40, 40], "counts": "T1d6`b0"}
    manifest_file, index = good / "packed/manifest.json", good / "packed/train.npy"

    def below(file: Path, base: Path) -> str:
        return str(file.relative_to(base))

    (failed, whole), records = recorded_sweep(good / "sweep")

    def commanded(store: Path) -> None:
        for words in (
            "sweep status table5", "sweep status table5 --json", "results check --deep", "results list",
            f"results show {whole}", f"results show {failed} --json", f"results compare {whole} {failed}",
            "results prune --dry-run", "paper table table5 --format json", "paper explain table5.masked.top1",
            f"sweep logs {failed}",
        ):  # fmt: skip
            command(*words.split(), "--store", str(store))

    def told(name: str) -> Target:
        kind = "json" if name.endswith("json") else "yaml" if name.endswith("yaml") else "bytes"
        depth = len(Path(name).parts) - 1
        return Target(lambda file: commanded(file.parents[depth]), name, [records[name]], good / "sweep", kind, 4)

    def in_store(name: str, kind: str) -> Target:
        return Target(look, f"{run.name}/{name}", [(run / name).read_bytes()], store, kind)

    return {
        "config": Target(load, "x.yaml", configs, kind="yaml"),
        "artifact": Target(lambda file: load_artifact(file, "smoke"), "x.yaml", artifacts, kind="yaml"),
        "scale": Target(load_scale, "x.yaml", scales, kind="yaml"),
        "profile": Target(load_profile, "x.yaml", profiles, kind="yaml"),
        "result": in_store("result.json", "json"),
        "stored config": in_store("config.yaml", "yaml"),
        "metrics": in_store("metrics.jsonl", "bytes"),
        "heartbeat": in_store("heartbeat.json", "json"),
        "provenance": in_store("provenance.json", "json"),
        "index": Target(
            lambda file: collect(Store(file.parent)), "index.parquet", [(store / "index.parquet").read_bytes()], store
        ),
        "submission": Target(submitted, below(record, ledger), [record.read_bytes()], ledger, "json"),
        "orders": Target(submitted, below(orders, ledger), [orders.read_bytes()], ledger, "json"),
        "coco": Target(
            lambda file: [parsed(str(file), (time.monotonic_ns(), 0), skip) for skip in (True, False)], "x.json",
            [coco, json.dumps(rle).encode()], kind="json",
        ),
        "label map": Target(lambda file: read_labels(str(file), 2), "x.png", maps),
        "classes": Target(
            lambda file: classes_of(file.parent, "any"), "classes.txt", [b"0\tnone\n1\tsky\n2\tsea\n3\ta b\n"]
        ),
        "picture": Target(lambda file: read(str(file)), "x.png", pictures),
        "packed manifest": Target(packed, "manifest.json", [manifest_file.read_bytes()], good / "packed", "manifest"),
        "packed index": Target(packed, "train.npy", [index.read_bytes()], good / "packed"),
        "safetensors": Target(weights, "x.safetensors", [encoder], kind="safetensors"),
        "released": Target(weights, "x.pth", [released]),
        "golden": Target(replay, "x.safetensors", [golden], kind="safetensors"),
        **{f"told of {Path(name).name}": told(name) for name in records},
    }  # fmt: skip


def recorded_sweep(root: Path) -> tuple[tuple[str, str], dict[str, bytes]]:
    """A store with a sweep, one run of it failed and one with its state saved: (the failed run, one that is done), and
    of each kind of record a name and its content."""
    import synthetic

    from ablations.planner import plan
    from sdae.config import dump
    from sdae.store import Store

    sweep, store = plan(["table5"], "smoke"), Store(root)
    runs = [run for run in sweep.runs.values() if run.config.stage == "pretrain"]
    failed, done = runs[0].id, runs[1].id
    records = {
        f"{failed}/config.yaml": yaml.safe_dump(dump(runs[0].config), sort_keys=False),
        f"{failed}/failure.json": json.dumps(
            {"class": "OutOfMemory", "message": "no room", "attempt": 2, "time": 1.7e9, "submission": None}
        ),
        f"{failed}/heartbeat.json": json.dumps(
            {"time": 1.7e9, "epoch": 1.5, "epochs": 3, "step": 6, "steps": 12, "images_per_s": 99.5}
        ),
        f"{failed}/metrics.jsonl": '{"step": 3, "epoch": 0.75, "loss": 0.5}\n{"step": 6, "epoch": 1.5, "loss": 0.4}\n',
        f"{failed}/attempts.jsonl": '{"event": "began", "time": 1.7e9, "token": "abc"}\n',
        f"{failed}/claim.json": json.dumps({"host": "other", "pid": 7, "started": "9", "time": 1.7e9, "token": "abc"}),
        f"{failed}/log.txt": "a line\nand another\n",
        f"{failed}/checkpoints/state-00000006.sha256.json": json.dumps({"sha256": "0" * 64}),
        f"{done}/provenance.json": json.dumps({"commit": "c0ffee", "dirty": False, "packages": {"torch": "2.11"}}),
        f"{done}/pruned.json": json.dumps({"student-epoch-0001.safetensors": 7}),
    }  # fmt: skip
    if not root.exists():
        synthetic.fill(store, sweep, synthetic=False)
        shutil.rmtree(root / failed)
        for name, content in records.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        (root / failed / "checkpoints/state-00000006.safetensors").write_bytes(b"x")
    records[f"{done}/result.json"] = (root / done / "result.json").read_text()
    return (failed, done), {name: content.encode() for name, content in records.items()}


def command(*words: str) -> None:
    """A command in this process: it may end as it likes, but not with a traceback, nor write what moves a cursor."""
    from cli.main import main

    sys.argv = ["sdae-cli", *words]
    texts, code = (io.StringIO(), io.StringIO()), None
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    assert code in (0, 1, 2), f"{words}: ended with {code}"
    for text in texts:
        text.getvalue().encode()  # a UnicodeEncodeError where no terminal takes it
        assert "\x1b" not in text.getvalue(), f"{words}: {text.getvalue()!r}"


# Changes

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "a\nb", "\x1b[2J", "\0", "../../x", "/etc/passwd", "é" * 9, "<script>alert(1)</script>", "\\input{x}",
    "%s{0}", "9" * 5000, "2026-13-45", [], [[]], {}, {"a": 1}, [1, 2, 3], {"": None}, "\ud800", "nan", "1e999",
    "~", "NaN",
]  # fmt: skip
WORDS = [
    b"[" * 3000, b"{" * 3000, b"{\"a\":" * 3000, b"\0", b"\xff\xfe", b"&a ", b"*a ", b"<<: ", b"!!python/object:x ",
    b"!!int ", b"!!timestamp ", b"- " * 500, b"\t", b"\r", b"\n---\n", b"1e999", b"-1", b"99999999999999999999", b"NaN",
    b"null", b"\"", b"'", b"? ", b"|\n", b"%YAML 9.9\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"0b_", b"2026-99-99",
    b":" * 99,
]  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)


def mutated(target: Target, draw: random.Random) -> bytes:
    """A good content with something wrong in it."""
    seed = draw.choice(target.seeds)
    if target.kind in ("json", "yaml", "manifest") and draw.random() < 0.6:
        with contextlib.suppress(ValueError, yaml.YAMLError, RecursionError):
            return _structured(seed, target.kind, draw)
    if target.kind == "safetensors" and draw.random() < 0.7:
        return _tensors(seed, draw)
    content = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        _strike(content, target, draw)
    return bytes(content)


def _strike(content: bytearray, target: Target, draw: random.Random) -> None:
    at = draw.randrange(len(content) + 1) if draw.random() < 0.6 else draw.randrange(min(len(content), 200) + 1)
    how = draw.randrange(8)
    if how == 0 and content:
        content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
    elif how == 1:
        content[at : at + 1] = bytes([draw.randrange(256)])
    elif how == 2:
        del content[at : at + draw.choice((1, 2, 8, 64, 4096))]
    elif how == 3:
        content[at:at] = draw.choice(WORDS)
    elif how == 4:
        size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
        number = draw.choice(NUMBERS) % (1 << 8 * size)
        content[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
    elif how == 5:
        del content[at:]
    elif how == 6:
        part = content[at : at + draw.choice((4, 40, 400))]
        content[at:at] = part * draw.choice((1, 3, 50))
    else:
        other = draw.choice(target.seeds)
        begin = draw.randrange(len(other) + 1)
        content[at:] = other[begin:]


def _structured(seed: bytes, kind: str, draw: random.Random) -> bytes:
    """The values of a file with some of them replaced, dropped, doubled or renamed."""
    values = yaml.safe_load(seed) if kind == "yaml" else json.loads(seed)
    for _ in range(draw.choice((1, 1, 2, 5))):
        values = _changed(values, draw)
    if kind == "yaml":
        text = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5, sort_keys=False)
        return text.encode("utf-8", "surrogatepass")
    if kind == "manifest" and isinstance(values, dict):
        from sdae.data.fingerprint import manifest_digest

        values["digest"] = manifest_digest(values)
    return json.dumps(values).encode()


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        out: Any = value.copy()
        how = draw.random()
        if how < 0.1:
            del out[key]
        elif how < 0.15 and isinstance(out, dict):
            out[draw.choice(("x", "", "a\nb", "../x", "-->", "9" * 300))] = out.pop(key)
        elif how < 0.18:
            return out | {str(n): out for n in range(3)} if isinstance(out, dict) else out * 50
        else:
            out[key] = _changed(out[key], draw)
        return out
    return draw.choice(ODD)


def _tensors(seed: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose head says something else; its length is right again."""
    size = int.from_bytes(seed[:8], "little")
    head, rest = json.loads(seed[8 : 8 + size]), seed[8 + size :]
    if "config" in head.get("__metadata__", {}) and draw.random() < 0.6:
        config = _changed(json.loads(head["__metadata__"]["config"]), draw)
        head["__metadata__"]["config"] = json.dumps(config)
    else:
        for _ in range(draw.choice((1, 2, 4))):
            head = _changed(head, draw)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + (rest if draw.random() < 0.9 else rest[: draw.randrange(len(rest))])


# Trying


def batch(target: Target, inputs: list[bytes], folder: Path) -> Result:
    """Reads each input in a child; where one of them brings it down, each in a child of its own."""
    home = folder / "home"
    if home.exists():
        shutil.rmtree(home)
    if target.home is None:
        home.mkdir(parents=True)
    else:
        shutil.copytree(target.home, home, symlinks=True)
    file, allowed = home / target.name, refusals()

    def go(chosen: list[bytes]) -> tuple[int, list[tuple[int, str]]]:
        refused, failures = 0, []
        for number, content in enumerate(chosen):
            file.write_bytes(content)
            began = time.process_time()
            try:
                target.read(file)
            except allowed as error:
                refused += 1
                if FULL.search(str(error)):
                    failures.append((number, f"took more than 1 GiB: {error}"))
            except BaseException as error:
                place = error.__traceback__
                while place is not None and place.tb_next is not None:
                    place = place.tb_next
                where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "?"
                failures.append((number, f"{type(error).__name__} in {where}: {str(error)[:300]}"))
            if (spent := time.process_time() - began) > SECONDS * BATCH / target.size:  # one input may be ten commands
                failures.append((number, f"took {spent:.1f} s"))
        return refused, failures

    outcome = confined(lambda: go(inputs), folder, seconds=60)
    if outcome.problem is None:
        refused, failures = outcome.value
        return Result(len(inputs), len(inputs) - refused - len(failures), refused, failures)
    if len(inputs) == 1:
        return Result(1, 0, 0, [(0, outcome.problem[:2000])])
    found = [batch(target, [content], folder) for content in inputs]
    failures = [(n, what) for n, one in enumerate(found) for _, what in one.failures]
    return Result(len(inputs), sum(one.read for one in found), sum(one.refused for one in found), failures)


def one_round(name: str, target: Target, seed: int, number: int, folder: Path, size: int = BATCH) -> dict[str, Any]:
    """The counts of a batch of inputs, and its failures with what brings them back."""
    draw = random.Random(f"{seed} {name} {number}")
    inputs = [mutated(target, draw) for _ in range(min(size, target.size))]
    result = batch(target, inputs, folder)
    failures = [
        {
            "target": name, "round": number, "input": n, "problem": what,
            "content": base64.b64encode(inputs[n]).decode() if len(inputs[n]) <= KEPT else None,
        }
        for n, what in result.failures
    ]  # fmt: skip
    return {"inputs": result.inputs, "read": result.read, "refused": result.refused, "failures": failures}


def guided(name: str, target: Target, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """atheris on one reader, in a process of its own: it ends at the first failure."""
    seeds, found = folder / "seeds", folder / "found"
    for path in (seeds, found):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for n, content in enumerate(target.seeds):
        (seeds / str(n)).write_bytes(content)
    words = [
        sys.executable, __file__, "--guide", name, "--good", str(folder.parent / "good"), "--", f"-seed={seed}",
        f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=3000", "-max_len=2000000",
        f"-artifact_prefix={found}/", "-print_final_stats=1", str(seeds),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", cwd=folder, timeout=seconds + 120)
    lines = done.stderr.splitlines()
    told = next((line.split()[-1] for line in lines if line.startswith("stat::number_of_executed_units")), "0")
    failures = []
    for file in sorted(found.iterdir()):
        what = next((line for line in lines if "Exception:" in line or "Error" in line or "ERROR" in line), file.name)
        content = base64.b64encode(file.read_bytes()[:KEPT]).decode()
        failures.append({"target": name, "guided": True, "problem": f"{file.name}: {what[:500]}", "content": content})
    if done.returncode and not failures:
        failures.append({"target": name, "guided": True, "problem": f"ended with {done.returncode}: {lines[-3:]}"})
    return {"inputs": int(told), "failures": failures}


def guide(name: str, good: Path, words: list[str]) -> None:
    """What the process of `guided` does."""
    import atheris

    with atheris.instrument_imports(include=["sdae", "ablations", "slurm", "analysis", "yaml", "json"]):
        target = targets(good)[name]
    folder = Path(tempfile.mkdtemp(prefix="sdae-fuzz-"))
    if target.home is not None:
        shutil.copytree(target.home, folder / "home", symlinks=True)
    (folder / "home").mkdir(exist_ok=True)
    allowed = refusals()

    def one(data: bytes) -> None:
        (folder / "home" / target.name).write_bytes(data)
        with contextlib.suppress(*allowed):
            target.read(folder / "home" / target.name)

    atheris.Setup([sys.argv[0], *words], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="else that of FILE, or any")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of targets")
    parser.add_argument("--no-atheris", action="store_true")
    parser.add_argument("--guide", help=argparse.SUPPRESS)
    parser.add_argument("--good", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.guide:
        guide(asked.guide, asked.good, asked.words)
        return 0
    from sdae.files import to_json, write_atomically
    from sdae.provenance import origin

    seed = random.randrange(2**32) if asked.seed is None else asked.seed
    report: dict[str, Any] = {"seed": seed, "seconds": 0.0, "targets": {}, "failures": []}
    if asked.out and asked.out.exists():
        report |= json.loads(asked.out.read_text())
        if asked.seed not in (None, report["seed"]):
            parser.error(f"--seed {asked.seed}: {asked.out} goes on with {report['seed']}; name another file")
    seed = report["seed"]
    atheris = not asked.no_atheris and importlib.util.find_spec("atheris") is not None
    if report["seconds"] < 60 * asked.minutes:
        report["origin"] = origin()
    with tempfile.TemporaryDirectory(prefix="sdae-fuzz-") as name:
        good = makers.good(Path(name) / "good")
        every = {n: t for n, t in targets(good).items() if not asked.only or n in asked.only}
        folder = Path(name) / "work"
        folder.mkdir()
        while report["seconds"] < 60 * asked.minutes:
            # the one with the fewest rounds: what was cut off goes on
            target_name = min(every, key=lambda one: report["targets"].get(one, {}).get("rounds", 0))
            known = Counter(report["targets"].get(target_name, {}))
            began, number = time.monotonic(), known["rounds"]
            made = one_round(target_name, every[target_name], seed, number, folder)
            report["failures"] += made.pop("failures")
            known.update(made)
            if atheris and number % GUIDED == GUIDED - 1:
                seconds = max(5, round(GUIDED * (time.monotonic() - began)))
                made = guided(target_name, every[target_name], seconds, seed + number, folder)
                report["failures"] += made["failures"]
                known["guided"] += made["inputs"]
            known["rounds"] += 1
            report["targets"][target_name] = dict(known)
            report["seconds"] += time.monotonic() - began
            if asked.out:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(asked.out, to_json(report))
    total: Counter[str] = sum((Counter(found) for found in report["targets"].values()), Counter())
    print(
        f"fuzz: {total['inputs']} inputs for {len(report['targets'])} readers, {total['read']} read, "
        f"{total['refused']} refused, {total['guided']} by atheris, {len(report['failures'])} failures "
        f"(seed {seed}, {report['seconds']:.0f} s)"
    )
    for failure in report["failures"][:10]:
        print(f"  {failure['target']}: {failure['problem'][:300]}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
