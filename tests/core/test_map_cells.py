"""What a user may give to map, and when a cell of a map run is another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import DataConfig, RunConfig
from rtshpc.core.errors import ConfigError, DataError
from rtshpc.core.grid import finished
from rtshpc.core.mapping.cells import inputs_of, map_cells
from rtshpc.core.mapping.ground import Ground, MapScene, read_frozen, write_frozen
from rtshpc.core.mapping.listing import scenes_to_map
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, write_record
from rtshpc.core.scenes import Scene

DATA: dict[str, Any] = {
    "name": "set",
    "scenes": {"index": "train.csv", "columns": {"scene": "chip", "image": "tif", "site": "place", "split": "split"}},
    "modalities": {"rgb": {"bands": ["1"]}, "dem": {"bands": ["1"], "file": "dem/{stem}_{site}.tif"}},
    "primary": "rgb",
}
CONFIG: dict[str, Any] = {
    "name": "region",
    "data": DATA,
    "model": {"name": "tiny"},
    "finetune": {"modalities": ["rgb"]},
    "map": {"model": "cells/x", "model_sha256": "a" * 64, "modalities": ["rgb"]},
}


def listed(given: Path | str, root: str = "") -> list[Scene]:
    return scenes_to_map(str(given), DataConfig.model_validate(DATA), root)[1]


def test_a_folder_a_list_an_index_and_a_raster_name_the_same_scene(tmp_path: Path) -> None:
    folder = tmp_path / "Herschel"
    folder.mkdir()
    for name in ("b.tif", "b.tif.aux.xml", "notes.txt"):
        (folder / name).touch()
    (folder / "list.txt").write_text("# two\n\nb.tif\n")
    (folder / "index.csv").write_text("tif,place,date,dem\nb.tif,Herschel,2020-07-01,x\n")
    (folder / "other.csv").write_text("scene,image,site\nb,b.tif,Herschel\n")
    by_folder, by_list, by_index, by_other, by_raster = (
        listed(one)
        for one in (folder, folder / "list.txt", folder / "index.csv", folder / "other.csv", folder / "b.tif")
    )
    for scenes in (by_folder, by_list, by_index, by_other, by_raster):
        assert [(one.id, Path(one.image)) for one in scenes] == [("b", folder / "b.tif")]
    assert by_folder[0].files == {"dem": str(folder / "dem/b_Herschel.tif")} == by_index[0].files
    assert (by_index[0].site, by_index[0].date, by_list[0].site) == ("Herschel", "2020-07-01", "")
    assert listed(folder / "list.txt", "/data")[0].image == "/data/b.tif"


def test_an_index_must_say_what_a_required_modality_needs_and_may_leave_out_the_rest(tmp_path: Path) -> None:
    dem = {"bands": ["1"], "file": "{tile}.tif"}
    (tmp_path / "list.txt").write_text("a.tif\n")
    for required in (True, False):
        modalities = {**DATA["modalities"], "dem": {**dem, "required": required}}
        data = DataConfig.model_validate({**DATA, "modalities": modalities})
        if required:
            with pytest.raises(ConfigError, match=r"modalities\.dem\.file"):
                scenes_to_map(str(tmp_path / "list.txt"), data)
        else:
            assert scenes_to_map(str(tmp_path / "list.txt"), data)[1][0].files == {}


def test_urls_and_virtual_files_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://host/a//x.tif\n/vsizip//data/all.zip/y.tif\ns3://bucket/z.tif\n")
    images = [scene.image for scene in listed(tmp_path / "list.txt")]
    assert images == ["/vsicurl/https://host/a//x.tif", "/vsizip//data/all.zip/y.tif", "/vsis3/bucket/z.tif"]
    assert listed("https://host/x.tif")[0].id == "x"


def test_images_of_one_name_in_two_folders_are_told_apart_and_a_row_without_an_image_stays(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("2020/a.tif\n2021/a.tif\nb.tif\n")
    assert [scene.id for scene in listed(tmp_path / "list.txt")] == ["2020-a", "2021-a", "b"]
    (tmp_path / "index.csv").write_text("scene,image\nlost,\nfound,a.tif\n")
    assert [(scene.id, scene.image != "") for scene in listed(tmp_path / "index.csv")] == [
        ("found", True),
        ("lost", False),
    ]


@pytest.mark.parametrize(
    ("name", "text", "error", "told"),
    [
        ("missing.txt", None, DataError, "no such list, index, folder or raster"),
        ("empty.txt", "\n# nothing\n", DataError, "names no raster to map"),
        (
            "index.csv",
            "scene,picture\na,b.tif\n",
            ConfigError,
            'column of images = "tif" is unknown. Known: picture, scene',
        ),
        ("twice.csv", "scene,image\na,b.tif\na,c.tif\n", DataError, 'scene "a" is listed twice'),
    ],
)
def test_what_cannot_be_mapped_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], told: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error) as caught:
        listed(tmp_path / name)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def scene(name: str, group: int = 0, blocks: int = 1, fingerprint: str = "", **ground: Any) -> MapScene:
    place = {"crs_wkt": "w", "transform": (1, 0, 0, 0, -1, 0), "height": 9, "width": 9, "resolution_m": 1, **ground}
    files = Scene(id=name, image=f"{name}.tif")
    return MapScene(
        scene=files, fingerprint=fingerprint or name, ground=Ground.model_validate(place), group=group, blocks=blocks
    )


def cells(*scenes: MapScene, **changes: Any) -> list[Cell]:
    values = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = value if not name else {**values[section], name: value}
    return map_cells(RunConfig.model_validate(values), scenes)


def test_every_block_has_a_cell_and_every_group_one_that_needs_all_of_its_blocks() -> None:
    found = cells(scene("a", 0, 3), scene("b", 1), scene("c", 0))
    assert [(cell.stage, cell.task, cell.tasks) for cell in found[:5]] == [("map", task, 5) for task in range(5)]
    merges = [cell for cell in found if cell.stage == "merge"]
    assert [cell.needs for cell in merges] == [tuple(c.id for c in (*found[:3], found[4])), (found[3].id,)]
    assert [[one.scene.id for one in cell.scenes] for cell in merges] == [["a", "c"], ["b"]]
    assert len({cell.id for cell in found}) == len(found)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"site": {"name": "other", "max_jobs": 7}}, True),
        ({"name": "other"}, True),
        ({"map__model": "cells/moved"}, True),
        ({"map__device": "cuda"}, True),
        ({"data": {**DATA, "root": "/elsewhere"}}, True),
        ({"map__overlap_px": 64}, True),
        ({"map__overlap_px": 32}, False),
        ({"map__model_sha256": "b" * 64}, False),
        ({"map__score_threshold": 0.4}, False),
        ({"map__statistics": {"rgb": {"mean": [1.0], "std": [1.0]}}}, False),
        ({"data": {**DATA, "chip": {"size_px": 128}}}, False),
    ],
)
def test_a_cell_is_another_one_exactly_where_its_result_can_be(changes: dict[str, Any], same: bool) -> None:
    assert ([cell.id for cell in cells(scene("a"))] == [cell.id for cell in cells(scene("a"), **changes)]) is same


def test_a_scene_that_changes_remakes_its_cells_and_no_others() -> None:
    before = {cell.id for cell in cells(scene("a", 0), scene("b", 1))}
    changed = [cell for cell in cells(scene("a", 0), scene("b", 1, fingerprint="2")) if cell.id not in before]
    assert [cell.label for cell in changed] == ["map b", "merge b", "publish"]
    assert {cell.label for cell in cells(scene("a", 0), scene("b", 1, height=8)) if cell.id not in before} == {
        "map b",
        "merge b",
        "publish",
    }


def record(cell: Cell, paths: RunPaths, **results: Any) -> None:
    facts = {
        "cell": cell.id,
        "stage": cell.stage,
        "label": "",
        "result_version": RESULT_VERSION[cell.stage],
        "started": "",
        "seconds": 1.0,
    }
    write_record(paths.cell(cell.id).record, Record(**facts, results=results))


def test_a_merge_is_done_while_what_it_took_is_what_is_there(tmp_path: Path) -> None:
    paths, (one, two, merge, _) = RunPaths(tmp_path), cells(scene("a", 0, 2))
    record(one, paths, pieces=3)
    assert finished(merge, paths) is None
    record(merge, paths, inputs=inputs_of(merge, paths))
    assert finished(merge, paths) is not None
    record(two, paths, pieces=1)
    assert finished(merge, paths) is None


def test_a_cell_whose_file_is_lost_or_cut_short_is_undone(tmp_path: Path) -> None:
    paths, (cell, *_) = RunPaths(tmp_path), cells(scene("a"))
    record(cell, paths, files=[{"file": "pieces.bin", "bytes": 3}])
    assert finished(cell, paths) is None
    paths.cell(cell.id).pieces.write_bytes(b"123")
    assert finished(cell, paths) is not None
    paths.cell(cell.id).pieces.write_bytes(b"12")
    assert finished(cell, paths) is None


def test_frozen_scenes_come_back_as_they_were_and_a_torn_file_as_none(tmp_path: Path) -> None:
    scenes = [scene("a", 0, 3), MapScene(scene=Scene(id="b", image=""), fingerprint="2", reason="no_crs", detail="x")]
    write_frozen(tmp_path / "scenes.json", scenes)
    assert read_frozen(tmp_path / "scenes.json") == scenes
    (tmp_path / "scenes.json").write_text("[{")
    assert read_frozen(tmp_path / "scenes.json") is None
