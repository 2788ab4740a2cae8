"""MAE: the same student, with the pixels of the masked patches as target (the paper's baseline)."""

from __future__ import annotations

from torch import Tensor, nn

from sdae.config import Pretrain
from sdae.methods.sdae import Output
from sdae.models.autoencoder import MaskedAutoencoder
from sdae.models.encoder import gather, patchify
from sdae.objective import pixel_loss
from sdae.views import split


class MAE(nn.Module):
    """MAE, the paper's baseline: the student predicts the masked pixels, normalized within each patch if asked for."""

    def __init__(self, config: Pretrain):
        super().__init__()
        patch, channels = config.model.patch_size, config.model.channels
        assert patch
        self.visible = config.tokens - config.masked
        self.masked = config.masked
        self.normalize = bool(config.method.normalize_pixels)
        self.channels = channels
        self.student = MaskedAutoencoder(config.model, config.data.image_size, patch * patch * channels)

    def init_weights(self) -> None:
        """As MAE draws them (docs/method.md)."""
        self.student.init_weights()

    def forward(self, images: Tensor, noise: Tensor, drop: Tensor | None = None) -> Output:
        """images (B, C, H, W), noise (B, L) uniform, drop (depth, 2, B)."""
        patches = patchify(images, self.student.patch)
        visible, masked = split(noise, self.visible)
        prediction = self.student.predict(patches, visible, masked, self.masked, drop)
        pixels = gather(patches, masked)
        # MAE's order inside a patch: row, column, channel
        pixels = pixels.view(*pixels.shape[:2], self.channels, -1).transpose(2, 3).flatten(2)
        loss = pixel_loss(prediction, pixels, self.normalize)
        return Output(loss, prediction, pixels.detach(), prediction.new_empty(0))
