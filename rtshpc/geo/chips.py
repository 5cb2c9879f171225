"""A scene is cut into square chips."""

from __future__ import annotations

from dataclasses import dataclass

from rtshpc.core.config import ChipConfig


@dataclass(frozen=True)
class ChipBox:
    """A square of the primary grid, px: rows `row .. row + size`, columns `col .. col + size`."""

    row: int
    col: int
    size: int


def chip_boxes(width: int, height: int, chip: ChipConfig) -> list[ChipBox]:
    """Chips that cover a scene of `width` x `height` px, row by row.

    The last chip of a row or column is shifted inside the scene; a scene smaller than a chip gets one
    chip that reaches beyond it (readers pad it as invalid).
    """
    rows = starts(height, chip.size_px, chip.overlap_px)
    cols = starts(width, chip.size_px, chip.overlap_px)
    return [ChipBox(row, col, chip.size_px) for row in rows for col in cols]


def starts(length: int, size: int, overlap: int) -> list[int]:
    """First px of each chip along a side of `length` px, strictly ascending; the last chip ends with the side."""
    if length <= size:
        return [0]
    starts = list(range(0, length - size, size - overlap))
    return [*starts, length - size]
