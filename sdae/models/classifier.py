"""The encoder with a classification head, under timm's names."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from sdae.models.encoder import Encoder, LayerNorm, patchify
from sdae.sections import Head, Model


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm without affine whose statistics run over the global batch of all ranks; gradients flow through them."""

    def __init__(self, features: int):
        super().__init__(features, eps=1e-6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), in float32."""
        x = x.float()
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        moments = torch.cat([x.sum(0), x.square().sum(0), x.new_full((1,), x.shape[0])])
        if dist.is_initialized():
            moments = all_reduce(moments)  # type: ignore[no-untyped-call]
        count = moments[-1]
        mean, square = moments[: x.shape[1]] / count, moments[x.shape[1] : -1] / count
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(variance.detach() * count / (count - 1).clamp_min(1), 0.1)
            self.num_batches_tracked += 1  # type: ignore
        return (x - mean) * (variance + self.eps).rsqrt()


class Classifier(Encoder):
    """Pooling (mean of the patch tokens, or cls), a norm, a linear layer.

    With mean pooling the encoder's last norm is dropped for a fresh one (`fc_norm`), as in MAE's fine-tuning.
    """

    def __init__(self, model: Model, image_size: int, head: Head, classes: int):
        super().__init__(model, image_size)
        self.pool = head.pool
        if head.pool == "mean":
            self.norm = nn.Identity()  # type: ignore[assignment]
        if head.norm == "batch":
            self.fc_norm: nn.Module = GlobalBatchNorm(self.width)
        else:
            self.fc_norm = LayerNorm(self.width) if head.pool == "mean" else nn.Identity()
        self.head = nn.Linear(self.width, classes)

    def init_weights(self, head_std: float) -> None:
        """timm's initialization; the head is trunc-normal with a deviation of its own."""
        self.init_timm()
        nn.init.trunc_normal_(self.head.weight, std=head_std)

    def features(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Pooled features (B, D), before the head's norm."""
        x = self.encode(self.embed(patchify(images, self.patch)), drop)
        return x[:, 1:].mean(1) if self.pool == "mean" else x[:, 0]

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.fc_norm(self.features(images, drop)))  # type: ignore[no-any-return]
