"""What users write: YAML read safely, a key given twice refused, every fault told in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sdae.errors import UserError
from sdae.files import DEEPEST, plain_file, read_plain

LARGEST = 256_000  # bytes of a YAML file: some seconds
MOST_VALUES = 100_000  # with every alias written out
SHOWN = 200  # characters of a wrong value


def read_yaml(path: str | Path, plain: bool = False) -> Any:
    """A YAML file's content, safely; every fault is one line that names the file and the place. plain: not of a pipe,
    which a user may name, but which may stand in a store for ever."""
    path = Path(path)
    try:
        with open(path, "rb", opener=plain_file if plain else None) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path}: too large for a YAML file (allowed: {LARGEST:,} bytes)")
        return load_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{'' if path.is_absolute() else f' in {Path.cwd()}'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = str(getattr(error, "problem", None) or error).replace("\n", " ")
        if "\\t" in problem or "'\t'" in problem:
            problem = "a tab; YAML wants spaces for indentation"
        raise UserError(f"{path}:{place} not valid YAML: {problem}") from None


def read_own(path: str | Path) -> Any:
    """YAML that the suite has written, fast; None where the file is absent, torn or something else."""
    try:
        return parse_own(read_plain(path, LARGEST))
    except (OSError, ValueError):
        return None


def parse_own(content: bytes) -> Any:
    """What `read_own` reads, from its bytes; None where they are something else."""
    kind, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    try:
        for event in yaml.parse(content, Loader=kind) if len(content) <= LARGEST else ():
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # libyaml's loader would end the process
                return None
        return load_yaml(content, kind) if len(content) <= LARGEST else None
    except (ValueError, OverflowError, LookupError, AttributeError, RecursionError, yaml.YAMLError):
        return None


def load_yaml(text: str | bytes, kind: Any = None) -> Any:
    """The one place where YAML is read, by a loader that makes nothing but plain values. Raises YAMLError and
    RecursionError."""
    loader = (kind or _UniqueKeys)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            problem = f"its aliases stand for more than {MOST_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node holds with its aliases written out; without end where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of silently taking the last."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        if self.flow_level >= DEEPEST:  # seconds for a thousand, by the square of them
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key_node))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        text.encode()  # a ValueError for half a surrogate pair, which no other file and no terminal can take
        return text

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except (ValueError, OverflowError, KeyError, AttributeError) as error:  # 2026-13-45, 0b_, !!bool 3
            problem = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def shown(value: Any) -> str:
    """A value as a line may hold it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}.."


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong, as one line: key, value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        owner: Any = model
        for part in first["loc"][:-1]:
            if (field := getattr(owner, "model_fields", {}).get(str(part))) is not None:  # else a name, as of a column
                owner = next((t for t in _models(field.annotation)), None)
        allowed = ", ".join(owner.model_fields) if owner else "see docs/config.md"
        return f"{key}: unknown key (allowed: {allowed})"
    message = first["msg"].removeprefix("Value error, ")
    place = f"{key}: " if key else ""
    if first["type"] == "missing":
        return f"{place}missing"
    if first["type"] in ("model_type", "dict_type"):
        return f"{place}{shown(value)}: expected a mapping of keys"
    if first["type"] == "value_error":
        if not key or re.match(r"\w+\.[\w.]+: ", message):
            return message  # names its key itself
        return f"{key}.{message}" if re.match(r"\w+: ", message) else f"{key}: {message}"
    return f"{key}: {shown(value)}: {message[0].lower()}{message[1:]}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models(arg)]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` upon `base`, mapping by mapping; everything that is not a mapping is replaced.

    `init` is replaced as a whole, since its keys belong together.
    """
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and key != "init":
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def override(values: Any, overrides: list[str]) -> Any:
    """`optim.epochs=3` and its like; values are YAML."""
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UserError(f"-s {text}: expected key=value, e.g. optim.epochs=3")
        try:
            nested: Any = load_yaml(value)
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"-s {text}: {value!r} is not a YAML value") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        if not isinstance(values, dict):
            raise UserError("config: expected a mapping of keys")
        values = merge(values, nested)
    return values
