"""What users write: YAML read safely, a key given twice refused, every fault told in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sdae.errors import UserError


def read_yaml(path: str | Path) -> Any:
    """A YAML file's content, safely; every fault is one line that names the file and the place."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = str(getattr(error, "problem", None) or error).replace("\n", " ")
        if "\\t" in problem or "'\t'" in problem:
            problem = "a tab; YAML wants spaces for indentation"
        raise UserError(f"{path}:{place} not valid YAML: {problem}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of silently taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key_node))
        return super().construct_mapping(node, deep)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong, as one line: key, value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        owner: Any = model
        for part in first["loc"][:-1]:
            field = owner.model_fields.get(str(part)) if hasattr(owner, "model_fields") else None
            owner = next((t for t in _models(field.annotation)), None) if field else None
        allowed = ", ".join(owner.model_fields) if owner else "see docs/config.md"
        return f"{key}: unknown key (allowed: {allowed})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        if not key or re.match(r"\w+\.[\w.]+: ", message):
            return message  # names its key itself
        return f"{key}.{message}" if re.match(r"\w+: ", message) else f"{key}: {message}"
    return f"{key}: {value!r}: {message[0].lower()}{message[1:]}"


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
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"-s {text}: {value!r} is not a YAML value") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        if not isinstance(values, dict):
            raise UserError("config: expected a mapping of keys")
        values = merge(values, nested)
    return values
