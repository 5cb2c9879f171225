"""Layers that others open: GeoPackage and GeoParquet of instances, and of the ground that was mapped or was not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyproj
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.shutil import copy
from rasterio.transform import Affine
from rasterio.windows import Window

from rtshpc.core.errors import RunError
from rtshpc.core.mapping.ground import Ground
from rtshpc.core.records import replacing
from rtshpc.geo.align import same_crs
from rtshpc.geo.crs import LONLAT, corners, crs_facts
from rtshpc.mapping import features as table
from rtshpc.mapping.attributes import ground_measures, moved
from rtshpc.mapping.features import Features, joined, read_features, write_features

MAPPED = "mapped"
_STRIP_PX = 512
_EDGE_STEPS = 16
"""Parts that a footprint's edge is cut into, so that it follows the ground in degrees too."""
_PACKAGE_VERSION = "1.2"
"""Of GeoPackage: GDAL and QGIS of many years open it without a warning, and nothing here needs a later one."""
_CLOCK = "2000-01-01T00:00:00.000Z"
"""What a GeoPackage says of the time of its last change: the same layers are the same bytes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a scene.

    Attributes:
        scene: its name.
        site: its site.
        date: its date, as it was given.
        image: path or URL of its raster.
        ground: its grid; None where its files could not be read.
        state: `mapped`, `rejected` (its data cannot be used) or `failed` (a task of it has no result).
        reason: a short stable word; empty where it was mapped.
        detail: the same for people.
        valid_px: pixels that hold data.
    """

    scene: str
    site: str
    date: str
    image: str
    ground: Ground | None
    state: str
    reason: str = ""
    detail: str = ""
    valid_px: int = 0


def footprints(outcomes: Sequence[Outcome], instances: Mapping[str, int]) -> Features:
    """The ground of every scene in degrees: what was mapped, what was not and why; no place where none is known.

    Args:
        outcomes: of all scenes of the run.
        instances: scene -> how many instances it holds.
    """
    shapes = [footprint(outcome) for outcome in outcomes]
    grounds = [outcome.ground for outcome in outcomes]
    steps = np.array([ground.resolution_m if ground else np.nan for ground in grounds], np.float64)
    columns: dict[str, Any] = {
        table.SCENE: [outcome.scene for outcome in outcomes],
        table.DATE: [outcome.date for outcome in outcomes],
        table.SITE: [outcome.site for outcome in outcomes],
        "state": [outcome.state for outcome in outcomes],
        "reason": [outcome.reason for outcome in outcomes],
        "detail": [outcome.detail for outcome in outcomes],
        "instances": np.array([instances.get(outcome.scene, 0) for outcome in outcomes], np.int64),
        table.AREA: np.array([_ground_area(outcome) for outcome in outcomes], np.float64),
        "valid_m2": np.array([outcome.valid_px for outcome in outcomes]) * steps**2,
        "resolution_m": steps,
        "crs": [crs_facts(ground.crs_wkt).name if ground else "" for ground in grounds],
        "image": [outcome.image for outcome in outcomes],
    }
    return Features(LONLAT, shapes, columns).ordered()  # pyright: ignore[reportArgumentType]


def footprint(outcome: Outcome) -> Any | None:
    """A scene's outline in degrees; None where it has no place there."""
    return None if outcome.ground is None else to_degrees([outline_of(outcome.ground)], outcome.ground.crs_wkt)[0]


def outline_of(ground: Ground) -> Any:
    """A scene's outline in its own CRS, with points along its edges."""
    xs, ys = corners(ground.transform, ground.width, ground.height, steps=_EDGE_STEPS)
    return shapely.Polygon(list(zip(xs, ys, strict=True)))


def _ground_area(outcome: Outcome) -> float:
    if outcome.ground is None:
        return np.nan
    return float(ground_measures([outline_of(outcome.ground)], outcome.ground.crs_wkt)[table.AREA][0])


def in_one_crs(tables: Sequence[Features]) -> Features:
    """Tables as one: in their CRS where they share a projected one, else in degrees between -180 and 180."""
    first = tables[0].crs_wkt
    if crs_facts(first).geographic or not all(same_crs(one.crs_wkt, first) for one in tables[1:]):
        tables = [Features(LONLAT, to_degrees(one.geometry, one.crs_wkt), one.columns) for one in tables]
    return joined(tables).ordered()


def to_degrees(geometry: Any, crs_wkt: str) -> NDArray[np.object_]:
    """Shapes in longitude and latitude (WGS84), -180 to 180; what crosses longitude 180 becomes two parts, as in RFC 7946.

    What lies off the Earth (the corners of a satellite's view) has no place in degrees: None.
    """
    shapes = moved(geometry, crs_wkt, LONLAT)
    shapes[~np.isfinite(shapely.bounds(shapes).reshape(-1, 4)).all(axis=1)] = None
    west, _, east, _ = np.nan_to_num(shapely.bounds(shapes).reshape(-1, 4)).T
    for row in np.flatnonzero((east - west > 180) | (east > 180) | (west < -180)):
        shapes[row] = _cut_at_180(shapes[row])
    return shapes


def _cut_at_180(shape: Any) -> Any:
    """A shape whose longitudes jump, in parts that lie between -180 and 180."""
    world, parts = shapely.box(-180, -90, 180, 90), list[Any]()
    for polygon in shapely.make_valid([_unrolled(part) for part in shapely.get_parts(shape)]):
        for turn in (-2, -1, 0, 1, 2):
            turned = shapely.transform(polygon, lambda points, by=360.0 * turn: points + np.array([by, 0.0]))
            parts += _areas(turned.intersection(world))
    # Parts of one polygon may share a meridian, where a multipolygon must not.
    return shapely.union_all(parts)


def _areas(shape: Any) -> list[Any]:
    return [part for part in shapely.get_parts(shape) if part.geom_type == "Polygon" and part.area > 0]


def _unrolled(polygon: Any) -> Any:
    """A polygon with longitudes that go on over 180; one around a pole gets the pole as an edge."""
    rings: list[Any] = []
    for ring in (polygon.exterior, *polygon.interiors):
        points = shapely.get_coordinates(ring)
        points[:, 0] = np.unwrap(points[:, 0], period=360)
        if abs(points[-1, 0] - points[0, 0]) > 180:
            pole = 90.0 if points[:, 1].mean() > 0 else -90.0
            points = np.vstack([points, [points[-1, 0], pole], [points[0, 0], pole]])
        if rings:
            # A hole lies in the same turn as the ring around it.
            points[:, 0] += 360 * np.round((rings[0][:, 0].mean() - points[:, 0].mean()) / 360)
        rings.append(points)
    return shapely.Polygon(rings[0], rings[1:])


def write_geopackage(path: Path, layers: Mapping[str, Features]) -> None:
    """Write layers by name into one GeoPackage, whole or not at all; polygons become multipolygons.

    Raises:
        RunError: what is read back is not what was written.
    """
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _CLOCK})
    try:
        with replacing(path) as temporary, warnings.catch_warnings():
            # The file's last name ends in .gpkg; that of the temporary one is of no interest.
            warnings.filterwarnings("ignore", ".*extension.*", RuntimeWarning)
            temporary.unlink()
            for name, features in layers.items():
                _write_layer(temporary, name, features)
            if not all(_read_layer(temporary, name).same(_many(features)) for name, features in layers.items()):
                raise RunError(f"{path}: does not read back as it was written")
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


def _write_layer(path: Path, name: str, features: Features) -> None:
    pyogrio.raw.write(
        path,
        shapely.to_wkb(features.geometry, byte_order=1),
        [np.asarray(values) for values in features.columns.values()],
        list(features.columns),
        layer=name,
        driver="GPKG",
        geometry_type="MultiPolygon",
        promote_to_multi=True,
        crs=features.crs_wkt,
        nan_as_null=True,
        dataset_options={"VERSION": _PACKAGE_VERSION},
    )


def _read_layer(path: Path, name: str) -> Features:
    meta, _, blobs, columns = pyogrio.raw.read(path, layer=name)
    crs = pyproj.CRS.from_user_input(meta["crs"]).to_wkt()
    return Features(crs, shapely.from_wkb(blobs), dict(zip(meta["fields"], columns, strict=True)))


def _many(features: Features) -> Features:
    """With multipolygons in the place of polygons."""
    shapes = [
        shapely.MultiPolygon([shape]) if shape is not None and shape.geom_type == "Polygon" else shape
        for shape in features.geometry
    ]
    return Features(features.crs_wkt, shapes, features.columns)  # pyright: ignore[reportArgumentType]


def write_table(path: Path, features: Features) -> Path:
    """Write a GeoParquet and read it back.

    Raises:
        RunError: what is read back is not what was written.
    """
    write_features(path, features)
    if not read_features(path).same(features):
        raise RunError(f"{path}: does not read back as it was written")
    return path


def write_layer(folder: Path, name: str, features: Features) -> dict[str, Path]:
    """Write `NAME.gpkg` (with a layer of that name) and `NAME.parquet`, and read both back.

    Returns:
        `package` and `table`.

    Raises:
        RunError: what is read back is not what was written.
    """
    package = folder / f"{name}.gpkg"
    write_geopackage(package, {name: features})
    return {"package": package, "table": write_table(folder / f"{name}.parquet", features)}


def write_scores(path: Path, ground: Ground, features: Features) -> None:
    """Write a COG (float32) on a scene's grid: the score of the instance that a pixel belongs to, 0 and nodata elsewhere.

    Args:
        path: where to.
        ground: the scene's grid.
        features: instances in its CRS, outlined along its pixels.
    """
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": _STRIP_PX, "blockysize": _STRIP_PX, "count": 1}
    place = {
        "crs": ground.crs_wkt,
        "transform": Affine(*ground.transform),
        "height": ground.height,
        "width": ground.width,
    }
    tree = shapely.STRtree(features.geometry)
    with replacing(path) as temporary, ExitStack() as stack:
        plain = temporary.with_name(f"{temporary.name}.plain.tmp")
        stack.callback(plain.unlink, missing_ok=True)
        with rasterio.open(plain, "w", **profile, **place, dtype="float32", nodata=0, compress="deflate") as file:
            for top in range(0, ground.height, _STRIP_PX):
                rows = min(_STRIP_PX, ground.height - top)
                window = Window(0, top, ground.width, rows)  # pyright: ignore[reportCallIssue]
                strip = file.window_transform(window)
                xs, ys = corners(tuple(strip)[:6], ground.width, rows, steps=1)  # pyright: ignore[reportArgumentType]
                chosen = np.sort(tree.query(shapely.Polygon(list(zip(xs, ys, strict=True)))))
                if len(chosen):
                    pairs = [(features.geometry[row], features[table.SCORE][row]) for row in chosen]
                    drawn = rasterize(pairs, (rows, ground.width), transform=strip, dtype="float32")
                    file.write(drawn, 1, window=window)
        copy(plain, temporary, driver="COG", compress="deflate", overview_resampling="average")
