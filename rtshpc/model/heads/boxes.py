"""Boxes (x1, y1, x2, y2 in px, no +1 in widths): overlap, clipping, the delta coder and the matcher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_CLAMP = math.log(1000.0 / 16)
"""Largest predicted log growth of a box's side; keeps exp finite."""


def area(boxes: Tensor) -> Tensor:
    """Areas (N,) of boxes (N, 4), px2."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair: (N, 4) and (M, 4) to (N, M); pairs that do not touch give 0."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clamp_(min=0).prod(dim=2)
    union = area(first)[:, None] + area(second) - shared
    return torch.where(shared > 0, shared / union, shared.new_zeros(1))


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut to an image of size (height, width)."""
    x = boxes[..., 0::2].clamp(min=0, max=size[1])
    y = boxes[..., 1::2].clamp(min=0, max=size[0])
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def nonempty(boxes: Tensor) -> Tensor:
    """Which of (N, 4) boxes have positive width and height."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


@dataclass(frozen=True)
class BoxCoder:
    """Boxes as (dx, dy, dw, dh) relative to others (Girshick et al. 2014), in fp32.

    Attributes:
        weights: the four deltas are multiplied by these.
    """

    weights: tuple[float, float, float, float]

    def encode(self, source: Tensor, target: Tensor) -> Tensor:
        """Deltas (N, 4) that take source boxes (N, 4) to target boxes (N, 4)."""
        source, target = source.float(), target.float()
        sides, wanted = source[:, 2:] - source[:, :2], target[:, 2:] - target[:, :2]
        shift = (target[:, :2] + 0.5 * wanted) - (source[:, :2] + 0.5 * sides)
        x, y, w, h = self.weights
        growth = torch.log(wanted / sides)
        return torch.stack(
            (x * shift[:, 0] / sides[:, 0], y * shift[:, 1] / sides[:, 1], w * growth[:, 0], h * growth[:, 1]), dim=1
        )

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (N, k * 4) that deltas (N, k * 4) make of boxes (N, 4); growth is clamped above only."""
        boxes, deltas = boxes.float(), deltas.float().view(len(boxes), deltas.shape[1] // 4, 4)
        sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
        centres = boxes[:, None, :2] + 0.5 * sides
        x, y, w, h = self.weights
        shift = deltas[..., :2] / deltas.new_tensor((x, y))
        growth = (deltas[..., 2:] / deltas.new_tensor((w, h))).clamp(max=SIZE_CLAMP)
        middle, extent = shift * sides + centres, growth.exp() * sides
        return torch.cat((middle - 0.5 * extent, middle + 0.5 * extent), dim=2).flatten(1)


@dataclass(frozen=True)
class Matcher:
    """Each candidate's ground truth and its label: 1 foreground, 0 background, -1 between.

    Attributes:
        low: below this IoU a candidate is background.
        high: from this IoU on it is foreground.
        keep_best: every ground truth's best candidates (all ties) are foreground whatever their IoU.
    """

    low: float
    high: float
    keep_best: bool = False

    def match(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """IoU (truths, candidates) to indices (candidates,) and labels (candidates,), both int64."""
        if overlap.shape[0] == 0:
            nothing = overlap.new_zeros(overlap.shape[1], dtype=torch.int64)
            return nothing, nothing.clone()
        best, matched = overlap.max(dim=0)
        labels = torch.full_like(matched, -1)
        labels[best < self.low] = 0
        labels[best >= self.high] = 1
        if self.keep_best and overlap.shape[1]:
            top = overlap.max(dim=1).values[:, None]
            # A truth that no candidate touches has its "best" IoU, 0, nearly everywhere: that is no match.
            labels[((overlap == top) & (top > 0)).any(dim=0)] = 1
        return matched, labels
