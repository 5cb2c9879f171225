from __future__ import annotations

import numpy as np
import pytest
import shapely
from geo_making import slumps

from rtshpc.geo.chips import ChipBox
from rtshpc.geo.instances import InstanceMap, crop, drop_small, from_ids, from_raster, label_instances, rasterise

GRID = (1.0, 0.0, 0.0, 0.0, -1.0, 32.0)


def flood(mask: np.ndarray) -> list[frozenset[tuple[int, int]]]:
    """8-connected components by the definition."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        todo, part = [left.pop()], set()
        while todo:
            row, col = todo.pop()
            part.add((row, col))
            near = {(row + dr, col + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(frozenset(part))
    return found


@pytest.mark.parametrize("share", [0.004, 0.02, 0.1, 0.3, 0.5, 0.8])
def test_components_are_those_of_the_definition_in_reading_order(share: float) -> None:
    mask = np.random.default_rng(3).random((40, 33)) < share
    ids = label_instances(mask)
    parts = [
        frozenset(zip(*map(np.ndarray.tolist, np.nonzero(ids == n)), strict=True)) for n in range(1, ids.max() + 1)
    ]
    assert set(parts) == set(flood(mask))
    assert [min(part) for part in parts] == sorted(min(part) for part in parts)
    assert ids.dtype == np.int32


def test_a_hole_stays_a_hole_and_corners_connect() -> None:
    ids = label_instances(slumps())
    assert ids.max() == 2
    assert ids[12, 12] == 0
    assert label_instances(np.eye(5)).max() == 1


def test_touching_ids_stay_apart_and_gaps_close() -> None:
    values = np.zeros((8, 8), np.uint16)
    values[:, :4], values[:4, 4:], values[7, 7] = 9, 3, 9
    ids = from_ids(values)
    assert sorted(np.unique(ids)) == [0, 1, 2]
    assert (ids == 2).sum() == (values == 9).sum()
    assert np.array_equal(from_ids(values.astype(np.float32)), ids)
    assert np.array_equal(from_ids(values.astype(np.int64) * 10_000_000_000), ids)


def test_negative_ids_are_no_instances() -> None:
    assert from_ids(np.array([[-5, 0, 2]], np.int16)).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32", "float64"])
@pytest.mark.parametrize("value", [1, 255])
def test_one_value_is_a_mask_whatever_it_is(dtype: str, value: int) -> None:
    found = from_raster((slumps() * np.uint8(value)).astype(dtype), "mask", None)
    assert np.array_equal(found.ids, label_instances(slumps()))
    assert not found.ignore.any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_an_undeclared_255_beside_1_is_unlabelled_ground_whatever_the_type(dtype: str) -> None:
    values = slumps().astype(dtype)
    values[18:25, :40] = 255
    found = from_raster(values, "mask", None)
    labels = slumps()
    labels[18:25, :40] = 0
    assert np.array_equal(found.ids, label_instances(labels))
    assert np.array_equal(found.ignore, values == 255)
    assert [note.split(":")[0] for note in found.notes] == ["label_values"]


def test_values_of_a_mask_that_are_hardly_ids_are_told() -> None:
    scattered = slumps() * np.uint8(3)
    scattered[40:43, 30:33] = 2
    scattered[5:8, 5:8] = 2
    gray = slumps() * np.uint8(255)
    gray[40:] //= 2
    specks = slumps() * np.uint8(255)
    specks[6, 6] = 254
    for values in (scattered, gray, specks):
        assert [note.split(":")[0] for note in from_raster(values, "mask", None).notes] == ["label_values"]
        assert from_raster(values, "instances", None).notes == ()
    ids = from_ids(label_instances(slumps()) * 4)
    assert from_raster(ids, "mask", None).notes == ()


def test_ids_beyond_any_integer_stay_apart() -> None:
    values = np.array([[1e30, 2e30, 0, 1e30]])
    assert from_ids(values).tolist() == [[1, 2, 0, 1]]


def test_several_values_are_ids_even_in_a_mask() -> None:
    values = slumps().astype(np.uint16)
    values[5:20, 12:] *= 2
    assert from_raster(values, "mask", None).count == 2 + 0
    assert from_raster(slumps(), "mask", None).count == 2
    assert from_raster(slumps(), "instances", None).count == 1


def test_declared_nodata_is_unlabelled_ground() -> None:
    values = slumps()
    values[60:] = 255
    found = from_raster(values, "mask", values == 255)
    assert found.count == 2
    assert found.ignore.sum() == 4 * 64
    undeclared = from_raster(values, "mask", None)
    assert np.array_equal(undeclared.ids, found.ids)
    assert np.array_equal(undeclared.ignore, found.ignore)
    assert undeclared.notes


def test_nan_in_a_mask_is_unlabelled_and_shares_are_told() -> None:
    values = slumps().astype(np.float32)
    values[0] = np.nan
    assert from_raster(values, "mask", None).ignore[0].all()
    values = slumps() * np.linspace(0.1, 0.9, 64, dtype=np.float32)
    found = from_raster(values, "mask", None)
    assert (found.count, len(found.notes)) == (2, 1)


def test_small_instances_are_dropped_and_the_rest_renumbered() -> None:
    ids = from_ids(np.array([[1, 2, 2, 3, 3, 3]]))
    assert drop_small(ids, 2).tolist() == [[0, 1, 1, 2, 2, 2]]
    assert drop_small(ids, 1) is ids


def test_a_crop_is_renumbered_keeps_classes_and_ignores_slivers() -> None:
    ids = np.zeros((32, 32), np.int32)
    ids[0, :20], ids[10:20, 14:30], ids[30:, 30:] = 1, 2, 3
    whole = InstanceMap(ids, [5, 6, 7], np.zeros((32, 32), np.bool_))
    part = crop(whole, ChipBox(8, 16, 16))
    assert (part.count, part.classes) == (1, [6])
    assert np.array_equal(part.ids > 0, ids[8:24, 16:] == 2)
    sliver = crop(whole, ChipBox(0, 16, 16), min_px=5)
    assert sliver.classes == [6]
    assert sliver.ignore.sum() == 4
    padded = crop(whole, ChipBox(0, 0, 40))
    assert padded.ids.shape == (40, 40)
    assert padded.classes == [5, 6, 7]
    assert crop(whole, ChipBox(0, 0, 32)) is whole


def test_polygons_keep_touching_slumps_apart_and_small_ones_on_top() -> None:
    large, beside, inside = shapely.box(0, 0, 16, 32), shapely.box(16, 0, 32, 32), shapely.box(4, 4, 8, 8)
    ids, classes = rasterise([inside, large, beside], [2, 0, 1], GRID, 32, 32)
    assert ids.max() == 3
    assert sorted(classes) == [0, 1, 2]
    assert (ids == 1 + classes.index(2)).sum() == 16
    hole = large.difference(inside)
    assert (rasterise([hole], [0], GRID, 32, 32)[0] > 0).sum() == 16 * 32 - 16


def test_a_polygon_without_a_pixel_centre_is_left_out() -> None:
    ids, classes = rasterise([shapely.box(0.6, 0.6, 0.9, 0.9), shapely.box(3, 3, 5, 5)], [0, 1], GRID, 32, 32)
    assert classes == [1]
    assert ids.max() == 1
    assert rasterise([], [], GRID, 4, 4)[1] == []
