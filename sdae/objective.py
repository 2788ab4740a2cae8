"""Target normalization, similarity and the pixel loss (paper section 2.1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


def normalize(features: Tensor) -> Tensor:
    """Eq. (3): zero mean, unit variance over the last axis; the variance is unbiased. Any shape (..., C)."""
    channels = features.shape[-1]
    shrink = (channels - 1) / channels  # LayerNorm's variance is the biased one: unbiased = biased / shrink
    out: Tensor = F.layer_norm(features, (channels,), eps=EPSILON * shrink) * shrink**0.5
    return out


def similarity_axis(similarity: str, full: bool) -> int:
    """The axis of (rows, tokens, channels) that the cosine runs over.

    `tokens` is Eq. (4), which sums over patches; `channels` compares token by token; `authors` is what the authors'
    programme does: channels for the full image, tokens for every other view.
    """
    return 2 if similarity == "channels" or (similarity == "authors" and full) else 1


def cosine_loss(prediction: Tensor, target: Tensor, axis: int) -> Tensor:
    """1 - mean cosine similarity of (rows, tokens, channels), in float32. Eq. (4)."""
    prediction, target = prediction.float(), target.float()
    dot = (prediction * target).sum(axis)
    norms = (prediction.square().sum(axis) * target.square().sum(axis)).clamp_min(1e-16).sqrt()
    return 1 - (dot / norms).mean()


def pixel_loss(prediction: Tensor, pixels: Tensor, normalized: bool) -> Tensor:
    """MAE's loss: mean squared error over masked patches (B, tokens, patch_size^2 * channels), in float32."""
    pixels = pixels.float()
    return F.mse_loss(prediction.float(), normalize(pixels) if normalized else pixels)
