"""BatchNorm whose statistics run over the global batch of all ranks, on CPUs too (torch's SyncBatchNorm is for GPUs).

In float32, whatever the precision of the layers around it; gradients flow through the statistics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def global_moments(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (B, C, ..) over all ranks; the norm's running ones move a tenth towards them.

    A rank may have another number of values than the others, or none.
    """
    axes, channels = [axis for axis in range(x.dim()) if axis != 1], x.shape[1]
    moments = torch.cat([x.sum(axes), x.square().sum(axes), x.new_full((1,), x.numel() / channels)])
    if dist.is_initialized():
        moments = all_reduce(moments)  # type: ignore[no-untyped-call]
    count = moments[-1]
    mean, square = moments[:channels] / count, moments[channels:-1] / count
    variance = (square - mean.square()).clamp_min(0)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean.detach(), 0.1)
        norm.running_var.lerp_(variance.detach() * count / (count - 1).clamp_min(1), 0.1)
        norm.num_batches_tracked += 1  # type: ignore
    return mean, variance


class GlobalBatchNorm(nn.BatchNorm1d):
    """Without affine, as in front of a linear probe."""

    def __init__(self, features: int):
        super().__init__(features, eps=1e-6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), in float32."""
        x = x.float()
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        mean, variance = global_moments(self, x)
        return (x - mean) * (variance + self.eps).rsqrt()


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in float32."""
        x = x.float()
        alone = not dist.is_initialized() and x.numel() > x.shape[1]  # torch refuses a single value a channel
        if alone or not self.training:
            return super().forward(x)  # type: ignore[no-any-return]
        mean, variance = global_moments(self, x)
        scale = (variance + self.eps).rsqrt() * self.weight
        out: Tensor = x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return out
