"""Pictures: which ones (`fingerprint`), how they are read (`open_dataset`), what is made of them (`Loader`, `mix`).

`fingerprint` and `resolve` are there without torch; the other names import it when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdae.data.fingerprint import fingerprint, resolve

if TYPE_CHECKING:
    from sdae.data.datasets import Dataset, open_dataset
    from sdae.data.loader import Batch, Loader
    from sdae.data.mixing import mix

__all__ = ["Batch", "Dataset", "Loader", "fingerprint", "mix", "open_dataset", "resolve"]

_HOMES = {"Batch": "loader", "Dataset": "datasets", "Loader": "loader", "mix": "mixing", "open_dataset": "datasets"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sdae.data.{_HOMES[name]}"), name)
    raise AttributeError(name)
