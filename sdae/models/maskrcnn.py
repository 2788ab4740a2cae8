"""Mask R-CNN (He et al. 2017) upon the pyramid of a ViT, from torchvision's parts.

Losses are sums over this rank's samples divided by the number of samples of all ranks, and what is sampled is drawn
from keys, so that the number of ranks does not matter. Scores, boxes and losses are float32 whatever the precision.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, generalized_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from sdae.models.dense import Pyramid
from sdae.models.normalization import GlobalBatchNorm2d
from sdae.sections import Backbone, DetectHead, DetectTest, Model

LEVELS = ("0", "1", "2", "3")  # those that regions are taken from; RPN also sees a fifth, half as fine
RATIOS = (0.5, 1.0, 2.0)
BETA = 1 / 9  # where smooth L1 turns from square to linear
PARTS = ("rpn_class", "rpn_box", "class", "box", "mask")


def global_mean(total: Tensor, count: int) -> Tensor:
    """This rank's sum over the count of all ranks, times their number: the mean over ranks is the global mean."""
    counts = total.new_full((), float(count))
    ranks = 1
    if dist.is_initialized():
        dist.all_reduce(counts)
        ranks = dist.get_world_size()
    return total * (ranks / counts.clamp_min(1))


class Sampler:
    """Of each picture's candidates (label >= 1: object, 0: ground, < 0: neither) so many, at most a share of objects.

    Each candidate's place in the queue is drawn from its picture's generator, on the CPU.
    """

    def __init__(self, number: int, share: float):
        self.number, self.most = number, int(number * share)
        self.generators: list[torch.Generator] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Two bool masks (n,) for each picture: objects and ground that were taken."""
        objects, ground = [], []
        for label, generator in zip(labels, self.generators, strict=True):
            draws = torch.rand(len(label), generator=generator).to(label.device)
            objects.append(first(label >= 1, self.most, draws))
            ground.append(first(label == 0, self.number - int(objects[-1].sum()), draws))
        return objects, ground


def first(candidates: Tensor, number: int, draws: Tensor) -> Tensor:
    """The `number` candidates (n,) of least draws, as a mask; all of them where there are fewer."""
    places = torch.where(candidates)[0]
    taken = torch.zeros_like(candidates)
    taken[places[draws[places].argsort(stable=True)[:number]]] = True
    return taken


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors at the maps' true strides, in float32 (torchvision's guesses strides, and takes the maps' precision)."""

    def __init__(self, size: float, strides: tuple[int, ...]):
        super().__init__(tuple((size * stride,) for stride in strides), (RATIOS,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(feature.shape[-2:]) for feature in feature_maps]
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, steps))
        return [anchors for _ in image_list.image_sizes]


class Float32Head(RPNHead):  # type: ignore[misc]
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [t.float() for t in scores], [t.float() for t in boxes]


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposals, whose losses are means over the samples of all processes."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        objects, ground = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        taken = objects | ground
        count = int(taken.sum())
        scores, wanted = objectness.flatten()[taken], torch.cat(labels)[taken]
        score = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
        aims = torch.cat(regression_targets)[objects]
        box = F.smooth_l1_loss(pred_bbox_deltas[objects], aims, beta=BETA, reduction="sum")
        return global_mean(score, count), global_mean(box, count)


class Regions(RoIHeads):  # type: ignore[misc]
    """Box head (class and box of each proposal) and mask head."""

    box_loss: str

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:  # fmt: skip
        """Detections in testing (masks: (n, 1, 28, 28) probabilities over their boxes), losses in training."""
        if targets is None:
            return self.detections(features, proposals, image_shapes), {}
        proposals, matched, labels, aims = self.select_training_samples(proposals, targets)
        scores, deltas = self.boxes(features, proposals, image_shapes)
        label, count = torch.cat(labels), len(scores)
        objects = torch.where(label > 0)[0]
        found = deltas.view(count, deltas.shape[1] // 4, 4)[objects, label[objects]]
        if self.box_loss == "giou":
            there = torch.cat(proposals)[objects]
            pairs = zip(targets, matched, proposals, strict=True)
            truth = torch.cat([t["boxes"][m] if len(t["boxes"]) else p for t, m, p in pairs])
            box = giou(self.box_coder.decode_single(found, there), truth[objects])
        else:
            box = F.smooth_l1_loss(found, torch.cat(aims)[objects], beta=BETA, reduction="sum")
        losses = {
            "class": global_mean(F.cross_entropy(scores, label, reduction="sum"), count),
            "box": global_mean(box, count),
        }
        of_objects = [torch.where(part > 0)[0] for part in labels]
        regions = [p[k] for p, k in zip(proposals, of_objects, strict=True)]
        every = self.masks(features, regions, image_shapes)
        logits = every[torch.arange(len(objects), device=every.device), label[objects]]
        side = logits.shape[-1]
        wanted = [
            project_masks_on_boxes(target["masks"], part, m[k], side)
            for target, part, m, k in zip(targets, regions, matched, of_objects, strict=True)
        ]
        mask = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
        losses["mask"] = global_mean(mask, logits.numel())
        return [], losses

    def boxes(self, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]) -> Any:
        """Of n regions: class logits (n, K + 1), box deltas (n, 4 K + 4)."""
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, regions, sizes)))
        return scores.float(), deltas.float()

    def masks(self, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Of n regions: logits (n, K + 1, 28, 28)."""
        logits: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, sizes)))
        return logits.float()

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores, deltas = self.boxes(features, proposals, sizes)
        boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, sizes)
        masks = maskrcnn_inference(self.masks(features, boxes, sizes), labels)
        return [
            {"boxes": b, "scores": s, "labels": y, "masks": m}
            for b, s, y, m in zip(boxes, scores, labels, masks, strict=True)
        ]


def giou(boxes: Tensor, truth: Tensor) -> Tensor:
    """The sum of 1 - GIoU (Rezatofighi et al. 2019) over pairs of boxes (n, 4) x0 y0 x1 y1."""
    return generalized_box_iou_loss(boxes, truth, reduction="sum")  # type: ignore[no-any-return]


class MaskRCNN(nn.Module):
    """A ViT's pyramid, FPN, RPN with one convolution, a box head of four convolutions and one linear layer with
    BatchNorm over the global batch, a mask head of four convolutions. `classes` without the background.
    """

    def __init__(
        self, model: Model, image_size: int, backbone: Backbone, head: DetectHead, test: DetectTest, classes: int,
        checkpointing: bool = False,
    ):  # fmt: skip
        super().__init__()
        width, hidden = head.channels, head.hidden
        with torch.random.fork_rng(devices=[]):  # torchvision's parts draw their weights at once; `init_weights` counts
            self.backbone = Pyramid(model, image_size, backbone, checkpointing)
            self.fpn = FeaturePyramidNetwork([self.backbone.width] * 4, width, LastLevelMaxPool())
            strides = self.backbone.strides
            anchors = Anchors(head.anchor, (*strides, 2 * strides[-1]))
            self.rpn = Proposals(
                anchors, Float32Head(width, len(RATIOS)), 0.7, 0.3, head.rpn_sampled, 0.5,
                {"training": 2 * head.proposals, "testing": head.proposals},
                {"training": head.proposals, "testing": head.proposals}, 0.7,
            )  # fmt: skip
            self.regions = Regions(
                _pool(7, strides), FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], GlobalBatchNorm2d),
                FastRCNNPredictor(hidden, classes + 1), 0.5, 0.5, head.sampled, 0.25, None,
                test.score, test.nms, test.detections,
                _pool(14, strides), MaskRCNNHeads(width, [width] * 4, 1), MaskRCNNPredictor(width, width, classes + 1),
            )  # fmt: skip
        self.rpn.fg_bg_sampler = Sampler(head.rpn_sampled, 0.5)
        self.regions.fg_bg_sampler = Sampler(head.sampled, 0.25)
        self.regions.box_loss = head.box_loss
        self.box_weight = head.box_weight

    def init_weights(self) -> None:
        """All but the encoder: torchvision's rules, and mmdetection's for the last layers of the box head."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d):
                module.reset_parameters()
        for part, kind in ((self.fpn, "uniform"), (self.rpn, "small"), (self.regions, "normal")):
            for layer in part.modules():
                if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    continue
                if kind == "uniform":
                    nn.init.kaiming_uniform_(layer.weight, a=1)
                elif kind == "small":
                    nn.init.normal_(layer.weight, std=0.01)
                elif not isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.regions.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.regions.box_predictor.bbox_pred.weight, std=0.001)

    def features(self, images: Tensor, drop: Tensor | None = None) -> dict[str, Tensor]:
        """Five maps (B, channels, ., .), the finest first."""
        maps = OrderedDict(zip(LEVELS, self.backbone(images, drop), strict=True))
        return {name: map_.float() for name, map_ in self.fpn(maps).items()}

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]],
        drop: Tensor | None, keys: list[int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss and its parts (5,) of pictures (B, C, H, W), `sizes` without the filling.

        targets: boxes (n, 4), labels (n,) from 1, masks (n, h, w). keys: one for each picture, to sample from.
        """
        features, filled = self.features(images, drop), ImageList(images, sizes)
        generators = [torch.Generator().manual_seed(key) for key in keys]
        self.rpn.fg_bg_sampler.generators = self.regions.fg_bg_sampler.generators = generators
        proposals, of_rpn = self.rpn(filled, features, targets)
        _, of_regions = self.regions(features, proposals, sizes, targets)
        parts = torch.stack([
            of_rpn["loss_objectness"], of_rpn["loss_rpn_box_reg"],
            of_regions["class"], self.box_weight * of_regions["box"], of_regions["mask"],
        ])  # fmt: skip
        return parts.sum(), parts.detach()

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """What is found in each picture: boxes (n, 4) in its pixels, scores, labels from 1, masks (n, 1, 28, 28)."""
        features = self.features(images)
        proposals, _ = self.rpn(ImageList(images, sizes), features)
        found, _ = self.regions(features, proposals, sizes)
        return found  # type: ignore[no-any-return]


def _pool(side: int, strides: tuple[int, ...]) -> MultiScaleRoIAlign:
    """Regions below 28 cells of the finest map a side are taken from it, below twice that from the next, and so on:
    FPN's rule (112 pixels at stride 4) for any patch. torchvision would guess the scales from the first batch's size.
    """
    pool = MultiScaleRoIAlign(list(LEVELS), side, 2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(LEVELS) - 1, 28 * strides[0], 1)
    return pool
