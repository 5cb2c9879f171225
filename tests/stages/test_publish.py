"""What publish makes of the merges of a run: complete, the same each time, and named where something is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyproj
import pystac
import pytest
import rasterio
import shapely
from publish_making import PLACES, make_run, trained

from rtshpc.core.errors import RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, write_json
from rtshpc.geo.align import same_crs
from rtshpc.mapping.attributes import moved
from rtshpc.mapping.features import read_features
from rtshpc.stages import publish

GEOD = pyproj.Geod(ellps="WGS84")


@pytest.fixture(autouse=True)
def no_bindings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GDAL's bindings have tests of their own."""
    monkeypatch.setenv("RTSHPC_GDAL_PYTHON", str(tmp_path / "absent"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_layer_of_a_run_opens_and_agrees_with_the_ground(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path, scores=True)
    told = publish.run(cell, paths, SILENT)
    assert told["scenes"] == {"mapped": 6, "rejected": 1}
    assert told["instances"] + told["joined"] == 20 and 1 <= told["joined"] <= 4
    whole = read_features(paths.layers / "slumps.parquet")
    assert same_crs(whole.crs_wkt, publish.LONLAT) and shapely.is_valid(whole.geometry).all()
    for shape, area in zip(whole.geometry, whole["area_m2"], strict=True):
        geodesic = sum(
            abs(GEOD.geometry_area_perimeter(part)[0]) for part in shapely.get_parts(shapely.orient_polygons(shape))
        )
        assert area == pytest.approx(geodesic, rel=1e-3)
    assert sum(whole["area_m2"]) == pytest.approx(told["area_m2"])
    # Of a slump that two grids show, one is left.
    ways = publish.in_one_crs([whole.take(np.isin(whole["scene"].astype(str), ["west", "over"]))])
    there = moved(ways.geometry, ways.crs_wkt, pyproj.CRS.from_epsg(32608).to_wkt())
    one, other = (there[np.flatnonzero(ways["scene"] == name)] for name in ("west", "over"))
    assert len(one) + len(other) == 8 - told["joined"]
    for a in one:
        assert all(a.intersection(b).area < 0.5 * a.union(b).area for b in other)
    # One site lies on longitude 180: its slumps are on both sides of it, and none goes round the globe.
    seam = whole.take(whole["scene"] == "seam")
    sides = shapely.bounds(seam.geometry)
    assert (sides[:, 0] < 0).any() and (sides[:, 2] > 0).any()
    layers = dict(pyogrio.list_layers(paths.layers / "map.gpkg"))
    assert set(layers) == {"slumps", "footprints"}
    ground = pyogrio.read_dataframe(paths.layers / "map.gpkg", layer="footprints").set_index("scene")
    counts = ground["instances"].to_dict()
    assert counts == {scene: int((whole["scene"] == scene).sum()) for scene in (*PLACES, "broken")}
    assert {scene: counts[scene] for scene in ("broken", "empty", "seam")} == {"broken": 0, "empty": 0, "seam": 4}
    assert ground.loc["broken", ["state", "reason", "detail"]].tolist() == ["rejected", "truncated", "strip 7"]
    for scene, (*_, epsg, left, top, _) in PLACES.items():
        own = read_features(paths.scene_layers(scene) / "slumps.parquet")
        assert same_crs(own.crs_wkt, pyproj.CRS.from_epsg(epsg).to_wkt())
        assert len(own) == counts[scene]
        with rasterio.open(paths.scene_layers(scene) / "scores.tif") as scores:
            drawn = scores.read(1)
            assert (scores.transform.c, scores.transform.f) == (left, top)
            assert np.count_nonzero(drawn) * 100 == pytest.approx(shapely.area(own.geometry).sum())
    items = {item.id: item for item in pystac.Collection.from_file(str(paths.layers / "collection.json")).get_items()}
    assert set(items) == set(PLACES) and items["seam"].properties["rtshpc:instances"] == 4
    assert any("no virtual rasters" in note for note in told["notes"])
    for one in told["files"]:
        assert (paths.cell(cell.id).root / one["file"]).stat().st_size == one["bytes"]


def test_the_same_merges_are_published_in_the_same_bytes_and_leftovers_go(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    first = publish.run(cell, paths, SILENT)
    before = contents(paths.layers) | contents(paths.report)
    (paths.layers / "scenes" / "gone").mkdir()
    (paths.layers / "scenes" / "gone" / "slumps.gpkg").write_bytes(b"old")
    backwards = cell.model_copy(update={"needs": cell.needs[::-1]})
    second = publish.run(backwards, paths, SILENT)
    assert contents(paths.layers) | contents(paths.report) == before
    assert first["files"] == second["files"]


def test_a_merge_without_a_record_leaves_its_scenes_named_and_stops_nothing(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    lost = paths.cell(cell.needs[-1])
    scene = json.loads(lost.record.read_text())["results"]["scenes"][0]["scene"]
    lost.record.unlink()
    write_json(lost.failure, {"error": "a node was lost", "kind": "RunError", "traceback": ""})
    told = publish.run(cell, paths, SILENT)
    assert told["scenes"] == {"mapped": 5, "rejected": 1, "failed": 1}
    rows = read_features(paths.layers / "footprints.parquet")
    row = rows["scene"].tolist().index(scene)
    assert (rows["state"][row], rows["detail"][row]) == ("failed", "a node was lost")
    assert "a node was lost" in paths.report_page.read_text()


def test_a_damaged_table_is_made_undone(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    merge = paths.cell(next(need for need in cell.needs if paths.cell(need).instances.is_file()))
    whole = merge.instances.read_bytes()
    merge.instances.write_bytes(whole[:8] + bytes(len(whole) - 16) + whole[-8:])
    with pytest.raises(RunError, match="no table of outlines can be read"):
        publish.run(cell, paths, SILENT)
    assert not merge.record.exists()


def test_a_run_of_which_nothing_was_mapped_has_its_layers_all_the_same(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    for need in cell.needs:
        paths.cell(need).record.unlink()
    told = publish.run(cell, paths, SILENT)
    assert told["scenes"] == {"failed": 7} and told["instances"] == 0
    assert len(read_features(paths.layers / "slumps.parquet")) == 0
    assert len(read_features(paths.layers / "footprints.parquet")) == 7
    assert "7 of 7 scenes were not mapped" in paths.report_page.read_text()


def _words(paths: RunPaths) -> str:
    return re.sub(r"\s+", " ", paths.report_page.read_text())


def test_the_page_says_what_was_found_where_and_how_sure(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    trained(tmp_path, 0.625)
    told = publish.run(cell, paths, SILENT)
    assert told["threshold"]["score"] == 0.625 and told["threshold"]["f1"] == 20.0
    page, rows = _words(paths), read_features(paths.layers / "slumps.parquet")
    above = int((rows["score"] >= 0.625).sum())
    assert (
        f"From score 0.625 on, F1 was largest on the validation split (20.0 %): {above} of {len(rows)} slumps" in page
    )
    table = [line.split(",") for line in paths.report_table("map_sites").read_text().splitlines()]
    found = {(row[0], row[1]): row[2:] for row in table[1:]}
    assert set(found) == {(site, date or "no date") for site, date, *_ in PLACES.values()} | {("Peel", "no date")}
    scenes, left_out, ground, slumps, *_ = map(float, found["Banks", "2020-07-01"][:4])
    assert (scenes, left_out, slumps) == (3, 0, 12 - told["joined"])
    assert ground == pytest.approx(3 * (120 * 120 - 600) * 100)
    area = rows["area_m2"][(rows["site"] == "Banks") & (rows["date"] == "2020-07-01")].sum()
    assert float(found["Banks", "2020-07-01"][4]) == pytest.approx(area)
    assert (
        page.count('class="map"') == 2 + len(set(rows["scene"])) and "zone &lt;9&gt;" in page and "zone <9>" not in page
    )
    assert "://" not in page


def test_without_a_model_folder_the_page_says_that_no_threshold_is_known(tmp_path: Path) -> None:
    paths, cell = make_run(tmp_path)
    assert publish.run(cell, paths, SILENT)["threshold"] is None
    assert "does not say which threshold" in _words(paths)


def test_names_of_scenes_are_folders_of_their_own(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    names: list[Any] = ["a", "a b", "a_b", "../a", ".", "", "ä", "x" * 300, "a/b", "con"]
    folders = [paths.scene_layers(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(folder.parent == paths.layers / "scenes" and len(folder.name) < 100 for folder in folders)
    assert paths.scene_layers("S2_2020-07-01.a").name == "S2_2020-07-01.a"
