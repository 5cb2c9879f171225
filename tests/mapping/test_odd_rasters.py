"""Layers of instances on odd real rasters: south-up, in degrees, over the antimeridian, in Esri's words, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
from geo_making import SHARED, config, needs_shared

from rtshpc.core.errors import SceneRejected
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.scenes import Scene
from rtshpc.geo.crs import LONLAT
from rtshpc.geo.scene import scene_grid
from rtshpc.mapping.attributes import Origin, describe, moved
from rtshpc.mapping.layers import MAPPED, Outcome, footprints, in_one_crs, write_layer, write_scores
from rtshpc.mapping.mosaic import MapInstance
from rtshpc.mapping.outlines import outlines
from rtshpc.mapping.scenes.survey import ground_of
from rtshpc.report.overview.quicklook import quicklook

GEOD = pyproj.Geod(ellps="WGS84")
LARGEST_M2 = 1e9
"""Of an instance (a square of 32 km) whose edges need no points between their ends; a satellite's view has larger pixels."""
pytestmark = needs_shared


def _mapped(path: Path, folder: Path) -> tuple[Any, Outcome] | None:
    """The table of two instances on a raster, and its scene; None where the raster is refused."""
    data = config(folder, modalities={"grey": {"bands": ["1"]}}, primary="grey")
    scene = Scene(id=path.stem if path.stem != "image" else path.parent.name, image=str(path))
    try:
        grid = scene_grid(scene, data)
        quicklook(scene, data)
    except SceneRejected:
        return None
    ground = ground_of(grid)
    side = max(1, min(16, min(grid.height, grid.width) // 8))
    draw = np.random.default_rng(0)
    instances = [
        MapInstance(grid.height // 2, grid.width // 2, np.ones((side, side), bool), 0.9, 0, scene.id, 1),
        MapInstance(0, 0, draw.random((side, side)) < 0.7, 0.8, 0, scene.id, 1),
    ]
    instances = [one for one in instances if one.mask.any()]
    place = MapScene(scene=scene, fingerprint="f", ground=ground)
    shapes = outlines(instances, ground.transform)
    rows, notes = describe(instances, shapes, ground.crs_wkt, ground.transform, [place], data, Origin("m", ""))
    if notes:
        return None
    write_scores(folder / "scores.tif", ground, rows)
    return rows, Outcome(scene.id, "", "", scene.image, ground, MAPPED)


def _known(rows: Any) -> np.ndarray:
    """Rows that lie on the Earth as a whole."""
    return np.isfinite(shapely.bounds(moved(rows.geometry, rows.crs_wkt, LONLAT))).all(axis=1)


def test_instances_on_every_raster_that_is_not_refused_have_layers_with_true_areas(tmp_path: Path) -> None:
    files = [
        *sorted((SHARED / "robustness" / "files").glob("*.tif")),
        *sorted((SHARED / "robustness").glob("sample_defects/*/image.tif")),
    ]
    tables, outcomes = [], []
    for path in files:
        made = _mapped(path, tmp_path)
        if made is None:
            continue
        rows, outcome = made
        write_layer(tmp_path, "slumps", rows)
        on_earth = rows.take(_known(rows))
        for shape, area in zip(on_earth.geometry, on_earth["area_m2"], strict=True):
            if area > LARGEST_M2:
                continue
            # Edges are lines of the map, which geodesics follow in small steps.
            fine = moved([shapely.segmentize(shape, max(shape.length / 400, 1e-9))], rows.crs_wkt, LONLAT)[0]
            parts = shapely.get_parts(shapely.orient_polygons(fine))
            geodesic = sum(GEOD.geometry_area_perimeter(part)[0] for part in parts)
            assert area == pytest.approx(geodesic, rel=1e-3), path.name
        tables.append(on_earth)
        outcomes.append(outcome)
    names = {outcome.scene for outcome in outcomes}
    assert {"negative_scaley", "cog_dateline", "test_esri_wkt", "16_south_up", "17_geographic_crs"} <= names
    assert len(names) >= 30
    whole = in_one_crs(tables)
    assert len(whole) == sum(map(len, tables))
    ground = footprints(outcomes, {})
    seam = ground.geometry[ground["scene"].tolist().index("cog_dateline")]
    assert len(shapely.get_parts(seam)) == 2
    inside = shapely.bounds(np.concatenate([whole.geometry, ground.geometry]))
    assert np.nanmin(inside[:, 0]) >= -180 and np.nanmax(inside[:, 2]) <= 180
    write_layer(tmp_path, "whole", whole)
    write_layer(tmp_path, "footprints", ground)
