"""The encoder with a classification head, under timm's names."""

from __future__ import annotations

from torch import Tensor, nn

from sdae.models.encoder import Encoder, LayerNorm, patchify
from sdae.models.normalization import GlobalBatchNorm
from sdae.sections import Head, Model


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
