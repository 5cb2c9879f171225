from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import shapely
from pyproj import CRS, Geod

from rtshpc.geo.crs import LONLAT
from rtshpc.mapping.attributes import ground_measures, moved
from rtshpc.mapping.between import Sheet, join
from rtshpc.mapping.features import Features

UTM = {zone: CRS.from_epsg(32600 + zone).to_wkt() for zone in (1, 8, 9, 60)}
POLAR = CRS.from_epsg(3413).to_wkt()


def sheet(
    crs: str, ground: Any, shapes: list[Any], scores: list[float] | None = None, date: str = "2020-07-01"
) -> Sheet:
    columns = {"score": np.array(scores or [0.5] * len(shapes)), **ground_measures(shapes, crs)}
    columns["scene"] = [f"{crs[:30]} {number}" for number in range(len(shapes))]
    return Sheet(date, ground, Features(crs, shapes, columns))


def snapped(shape: Any, px: float) -> Any:
    """A shape as a grid of `px` shows it: the px whose middle it covers."""
    left, bottom, right, top = shape.bounds
    xs = np.arange(np.floor(left / px), np.ceil(right / px))
    ys = np.arange(np.floor(bottom / px), np.ceil(top / px))
    boxes = [shapely.box(x * px, y * px, (x + 1) * px, (y + 1) * px) for x in xs for y in ys]
    return shapely.union_all([box for box in boxes if shape.covers(box.centroid)])


def in_crs(shapes: list[Any], crs: str) -> list[Any]:
    return moved([shapely.segmentize(shape, 5) for shape in shapes], UTM[8], crs).tolist()


CENTRES = [(400_000.0 + x, 7_700_000.0 + y) for x in range(0, 1000, 250) for y in range(0, 1000, 250)]
SLUMPS = [shapely.Point(x, y).buffer(40 + 7 * (n % 5)) for n, (x, y) in enumerate(CENTRES)]
LEFT, RIGHT = (shapely.box(399_000, 7_699_000, 400_510, 7_702_000), shapely.box(400_230, 7_699_000, 402_000, 7_702_000))


@pytest.mark.parametrize("crs", [UTM[9], POLAR, LONLAT], ids=["utm 9", "polar", "degrees"])
def test_each_slump_of_two_grids_is_there_once_and_whole(crs: str) -> None:
    """The grounds end within slumps, which one of the grids shows cut and the other whole."""
    left = [shape.intersection(LEFT) for shape in SLUMPS if shape.intersects(LEFT)]
    right = in_crs([shape.intersection(RIGHT) for shape in SLUMPS if shape.intersects(RIGHT)], crs)
    sheets = [
        sheet(UTM[8], LEFT, [snapped(shape, 4.0) for shape in left]),
        sheet(crs, in_crs([RIGHT], crs)[0], right),
    ]
    tables = join(sheets)
    found = [shape for one in tables for shape in moved(one.geometry, one.crs_wkt, UTM[8])]
    assert len(found) == len(SLUMPS)
    for true in SLUMPS:
        near = [shape for shape in found if shape.intersection(true).area > 0.5 * true.area]
        assert len(near) == 1
        assert abs(near[0].area - true.area) < true.length * 2.0
    geod = Geod(ellps="WGS84")
    for one in tables:
        for shape, area in zip(moved(one.geometry, one.crs_wkt, LONLAT), one["area_m2"], strict=True):
            assert abs(geod.geometry_area_perimeter(shape)[0]) == pytest.approx(area, rel=1e-3)


def test_a_slump_that_no_ground_holds_whole_is_put_together() -> None:
    long = shapely.box(400_000, 7_700_000, 401_000, 7_700_060)
    sheets = [
        sheet(UTM[8], LEFT, [long.intersection(LEFT)], [0.3]),
        sheet(UTM[9], in_crs([RIGHT], UTM[9])[0], in_crs([long.intersection(RIGHT)], UTM[9]), [0.8]),
    ]
    (found,) = [(one, row) for one in join(sheets) for row in range(len(one))]
    shape = moved(found[0].geometry, found[0].crs_wkt, UTM[8])[found[1]]
    assert shape.symmetric_difference(long).area < 5
    assert found[0]["score"][found[1]] == 0.8
    assert found[0]["area_m2"][found[1]] == pytest.approx(1000 * 60, rel=2e-3)


@pytest.mark.parametrize(("share", "count"), [(0.45, 2), (0.55, 1)])
def test_the_same_is_what_overlaps_by_half_of_both(share: float, count: int) -> None:
    one = shapely.box(0, 0, 100, 100)
    other = shapely.box(0, 0, 100, 100 * share)
    ground = shapely.box(-500, -500, 500, 500)
    center = CRS.from_proj4("+proj=laea +lat_0=70 +lon_0=-130").to_wkt()
    found = join([sheet(center, ground, [one]), sheet(center, ground, [other])])
    assert sum(map(len, found)) == count
    assert found[0].geometry[0].equals(one)


def test_two_that_touch_stay_two_and_other_dates_are_others() -> None:
    center = CRS.from_proj4("+proj=laea +lat_0=70 +lon_0=-130").to_wkt()
    ground = shapely.box(-500, -500, 500, 500)
    halves = [shapely.box(0, 0, 100, 50), shapely.box(0, 50, 100, 100)]
    whole = [shapely.box(0, 0, 100, 100)]
    assert [len(one) for one in join([sheet(center, ground, halves), sheet(center, ground, halves)])] in (
        [2, 0],
        [0, 2],
    )
    assert sum(map(len, join([sheet(center, ground, halves), sheet(center, ground, whole)]))) == 2
    later = sheet(center, ground, whole, date="2021-07-01")
    assert [len(one) for one in join([sheet(center, ground, whole), later])] == [1, 1]


def test_what_stays_does_not_depend_on_the_order_of_the_maps() -> None:
    draw = np.random.default_rng(4)
    sheets = []
    for crs in (UTM[8], UTM[9], POLAR):
        shapes = [shapely.affinity.translate(shape, *draw.uniform(-12, 12, 2)) for shape in SLUMPS]
        sheets.append(sheet(crs, in_crs([LEFT], crs)[0], in_crs(shapes[: 4 + len(sheets) * 3], crs)))
    results = set()
    for order in itertools.permutations(range(3)):
        tables = dict(zip(order, join([sheets[number] for number in order]), strict=True))
        results.add(tuple(shape.wkb for number in range(3) for shape in tables[number].geometry))
    assert len(results) == 1


def test_maps_on_both_sides_of_the_antimeridian_meet() -> None:
    center = CRS.from_proj4("+proj=laea +lat_0=68 +lon_0=180 +datum=WGS84").to_wkt()
    ground, slump = shapely.box(-3000, -3000, 3000, 3000), shapely.box(-60, -50, 60, 50)
    sheets = []
    for zone in (60, 1):
        shapes = [shapely.segmentize(shape, 10) for shape in (ground, slump)]
        moved_to = moved(shapes, center, UTM[zone])
        sheets.append(sheet(UTM[zone], moved_to[0], [moved_to[1]]))
    assert sum(map(len, join(sheets))) == 1


def test_no_maps_and_empty_maps_are_left_as_they_are() -> None:
    assert join([]) == []
    empty = sheet(UTM[8], LEFT, [])
    assert [len(one) for one in join([empty, sheet(UTM[8], LEFT, SLUMPS[:2])])] == [0, 2]
