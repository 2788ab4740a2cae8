"""From the processor's memory to a GPU's, so that nobody waits for the copy.

A copy from pageable memory makes the program wait until the GPU has done all that it was given before: once a step,
and the GPU idles while the next step is prepared. Pinned memory is copied when the GPU comes to it; torch keeps it that
long.
"""

from __future__ import annotations

from torch import Tensor, device


def pinned(tensor: Tensor, target: device) -> Tensor:
    """In memory that a GPU copies from by itself; for a CPU as it is."""
    return tensor.pin_memory() if target.type == "cuda" and not tensor.is_cuda else tensor


def sent(tensor: Tensor, target: device) -> Tensor:
    """On the device."""
    return pinned(tensor, target).to(target, non_blocking=True)
