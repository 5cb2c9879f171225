"""The box head of one stage: features to class scores and deltas, its losses, and the choice of detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import RoIConfig
from rtshpc.fusion.recompute import chain, linear_in_rows
from rtshpc.model.choices import choices
from rtshpc.model.heads.boxes import BoxCoder, clip
from rtshpc.model.heads.pooling import Pooled
from rtshpc.model.layers import ConvNorm, start_msra, start_normal, start_xavier, waits_for_others

POOLED = 7
"""Side of the features of a box."""


@dataclass(frozen=True)
class RoIs:
    """Labelled boxes of one image.

    Attributes:
        boxes: (N, 4), px.
        classes: (N,) class, `classes` of the detector = background, -1 = left out of the loss.
        truths: (N, 4) box of the matched ground truth (zeros where there is none).
        matched: (N,) index of the ground truth.
    """

    boxes: Tensor
    classes: Tensor
    truths: Tensor
    matched: Tensor

    def __getitem__(self, index: Tensor) -> RoIs:
        return RoIs(self.boxes[index], self.classes[index], self.truths[index], self.matched[index])


class BoxHead(nn.Module):
    """Convolutions and fully connected layers on the pooled features of a box."""

    def __init__(self, config: RoIConfig, channels: int) -> None:
        super().__init__()
        self.convs = [f"conv{i + 1}" for i in range(config.box_convs)]
        self.fcs = [f"fc{i + 1}" for i in range(config.box_fcs)]
        for name in self.convs:
            norm = nn.BatchNorm2d(channels) if config.norm == "bn" else None
            layer = ConvNorm(channels, channels, 3, norm=norm, relu=True)
            start_msra(layer)
            self.add_module(name, layer)
        width = channels * POOLED**2
        for name in self.fcs:
            layer = nn.Linear(width, config.fc_dim)
            start_xavier(layer)
            self.add_module(name, layer)
            width = config.fc_dim
        self.width = width
        self.recompute = config.recompute

    def forward(self, features: Pooled) -> Tensor:
        """Features of N boxes, side 7, to (N, fc_dim)."""
        if len(features) == 0 and not waits_for_others(self):
            # No batch norm over nothing; the zero still reaches every weight, as distributed training needs.
            x = features.now()
            return x.new_zeros(0, self.width) + sum(p.sum() * 0.0 for p in self.parameters()) + x.sum() * 0.0
        convs = [getattr(self, name) for name in self.convs]
        steps = [(conv.convolve, conv.finish) for conv in convs]
        make, linear = features.make, linear_in_rows if self.recompute else _linear
        if convs:
            make = features.make_for_convolutions
            steps[-1] = (convs[-1].convolve, partial(convs[-1].finish, channels_first=True))
        steps += [(partial(linear, getattr(self, name)), F.relu) for name in self.fcs]
        return chain(make, steps, features.levels, self.recompute, self)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x.flatten(1))


class BoxPredictor(nn.Module):
    """Class scores (the background last) and deltas, for all classes together or for each."""

    def __init__(self, width: int, classes: int, per_class: bool, coder: BoxCoder) -> None:
        super().__init__()
        self.classes = classes
        self.coder = coder
        self.counted = 0  # RoIs that the last losses are means over
        self.foreground = 0  # of them
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * classes if per_class else 4)
        start_normal(self.cls_score, 0.01)
        start_normal(self.bbox_pred, 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width) to logits (N, classes + 1) and deltas (N, 4 or 4 * classes), fp32."""
        return self.cls_score(x).float(), self.bbox_pred(x).float()

    def losses(self, logits: Tensor, deltas: Tensor, labelled: Sequence[RoIs]) -> tuple[Tensor, Tensor]:
        """Cross-entropy, mean over RoIs; and L1 of foreground deltas over the number of ALL RoIs."""
        classes = torch.cat([r.classes for r in labelled])
        boxes, truths = torch.cat([r.boxes for r in labelled]), torch.cat([r.truths for r in labelled])
        count = self.counted = choices().number(classes >= 0)
        self.foreground = 0
        if count == 0:
            return logits.sum() * 0.0, deltas.sum() * 0.0
        score = F.cross_entropy(logits, classes, ignore_index=-1)
        front = choices().where((classes >= 0) & (classes < self.classes))
        self.foreground = len(front)
        chosen = deltas[front]
        if deltas.shape[1] != 4:
            chosen = chosen.view(len(front), -1, 4)[torch.arange(len(front), device=front.device), classes[front]]
        wanted = self.coder.encode(boxes[front], truths[front])
        return score, F.l1_loss(chosen, wanted, reduction="sum") / count


def choose(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], threshold: float, nms_iou: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: threshold, clip, suppression per class, best first.

    Args:
        boxes: (N, 4) for all classes together or (N, 4 * K), px.
        scores: (N, K + 1), the background last.
        size: (height, width) of the image, px.
        threshold: scores must exceed it.
        nms_iou: overlap that suppresses.
        most: largest number returned.

    Returns:
        Boxes (D, 4), scores (D,), classes (D,).
    """
    sound = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    whole = choices().where(sound)
    boxes, scores = boxes[whole], scores[whole][:, :-1]
    boxes = clip(boxes.view(len(boxes), boxes.shape[1] // 4, 4), size)
    likely = choices().where((scores > threshold).flatten())
    row, kind = likely // scores.shape[1], likely % scores.shape[1]
    picked = boxes[row, 0] if boxes.shape[1] == 1 else boxes[row, kind]
    values = scores[row, kind]
    keep = choices().unsuppressed(picked, values, kind, nms_iou, most)
    return picked[keep], values[keep], kind[keep]
