"""What is said of mapped instances, against computations of its own: geodesic areas, plain numpy, planes as terrain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyproj
import pytest
import shapely
from geo_making import BANDS, config, reflectance, write_tif
from hypothesis import given, settings, strategies as st
from rasterio.transform import Affine

from rtshpc.core.scenes import Scene
from rtshpc.mapping import attributes
from rtshpc.mapping.attributes import Origin, describe, ground_measures, moved
from rtshpc.mapping.features import COLUMNS
from rtshpc.mapping.mosaic import MapInstance

LONLAT = pyproj.CRS.from_epsg(4326).to_wkt()
GEOD = pyproj.Geod(ellps="WGS84")
STEPS = (32608, 3413, 6931, 4326, 32601)


class Place(NamedTuple):
    scene: Scene
    row: int
    col: int


def wkt(epsg: int) -> str:
    return pyproj.CRS.from_epsg(epsg).to_wkt()


def at(transform: Affine, cols: Any, rows: Any) -> Any:
    """Coordinates of pixel corners."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * cols + b * rows + c, d * cols + e * rows + f


def in_crs(shape: Any, epsg: int) -> Any:
    """A shape of degrees in a CRS; degrees beyond 180 stay as they are in degrees."""
    return shape if epsg == 4326 else moved([shape], LONLAT, wkt(epsg))[0]


@settings(max_examples=40, deadline=None)
@given(
    epsg=st.sampled_from(STEPS),
    lon=st.floats(-179.9, 180.1),
    lat=st.floats(52, 82),
    size=st.floats(0.0002, 0.05),
    wide=st.floats(1, 4),
)
def test_areas_and_perimeters_are_the_geodesic_ones(
    epsg: int, lon: float, lat: float, size: float, wide: float
) -> None:
    if epsg > 32600:
        # A transverse Mercator map is made for its zone.
        lon = (epsg - 32600) * 6 - 183 + (lon + 180) / 60
    shell = shapely.box(lon, lat, lon + wide * size, lat + size)
    hole = shapely.box(lon + size / 4, lat + size / 4, lon + size / 2, lat + size / 2)
    shape = shapely.MultiPolygon([shell.difference(hole), shapely.box(lon, lat - 2 * size, lon + size, lat - size)])
    found = ground_measures([in_crs(shape, epsg)], wkt(epsg))
    # Edges are lines of the map, which geodesics follow in small steps.
    there = in_crs(shape, epsg)
    steps = shapely.segmentize(there, math.sqrt(there.area) / 30)
    fine = steps if epsg == 4326 else moved([steps], wkt(epsg), LONLAT)[0]
    assert found["area_m2"][0] == pytest.approx(abs(GEOD.geometry_area_perimeter(_wound(fine))[0]), rel=1e-3)
    assert found["perimeter_m"][0] == pytest.approx(GEOD.geometry_length(fine.boundary), rel=1e-3)


def _wound(shape: Any) -> Any:
    """Outer rings one way and holes the other, as pyproj counts areas."""
    return shapely.MultiPolygon([shapely.geometry.polygon.orient(part) for part in shape.geoms])


def test_many_shapes_far_apart_keep_the_measures_they_have_alone() -> None:
    shapes = [shapely.box(lon, lat, lon + 0.01, lat + 0.005) for lon in range(-170, 180, 10) for lat in (60, 75)]
    found = ground_measures(shapes, LONLAT)
    alone = [ground_measures([shape], LONLAT) for shape in shapes]
    for name in ("area_m2", "perimeter_m"):
        np.testing.assert_allclose(found[name], [one[name][0] for one in alone], rtol=1e-5)


def test_elongation_is_that_of_the_narrowest_rectangle_whichever_way_it_lies() -> None:
    box = shapely.box(500_000, 7_600_000, 500_300, 7_600_100)
    turned = shapely.affinity.rotate(box, 30)
    notched = box.difference(shapely.box(500_050, 7_600_050, 500_060, 7_600_100))
    found = ground_measures([box, turned, notched], wkt(32608))["elongation"]
    np.testing.assert_allclose(found, 3, rtol=1e-3)
    assert [len(values) for values in ground_measures([], wkt(32608)).values()] == [0, 0, 0]


def discs(count: int, height: int, width: int, scene: str, seed: int = 0) -> list[MapInstance]:
    """Round instances without common pixels, some of them touching, some at an edge."""
    draw, taken, found = np.random.default_rng(seed), np.zeros((height, width), bool), []
    rows, cols = np.mgrid[:height, :width]
    while len(found) < count:
        y, x, radius = draw.uniform(0, height), draw.uniform(0, width), draw.uniform(1, 14)
        mask = ((rows - y) ** 2 + (cols - x) ** 2 < radius**2) & ~taken
        if mask.any():
            taken |= mask
            found.append(instance(mask, scene))
    return found


def instance(mask: Any, scene: str, row: int = 0, col: int = 0) -> MapInstance:
    at, to = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = mask[at[0] : at[-1] + 1, to[0] : to[-1] + 1]
    return MapInstance(int(at[0]) + row, int(to[0]) + col, tight, 0.75, 0, scene, 1)


def outline(one: MapInstance, transform: Affine) -> Any:
    """The instance's box on the ground: measures of pixels do not look at it."""
    height, width = one.mask.shape
    corners = [
        (one.col, one.row),
        (one.col + width, one.row),
        (one.col + width, one.row + height),
        (one.col, one.row + height),
    ]
    return shapely.Polygon([at(transform, *corner) for corner in corners])


def described(
    instances: list[MapInstance], places: list[Place], data: Any, crs: str, transform: Affine, dem: str = ""
) -> Any:
    shapes = [outline(one, transform) for one in instances]
    return describe(instances, shapes, crs, tuple(transform)[:6], places, data, Origin("a cell", "5eed"), dem)  # pyright: ignore[reportArgumentType]


def scene(root: Path, name: str, pixels: Any, transform: Affine, **profile: Any) -> Scene:
    write_tif(
        root / name / "image.tif", pixels, BANDS, transform=transform, **{"scale": 1e-4, "nodata": -32768, **profile}
    )
    return Scene(id=name, image=str(root / name / "image.tif"), site="Banks", date="2020-07-01")


def test_means_inside_and_around_are_those_of_plain_numpy_whatever_the_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    pixels, place = reflectance(150, 110), Affine(10, 0, 500_000, 0, -10, 7_600_000)
    pixels[:, 20:60, 30:50] = -32768
    one = scene(tmp_path, "one", pixels, place)
    instances = discs(25, 150, 110, "one")
    results = []
    for block in (1024, 37):
        monkeypatch.setattr(attributes, "_BLOCK_PX", block)
        table, notes = described(instances, [Place(one, 0, 0)], config(tmp_path), wkt(32608), place)
        assert notes == []
        results.append(table)
    for name, values in results[0].columns.items():
        np.testing.assert_array_equal(values, results[1][name], err_msg=name)
    table, taken = results[0], np.zeros((150, 110), bool)
    masks = [np.zeros((150, 110), bool) for _ in instances]
    for each, whole in zip(instances, masks, strict=True):
        whole[each.row : each.row + each.mask.shape[0], each.col : each.col + each.mask.shape[1]] = each.mask
        taken |= whole
    valid, disc = pixels[0] != -32768, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    for at, whole in enumerate(masks):
        ring = (cv2.dilate(whole.astype(np.uint8), disc) > 0) & ~taken
        for kind, mask in (("mean", whole), ("ring", ring)):
            expected = [band[mask & valid].mean() * 1e-4 if (mask & valid).any() else np.nan for band in pixels]
            found = [table[f"{kind}_{name}"][at] for name in ("rgb_red", "rgb_green", "rgb_blue", "ndvi", "nir")]
            np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert set(COLUMNS) < set(table.columns)
    assert table["class"][0] == "rts" and table["container"][0] == "5eed" and table["site"][0] == "Banks"


def test_an_instance_of_several_scenes_is_measured_in_its_own_wherever_that_lies(tmp_path: Path) -> None:
    place = Affine(10, 0, 500_000, 0, -10, 7_600_000)
    left, right = np.full((5, 60, 60), 1000, np.int16), np.full((5, 60, 60), 3000, np.int16)
    places = [
        Place(scene(tmp_path, "left", left, place), 0, 0),
        Place(scene(tmp_path, "right", right, Affine(10, 0, 500_500, 0, -10, 7_599_930)), 7, 50),
    ]
    mask = np.ones((10, 40), bool)
    across = [instance(mask, "left", 20, 30), instance(mask, "right", 40, 35)]
    table, notes = described(across, places, config(tmp_path), wkt(32608), place)
    assert notes == []
    np.testing.assert_allclose(table["mean_nir"], [0.1, 0.3])
    np.testing.assert_allclose(table["ring_nir"], [0.1, 0.3])
    Path(places[0].scene.image).unlink()
    table, notes = described(across, places, config(tmp_path), wkt(32608), place)
    np.testing.assert_allclose(table["mean_nir"], [np.nan, 0.3])
    assert len(notes) == 1 and notes[0].startswith("left: missing_file: ")


def _plane(height: int, width: int, transform: Affine, crs: str, slope: float, aspect: float) -> Any:
    """Elevations (float32) of a plane on the ground that falls by `slope` degrees towards `aspect` degrees from north."""
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xs, ys = at(transform, cols, rows)
    lons, lats = pyproj.Transformer.from_crs(crs, LONLAT, always_xy=True).transform(xs.ravel(), ys.ravel())
    middle = len(lons) // 2 + width // 2
    azimuth, _, metres = GEOD.inv(np.full_like(lons, lons[middle]), np.full_like(lats, lats[middle]), lons, lats)
    fall = metres * np.cos(np.radians(azimuth - aspect)) * math.tan(math.radians(slope))
    return (500 - fall).reshape(height, width).astype(np.float32)


@pytest.mark.parametrize(
    ("epsg", "transform"),
    [
        (32608, Affine(10, 0, 500_000, 0, -10, 7_600_000)),
        (32608, Affine(10, 0, 500_000, 0, 10, 7_600_000)),
        (3413, Affine(10, 0, -2_000_000, 0, -10, 600_000)),
        (3413, Affine(8, 6, -2_000_000, 6, -8, -600_000)),
        (4326, Affine(0.0002, 0, -134.0, 0, -0.0001, 69.0)),
        (4326, Affine(0.0002, 0, 179.994, 0, -0.0001, 69.0)),
    ],
    ids=["utm", "south-up", "polar", "polar rotated", "degrees", "antimeridian"],
)
@pytest.mark.parametrize("aspect", [0.0, 135.0, 280.0])
def test_slope_and_aspect_are_those_of_the_ground_on_any_map(
    tmp_path: Path, epsg: int, transform: Affine, aspect: float
) -> None:
    heights = _plane(60, 60, transform, wkt(epsg), 12.0, aspect)
    one = scene(tmp_path, "one", reflectance(60, 60), transform, crs=f"EPSG:{epsg}")
    write_tif(tmp_path / "one" / "dem.tif", heights, crs=f"EPSG:{epsg}", transform=transform)
    one = one.model_copy(update={"files": {"dem": str(tmp_path / "one" / "dem.tif")}})
    data = config(tmp_path)
    made = {**data.model_dump()["modalities"], "dem": {"bands": ["1"], "file": "dem.tif"}}
    data = config(tmp_path, modalities=made)
    # Rows of the instances count from the north, as those of the scene that is read do.
    upright = transform if transform.e < 0 else Affine(10, 0, 500_000, 0, -10, 7_600_600)
    instances = [instance(np.ones((8, 12), bool), "one", 24, 22), instance(np.ones((3, 3), bool), "one", 0, 0)]
    table, notes = described(instances, [Place(one, 0, 0)], data, wkt(epsg), upright, "dem")
    assert notes == []
    assert table["slope_deg"][0] == pytest.approx(12, abs=0.1)
    assert (table["aspect_deg"][0] - aspect + 180) % 360 - 180 == pytest.approx(0, abs=0.5)
    seen = heights if transform.e < 0 else heights[::-1]
    assert table["elevation_m"][0] == pytest.approx(seen[24:32, 22:34].mean(), rel=1e-5)
    # At the scene's edge only what has neighbours all around has a slope.
    assert table["slope_deg"][1] == pytest.approx(12, abs=0.2)
    assert not {"mean_dem", "ring_dem"} & set(table.columns)


def test_level_ground_faces_nowhere(tmp_path: Path) -> None:
    place = Affine(10, 0, 500_000, 0, -10, 7_600_000)
    data = config(tmp_path, modalities={"rgb": {"bands": ["red", "green", "blue"]}, "dem": {"bands": ["nir"]}})
    pixels = reflectance()
    pixels[4] = 1234
    one = scene(tmp_path, "one", pixels, place, scale=1.0)
    table, _ = described(
        [instance(np.ones((8, 12), bool), "one", 20, 20)], [Place(one, 0, 0)], data, wkt(32608), place, "dem"
    )
    assert (table["slope_deg"][0], table["elevation_m"][0]) == (0, 1234) and np.isnan(table["aspect_deg"][0])
