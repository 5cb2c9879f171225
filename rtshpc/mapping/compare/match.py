"""Which polygons of two sets overlap, how much, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtshpc.geo.crs import LONLAT
from rtshpc.mapping.attributes import equal_area, moved
from rtshpc.mapping.features import Features

ROUNDING = 1e-6
"""What a ratio of areas may lose on its way through projections: a limit that is just met stays met."""
Shapes = NDArray[np.object_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Overlaps:
    """Pairs of two sets of polygons with a common area; (K,) each.

    Attributes:
        one: index into the first set.
        other: index into the second.
        iou: common area over that of both together.
        share: common area over that of the smaller.
    """

    one: Ints
    other: Ints
    iou: Floats
    share: Floats


def common_projection(tables: Sequence[Features]) -> str:
    """WKT of an equal-area projection in which tables of any CRSs can be compared: areas and their ratios are true in it."""
    for features in tables:
        places: Any = shapely.centroid(features.geometry[~shapely.is_missing(features.geometry)])
        if len(places):
            return equal_area(features.crs_wkt, places[0].x, places[0].y)
    return equal_area(LONLAT, 0, 90)


def flat(geometry: Any, crs_wkt: str, projection: str) -> Shapes:
    """Shapes in another CRS, valid; polygons alone are left of what had to be repaired."""
    shapes = moved(geometry, crs_wkt, projection)
    broken = ~shapely.is_valid(shapes)
    shapes[broken] = [areal(shape) for shape in shapely.make_valid(shapes[broken])]
    return shapes


def areal(shape: Any) -> Any:
    """The polygons of a geometry, as one."""
    parts = [part for part in _leaves(shape) if part.geom_type == "Polygon" and part.area > 0]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _leaves(shape: Any) -> list[Any]:
    """What a geometry consists of, however deep."""
    if not shape.geom_type.startswith(("Multi", "Geometry")):
        return [shape]
    return [leaf for part in shape.geoms for leaf in _leaves(part)]


def overlaps(one: Shapes, other: Shapes) -> Overlaps:
    """All pairs with a common area, sorted."""
    pairs = shapely.STRtree(other).query(one, predicate="intersects")
    a, b = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    shared = shapely.area(shapely.intersection(one[a], other[b]))
    a, b, shared = a[shared > 0], b[shared > 0], shared[shared > 0]
    first, second = shapely.area(one)[a], shapely.area(other)[b]
    return Overlaps(a, b, shared / (first + second - shared), shared / np.minimum(first, second))


def best_pairs(
    found: Overlaps, least: float, rank: Callable[[int, int], Any] = lambda one, other: (one, other)
) -> list[tuple[int, int]]:
    """Pairs with an IoU of at least `least`, each member in one only: the best pair first, `rank` between equal ones."""
    enough = np.flatnonzero(found.iou >= least - ROUNDING).tolist()
    facts = {at: (int(found.one[at]), int(found.other[at])) for at in enough}
    taken: tuple[set[int], set[int]] = (set(), set())
    pairs: list[tuple[int, int]] = []
    for at in sorted(enough, key=lambda at: (-found.iou[at], rank(*facts[at]))):
        one, other = facts[at]
        if one not in taken[0] and other not in taken[1]:
            taken[0].add(one)
            taken[1].add(other)
            pairs.append((one, other))
    return pairs
