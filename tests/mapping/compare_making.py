"""Maps made of squares of a fine grid, so that areas can be counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import shapely
from pyproj import CRS

from rtshpc.mapping.attributes import ground_measures
from rtshpc.mapping.compare.sources import Source
from rtshpc.mapping.features import Features

FLAT = CRS.from_proj4("+proj=laea +lat_0=70 +lon_0=-130 +datum=WGS84").to_wkt()
"""Equal-area: a square of it has its area on the ground too."""
STEP = 10.0
"""m, a cell of the grid."""

Cells = set[tuple[int, int]]


def block(rows: tuple[int, int], cols: tuple[int, int]) -> Cells:
    return {(row, col) for row in range(*rows) for col in range(*cols)}


def shape(cells: Iterable[tuple[int, int]]) -> Any:
    rows: dict[int, list[int]] = {}
    for row, col in sorted(cells):
        rows.setdefault(row, []).append(col)
    strips = []
    for row, cols in rows.items():
        ends = [at for at in range(len(cols)) if at + 1 == len(cols) or cols[at + 1] > cols[at] + 1]
        for first, last in zip([0, *(at + 1 for at in ends)], ends, strict=False):
            strips.append(shapely.box(cols[first] * STEP, row * STEP, (cols[last] + 1) * STEP, (row + 1) * STEP))
    return shapely.union_all(strips)


def features(parts: list[Cells], **columns: Any) -> Features:
    shapes = [shape(part) for part in parts]
    return Features(FLAT, np.array([*shapes, None], np.object_)[:-1], {**ground_measures(shapes, FLAT), **columns})


def mapped(parts: list[Cells], date: str = "2020", grounds: list[tuple[str, Cells]] | None = None) -> Source:
    """A map of one date; `grounds` are pairs of site and cells."""
    found = features(parts, date=[date] * len(parts), score=np.full(len(parts), 0.5), site=[""] * len(parts))
    if grounds is None:
        return Source("map", found, None)
    names = [site for site, _ in grounds]
    ground = features([cells for _, cells in grounds], site=names, date=[date] * len(grounds))
    return Source("map", found, ground)
