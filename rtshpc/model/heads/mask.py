"""Masks of instances (He et al. 2017): a small convolutional head on the features of each box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from rtshpc.core.config import RoIConfig
from rtshpc.fusion.recompute import chain, same
from rtshpc.model.choices import choices
from rtshpc.model.heads.pooling import Pooled, rois
from rtshpc.model.layers import ConvNorm, start_msra, start_normal, waits_for_others

POOLED = 14
"""Side of the features of a box; the mask has twice that."""


class MaskHead(nn.Module):
    """3x3 convolutions, a 2x2 deconvolution with stride 2, and one logit per class and point."""

    def __init__(self, config: RoIConfig, channels: int, classes: int) -> None:
        super().__init__()
        self.names = [f"mask_fcn{i + 1}" for i in range(config.mask_convs)]
        for name in self.names:
            norm = nn.BatchNorm2d(channels) if config.norm == "bn" else None
            self.add_module(name, ConvNorm(channels, channels, 3, norm=norm, relu=True))
            start_msra(getattr(self, name))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, classes, 1)
        start_msra(self.deconv)
        start_normal(self.predictor, 0.001)
        self.recompute = config.recompute
        self.counted = 0  # boxes that the last loss is a mean over

    def forward(self, features: Pooled) -> Tensor:
        """Features of N boxes, side 14, to logits (N, classes, 28, 28)."""
        convs = [getattr(self, name) for name in self.names]
        steps = [(conv.convolve, conv.finish) for conv in convs]
        steps += [(self.deconv, F.relu), (self.predictor, same)]
        return chain(features.make_for_convolutions, steps, features.levels, self.recompute, self)

    def loss(self, features: Pooled, classes: Tensor, wanted: Tensor) -> Tensor:
        """Mean binary cross-entropy on the true class's channel.

        Args:
            features: of N foreground boxes, side 14; may be empty.
            classes: (N,).
            wanted: (N, 28, 28) bool.
        """
        self.counted = len(features)
        if len(features) == 0 and waits_for_others(self):
            return self(features).sum() * 0.0
        if len(features) == 0:
            # No batch norm over nothing; the zero still reaches every weight, as distributed training needs.
            return sum((p.sum() * 0.0 for p in self.parameters()), features.now().sum() * 0.0)
        logits = self(features)[torch.arange(len(classes), device=classes.device), classes].float()
        return F.binary_cross_entropy_with_logits(logits, wanted.float())

    def probabilities(self, features: Pooled, classes: Tensor) -> Tensor:
        """Features of N boxes and classes (N,) to (N, 28, 28) in [0, 1]."""
        if len(features) == 0:
            return features.levels[0].new_zeros(0, 2 * POOLED, 2 * POOLED, dtype=torch.float32)
        return self(features)[torch.arange(len(classes), device=classes.device), classes].float().sigmoid()


def crop_masks(masks: Sequence[Tensor], boxes: Sequence[Tensor], matched: Sequence[Tensor]) -> Tensor:
    """What the mask head should say: each image's masks cut to boxes.

    Args:
        masks: for each image (N, H, W) bool.
        boxes: for each image (R, 4), px.
        matched: for each image (R,) index of the mask of each box.

    Returns:
        (sum R, 28, 28) bool.
    """
    found: list[Tensor] = []
    for mask, box, index in zip(masks, boxes, matched, strict=True):
        if len(box) == 0:
            continue
        used, place = choices().distinct(index, len(mask))
        places = torch.cat((place[:, None].float(), box.float()), dim=1)
        found.append(roi_align(mask[used, None].float(), places, 2 * POOLED, 1.0, 0, aligned=True)[:, 0] >= 0.5)
    if not found:
        return torch.zeros(0, 2 * POOLED, 2 * POOLED, dtype=torch.bool, device=rois(boxes).device)
    return torch.cat(found)
