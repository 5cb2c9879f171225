"""Features of boxes from the pyramid level that fits their size (RoIAlign, He et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
            parts.append(choices().align(levels[i].float(), every[place], side, 1 / stride))
            places.append(place)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.argsort(torch.cat(places))]
