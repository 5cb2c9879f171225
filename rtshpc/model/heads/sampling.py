"""Which candidates enter a loss: seeded draws, the foreground quota, and regions nobody labelled."""

from __future__ import annotations

import torch
from torch import Tensor

from rtshpc.model.choices import choices
from rtshpc.model.heads.boxes import clip

IGNORED_SHARE = 0.5
"""A background candidate with more of its area than this in an ignore region is left out of the loss."""


class Draw:
    """The random choices of one image: from a seed, or none at all (the first in index order)."""

    def __init__(self, seed: int | None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def order(self, count: int) -> Tensor:
        """A permutation of `count` indices (the identity without a seed), on the CPU."""
        if self.generator is None:
            return torch.arange(count)
        return torch.randperm(count, generator=self.generator)

    def uniform(self, count: int) -> Tensor | None:
        """`count` numbers in [0, 1), or None without a seed."""
        return None if self.generator is None else torch.rand(count, generator=self.generator)


def quota(count: int, share: float) -> int:
    """Most foreground among `count` candidates of a loss."""
    return int(count * share)


def subsample(labels: Tensor, count: int, share: float, background: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Chooses candidates for a loss.

    Args:
        labels: (N,) class of each candidate; -1 is never chosen.
        count: candidates wanted.
        share: largest share of foreground; background fills up.
        background: the label that means background.
        draw: order of choice.

    Returns:
        Indices of the chosen foreground and of the chosen background.
    """
    positive = choices().where((labels != -1) & (labels != background), quota(count, share))
    negative = choices().where(labels == background)
    few = min(len(positive), quota(count, share))
    many = min(len(negative), count - few)
    first = draw.order(len(positive))[:few].to(labels.device)
    second = draw.order(len(negative))[:many].to(labels.device)
    return positive[first], negative[second]


def in_ignored(boxes: Tensor, ignore: Tensor) -> Tensor:
    """Which boxes lie mostly in ignore regions.

    Args:
        boxes: (N, 4), px.
        ignore: (H, W) bool.

    Returns:
        (N,) bool: more than `IGNORED_SHARE` of the box's area on the image is ignored.
    """
    if not choices().holds(ignore.any(), usual=False):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    height, width = ignore.shape
    total = torch.zeros(height + 1, width + 1, dtype=torch.int64, device=boxes.device)
    total[1:, 1:] = ignore.to(boxes.device).long().cumsum(0).cumsum(1)
    x1, y1, x2, y2 = clip(boxes, (height, width)).round().long().unbind(1)
    inside = total[y2, x2] - total[y1, x2] - total[y2, x1] + total[y1, x1]
    return inside > IGNORED_SHARE * ((x2 - x1) * (y2 - y1)).clamp(min=1)
