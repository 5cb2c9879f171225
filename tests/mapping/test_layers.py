"""The layers: other programs open them, seams of the map are none of theirs, and the same layers are the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyproj
import pytest
import rasterio
import shapely
from hypothesis import given, settings, strategies as st
from rasterio.transform import Affine
from table_making import UTM, outcome, table

from rtshpc.core.errors import RunError
from rtshpc.core.mapping.ground import Ground
from rtshpc.geo.align import same_crs
from rtshpc.mapping import layers
from rtshpc.mapping.attributes import ground_measures, moved
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import (
    Outcome,
    footprints,
    in_one_crs,
    to_degrees,
    write_geopackage,
    write_layer,
    write_scores,
)
from rtshpc.mapping.mosaic import MapInstance
from rtshpc.mapping.outlines import outlines

LONLAT = pyproj.CRS.from_epsg(4326).to_wkt()
GEOD = pyproj.Geod(ellps="WGS84")


def wkt(epsg: int) -> str:
    return pyproj.CRS.from_epsg(epsg).to_wkt()


def test_both_formats_open_in_geopandas_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="needs geopandas (extra benchmarks)")
    written = table(7)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_layer(tmp_path / folder, "slumps", written)
    for name in ("slumps.gpkg", "slumps.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    frames = [
        geopandas.read_file(tmp_path / "one" / "slumps.gpkg"),
        geopandas.read_parquet(tmp_path / "one" / "slumps.parquet"),
    ]
    for frame in frames:
        assert frame.crs == pyproj.CRS.from_epsg(32608) and len(frame) == 7
        assert shapely.equals(frame.geometry.to_numpy(), written.geometry).all()
        assert frame["scene"].tolist() == written["scene"].tolist()
        np.testing.assert_array_equal(frame["elevation_m"].to_numpy(float), written["elevation_m"])
        assert frame["pieces"].dtype == np.int64
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["slumps.gpkg", "slumps.parquet"]


def test_a_package_of_several_layers_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "map.gpkg"
    write_geopackage(path, {"old": table(2)})
    write_geopackage(path, {"slumps": table(3), "footprints": table(1, wkt(3413)), "none": table(0)})
    assert sorted(name for name, _ in pyogrio.list_layers(path)) == ["footprints", "none", "slumps"]
    assert pyogrio.read_info(path, layer="slumps")["features"] == 3
    assert pyogrio.read_info(path, layer="footprints")["crs"] == "EPSG:3413"


def test_a_layer_that_does_not_read_back_as_written_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    kept = layers._write_layer
    monkeypatch.setattr(layers, "_write_layer", lambda path, name, rows: kept(path, name, rows.take(np.arange(2))))
    with pytest.raises(RunError, match=r"map\.gpkg: does not read back as it was written"):
        write_geopackage(tmp_path / "map.gpkg", {"slumps": table(3)})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(lon=st.floats(-180, 180), lat=st.floats(-85, 85), size=st.floats(1000, 300_000))
def test_outlines_in_degrees_lie_where_they_did_and_stay_in_range(lon: float, lat: float, size: float) -> None:
    epsg = 3413 if lat > 0 else 3031
    x, y = (
        values[0] for values in pyproj.Transformer.from_crs(LONLAT, wkt(epsg), always_xy=True).transform([lon], [lat])
    )
    ring = shapely.Point(x, y).buffer(size).difference(shapely.Point(x, y).buffer(size / 2))
    degrees = to_degrees([shapely.segmentize(ring, size / 50)], wkt(epsg))[0]
    west, south, east, north = degrees.bounds
    assert degrees.is_valid and west >= -180 and east <= 180 and south >= -90 and north <= 90
    parts = shapely.get_parts(degrees)
    # No part goes round the wrong way: all have the area they have on the ground.
    there = ground_measures([ring], wkt(epsg))["area_m2"][0]
    assert sum(_area(part) for part in parts) == pytest.approx(there, rel=0.02)


def _area(polygon: Any) -> float:
    """Of degrees, on the ellipsoid, by strips of latitude."""
    return ground_measures([shapely.segmentize(polygon, 0.5)], LONLAT)["area_m2"][0]


def test_a_scene_over_the_pole_covers_the_pole() -> None:
    square = shapely.segmentize(shapely.box(-300_000, -200_000, 250_000, 400_000), 20_000)
    degrees = to_degrees([square], wkt(3413))[0]
    for lon in range(-175, 180, 10):
        assert degrees.contains(shapely.Point(lon, 89.5))
    assert not degrees.contains(shapely.Point(10, 80)) and degrees.is_valid


@pytest.mark.parametrize(
    ("epsg", "left", "step"), [(32601, 400_000, 10.0), (32660, 600_000, 10.0), (4326, 179.99, 0.0005)]
)
def test_what_crosses_the_antimeridian_is_two_parts(epsg: int, left: float, step: float) -> None:
    if epsg > 32600:
        x, _ = pyproj.Transformer.from_crs(LONLAT, wkt(epsg), always_xy=True).transform(180.0, 69.0)
        left = x - 50 * step
    top = (
        69.0
        if epsg == 4326
        else pyproj.Transformer.from_crs(LONLAT, wkt(epsg), always_xy=True).transform(180.0, 69.0)[1]
    )
    rows = footprints([outcome("a", epsg, left, top, step)], {"a": 3})
    west, _, east, _ = rows.geometry[0].bounds
    assert (west, east) == (-180, 180) and len(rows.geometry[0].geoms) == 2
    assert sum(part.bounds[2] - part.bounds[0] for part in rows.geometry[0].geoms) < 0.1
    assert rows["instances"].tolist() == [3]
    assert rows["area_m2"][0] == pytest.approx(
        abs(sum(GEOD.geometry_area_perimeter(part)[0] for part in rows.geometry[0].geoms)), rel=2e-3
    )


def test_what_lies_off_the_earth_has_no_place_in_degrees() -> None:
    view = pyproj.CRS.from_proj4("+proj=geos +h=35785831 +lon_0=-75 +sweep=x +datum=WGS84").to_wkt()
    shapes = [shapely.box(-1e5, 1e5, 1e5, 2e5), shapely.box(-6e6, -6e6, 6e6, 6e6)]
    near, off = to_degrees(shapes, view)
    assert off is None and near.centroid.x == pytest.approx(-75, abs=0.1)
    rows = in_one_crs([Features(view, shapes, {"score": np.array([0.5, 0.6])}), table(1)])  # pyright: ignore[reportArgumentType]
    assert shapely.is_missing(rows.geometry).sum() == 1 and len(rows) == 3


def test_degrees_beyond_180_are_brought_back_in_the_layer_of_a_whole_run() -> None:
    rows = Features(
        LONLAT, [shapely.box(179.9, 70, 180.1, 70.1), shapely.box(180.2, 70, 180.3, 70.1)], {"score": [0.5, 0.6]}
    )  # pyright: ignore[reportArgumentType]
    whole = in_one_crs([rows])
    assert sorted(len(shapely.get_parts(shape)) for shape in whole.geometry) == [1, 2]
    assert shapely.total_bounds(whole.geometry)[[0, 2]].tolist() == [-180, 180]
    assert shapely.area(whole.geometry).sum() == pytest.approx(0.2 * 0.1 + 0.1 * 0.1)


def test_footprints_name_every_scene_and_why_it_was_left_out(tmp_path: Path) -> None:
    outcomes = [
        outcome("c", 32608, 500_000, 7_600_000, 10),
        Outcome("b", "Peel", "2020-07-01", "b.tif", None, "rejected", "truncated", "b.tif: strip 7"),
        outcome("a", 32609, 500_000, 7_600_000, 10, "failed", "no_result"),
    ]
    rows = footprints(outcomes, {"c": 2})
    assert rows.same(footprints(outcomes[::-1], {"c": 2}))
    assert rows["scene"].tolist() == ["a", "b", "c"] and rows["state"].tolist() == ["failed", "rejected", "mapped"]
    assert rows["reason"].tolist() == ["no_result", "truncated", ""]
    assert rows.geometry[1] is None
    np.testing.assert_allclose(rows["area_m2"], [1e6, np.nan, 1e6], rtol=1e-3)
    np.testing.assert_array_equal(rows["valid_m2"], [4e5, np.nan, 4e5])
    write_layer(tmp_path, "footprints", rows)
    assert pyogrio.read_info(tmp_path / "footprints.gpkg")["features"] == 3


def test_zones_meet_in_degrees_and_one_crs_is_kept() -> None:
    one, other = table(3), table(2, wkt(32609))
    assert same_crs(in_one_crs([one, table(2, seed=3)]).crs_wkt, UTM)
    both = in_one_crs([one, other])
    assert same_crs(both.crs_wkt, LONLAT) and len(both) == 5
    back = moved(both.geometry, LONLAT, UTM)
    there = np.concatenate([one.geometry, moved(other.geometry, wkt(32609), UTM)])
    assert shapely.area(shapely.union_all(back)) == pytest.approx(shapely.area(shapely.union_all(there)), rel=1e-6)
    assert both.same(in_one_crs([other, one]))
    assert isinstance(both, Features)


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_a_cog_of_scores_holds_each_instance_pixel_by_pixel(tmp_path: Path, turn: float) -> None:
    place = Affine.translation(500_000, 7_600_000) @ Affine.rotation(turn) @ Affine.scale(10, -10)
    ground = Ground(crs_wkt=UTM, transform=tuple(place)[:6], height=1200, width=700, resolution_m=10)  # pyright: ignore[reportArgumentType]
    draw, masks = np.random.default_rng(0), np.zeros((1200, 700), np.float32)
    instances = []
    for row, col in ((3, 5), (500, 600), (1100, 200)):
        mask = draw.random((40, 60)) < 0.6
        score = round(float(draw.random()), 3)
        instances.append(MapInstance(row, col, mask, score, 0, "a", 1))
        masks[row : row + 40, col : col + 60][mask] = score
    rows = Features(UTM, outlines(instances, ground.transform), {"score": np.array([one.score for one in instances])})  # pyright: ignore[reportArgumentType]
    write_scores(tmp_path / "scores.tif", ground, rows)
    with rasterio.open(tmp_path / "scores.tif") as file:
        np.testing.assert_array_equal(file.read(1), masks)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.nodata == 0 and file.overviews(1)
        assert same_crs(file.crs.to_wkt(), UTM) and file.transform.almost_equals(place)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.tif"]
    write_scores(tmp_path / "none.tif", ground, rows.take(np.zeros(3, bool)))
    with rasterio.open(tmp_path / "none.tif") as file:
        assert not file.read(1).any()
