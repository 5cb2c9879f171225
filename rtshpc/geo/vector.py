"""Label polygons from GeoJSON, GeoPackage or Shapefile, on the primary grid."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely

from rtshpc.core.errors import SceneRejected, guess
from rtshpc.geo.crs import LONLAT, corners, transformer
from rtshpc.geo.raster import Grid, sniff_text

VECTOR_SUFFIXES = frozenset({".geojson", ".json", ".gpkg", ".shp", ".fgb", ".parquet"})


@dataclass(frozen=True)
class Polygons:
    """Polygons in the grid's CRS that touch the scene.

    Attributes:
        labels: one shapely (multi)polygon an instance.
        classes: index into the classes, one a label.
        ignore: regions where nothing is known.
        total: polygons in the file, touching or not.
        swapped: none touches, but they would with x and y exchanged.
        dropped: features of the file without a polygon.
    """

    labels: list[Any]
    classes: list[int]
    ignore: list[Any]
    total: int
    swapped: bool
    dropped: int = 0


def footprint(grid: Grid) -> Any:
    """The scene's outline in its CRS, a shapely polygon."""
    xs, ys = corners(grid.transform, grid.width, grid.height, steps=1)
    return shapely.Polygon(list(zip(xs, ys, strict=True)))


def read_polygons(
    path: Path | str,
    grid: Grid,
    classes: Sequence[str] = ("rts",),
    class_property: str = "",
    ignore_property: str = "",
    ignore_when: Sequence[str] = (),
) -> Polygons:
    """Polygons of `path` that touch `grid`, each with its class, ignore regions apart.

    Raises:
        SceneRejected: `label_unreadable`, `label_no_crs` or `label_class`.
    """
    path = Path(path)
    sniff_text(path)
    wanted = [name for name in (class_property, ignore_property) if name]
    try:
        with warnings.catch_warnings():
            # An open ring and the like are told by what becomes of the geometry.
            warnings.simplefilter("ignore", RuntimeWarning)
            meta, _, blobs, columns = pyogrio.raw.read(path, columns=wanted, force_2d=True)
        shapes = _unpacked(shapely.from_wkb(blobs))
    except (RuntimeError, ValueError, shapely.errors.ShapelyError) as error:
        raise SceneRejected("label_unreadable", f"{path.name}: {' '.join(str(error).split())[:200]}") from None
    if shapes is None:
        raise SceneRejected("label_unreadable", f"{path.name} holds no geometry")
    for name in wanted:
        if name not in meta["fields"] and len(shapes):
            raise SceneRejected("label_class", f'{path.name} has no property "{name}"')
    kept = np.flatnonzero(_areal(shapes))
    if not kept.size:
        if len(shapes):
            detail = f"{path.name} holds {len(shapes)} features and no polygons among them"
            raise SceneRejected("label_unreadable", detail)
        return Polygons([], [], [], 0, False)
    if not meta["crs"]:
        raise SceneRejected("label_no_crs", f"{path.name} has no CRS")
    values = dict(zip(list(meta["fields"]), columns, strict=True))
    ground, swapped = _on_grid(shapes[kept], meta["crs"], grid)
    touching = [(index, shape) for index, shape in zip(kept, ground, strict=True) if shape is not None]
    result = Polygons([], [], [], len(kept), swapped, len(shapes) - len(kept))
    for index, shape in touching:
        if ignore_property and str(values[ignore_property][index]) in ignore_when:
            result.ignore.append(shape)
            continue
        result.labels.append(shape)
        result.classes.append(_class(path, values, index, classes, class_property))
    return result


def _unpacked(shapes: Any) -> Any:
    """Geometry collections as the polygons in them; anything else as it is."""
    if shapes is None:
        return None
    mixed = shapely.get_type_id(shapes) == shapely.GeometryType.GEOMETRYCOLLECTION
    shapes[mixed] = [_polygonal(shape) for shape in shapes[mixed]]
    return shapes


def _areal(shapes: Any) -> Any:
    kinds = shapely.get_type_id(shapes)
    areal = (kinds == shapely.GeometryType.POLYGON) | (kinds == shapely.GeometryType.MULTIPOLYGON)
    return areal & ~shapely.is_empty(shapes)


def _class(path: Path, values: dict[str, Any], index: int, classes: Sequence[str], class_property: str) -> int:
    if not class_property:
        return 0
    name = str(values[class_property][index])
    if name not in classes:
        raise SceneRejected("label_class", f'{path.name}: class "{name}" is unknown.{guess(name, classes)}')
    return list(classes).index(name)


def _on_grid(shapes: Any, crs: str, grid: Grid) -> tuple[list[Any], bool]:
    """Polygons in the grid's CRS, None for those that do not touch it; and whether x and y seem exchanged."""
    outline = footprint(grid)
    moved = _moved(shapes, crs, grid.crs_wkt, swap=False)
    touches = shapely.intersects(moved, outline)
    if touches.any():
        return [shape if hit else None for shape, hit in zip(moved, touches, strict=True)], False
    exchanged = _moved(shapes, crs, grid.crs_wkt, swap=True)
    return [None] * len(shapes), bool(shapely.intersects(exchanged, outline).any())


def _moved(shapes: Any, crs: str, target: str, swap: bool) -> Any:
    import pyproj

    source = LONLAT if crs in ("EPSG:4326", "OGC:CRS84") else pyproj.CRS.from_user_input(crs).to_wkt()
    change = transformer(source, target)

    def move(points: Any) -> Any:
        xs, ys = change.transform(points[:, 1], points[:, 0]) if swap else change.transform(points[:, 0], points[:, 1])
        return np.column_stack([xs, ys])

    moved = shapely.transform(shapes, move)
    finite = np.isfinite(shapely.bounds(moved)).all(axis=1)
    moved = np.where(finite, moved, shapely.Polygon())
    broken = ~shapely.is_valid(moved)
    if broken.any():
        moved[broken] = [_polygonal(shape) for shape in shapely.make_valid(moved[broken])]
    return moved


def _polygonal(shape: Any) -> Any:
    """The areal part of a geometry: of collections, and of repaired ones (repairs may leave lines and points)."""
    return shapely.union_all([part for part in _flat([shape]) if part.geom_type == "Polygon" and part.area > 0])


def _flat(parts: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for part in parts:
        whole = not part.geom_type.startswith(("Multi", "Geometry"))
        found.extend([part] if whole else _flat(shapely.get_parts(part).tolist()))
    return found
