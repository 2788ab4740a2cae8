"""YAML from users: safe, every fault one line, a key given twice refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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
