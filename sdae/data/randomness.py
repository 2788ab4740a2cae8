"""Random numbers as pure functions of their keys: no state, so nothing to save and nothing that an order could change.

The hash is the finalizer of splitmix64 (Steele, Lea, Flood 2014), chained over the keys. Integer arithmetic modulo 2^64
only, hence the same bits on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# One stream per purpose, so that a further draw for one never moves the numbers of another.
ORDER, CROP, FLIP, RANDAUGMENT, ERASING, PIXELS, BUILTIN, SCENE, OBJECTS = range(1, 10)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64 array -> uint64 array of the same shape."""
    x = x + np.uint64(GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(SECOND)
    x ^= x >> np.uint64(31)
    return x


def hashed(*keys: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each combination of the keys (non-negative integers or integer arrays, broadcast)."""
    out = np.zeros(1, np.uint64)
    for key in keys:
        out = splitmix64(out ^ np.asarray(key).astype(np.uint64))
    return out


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform in [0, 1), 53 bits."""
    return (hashed(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*keys: ArrayLike) -> NDArray[np.float64]:
    """Standard normal by Box-Muller; uses the keys followed by 0 and by 1."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(*keys, 0)))
    out: NDArray[np.float64] = radius * np.cos(2.0 * np.pi * uniform(*keys, 1))
    return out


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of an epoch: the indices sorted by their hash."""
    return np.argsort(hashed(seed, ORDER, epoch, np.arange(n)), kind="stable")


def normal_like(keys: NDArray[np.uint64], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """float32 normals (len(keys), *shape) on a device: splitmix64's sequence from each key, then Box-Muller."""
    import torch

    from sdae.data.transfer import sent

    start = sent(torch.from_numpy(keys.view(np.int64)), device)
    x = start[:, None] + torch.arange(1, int(np.prod(shape)) + 1, device=device) * _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    x = x ^ _shifted(x, 31)
    radius = (-2.0 * ((_shifted(x, 40).float() + 1.0) * 2.0**-24).log()).sqrt()
    angle = (x & 0xFFFFFF).float() * (2.0 * np.pi * 2.0**-24)
    return radius.mul_(angle.cos_()).view(len(keys), *shape)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: torch.Tensor, k: int) -> torch.Tensor:
    """Logical right shift; torch's own copies the sign bit."""
    return (x >> k) & ((1 << (64 - k)) - 1)
