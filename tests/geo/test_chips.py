from __future__ import annotations

import numpy as np
import pytest

from rtshpc.core.config import ChipConfig
from rtshpc.geo.chips import ChipBox, chip_boxes
from rtshpc.geo.instances import cut


@pytest.mark.parametrize(("width", "height"), [(100, 100), (32, 32), (33, 70), (20, 90), (16, 16), (257, 31)])
def test_chips_cover_every_pixel_and_stay_inside_where_they_can(width: int, height: int) -> None:
    boxes = chip_boxes(width, height, ChipConfig(size_px=32, overlap_px=8))
    seen = np.zeros((height, width), np.int64)
    for box in boxes:
        assert box.row + box.size <= height or (box.row == 0 and height < 32)
        assert box.col + box.size <= width or (box.col == 0 and width < 32)
        seen[box.row : box.row + 32, box.col : box.col + 32] += 1
    assert seen.min() >= 1
    assert boxes == sorted(set(boxes), key=lambda box: (box.row, box.col))


def test_neighbours_share_the_overlap_and_none_is_needless() -> None:
    boxes = chip_boxes(80, 32, ChipConfig(size_px=32, overlap_px=8))
    assert [box.col for box in boxes] == [0, 24, 48]
    assert chip_boxes(64, 64, ChipConfig(size_px=32, overlap_px=0))[-1] == ChipBox(32, 32, 32)


def test_a_cut_beyond_the_edge_is_padded_with_zeros() -> None:
    array = np.ones((2, 20, 30), np.int16)
    part = cut(array, ChipBox(0, 0, 32))
    assert part.shape == (2, 32, 32)
    assert part.sum() == array.sum()
    assert np.shares_memory(cut(array, ChipBox(2, 3, 16)), array)
