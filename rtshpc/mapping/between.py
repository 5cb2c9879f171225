"""One set of instances of maps on different grids or in different CRSs, whose grounds meet.

No px is common to two grids, so outlines are compared: of two maps of one date, instances are the same where the parts in
their common ground overlap with an IoU of at least 0.5, each with at most one of the other map, the best first. Of those
that are the same the largest stays (it is the least cut by the end of its ground), with the higher score of them; what
another shows beyond the ground of those before it is added to it. Its area then differs from the true one by less than its
perimeter times half a px of the coarser grid. Everything is compared in an equal-area projection around the common ground, so
that degrees, several zones, poles and the antimeridian are all one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import shapely

from rtshpc.geo.crs import LONLAT
from rtshpc.mapping import features as table
from rtshpc.mapping.attributes import equal_area, ground_measures, moved
from rtshpc.mapping.compare.match import Shapes, areal, best_pairs, flat, overlaps
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import to_degrees
from rtshpc.mapping.mosaic import connected

LEAST_IOU = 0.5
Row = tuple[int, int]
"""Number of a map, and a row of its table."""


@dataclass(frozen=True)
class Sheet:
    """What was mapped on one grid.

    Attributes:
        date: only maps of one date are compared.
        ground: outline of what was mapped, in the CRS of the features.
        features: the instances.
    """

    date: str
    ground: Any
    features: Features


@dataclass(frozen=True)
class _Meeting:
    """Two sheets whose grounds meet, in a projection around their common ground."""

    numbers: tuple[int, int]
    common: Any
    projection: str


def join(sheets: Sequence[Sheet]) -> list[Features]:
    """The tables of `sheets`, in their order, with each instance in one of them only; which one does not depend on the order."""
    order = sorted(range(len(sheets)), key=lambda number: _name(sheets[number]))
    tables = _join([sheets[number] for number in order])
    return [table for _, table in sorted(zip(order, tables, strict=True), key=itemgetter(0))]


def _name(sheet: Sheet) -> tuple[Any, ...]:
    outlines = shapely.to_wkb(sheet.features.geometry, byte_order=1).tolist()
    return sheet.date, sheet.features.crs_wkt, shapely.to_wkb(sheet.ground, byte_order=1), outlines


def _join(sheets: Sequence[Sheet]) -> list[Features]:
    meetings = _meetings(sheets)
    clusters = _clusters([pair for meeting in meetings for pair in _same(sheets, meeting)])
    gone: dict[int, set[int]] = defaultdict(set)
    grown: dict[int, dict[int, list[Row]]] = defaultdict(dict)
    for rows in clusters:
        stays, *others = sorted(rows, key=lambda row: _rank(sheets, row))
        grown[stays[0]][stays[1]] = others
        for number, row in others:
            gone[number].add(row)
    return [_without(_grown(sheets, number, grown[number]), gone[number]) for number in range(len(sheets))]


def _rank(sheets: Sequence[Sheet], row: Row) -> tuple[Any, ...]:
    """The largest first, then the higher score, then whatever else tells two apart."""
    features, at = sheets[row[0]].features, row[1]
    facts = [str(values[at]) for _, values in sorted(features.columns.items())]
    outline = shapely.to_wkb(features.geometry[at], byte_order=1)
    return -float(np.nan_to_num(features[table.AREA][at])), -features[table.SCORE][at], facts, outline, features.crs_wkt


def _meetings(sheets: Sequence[Sheet]) -> list[_Meeting]:
    grounds = np.array([to_degrees([sheet.ground], sheet.features.crs_wkt)[0] for sheet in sheets], np.object_)
    if len(sheets) < 2:
        return []
    found: list[_Meeting] = []
    for one, other in zip(*shapely.STRtree(grounds).query(grounds, predicate="intersects").tolist(), strict=True):
        if one >= other or sheets[one].date != sheets[other].date:
            continue
        place: Any = shapely.point_on_surface(shapely.intersection(grounds[one], grounds[other]))
        projection = equal_area(LONLAT, place.x, place.y)
        common = shapely.intersection(*(_ground(sheets[number], projection) for number in (one, other)))
        if common.area > 0:
            found.append(_Meeting((one, other), common, projection))
    return found


def _ground(sheet: Sheet, projection: str) -> Any:
    return flat([sheet.ground], sheet.features.crs_wkt, projection)[0]


def _same(sheets: Sequence[Sheet], meeting: _Meeting) -> list[tuple[Row, Row]]:
    """Pairs of rows that are one instance, each row in one pair at most."""
    shapes: list[Shapes] = []
    shapely.prepare(meeting.common)
    for number in meeting.numbers:
        features = sheets[number].features
        parts = flat(features.geometry, features.crs_wkt, meeting.projection)
        cut = np.flatnonzero(~shapely.covers(meeting.common, parts))
        parts[cut] = shapely.intersection(parts[cut], meeting.common)
        shapes.append(parts)
    one, other = meeting.numbers
    pairs = best_pairs(overlaps(*shapes), LEAST_IOU, lambda a, b: (_rank(sheets, (one, a)), _rank(sheets, (other, b))))
    return [((one, a), (other, b)) for a, b in pairs]


def _clusters(pairs: Sequence[tuple[Row, Row]]) -> list[list[Row]]:
    """Rows that pairs connect."""
    rows = sorted({row for pair in pairs for row in pair})
    at = {row: index for index, row in enumerate(rows)}
    found: dict[int, list[Row]] = defaultdict(list)
    for row, first in zip(rows, connected(len(rows), [(at[one], at[other]) for one, other in pairs]), strict=True):
        found[first].append(row)
    return list(found.values())


def _grown(sheets: Sequence[Sheet], number: int, rows: dict[int, list[Row]]) -> Features:
    """A sheet's table with what others show beyond its ground, and with the highest score of each instance."""
    features = sheets[number].features
    if not rows:
        return features
    geometry = features.geometry.copy()
    columns = {name: values.copy() for name, values in features.columns.items()}
    changed: list[int] = []
    for row, others in rows.items():
        columns[table.SCORE][row] = max(sheets[n].features[table.SCORE][at] for n, at in [(number, row), *others])
        added = _beyond(sheets, number, row, others)
        if added is not None:
            geometry[row] = added
            changed.append(row)
    measured = ground_measures(list(geometry[changed]), features.crs_wkt)
    for name, values in measured.items():
        columns[name][changed] = values
    return Features(features.crs_wkt, geometry, columns)


def _beyond(sheets: Sequence[Sheet], number: int, row: int, others: Sequence[Row]) -> Any | None:
    """The outline of an instance with what `others` show beyond the grounds before them; None where they show nothing there."""
    features = sheets[number].features
    middle: Any = shapely.centroid(features.geometry[row])
    projection = equal_area(features.crs_wkt, middle.x, middle.y)
    whole = flat([features.geometry[row]], features.crs_wkt, projection)[0]
    known = _ground(sheets[number], projection)
    before = whole.area
    for other, at in others:
        source = sheets[other].features
        shape = flat([source.geometry[at]], source.crs_wkt, projection)[0]
        whole = shapely.union(whole, areal(shapely.difference(shape, known)))
        known = shapely.union(known, _ground(sheets[other], projection))
    if whole.area <= before * (1 + 1e-9):
        return None
    return moved([areal(whole)], projection, features.crs_wkt)[0]


def _without(features: Features, rows: set[int]) -> Features:
    if not rows:
        return features
    return features.take(np.array([row not in rows for row in range(len(features))], np.bool_))
