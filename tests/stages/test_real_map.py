"""Real scenes, mapped by an ideal detector: the labels themselves, clipped to chips, go through merge and publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyogrio
import pyproj
import pytest
import rasterio
import shapely
from geo_making import SHARED, needs_shared
from mapping_making import seen
from publish_making import run_config

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.load import load_data, write_cell, write_run_config
from rtshpc.core.mapping.cells import map_cells
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.core.scenes import list_scenes
from rtshpc.geo.instances import from_ids
from rtshpc.mapping.features import read_features
from rtshpc.mapping.pieces import write_pieces
from rtshpc.mapping.scenes.survey import layout_of, survey
from rtshpc.stages import merge, publish

PUBLIC = SHARED / "scenes" / "public"
GEOD = pyproj.Geod(ellps="WGS84")
pytestmark = [pytest.mark.slow, needs_shared]


def record(cell: Cell, paths: RunPaths, results: dict[str, object]) -> None:
    write_record(
        paths.cell(cell.id).record,
        Record(
            cell=cell.id,
            stage=cell.stage,
            label=cell.label,
            result_version=RESULT_VERSION[cell.stage],
            started="",
            seconds=1.0,
            results=results,
        ),
    )


def seen_by_an_ideal_detector(cell: Cell, paths: RunPaths) -> None:
    scene = cell.scenes[0]
    assert scene.ground is not None
    with rasterio.open(scene.scene.label) as file:
        ids = from_ids(file.read(1))
    layout = layout_of(scene.ground, cell.config.data, cell.config.map)
    pieces = [replace(piece, kind=0) for piece in seen(ids, layout)]
    write_pieces(paths.cell(cell.id).pieces, pieces)
    facts = {
        "rejected": None,
        "chips": 1,
        "empty": 0,
        "valid_px": int(ids.size),
        "warnings": [],
        "missing": [],
        "files": [],
    }
    record(cell, paths, facts)


def test_slumps_of_real_scenes_come_out_once_with_true_areas_in_layers_that_open(tmp_path: Path) -> None:
    data = load_data("sentinel2_rts", [f"root={PUBLIC}"])
    config = run_config(tmp_path, modalities=tuple(data.modalities)).model_copy(update={"data": data})
    listed = [scene for scene in list_scenes(data, None) if scene.label]
    facts = survey(listed, data, config.map)
    scenes = [
        MapScene(scene=scene, fingerprint=f"{n:064x}", **dict(one))
        for n, (scene, one) in enumerate(zip(listed, facts, strict=True))
    ]
    paths = RunPaths(tmp_path / "run")
    paths.create()
    write_run_config(paths.config, config, {})
    cells = map_cells(config, scenes)
    for cell in cells:
        paths.cell(cell.id).root.mkdir()
        write_cell(paths.cell(cell.id).config, cell)
        if cell.stage == "map":
            seen_by_an_ideal_detector(cell, paths)
        if cell.stage == "merge":
            record(cell, paths, merge.run(cell, paths, SILENT))
    told = publish.run(cells[-1], paths, SILENT)
    assert told["scenes"] == {"mapped": len(listed)} and told["instances"] > 150
    whole = read_features(paths.layers / "slumps.parquet")
    for shape, area in zip(whole.geometry, whole["area_m2"], strict=True):
        geodesic = sum(
            abs(GEOD.geometry_area_perimeter(part)[0]) for part in shapely.get_parts(shapely.orient_polygons(shape))
        )
        assert area == pytest.approx(geodesic, rel=1e-3)
    assert np.isfinite(whole["mean_ndvi"]).all() and np.isfinite(whole["ring_ndvi"]).mean() > 0.95
    assert len(pyogrio.read_dataframe(paths.layers / "map.gpkg", layer="footprints")) == len(listed)
    assert len(pyogrio.read_dataframe(paths.layers / "map.gpkg", layer="slumps")) == len(whole)
    assert paths.report_page.stat().st_size > 100_000
