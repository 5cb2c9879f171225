"""Outlines and tables for the tests of mapping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyproj
import shapely

from rtshpc.core.mapping.ground import Ground
from rtshpc.mapping.features import Features
from rtshpc.mapping.layers import MAPPED, Outcome

UTM = pyproj.CRS.from_epsg(32608).to_wkt()


def table(count: int = 5, crs_wkt: str = UTM, seed: int = 0, **columns: Any) -> Features:
    """Squares with holes and a pair of squares, with every kind of column."""
    draw = np.random.default_rng(seed)
    corner = 500_000 + 1000 * np.arange(count)
    outer = [shapely.box(x, 7_600_000, x + 100, 7_600_100 + 10 * i) for i, x in enumerate(corner)]
    shapes: list[Any] = [
        shape.difference(shapely.box(x + 10, 7_600_010, x + 20, 7_600_020))
        for shape, x in zip(outer, corner, strict=True)
    ]
    if count > 1:
        shapes[1] = shapely.MultiPolygon(
            [shapes[1], shapely.box(corner[1] + 500, 7_600_000, corner[1] + 510, 7_600_010)]
        )
    values = {
        "score": draw.random(count),
        "class": ["rts"] * count,
        "scene": [f"scene {i % 2}" for i in range(count)],
        "date": ["2020-07-01"] * count,
        "site": ["Banks"] * count,
        "elevation_m": [np.nan if i == 0 else 10.5 * i for i in range(count)],
        "pieces": np.arange(count),
    }
    return Features(crs_wkt, shapes, {**values, **columns})  # pyright: ignore[reportArgumentType]


def outcome(
    name: str, epsg: int, left: float, top: float, step: float, state: str = MAPPED, reason: str = ""
) -> Outcome:
    """What became of a scene of 100 x 100 px."""
    ground = Ground(
        crs_wkt=pyproj.CRS.from_epsg(epsg).to_wkt(),
        transform=(step, 0, left, 0, -step, top),
        height=100,
        width=100,
        resolution_m=10,
    )
    return Outcome(name, "Peel", "2020-07-01", f"{name}.tif", ground, state, reason, valid_px=4000)
