"""What a mixer takes and gives, and how scales of several modalities must agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rtshpc.core.errors import ShapeError


class Mixer(nn.Module, ABC):
    """Primary x auxiliary -> one map, at one scale: the base of every mixer.

    A subclass takes `(width, config, scale)` and defines `forward(primary, auxiliary)`: two maps of
    (B, width, H, W) to one of the same shape.
    """

    @abstractmethod
    def forward(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """Mixes two maps of (B, C, H, W) into one of the same shape."""


def check_scales(scales: Mapping[str, Sequence[Tensor]], primary: str, auxiliaries: Sequence[str]) -> None:
    """All modalities are there and every scale has one shape.

    Raises:
        ShapeError: names the modality and the scale that do not agree with the primary.
    """
    wanted = (primary, *auxiliaries)
    if set(scales) != set(wanted):
        raise ShapeError(f"fusion of {', '.join(wanted)} was given {', '.join(scales) or 'nothing'}")
    for name in auxiliaries:
        if len(scales[name]) != len(scales[primary]):
            raise ShapeError(f"{name} has {len(scales[name])} scales, {primary} has {len(scales[primary])}")
        for i, (a, b) in enumerate(zip(scales[primary], scales[name], strict=True)):
            if a.shape != b.shape:
                raise ShapeError(f"scale {i} of {name} is {tuple(b.shape)}, of {primary} {tuple(a.shape)}")
