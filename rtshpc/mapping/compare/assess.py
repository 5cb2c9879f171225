"""A map beside reference polygons: precision, recall and F1 of its instances and of its area, per site.

Only ground where both are known counts: what was mapped (where the map says so), less the ignore regions. An instance or a
reference with less than half of its area there is left out; of the others the part there is compared. Instances are right when
they match a reference with an IoU of at least the one asked for, the best pair first, each in one pair only. By area, what
several polygons of one side cover counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rtshpc.mapping import features as table
from rtshpc.mapping.compare.match import ROUNDING, Shapes, areal, best_pairs, common_projection, flat, overlaps
from rtshpc.mapping.compare.sources import Source, sites_of
from rtshpc.mapping.features import Features

WHOLE = "all"
LEAST_KNOWN = 0.5


@dataclass(frozen=True)
class Score:
    """How a map agrees with references, of one site or of all.

    Attributes:
        mapped: instances of the map that count.
        right: those that match a reference.
        reference: references that count.
        found: those that an instance matches.
        mapped_m2: area of the map.
        reference_m2: area of the references.
        shared_m2: area of both.
    """

    mapped: int
    right: int
    reference: int
    found: int
    mapped_m2: float
    reference_m2: float
    shared_m2: float

    def figures(self) -> dict[str, float | int | None]:
        """Counts, and shares of 1; None where there is nothing to divide by."""
        precision, recall = _share(self.right, self.mapped), _share(self.found, self.reference)
        by_area = _share(self.shared_m2, self.mapped_m2), _share(self.shared_m2, self.reference_m2)
        return vars(self) | {
            "precision": precision,
            "recall": recall,
            "f1": _f1(precision, recall),
            "area_precision": by_area[0],
            "area_recall": by_area[1],
            "area_f1": _f1(*by_area),
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _f1(precision: float | None, recall: float | None) -> float | None:
    """Their harmonic mean; 0 where one is 0, or is not defined because its side is empty."""
    if precision is None and recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


@dataclass(frozen=True)
class _Side:
    """The polygons of one side: their parts on known ground, which of them count, and the site of each."""

    parts: Shapes
    counts: NDArray[np.bool_]
    sites: NDArray[np.object_]


def assess(
    source: Source, reference: Features, ignore: Features | None = None, least_iou: float = 0.5
) -> dict[str, Score]:
    """Scores by site, in order of their names, and of all together under `all`.

    Args:
        source: the map.
        reference: polygons; a column `site` tells their sites where the map does not know its grounds.
        ignore: regions where nothing is known.
        least_iou: of a right instance.
    """
    projection = common_projection([source.features, reference])
    known, grounds = _known(source, ignore, projection)
    mapped = _side(source.features, projection, known, grounds)
    true = _side(reference, projection, known, grounds)
    a, b = np.flatnonzero(mapped.counts), np.flatnonzero(true.counts)
    pairs = best_pairs(overlaps(mapped.parts[a], true.parts[b]), least_iou)
    right, found = np.zeros(len(mapped.parts), np.bool_), np.zeros(len(true.parts), np.bool_)
    right[a[[one for one, _ in pairs]]] = True
    found[b[[other for _, other in pairs]]] = True

    def score(sides: Sequence[NDArray[np.bool_]]) -> Score:
        one, other = sides
        areas = [shapely.union_all(side.parts[chosen]) for side, chosen in zip((mapped, true), sides, strict=True)]
        return Score(
            mapped=int((mapped.counts & one).sum()),
            right=int((right & one).sum()),
            reference=int((true.counts & other).sum()),
            found=int((found & other).sum()),
            mapped_m2=float(areas[0].area),
            reference_m2=float(areas[1].area),
            shared_m2=float(areas[0].intersection(areas[1]).area),
        )

    names = sorted({*mapped.sites, *true.sites})
    by_site = {name: score([side.sites == name for side in (mapped, true)]) for name in names}
    return by_site | {WHOLE: score([np.ones(len(side.sites), np.bool_) for side in (mapped, true)])}


def _known(source: Source, ignore: Features | None, projection: str) -> tuple[Any | None, dict[str, Any]]:
    """The ground that counts (None = everywhere), and the ground of each site."""
    grounds: dict[str, Any] = {}
    whole: Any | None = None
    if source.grounds is not None:
        shapes = flat(source.grounds.geometry, source.grounds.crs_wkt, projection)
        grounds = {
            site: shapely.union_all(shapes[rows]) for site, rows in sorted(source.grounds.rows_by(table.SITE).items())
        }
        whole = shapely.union_all(list(grounds.values()))
    if ignore is None or not len(ignore):
        return whole, grounds
    hidden = shapely.union_all(flat(ignore.geometry, ignore.crs_wkt, projection))
    if whole is None:
        left, bottom, right, top = shapely.bounds(hidden).tolist()
        reach = 1e8  # m, beyond the Earth
        whole = shapely.box(left - reach, bottom - reach, right + reach, top + reach)
    return shapely.difference(whole, hidden), grounds


def _side(features: Features, projection: str, known: Any | None, grounds: dict[str, Any]) -> _Side:
    shapes = flat(features.geometry, features.crs_wkt, projection)
    parts = shapes.copy()
    if known is not None:
        shapely.prepare(known)
        cut = np.flatnonzero(~shapely.covers(known, shapes))
        parts[cut] = [areal(shape) for shape in shapely.intersection(shapes[cut], known)]
    area = shapely.area(parts)
    counts = (area > 0) & (area >= (LEAST_KNOWN - ROUNDING) * shapely.area(shapes))
    if not grounds:
        return _Side(parts, counts, np.array([*sites_of(features), None], np.object_)[:-1])
    shares = np.zeros((len(grounds), len(shapes)))
    for share, ground in zip(shares, grounds.values(), strict=True):
        shapely.prepare(ground)
        there = shapely.intersects(ground, shapes)
        share[there] = shapely.area(shapely.intersection(shapes[there], ground))
    names = np.array([*grounds, None], np.object_)[:-1]
    sites = names[shares.argmax(axis=0)]
    # What lies on no ground at all counts nowhere.
    return _Side(parts, counts, np.where(shares.max(axis=0) > 0, sites, names[0]))
