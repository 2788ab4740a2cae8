"""What a power cut leaves of a folder: a model of the disk, fed with the log of the layer.

A file's bytes are safe once it was flushed (fsync); a folder's names (made, renamed, removed) once the folder was. All
else may be lost, for each file and each folder on its own; of a folder's changes the later ones are lost first.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Style = Literal["strict", "names", "random"]  # all that may be lost; names stay, bytes are lost; anything in between


@dataclass
class Node:
    """A file (bytes), a symbolic link (str) or a folder (None)."""

    content: bytearray | str | None
    safe: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    past: list[dict[str, Node]] = field(default_factory=list)  # of a folder: since it was flushed, what it held

    def flush(self) -> None:
        if isinstance(self.content, bytearray):
            self.safe = bytes(self.content)
        self.past.clear()


Tree = dict[str, bytes | str | None]  # by relative path, as `Node.content`


def read_tree(root: Path) -> Tree:
    found: Tree = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(folder, name)
            what = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(root))] = what
    return found


class Disk:
    """A folder as it is now, all of it safe."""

    def __init__(self, root: Path):
        self.root, self.top = root, Node(None)
        for path, content in sorted(read_tree(root).items()):
            node = Node(bytearray(content) if isinstance(content, bytes) else content)
            node.flush()
            folder, name = self._place(str(root / path))
            folder.names[name] = node

    def _place(self, path: str) -> tuple[Node, str]:
        """The folder that holds a path, and the name in it. KeyError where there is no such folder."""
        *folders, name = os.path.relpath(os.path.normpath(path), self.root).split("/")
        node = self.top
        for part in folders:
            node = node.names[part]
        return node, name

    def _node(self, path: str) -> Node:
        folder, name = self._place(path)
        return self.top if name == "." else folder.names[name]

    def replay(self, log: Path) -> None:
        data, at = log.read_bytes(), 0
        while at < len(data):
            end = data.index(b"\n", at)
            _, kind, length, offset, first, second = data[at:end].split()
            at = end + 1
            path = os.fsdecode(data[at : at + int(first)])
            other = os.fsdecode(data[at + int(first) : at + int(first) + int(second)])
            at += int(first) + int(second)
            content = data[at : at + int(length)] if kind == b"write" else b""
            at += len(content)
            if not path.endswith(" (deleted)"):
                self._apply(kind.decode(), path, other, int(length), int(offset), content)

    def _apply(self, kind: str, path: str, other: str, length: int, offset: int, content: bytes) -> None:
        if kind == "fsync":
            return self._node(path).flush()
        if kind in ("write", "truncate"):
            file = self._node(path).content
            assert isinstance(file, bytearray)
            if kind == "truncate":
                file[length:] = b""
            size = length if kind == "truncate" else offset
            file.extend(bytes(max(0, size - len(file))))
            file[offset : offset + len(content)] = content
            return None
        folder, name = self._place(path)
        if kind == "open":
            if name not in folder.names:
                self._change(folder, name, Node(bytearray()))
            elif length:  # truncated
                file = folder.names[name].content
                assert isinstance(file, bytearray)
                file.clear()
        elif kind in ("mkdir", "symlink"):
            self._change(folder, name, Node(other if kind == "symlink" else None))
        elif kind in ("unlink", "rmdir"):
            self._change(folder, name, None)
        elif kind in ("rename", "link"):
            node = folder.names[name]
            target, called = self._place(other)
            if target.names.get(called) is node:  # two names of one file: nothing happens
                return None
            if kind == "rename" and target is not folder:
                self._change(folder, name, None)
            self._change(target, called, node, gone=name if kind == "rename" and target is folder else None)
        else:
            assert kind == "chmod", kind
        return None

    def _change(self, folder: Node, name: str, node: Node | None, gone: str | None = None) -> None:
        """One step: `name` is `node` (None: is no more), and the name `gone` is no more."""
        folder.past.append(dict(folder.names))
        for old in (name, gone):
            if old is not None:
                folder.names.pop(old, None)
        if node is not None:
            folder.names[name] = node

    def now(self) -> Tree:
        return dict(self._walk(self.top, "", None, "names"))

    def after_cut(self, style: Style, draw: random.Random) -> Tree:
        chosen: dict[int, bytes] = {}  # one file may have several names
        return dict(self._walk(self.top, "", (draw, chosen), style))

    def _walk(
        self, folder: Node, prefix: str, cut: tuple[random.Random, dict[int, bytes]] | None, style: Style
    ) -> Iterator[tuple[str, bytes | str | None]]:
        versions = [*folder.past, folder.names]
        names = versions[-1]
        if cut and style != "names":
            names = versions[0] if style == "strict" else cut[0].choice(versions)
        for name, node in sorted(names.items()):
            path = f"{prefix}{name}"
            if node.content is None:
                yield path, None
                yield from self._walk(node, f"{path}/", cut, style)
            elif isinstance(node.content, str):
                yield path, node.content
            elif cut is None:
                yield path, bytes(node.content)
            else:
                if id(node) not in cut[1]:
                    cut[1][id(node)] = _surviving(node, style, cut[0])
                yield path, cut[1][id(node)]

    def cut(self, style: Style, draw: random.Random) -> None:
        """Leaves in the folder what a power cut would; what is not lost is not touched."""
        left, there = self.after_cut(style, draw), read_tree(self.root)
        for path in sorted(there, reverse=True):
            if path not in left or (left[path] != there[path]):
                full = self.root / path
                shutil.rmtree(full) if there[path] is None else full.unlink()
        for path, content in left.items():
            full = self.root / path
            if content is None:
                full.mkdir(exist_ok=True)
            elif not os.path.lexists(full):
                full.symlink_to(content) if isinstance(content, str) else full.write_bytes(content)


def _surviving(node: Node, style: Style, draw: random.Random) -> bytes:
    now = bytes(node.content) if isinstance(node.content, bytearray) else b""
    if style != "random" or now == node.safe:
        return node.safe
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(node.safe, now, strict=False))
    kept = sum(1 for _ in same)  # flushed, and not written over since
    shorter = now[: draw.randint(kept, len(now))]
    zeros = shorter + bytes(len(now) - len(shorter))
    return draw.choice([node.safe, now, shorter, zeros])
