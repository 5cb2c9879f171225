"""Features of boxes from the pyramid level that fits their size (RoIAlign, He et al. 2017, sec. 3).

A bin's value is a weighted sum of the pixels under its sampling points, with the same weights in every channel. So, with
channels last, a pixel's gradient is a sum of a few rows of the bins' gradients, long rows that a processor adds at its
full width. torchvision's kernel walks through the points of every channel by itself instead: it takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from torchvision.ops import roi_align

from rtshpc.model.choices import choices
from rtshpc.model.heads.boxes import area

FIRST, LAST = 2, 5
"""Levels that boxes are pooled from."""


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


@dataclass(frozen=True)
class Pooled:
    """Features of boxes, made when a head asks for them: once, and again in backward where they are not kept.

    Attributes:
        levels: p2 to p5 (and more, not used).
        boxes: for each image (N_i, 4), px of the network input.
        side: height and width of the features.
        share: of the gradient that reaches the levels.
    """

    levels: Sequence[Tensor]
    boxes: Sequence[Tensor]
    side: int
    share: float = 1.0

    def __len__(self) -> int:
        return sum(len(b) for b in self.boxes)

    def make(self, *levels: Tensor) -> Tensor:
        """Features (sum N_i, C, side, side) from the levels."""
        features = pool(levels, self.boxes, self.side)
        return features if self.share == 1 else _ScaleGradient.apply(features, self.share)

    def make_for_convolutions(self, *levels: Tensor) -> Tensor:
        """The same as convolutions take it: on a CPU under autocast in 16 bits, with channels last.

        A step is a tenth shorter so. Type and order change in one copy: with one copy each, they would be a step's peak.
        """
        features = self.make(*levels)
        if features.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return features.to(torch.get_autocast_dtype("cpu"), memory_format=torch.channels_last)
        return features

    def now(self) -> Tensor:
        """Features from the levels held here."""
        return self.make(*self.levels)


def levels_of(boxes: Tensor) -> Tensor:
    """Level (0 = p2) of each box of (N, 4): p4 at 224 px, one level a factor of two, clamped to p2 to p5."""
    level = torch.floor(4 + torch.log2(area(boxes).sqrt() / 224 + 1e-8))
    return level.clamp(min=FIRST, max=LAST).long() - FIRST


def levels_within(side: float) -> int:
    """Levels that boxes of sides up to `side` px, and as large as that, lie on."""
    return int(levels_of(torch.tensor([[0.0, 0.0, side, side]]))) + 1


def rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes (N_i, 4) of each image to (sum N_i, 5), the image's index first."""
    return torch.cat([torch.cat((b.new_full((len(b), 1), i), b), dim=1) for i, b in enumerate(boxes)])


def pool(levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
    """Square features of boxes.

    Args:
        levels: p2 to p5, (B, C, H / stride, W / stride); p6 and others are not used.
        boxes: for each image (N_i, 4), px of the network input.
        side: height and width of the result.

    Returns:
        (sum N_i, C, side, side), fp32, in the order of the boxes.
    """
    every = rois([b.float() for b in boxes])
    chosen = levels_of(every[:, 1:])
    parts, places = [], []
    for i, place in enumerate(choices().groups(chosen, LAST - FIRST + 1)):
        if len(place) or i == 0:
            # fp32 also under autocast: RoIAlign keeps nothing of its input, so this costs no memory.
            stride = 2 ** (FIRST + i)
            parts.append(align(levels[i].float(), every[place], side, 1 / stride))
            places.append(place)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.argsort(torch.cat(places))]


def align(features_BCHW: Tensor, rois_K5: Tensor, side: int, scale: float) -> Tensor:
    """RoIAlign, (K, C, side, side); see `SummedRoIAlign`, which takes places to look at, and a CPU."""
    if choices().looks and features_BCHW.device.type == "cpu":
        return SummedRoIAlign.apply(features_BCHW, rois_K5, side, scale)
    return roi_align(features_BCHW, rois_K5, side, scale, 0, aligned=True)


class SummedRoIAlign(torch.autograd.Function):
    """`roi_align(features, rois, side, scale, sampling_ratio=0, aligned=True)` with another backward; keeps the boxes alone."""

    @staticmethod
    def forward(ctx: Any, features_BCHW: Tensor, rois_K5: Tensor, side: int, scale: float) -> Tensor:
        """Features of boxes.

        Args:
            ctx: carries the boxes to backward.
            features_BCHW: fp32, on the CPU.
            rois_K5: image, left, top, right, bottom; px of the network input.
            side: bins of a box along an axis.
            scale: 1 / stride of the features.

        Returns:
            (K, C, side, side), fp32.
        """
        ctx.save_for_backward(rois_K5)
        ctx.shape, ctx.side, ctx.scale = features_BCHW.shape, side, scale
        return roi_align(features_BCHW, rois_K5, side, scale, 0, aligned=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the features, (B, C, H, W); the same to the bit in each run, with any number of threads."""
        (rois_K5,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        bins, pixels, weights = entries(rois_K5, ctx.side, ctx.scale, height, width)
        order = torch.argsort(pixels, stable=True)
        starts = torch.searchsorted(pixels[order], torch.arange(batch * height * width))
        rows = grads[0].permute(0, 2, 3, 1).reshape(-1, channels)
        table = embedding_bag(bins[order], rows, starts, mode="sum", per_sample_weights=weights[order])
        return table.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous(), None, None, None


def entries(rois_K5: Tensor, side: int, scale: float, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of RoIAlign: bin, pixel and weight of each entry, (E,).

    Args:
        rois_K5: image, left, top, right, bottom; px of the network input.
        side: bins of a box along an axis; bins are numbered row by row, box by box.
        scale: 1 / stride of the features.
        height: of the features; pixels are numbered row by row, image by image.
        width: of the features.
    """
    left, top, right, bottom = (rois_K5[:, 1:] * scale - 0.5).unbind(1)
    first_y, span_y, along_y = _axis(top, bottom, side, height)
    first_x, span_x, along_x = _axis(left, right, side, width)
    counts = (span_y.view(-1, side, 1) * span_x.view(-1, 1, side)).flatten()
    bins = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(bins)) - (torch.cumsum(counts, 0) - counts)[bins]
    box, inside = bins // (side * side), bins % (side * side)
    bin_y, bin_x = box * side + inside // side, box * side + inside % side
    y, x = place // span_x[bin_x], place % span_x[bin_x]
    row, col = first_y[bin_y] + y, first_x[bin_x] + x
    image = rois_K5[:, 0].long()[box]
    return bins, (image * height + row) * width + col, along_y[bin_y, y] * along_x[bin_x, x]


def _axis(low: Tensor, high: Tensor, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each bin along an axis, (K side,): its first pixel and how many it takes; and their weights, (K side, most).

    A bin takes the mean of ceil(its length) points, each between two pixels; points more than a pixel outside are 0.
    """
    length = ((high - low) / side).repeat_interleave(side)[:, None]
    start = low.repeat_interleave(side)[:, None] + torch.arange(side).repeat(len(low))[:, None] * length
    points = torch.ceil(length).clamp(min=0)
    number = torch.arange(int(points.max()) + 1 if len(points) else 1)
    at = start + (number + 0.5) * length / points.clamp(min=1)
    taken = number < points
    weight = (taken & (at >= -1) & (at <= size)) / points.clamp(min=1)
    at = at.clamp(min=0, max=size - 1)
    before = at.floor()
    part = (at - before) * weight
    first = before[:, :1]
    step = torch.where(taken, before - first, 0).long()
    first = first[:, 0].long()
    span = torch.minimum(step.amax(1) + 2, size - first)
    along = weight.new_zeros(len(weight), int(step.max()) + 2 if len(step) else 2)
    along.scatter_add_(1, step, weight - part)
    along.scatter_add_(1, step + 1, part)
    return first, span, along
