from __future__ import annotations

import os
import sys
from types import TracebackType

if sys.version_info < (3, 11):  # noqa: UP036 - an old Python says so before it stumbles over what it cannot read
    found = ".".join(map(str, sys.version_info[:2]))
    print("error: Python " + found + " is too old (3.11 or newer): `make setup` looks for one", file=sys.stderr)
    sys.exit(2)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A Ctrl-C while modules are still being imported, before `cli.main.main` can tell it."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught
