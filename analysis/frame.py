"""The store as one pandas frame: a row per run folder, whatever its state.

Invariant: the frame is a function of the run folders alone. `STORE/index.parquet` only remembers what was read from
them; every row carries the stamp (time, size, inode) of the files it came from, and a row whose stamp has changed is
read again. The index may be deleted at any time, is replaced whole by one rename, and a store that cannot be written
does without it.

Columns (dtype): what `COLUMNS` below says, and after them one float64 column for every further flat number that some
run's `result.json` holds under `metrics` (mIoU, AP, a user's own). Text is `string`, whole numbers `Int64`, truth
values `boolean`, times `datetime64[us, UTC]`, other numbers `float64`; unknown is `<NA>` / `NaN` / `NaT`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gc
import hashlib
import io
import json
import marshal
import os
import statistics
from collections.abc import Iterable
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sdae.config import NEUTRAL, NOT_SCIENCE
from sdae.errors import UserError
from sdae.files import forget_dead, parse_json, read_json, read_plain, write_atomically
from sdae.store import FORMAT, MARK, Store
from sdae.yamls import read_own

TEXT, WHOLE, TRUTH, NUMBER, TIME = pa.string(), pa.int64(), pa.bool_(), pa.float64(), pa.timestamp("us", "UTC")

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "id": (TEXT, "the run's id, STAGE- and 16 hex digits"),
    "stage": (TEXT, "pretrain, finetune, linprobe, cost, .."),
    "state": (TEXT, "done, failed, running, started (stopped, resumable), torn (result.json cannot be used)"),
    "scale": (TEXT, "label of the scale that asked for the run first"),
    "seed": (WHOLE, ""),
    "arm": (
        TEXT,
        "hash of the config without its seed (parents likewise): equal for runs that differ in the seed only",
    ),
    "need": (TEXT, "id of the pre-training whose weights it starts from"),
    "dataset": (TEXT, "name of the data set; <NA>: cost, which takes no pictures from disk"),
    "fingerprint": (TEXT, "hash of its class list and counts"),
    "classes": (WHOLE, ""),
    "train": (WHOLE, "training pictures"),
    "val": (WHOLE, "validation pictures"),
    "model": (TEXT, "architecture"),
    "image_size": (WHOLE, "pixels"),
    "method": (TEXT, "sdae or mae (pretrain, cost)"),
    "mask_ratio": (NUMBER, ""),
    "view": (TEXT, "what the teacher sees: full, masked, crop, folds"),
    "folds": (WHOLE, "number of folds (view folds)"),
    "tokens": (WHOLE, "patches of a crop (view crop)"),
    "normalize": (TRUTH, "teacher normalization, Eq. (3)"),
    "similarity": (TEXT, "authors, tokens, channels"),
    "ema_every": (TEXT, "epoch or iteration"),
    "momentum": (NUMBER, "EMA momentum (at the start)"),
    "momentum_end": (NUMBER, "its end on the cosine; NaN: constant"),
    "weights": (TEXT, "student or teacher of `need`, or random, timm:NAME, file:PATH"),
    "digest": (TEXT, "sha256 of the file of `weights`"),
    "init_epoch": (WHOLE, "completed epochs of `need` whose weights were taken; <NA>: the last"),
    "epochs": (WHOLE, "epochs asked for"),
    "steps": (WHOLE, "steps asked for (segment, detect)"),
    "batch_size": (WHOLE, "global batch"),
    "precision": (TEXT, "bf16 or fp32"),
    "top1": (NUMBER, "percent"),
    "top5": (NUMBER, "percent"),
    "miou": (NUMBER, "percent, mean over classes (segment)"),
    "macc": (NUMBER, "percent, mean over classes (segment)"),
    "aacc": (NUMBER, "percent, over pixels (segment)"),
    "apb": (NUMBER, "percent, AP of boxes (detect)"),
    "apb50": (NUMBER, "percent"),
    "apb75": (NUMBER, "percent"),
    "apm": (NUMBER, "percent, AP of masks (detect)"),
    "apm50": (NUMBER, "percent"),
    "apm75": (NUMBER, "percent"),
    "loss": (NUMBER, "training loss of the last row"),
    "knn_top1": (NUMBER, "percent, online probe of a pre-training"),
    "time": (NUMBER, "cost: seconds per epoch"),
    "time_sd": (NUMBER, "its standard deviation over the repeats of this one run"),
    "overhead": (NUMBER, "cost: percent over MAE"),
    "overhead_sd": (NUMBER, "its standard deviation over the repeats"),
    "repeats": (WHOLE, "cost: number of repeats"),
    "memory": (NUMBER, "cost: peak, in 10^9 bytes"),
    "images_per_s": (NUMBER, ""),
    "mfu": (NUMBER, "model FLOPs utilization, 0 to 1"),
    "seconds": (NUMBER, "wall-clock time of the run"),
    "started": (TIME, ""),
    "ended": (TIME, ""),
    "device": (TEXT, ""),
    "commit": (TEXT, "of the code that ran it"),
    "dirty": (TRUTH, "whether that code was changed after the commit"),
    "substance": (TEXT, "digest of the code that can change the run's numbers; <NA>: not recorded"),
    "synthetic": (TRUTH, "made up to test the tables: never mixed with real results"),
    "failure": (TEXT, "class of the error (failed), or `torn`"),
    "message": (TEXT, "what went wrong"),
}
_HIDDEN = {"own": TEXT, "stamp": WHOLE}  # hash of the config without seed and parent; stamp of the files read
_TYPES = {name: kind for name, (kind, _) in COLUMNS.items()} | _HIDDEN
_VERSION = hashlib.sha256(repr([2, FORMAT, sorted((k, str(v)) for k, v in _TYPES.items())]).encode()).hexdigest()[:16]
_MAPPER = {TEXT: pd.StringDtype("pyarrow"), WHOLE: pd.Int64Dtype(), TRUTH: pd.BooleanDtype()}
_DENSE = ("miou", "macc", "aacc", "apb", "apb50", "apb75", "apm", "apm50", "apm75")
_PLAIN = (*_DENSE, "top1", "top5", "loss", "knn_top1", "time", "overhead", "memory", "images_per_s", "mfu")
_NEUTRAL = [(name.partition(".")[0], name.partition(".")[2], neutral) for name, neutral in NEUTRAL.items()]
INDEX = "index.parquet"
MOST_INDEX = 2**30  # bytes
MOST_METRICS = 1000  # of a result: each is a column of every run's row
_MIXED = {
    False: f"result.json is synthetic, made up, and the store has no file {MARK}: not taken for a measured one",
    True: f"result.json is of a real run, and the file {MARK} says that the store holds synthetic ones only",
}


def collect(store: Store) -> pd.DataFrame:
    """Every run of the store, sorted by id, in the columns of this module's docstring. Reads only what has changed."""
    folders = {i: stamp for i in store.ids() if (stamp := _stamp(f"{store.root}/{i}"))}
    synthetic, version = store.synthetic, _version(store)
    index = _load(store.root / INDEX, version)
    known = dict(zip(index["id"].to_pylist(), index["stamp"].to_pylist(), strict=True)) if index is not None else {}
    changed = [i for i, stamp in folders.items() if known.get(i) != stamp]
    if index is None or changed or len(known) != len(folders):
        enabled = gc.isenabled()
        gc.disable()  # ten thousand parsed results live at once, and none of them is a cycle
        try:
            rows = [_read(store, i, folders[i], synthetic) for i in changed]
            index = _merge(index, rows, set(folders).difference(changed), version)
        finally:
            if enabled:
                gc.enable()
        _save(store.root, index)
    else:
        forget_dead(store.root, INDEX)  # what a killed one left; else the next that writes does it
    return _frame(store, index)


def examine(store: Store) -> tuple[pd.DataFrame, str | None]:
    """The frame, every folder read anew and nothing written, and what is wrong with the index, if anything."""
    version = _version(store)
    stamps = {i: stamp for i in store.ids() if (stamp := _stamp(f"{store.root}/{i}"))}
    rows = [_read(store, i, stamp, store.synthetic) for i, stamp in stamps.items()]
    fresh, path = _merge(None, rows, set(), version), store.root / INDEX
    index, problem = _load(path, version), None
    if index is None:
        problem = "cannot be read, or is of another version" if path.exists() else None
    else:
        known = dict(zip(index["id"].to_pylist(), index["stamp"].to_pylist(), strict=True))
        if behind := len(dict(known.items() ^ stamps.items())):
            problem = f"is older than the runs: {behind} came, went or changed since"
        elif not index.select(list(_TYPES)).equals(fresh.select(list(_TYPES))):
            problem = "does not say what the runs say"
    return _frame(store, fresh), problem


def config_hash(config: dict[str, Any]) -> tuple[str, str]:
    """(the 16 hex digits of this config's id, the hash of the same without seed and parent). Strips `config` in place.

    `config` is what `sdae.config.dump` gives, after a way through JSON or not.
    """
    for key in NOT_SCIENCE:
        config.pop(key, None)
    config["data"].pop("path", None)
    init = config.get("init")
    if init and init.get("digest") and str(init.get("weights")).startswith("file:"):
        init["weights"] = "file"
    for section, key, neutral in _NEUTRAL:
        owner = config.get(section)
        if isinstance(owner, dict) and key in owner and owner[key] == neutral:
            del owner[key]
    seed, run = config.pop("seed", None), init.get("run") if init else None
    if init and run:
        init["run"] = None
    own, digest = _own(marshal.dumps(config, 2))
    # Keys are sorted, so `seed` stands in front of `stage`: the text with both is made without encoding it again.
    text = own.replace('"stage":', f'"seed":{_canonical(seed)},"stage":', 1)
    if init and run:
        text = text.replace('"run":null', f'"run":{_canonical(run)}', 1)
        init["run"] = run
    return _digest(text), digest


@functools.lru_cache(maxsize=4096)
def _own(config: bytes) -> tuple[str, str]:
    """The canonical text of a config without seed and parent, and its hash. Most of a store's runs share theirs."""
    text = _canonical(marshal.loads(config))  # made one line above  # nosec B302
    return text, _digest(text)


def arm_name(own: str, parent_arm: str | None) -> str:
    return f"{own}+{parent_arm}" if parent_arm else own


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode  # as in sdae.config.run_id


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# One folder
def _stamp(folder: str) -> int:
    """A number that changes when the files change from which this folder's row is made; 0 where there are none."""
    try:
        stat = os.stat(folder + "/result.json")
        return hash((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    except OSError:
        found: list[int] = []
        for name in ("/config.yaml", "/failure.json"):
            try:
                stat = os.stat(folder + name)
                found += [stat.st_mtime_ns, stat.st_size, stat.st_ino]
            except OSError:
                found += [0, 0, 0]
        return hash(tuple(found)) if any(found) else 0


def _read(store: Store, identity: str, stamp: int, synthetic: bool) -> dict[str, Any]:
    """The row of one run as plain values; columns that it leaves out are unknown. `synthetic`: the store's mark."""
    folder = f"{store.root}/{identity}"
    row: dict[str, Any] = dict.fromkeys(_TYPES)
    row |= {"id": identity, "stage": identity.rpartition("-")[0], "stamp": stamp, "synthetic": synthetic, "metrics": {}}
    try:
        result = parse_json(read_plain(folder + "/result.json"))
    except FileNotFoundError:
        return _unfinished(folder, row)
    except (OSError, ValueError, RecursionError):
        return _torn(row, "result.json cannot be read")
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        return _torn(row, "result.json holds no metrics")
    if result.get("format", FORMAT) != FORMAT:
        return _torn(row, f"result.json has format {result['format']}, this version reads {FORMAT}")
    if result.get("id", identity) != identity:
        return _torn(row, f"result.json is that of {result['id']}")
    if (made_up := bool(result.get("synthetic", False))) != synthetic:
        return _torn(row | {"synthetic": made_up}, _MIXED[synthetic])
    if (metrics := len(result["metrics"])) > MOST_METRICS:
        return _torn(row, f"result.json holds {metrics:,} metrics (allowed: {MOST_METRICS:,})")
    config = result.get("config") or _config_file(folder)
    try:
        if config:
            _facts(row, config)
            science, row["own"] = config_hash(config)
            if not identity.endswith("-" + science):
                return _torn(row, "the config in result.json is not the one that the id stands for")
        _outcome(row, result)
        if row["stage"] == "cost":
            row |= dict.fromkeys(("dataset", "fingerprint", "classes", "train", "val"))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        return _torn(row, f"result.json has not the expected form ({type(error).__name__}: {error})")
    return row


def _torn(row: dict[str, Any], message: str) -> dict[str, Any]:
    return row | {"state": "torn", "failure": "torn", "message": message, "metrics": {}}


def _unfinished(folder: str, row: dict[str, Any]) -> dict[str, Any]:
    """A run without a result: its config, and why it failed. The state is looked up at every call: it ages."""
    row |= {"state": "started"}
    config = _config_file(folder)
    if config:
        try:
            _facts(row, config)
            row["own"] = config_hash(config)[1]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            row["message"] = "config.yaml has not the expected form"
    failure = read_json(Path(folder) / "failure.json")
    if isinstance(failure, dict):
        row |= {"failure": failure.get("class"), "message": failure.get("message")}
    return row


def _config_file(folder: str) -> dict[str, Any] | None:
    config = read_own(folder + "/config.yaml")
    return config if isinstance(config, dict) else None


def _facts(row: dict[str, Any], config: dict[str, Any]) -> None:
    """What the config says."""
    data, model, optim = config["data"], config["model"], config.get("optim") or {}
    row["scale"], row["seed"], row["precision"] = config.get("scale"), config.get("seed"), config.get("precision")
    row["dataset"], row["fingerprint"], row["image_size"] = data["name"], data.get("fingerprint"), data["image_size"]
    row["classes"], row["model"] = data.get("classes"), model["arch"]
    row["epochs"], row["steps"], row["batch_size"] = optim.get("epochs"), optim.get("steps"), optim.get("batch_size")
    if cost := config.get("cost"):
        row["batch_size"], row["repeats"] = cost.get("batch_size"), cost.get("repeats")
    if init := config.get("init"):
        row["need"], row["weights"], row["digest"] = init.get("run"), init.get("weights"), init.get("digest")
        row["init_epoch"] = None if init.get("epoch") == "last" else init.get("epoch")
    if method := config.get("method"):
        row["method"], row["mask_ratio"], row["similarity"] = method["name"], method["mask_ratio"], method["similarity"]
        if teacher := method["teacher"]:
            row["view"], row["folds"] = teacher["view"], teacher["folds"]
            row["tokens"], row["normalize"] = teacher["tokens"], teacher["normalize"]
        if ema := method["ema"]:
            row["ema_every"], row["momentum"], row["momentum_end"] = ema["every"], ema["momentum"], ema["momentum_end"]


def _outcome(row: dict[str, Any], result: dict[str, Any]) -> None:
    """What came of it."""
    row["state"] = "done"
    for key in ("stage", "scale", "seed", "model", "image_size", "device"):
        if result.get(key) is not None:
            row[key] = result[key]
    if dataset := result.get("dataset"):
        row["dataset"] = dataset["name"]
        for key in ("fingerprint", "train", "val", "classes"):
            if dataset.get(key) is not None:
                row[key] = dataset[key]
    time = result.get("time") or {}
    row["seconds"] = time.get("seconds")
    row["started"], row["ended"] = _instant(time.get("started")), _instant(time.get("ended"))
    provenance = result.get("provenance") or {}
    for key in ("commit", "dirty", "substance"):
        row[key] = provenance.get(key)
    metrics = row["metrics"] = {key: None if _endless(value) else value for key, value in result["metrics"].items()}
    for key in _PLAIN:
        row[key] = metrics.get(key)
    for key in ("time", "overhead"):
        repeats = metrics.get(key + "_repeats")
        if repeats and len(repeats) > 1:
            row[key + "_sd"], row["repeats"] = statistics.stdev(repeats), len(repeats)


def _instant(value: Any) -> int | None:
    """Unix seconds or an ISO 8601 text as microseconds."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value).timestamp()
    return None if value is None else int(value * 1e6)


# The index
def _version(store: Store) -> str:
    return f"{_VERSION} synthetic" if store.synthetic else _VERSION  # the mark decides which results count


def _merge(index: pa.Table | None, rows: list[dict[str, Any]], kept: set[str], version: str) -> pa.Table:
    """The old rows that still hold and the new ones, by id, as one table."""
    further = sorted({k for row in rows for k, v in row["metrics"].items() if k not in _TYPES and _is_number(v)})
    values = zip(*map(itemgetter(*_TYPES), rows), strict=True) if rows else ([] for _ in _TYPES)
    columns = {name: _array(list(v), kind) for (name, kind), v in zip(_TYPES.items(), values, strict=True)}
    columns |= {name: _array([row["metrics"].get(name) for row in rows], NUMBER) for name in further}
    table = pa.table(columns)
    if index is not None and kept:
        old = index.filter(pa.array([i in kept for i in index["id"].to_pylist()]))
        table = pa.concat_tables([old, table], promote_options="default")
    return table.sort_by("id").replace_schema_metadata({"sdae": version})


def _endless(value: Any) -> bool:
    """Infinite or not a number: JSON has no such numbers, so nobody that writes it can take them."""
    return isinstance(value, float) and value - value != 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A typed column. A value of another type (a hand-made result) is unknown, and does not take the others with it."""
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return pa.array([_checked(value, kind) for value in values], type=kind)


def _checked(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, type=kind).as_py() if kind != TIME else None
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None


def _load(path: Path, version: str) -> pa.Table | None:
    """The index where it is whole and of this version; else None, and it is made anew."""
    try:
        content = read_plain(path, MOST_INDEX)
        file = pq.ParquetFile(io.BytesIO(content))
        if (file.schema_arrow.metadata or {}).get(b"sdae") != version.encode():
            return None
        if file.metadata.num_rows * 8 > len(content):  # an id alone takes more, however it is packed
            return None
        table = file.read(use_threads=False)
        table.validate(full=True)
        kinds = dict.fromkeys(table.schema.names, NUMBER) | _TYPES
        whole = all(table.schema.field(name).type == kind for name, kind in kinds.items())
        return table if whole and not table["id"].null_count + table["stamp"].null_count else None
    except Exception:  # whatever a damaged file leads pyarrow to: nothing is lost with it
        return None


def _save(root: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy")
    with contextlib.suppress(UserError):  # a read-only or full store: the frame is right all the same
        if root.is_dir():
            write_atomically(root / INDEX, buffer.getvalue())


def _frame(store: Store, index: pa.Table) -> pd.DataFrame:
    own = dict(zip(index["id"].to_pylist(), index["own"].to_pylist(), strict=True))
    arms = [
        arm_name(mine, own.get(need, need) or need) if mine and need else mine
        for mine, need in zip(own.values(), index["need"].to_pylist(), strict=True)
    ]
    index = index.set_column(index.schema.get_field_index("arm"), "arm", pa.array(arms, type=TEXT))
    states: list[str] = index["state"].to_pylist()
    if "started" in states:
        ids = list(own)
        states = [store.run(ids[n]).state() if s == "started" else s for n, s in enumerate(states)]
        index = index.set_column(index.schema.get_field_index("state"), "state", pa.array(states, type=TEXT))
    frame: pd.DataFrame = index.drop_columns(list(_HIDDEN)).to_pandas(types_mapper=_MAPPER.get)
    return frame


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The line for a name that there is not, with those that come near it."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 3) or names[:3]
    return f"{what} {name!r} is unknown ({'e.g. ' + ', '.join(near) if near else 'there is none'})"


def distinct(values: Iterable[Any]) -> list[str]:
    """The known values of a column, each once, sorted."""
    return sorted({str(value) for value in values if not pd.isna(value)})
