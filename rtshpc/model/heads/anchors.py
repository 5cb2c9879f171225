"""Anchors: boxes of fixed sizes and ratios on every cell of every pyramid level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtshpc.core.errors import ConfigError

STRIDES = (4, 8, 16, 32, 64)
"""Of the pyramid levels p2 to p6, px."""


class Anchors(nn.Module):
    """One size per level, several ratios of height to width; centres at (x * stride, y * stride)."""

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__()
        if len(sizes) != len(STRIDES):
            raise ConfigError(f"rpn.anchor_sizes has {len(sizes)} values, one per level p2 to p6 makes {len(STRIDES)}")
        self.per_cell = len(ratios)
        cells: list[list[list[float]]] = []
        for size in sizes:
            sides = [((size**2 / ratio) ** 0.5, ratio * (size**2 / ratio) ** 0.5) for ratio in ratios]
            cells.append([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sides])
        self.register_buffer("cells", torch.tensor(cells), persistent=False)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, H, W) of p2 to p6 to anchors (H * W * ratios, 4) each, in the order H, W, ratio."""
        found: list[Tensor] = []
        for level, cell, stride in zip(levels, self.cells, STRIDES, strict=True):
            height, width = level.shape[-2:]
            x = torch.arange(0, width * stride, stride, dtype=torch.float32, device=level.device)
            y = torch.arange(0, height * stride, stride, dtype=torch.float32, device=level.device)
            row, column = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack((column, row, column, row), dim=2).view(-1, 1, 4)
            found.append((centres + cell).view(-1, 4))
        return found
