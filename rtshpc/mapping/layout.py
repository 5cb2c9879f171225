"""How a scene is cut for mapping: chips that overlap, and the part of each that it alone decides."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from rtshpc.core.errors import RtshpcError
from rtshpc.geo.chips import ChipBox, starts

LEAST_OVERLAP = 2
"""px. The seam of two cores runs through the middle of the overlap, so that each chip sees at least one px beyond its
own core: two px that touch across a seam are then both seen by both chips, which is what joining needs."""

TALL = 4
"""A block is read from the top, and its width is what takes memory. A file's tiles under an edge of two blocks are read
twice: of two blocks of one area and of one width, those that are taller have fewer edges."""


class LayoutError(RtshpcError):
    """A scene cannot be cut like this."""


@dataclass(frozen=True)
class Layout:
    """The chips of one scene.

    Args:
        height: rows of the scene, px.
        width: columns of the scene, px.
        size: side of a chip, px.
        overlap: px shared by neighbours, 2 to size - 1; the last row and column of chips share more.

    Raises:
        LayoutError: the scene is empty, or the overlap is too small or too large.
    """

    height: int
    width: int
    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise LayoutError(f"a scene of {self.height} x {self.width} px cannot be cut into chips")
        if not LEAST_OVERLAP <= self.overlap < self.size:
            raise LayoutError(
                f"overlap = {self.overlap} px: chips of {self.size} px need an overlap of {LEAST_OVERLAP} to"
                f" {max(self.size - 1, LEAST_OVERLAP)} px, else slumps at a seam cannot be joined"
            )

    @cached_property
    def rows(self) -> list[int]:
        """First row of each row of chips."""
        return starts(self.height, self.size, self.overlap)

    @cached_property
    def cols(self) -> list[int]:
        """First column of each column of chips."""
        return starts(self.width, self.size, self.overlap)

    @cached_property
    def row_seams(self) -> list[int]:
        """Rows where the cores of a column of chips begin, and at last the scene's height."""
        return _seams(self.rows, self.size, self.height)

    @cached_property
    def col_seams(self) -> list[int]:
        """Columns where the cores of a row of chips begin, and at last the scene's width."""
        return _seams(self.cols, self.size, self.width)

    def boxes(self) -> list[ChipBox]:
        """The chips, row by row; a scene smaller than a chip gets one that reaches beyond it."""
        return [ChipBox(row, col, self.size) for row in self.rows for col in self.cols]

    def core(self, chip: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right of the px that `chip` decides, px; every px of the scene lies in exactly one core."""
        row, col = divmod(chip, len(self.cols))
        return self.row_seams[row], self.col_seams[col], self.row_seams[row + 1], self.col_seams[col + 1]

    def owner(self, row: int, col: int) -> int:
        """The chip whose core holds a px of the scene."""
        return (bisect_right(self.row_seams, row) - 1) * len(self.cols) + bisect_right(self.col_seams, col) - 1

    def blocks(self, block_px: int) -> list[list[int]]:
        """The chips in blocks of at most `block_px` px across and `TALL` times as many down (at least one chip), each row by row.

        Blocks are of nearly equal numbers of chips; every chip is in exactly one.
        """
        step = self.size - self.overlap
        across = len(self.cols)
        wide, high = (max(1, (most - self.overlap) // step) for most in (block_px, TALL * block_px))
        return [
            [row * across + col for row in rows for col in cols]
            for rows in _parts(len(self.rows), high)
            for cols in _parts(across, wide)
        ]


def _seams(first: list[int], size: int, length: int) -> list[int]:
    """0, the middles of the overlaps of consecutive chips, `length`: strictly ascending, as the starts are."""
    middles = [(start + before + size) // 2 for before, start in pairwise(first)]
    return [0, *middles, length]


def _parts(count: int, most: int) -> list[range]:
    """0..count-1 in consecutive parts of at most `most`, as equal as can be."""
    parts = -(-count // most)
    return [range(part * count // parts, (part + 1) * count // parts) for part in range(parts)]
