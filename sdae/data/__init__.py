"""Pictures: which ones (`fingerprint`, without torch), how they are read (`open_dataset`), and what is made of them (`Loader`, `mix`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdae.data.fingerprint import fingerprint, resolve

if TYPE_CHECKING:
    from sdae.data.datasets import Dataset, open_dataset
    from sdae.data.loader import Batch, Loader
    from sdae.data.mixing import mix

__all__ = ["Batch", "Dataset", "Loader", "fingerprint", "mix", "open_dataset", "resolve"]

_WITH_TORCH = {"Batch": "loader", "Dataset": "datasets", "Loader": "loader", "mix": "mixing", "open_dataset": "datasets"}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(import_module(f"sdae.data.{_WITH_TORCH[name]}"), name)
    raise AttributeError(name)
