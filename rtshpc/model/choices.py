"""What a step makes of the values of its tensors: one object that looks, and one that counts instead.

All sizes of a training step follow from its input's but for those decided here: which proposals are sound, which
boxes are foreground, on which level a box lies, over how many pixels. A trace of shapes has no values to look at. It takes of
everything as many as there can be, so that all of the code between is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms


class Choices:
    """Decisions by the values."""

    looks = True
    """Whether there are values."""

    def holds(self, flag: Tensor, usual: bool) -> bool:
        """Whether `flag` (a scalar) is true; `usual` is what a trace takes it for."""
        return bool(flag)

    def number(self, flags: Tensor) -> int:
        """How many of `flags` are set."""
        return int(flags.sum())

    def where(self, flags: Tensor, most: int | None = None) -> Tensor:
        """Indices of those of `flags` (N,) that are set, in order; at most `most` can be (None = all)."""
        return torch.nonzero(flags)[:, 0]

    def groups(self, group: Tensor, count: int) -> list[Tensor]:
        """For each of `count` groups the indices of its members, of `group` (N,) in 0..count-1."""
        return [torch.nonzero(group == i)[:, 0] for i in range(count)]

    def distinct(self, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Different values of `index` (N,), of which there are at most `most`, and for each element the place of its."""
        return index.unique(return_inverse=True)

    def unsuppressed(self, boxes: Tensor, scores: Tensor, group: Tensor, iou: float, most: int) -> Tensor:
        """Indices of the best `most` boxes (N, 4), best first, that none better of their group overlaps by `iou`."""
        return batched_nms(boxes, scores, group, iou)[:most]


@dataclass(frozen=True)
class Counted(Choices):
    """As many as there can be, whatever the values; for tensors that have none.

    Attributes:
        filled: groups that have members, in equal shares; the others have none.
    """

    looks = False
    filled: int

    def holds(self, flag: Tensor, usual: bool) -> bool:
        return usual

    def number(self, flags: Tensor) -> int:
        return flags.numel()

    def where(self, flags: Tensor, most: int | None = None) -> Tensor:
        return _first(flags, most)

    def groups(self, group: Tensor, count: int) -> list[Tensor]:
        filled = min(self.filled, count)
        shares = [(len(group) + filled - 1 - i) // filled if i < filled else 0 for i in range(count)]
        return [_first(group, share) for share in shares]

    def distinct(self, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
        return _first(index, most), index

    def unsuppressed(self, boxes: Tensor, scores: Tensor, group: Tensor, iou: float, most: int) -> Tensor:
        return _first(scores, most)


def _first(of: Tensor, most: int | None) -> Tensor:
    count = len(of) if most is None else min(most, len(of))
    return torch.arange(count, device=of.device)


_current: list[Choices] = [Choices()]
# No thread's or task's own: backward makes dropped tensors again in threads of its own, and must decide alike.


def choices() -> Choices:
    """Who decides now."""
    return _current[-1]


@contextmanager
def decided_by(other: Choices) -> Iterator[None]:
    """`other` decides, in all threads, as long as this lasts."""
    _current.append(other)
    try:
        yield
    finally:
        _current.pop()
