"""UperNet (Xiao et al. 2018) upon the pyramid of a ViT: pyramid pooling, a feature pyramid, in training an FCN beside.

Layers and initialization are those of mmsegmentation's UPerHead and FCNHead: kaiming-normal (fan out) for convolutions
in front of a norm, normal 0.01 for the classifiers. Maps are resized bilinearly, corners not aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdae.data.segmentation import IGNORE
from sdae.models.dense import Pyramid
from sdae.models.normalization import GlobalBatchNorm2d
from sdae.sections import Backbone, Model, SegmentHead


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm over the global batch, ReLU; the size stays."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, GlobalBatchNorm2d(outputs), nn.ReLU(inplace=True))


def resize(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """UperNet on a ViT: pyramid pooling, a feature pyramid, a classifier of pixels, an auxiliary FCN in training."""

    def __init__(
        self, model: Model, image_size: int, backbone: Backbone, head: SegmentHead, classes: int,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = Pyramid(model, image_size, backbone, checkpointing)
        self.head = head
        width, channels = self.backbone.width, head.channels
        self.psp = nn.ModuleList(convolution(width, channels, 1) for _ in head.pools)
        self.psp_bottleneck = convolution(width + len(head.pools) * channels, channels, 3)
        self.laterals = nn.ModuleList(convolution(width, channels, 1) for _ in range(3))
        self.fpn = nn.ModuleList(convolution(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = convolution(4 * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)
        if head.aux_weight:
            self.aux = convolution(width, head.aux_channels, 3)
            self.aux_classifier = nn.Conv2d(head.aux_channels, classes, 1)

    @property
    def dropped(self) -> int:
        """Channels that dropout may drop: those in front of the classifier, and those of the FCN behind them."""
        return self.head.channels + (self.head.aux_channels if self.head.aux_weight else 0)

    def init_weights(self) -> None:
        """First weights of all but the encoder."""
        for name, module in self.named_modules():
            if isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d):
                module.reset_parameters()
            elif name.endswith("classifier"):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, maps: list[Tensor]) -> Tensor:
        """The pyramid's four maps to one (B, channels, ., .) of the finest one's size."""
        last = maps[3]
        pooled = [
            resize(conv(F.adaptive_avg_pool2d(last, n)), last.shape[2:])
            for conv, n in zip(self.psp, self.head.pools, strict=True)
        ]
        joined = [conv(finer) for conv, finer in zip(self.laterals, maps, strict=False)]
        joined.append(self.psp_bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in (2, 1, 0):
            joined[i] = joined[i] + resize(joined[i + 1], joined[i].shape[2:])
        size = joined[0].shape[2:]
        smooth = [resize(conv(x), size) for conv, x in zip(self.fpn, joined, strict=False)]
        return self.fpn_bottleneck(torch.cat([*smooth, resize(joined[3], size)], dim=1))  # type: ignore[no-any-return]

    def logits(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W), sides multiples of the patch, to (B, classes, ., .), four to a patch's side."""
        return self.classifier(self.features(self.backbone(images)))  # type: ignore[no-any-return]

    def forward(
        self, images: Tensor, labels: Tensor, drop: Tensor | None = None, dropout: Tensor | None = None
    ) -> tuple[Tensor]:
        """The loss. labels: int64 (B, H, W). drop: the encoder's stochastic depth. dropout: (B, dropped) factors."""
        maps = self.backbone(images, drop)
        features = self.features(maps)
        split = self.head.channels
        loss = cross_entropy(self.classifier(kept(features, dropout, slice(split))), labels)
        if self.head.aux_weight:
            beside = kept(self.aux(maps[2]), dropout, slice(split, None))
            loss = loss + self.head.aux_weight * cross_entropy(self.aux_classifier(beside), labels)
        return (loss,)


def kept(features: Tensor, dropout: Tensor | None, part: slice) -> Tensor:
    """Features (B, C, h, w) times their factors, channel by channel."""
    return features if dropout is None else features * dropout[:, part, None, None].to(features.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the labelled pixels and divided by all of them, labelled or not (mmsegmentation's), in float32.

    Ranks have equally many pixels, so that the mean over ranks is that of the global batch.
    """
    upon = resize(logits.float(), labels.shape[1:])
    return F.cross_entropy(upon, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()
