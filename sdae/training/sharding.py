"""Tensors that several processes hold a part of each (FSDP2's DTensors), and whole ones: what files hold."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def whole(value: Any) -> Any:
    """A shared tensor put together, which all ranks must ask for together; anything else as it is."""
    if not dist.is_initialized():  # then nothing is shared, and the import below costs a second
        return value
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """Gathers shared tensors; every process must call it."""
    return {name: whole(value) for name, value in state.items()}


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as this rank's part where `other`, of its shape, is shared; a copy on `other`'s device."""
    if dist.is_initialized() and value.shape == other.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(other, DTensor):
            return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value.to(other.device, copy=True)
