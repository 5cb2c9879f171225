from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings, strategies as st
from rasterio.features import rasterize
from rasterio.transform import Affine

from rtshpc.mapping import outlines as module
from rtshpc.mapping.outlines import outlines

NORTH_UP = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


@dataclass(frozen=True)
class Drawn:
    row: int
    col: int
    mask: np.ndarray


def random_masks(seed: int, count: int) -> list[Drawn]:
    """Noise of all densities (px that touch by corners, holes in holes) and smooth shapes."""
    draw = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        height, width = draw.integers(1, 18, 2)
        mask = draw.random((height, width)) < draw.choice([0.2, 0.5, 0.62, 0.9])
        if mask.any():
            found.append(Drawn(int(draw.integers(-50, 50)), int(draw.integers(-50, 50)), mask))
    return found


def by_squares(one: Drawn) -> object:
    """The outline by the definition: the union of the squares of the px."""
    rows, cols = np.nonzero(one.mask)
    x, y = cols + one.col, -(rows + one.row)
    return shapely.union_all(shapely.box(x, y - 1, x + 1, y))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_an_outline_is_valid_and_the_union_of_the_squares_of_its_px(seed: int) -> None:
    masks = random_masks(seed, 6)
    for one, shape in zip(masks, outlines(masks, NORTH_UP), strict=True):
        assert shapely.is_valid(shape), shapely.is_valid_reason(shape)
        assert shape.area == one.mask.sum()
        assert shape.equals(by_squares(one))
        assert len(shapely.get_parts(shape)) == parts(one.mask)


def parts(mask: np.ndarray) -> int:
    return int(cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0]) - 1


def test_an_outline_does_not_depend_on_the_masks_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random_masks(1, 60)
    together = outlines(masks, NORTH_UP)
    monkeypatch.setattr(module, "_CANVAS_PX", 1)
    assert [shape.wkb for shape in outlines(masks, NORTH_UP)] == [shape.wkb for shape in together]
    assert [shape.wkb for shape in outlines(masks[::-1], NORTH_UP)][::-1] == [shape.wkb for shape in together]


@pytest.mark.parametrize(
    "transform",
    [(10.0, 0.0, 500_000.0, 0.0, -10.0, 7_600_000.0), (0.5, 0.0, 3.0, 0.0, 0.5, 2.0), (3.0, 4.0, 10.0, 4.0, -3.0, 7.0)],
    ids=["north up", "south up", "rotated"],
)
def test_burnt_back_onto_the_lattice_an_outline_gives_its_mask(transform: Sequence[float]) -> None:
    for one, shape in zip(masks := random_masks(8, 30), outlines(masks, transform), strict=True):
        height, width = one.mask.shape
        corner = Affine(*transform) @ Affine.translation(one.col, one.row)
        back = rasterize([(shape, 1)], out_shape=(height, width), transform=corner, dtype="uint8")
        assert np.array_equal(back == 1, one.mask)
        assert shape.area == pytest.approx(
            one.mask.sum() * abs(transform[0] * transform[4] - transform[1] * transform[3])
        )


def test_a_hole_that_touches_its_shell_and_an_island_in_a_hole_stay_what_they_are() -> None:
    picture = """
        #######
        #.....#
        #.###.#
        #.#.#.#
        #.###.#
        #.....#
        ######.
        ......#"""
    mask = np.array([[sign == "#" for sign in line.strip()] for line in picture.split()])
    (shape,) = outlines([Drawn(0, 0, mask)], NORTH_UP)
    assert shape.equals(by_squares(Drawn(0, 0, mask)))
    assert sorted(len(part.interiors) for part in shape.geoms) == [0, 1, 1]


def test_no_masks_have_no_outlines() -> None:
    assert outlines([], NORTH_UP) == []
