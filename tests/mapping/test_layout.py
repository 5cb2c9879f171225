from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rtshpc.mapping.layout import Layout, LayoutError


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    size = draw(st.integers(3, 40))
    return Layout(draw(st.integers(1, 90)), draw(st.integers(1, 90)), size, draw(st.integers(2, size - 1)))


@given(layouts())
def test_every_pixel_is_in_exactly_one_core_and_its_owner_says_which(layout: Layout) -> None:
    owners = np.full((layout.height, layout.width), -1)
    for chip in range(len(layout.boxes())):
        top, left, bottom, right = layout.core(chip)
        assert (owners[top:bottom, left:right] == -1).all() and bottom > top and right > left
        owners[top:bottom, left:right] = chip
    assert (owners >= 0).all()
    assert all(layout.owner(row, col) == chip for (row, col), chip in np.ndenumerate(owners))


@given(layouts())
def test_a_chip_sees_at_least_a_pixel_beyond_its_core_except_at_the_scenes_edge(layout: Layout) -> None:
    for chip, box in enumerate(layout.boxes()):
        top, left, bottom, right = layout.core(chip)
        assert box.row <= max(top - 1, 0) and box.col <= max(left - 1, 0)
        assert box.row + box.size >= min(bottom + 1, layout.height)
        assert box.col + box.size >= min(right + 1, layout.width)


@given(layouts(), st.integers(1, 120))
def test_blocks_hold_every_chip_once_and_are_no_larger_than_asked(layout: Layout, block: int) -> None:
    boxes, blocks = layout.boxes(), layout.blocks(block)
    assert sorted(chip for chips in blocks for chip in chips) == list(range(len(boxes)))
    for chips in blocks:
        assert chips == sorted(chips)
        for side, most in (("row", 4 * block), ("col", block)):
            places = [getattr(boxes[chip], side) for chip in chips]
            assert max(places) - min(places) + layout.size <= max(most, layout.size)


def test_the_last_chips_end_with_the_scene() -> None:
    boxes = Layout(25, 40, 16, 4).boxes()
    assert [(box.row, box.col) for box in boxes] == [(0, 0), (0, 12), (0, 24), (9, 0), (9, 12), (9, 24)]
    assert [(box.row, box.col) for box in Layout(5, 17, 16, 4).boxes()] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("overlap", [-1, 0, 1, 16, 20])
def test_an_overlap_that_cannot_join_is_refused_in_one_line(overlap: int) -> None:
    with pytest.raises(LayoutError, match=rf"overlap = {overlap} px: chips of 16 px need an overlap of 2 to 15 px"):
        Layout(100, 100, 16, overlap)


def test_a_scene_without_pixels_is_refused() -> None:
    with pytest.raises(LayoutError, match="0 x 7 px"):
        Layout(0, 7, 16, 4)
