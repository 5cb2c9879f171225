"""Map runs: what is planned, refused and remade, and that nothing depends on how the work was cut."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rasterio

from rtshpc.core.errors import ConfigError, RtshpcError
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.mapping.listing import scenes_to_map
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_record
from rtshpc.core.scenes import scene_fingerprints
from rtshpc.hpc.executor import Job
from rtshpc.launch import schedule
from rtshpc.launch.display import Display, make_console
from rtshpc.launch.launch import by_hand
from rtshpc.launch.plan import MapPlan, arrays, map_plan, plan_again, plan_in
from rtshpc.launch.plan.model import map_config
from rtshpc.launch.status import run_status
from rtshpc.launch.submit import Ledger, prepare, refuse_other_data
from rtshpc.mapping.scenes.survey import survey
from rtshpc.stages import runner

pytestmark = pytest.mark.usefixtures("square_blocks")

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("slumps.parquet", "footprints.parquet", "map.gpkg")
SETS = ("map.score_threshold=0.3", "map.overlap_px=16")


def planned(to_map: Any, scenes: Path, out: Path, *sets: str, model: str = "", **given: str) -> MapPlan:
    made = map_config(model or to_map.model, Path("runs"), "region", None, [*SETS, *sets], **given)
    data, listed = scenes_to_map(str(scenes), made.data)
    made = made.model_copy(update={"data": data})
    seen = zip(listed, scene_fingerprints(data, listed, None), survey(listed, data, made.map), strict=True)
    return map_plan(made, RunPaths(out), [MapScene(scene=s, fingerprint=f, **dict(facts)) for s, f, facts in seen])


@pytest.fixture(autouse=True)
def quick_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records say which commit made them, for which git looks through all files each time."""
    monkeypatch.setattr(runner, "code_version", lambda: "test")


def work(plan: MapPlan, order: random.Random | None = None) -> None:
    """Do what is to do, here; within a stage in any order."""
    prepare(plan)
    for stage in plan.stages:
        cells = [cell for cell in plan.todo if cell.stage == stage]
        if order is not None:
            order.shuffle(cells)
        for cell in cells:
            assert runner.run(stage, plan.paths.root, cell.id) == 0, cell.label


def results(plan: MapPlan, stage: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for cell in plan.cells:
        record = read_record(plan.paths.cell(cell.id).record)
        if cell.stage == stage and record is not None:
            found[cell.label] = record.results
    return found


def tables(plan: MapPlan) -> dict[str, bytes]:
    """The features of every group and the layers of the whole run, byte by byte."""
    merges = {cell.label: plan.paths.cell(cell.id).instances for cell in plan.cells if cell.stage == "merge"}
    layers = {name: plan.paths.layers / name for name in LAYERS}
    return {name: path.read_bytes() for name, path in (merges | layers).items() if path.exists()}


def states(plan: MapPlan) -> dict[str, str]:
    return {one["scene"]: one["state"] for merge in results(plan, "merge").values() for one in merge["scenes"]}


def test_one_task_a_scene_and_many_in_any_order_give_the_same_bytes(to_map: Any, tmp_path: Path) -> None:
    scenes = to_map.scenes("abxy")
    whole = planned(to_map, scenes, tmp_path / "whole")
    cut = planned(to_map, scenes, tmp_path / "cut", "map.block_px=64")
    assert [sum(cell.stage == "map" for cell in plan.cells) for plan in (whole, cut)] == [4, 13]
    work(whole)
    work(cut, random.Random(3))
    found = tables(whole)
    assert set(found) == {"merge a and 1 more", "merge y", *LAYERS}
    assert [name for name, content in tables(cut).items() if content != found[name]] == []
    assert states(whole) == states(cut) == {"a": "mapped", "b": "mapped", "x": "rejected", "y": "mapped"}
    told = results(whole, "merge")["merge a and 1 more"]
    assert told["instances"] == sum(one["instances"] for one in told["scenes"]) > 10
    assert [one["valid_px"] for one in told["scenes"]] == [100 * 100 - 7 * 9] * 2
    assert results(whole, "map")["map x"]["rejected"]["reason"] == "unreadable"
    assert planned(to_map, scenes, tmp_path / "whole").todo == []


def test_a_scene_with_too_little_valid_ground_is_named_once_its_blocks_are_counted(to_map: Any, tmp_path: Path) -> None:
    scenes = to_map.scenes("ay")
    with rasterio.open(scenes / "a.tif", "r+") as file:
        pixels, file.nodata = file.read(), -9999
        pixels[:, 9:], pixels[:, :, 9:] = -9999, -9999
        file.write(pixels)
    plan = planned(to_map, scenes, tmp_path / "out", "map.block_px=64")
    work(plan)
    a = next(one for merge in results(plan, "merge").values() for one in merge["scenes"] if one["scene"] == "a")
    assert states(plan) == {"a": "rejected", "y": "mapped"}
    assert (a["reason"], a["detail"], a["instances"]) == ("almost_empty", "a: 0.81% of it is valid", 0)


def test_a_cell_and_a_file_of_its_weights_map_alike(to_map: Any, tmp_path: Path) -> None:
    given = {"config": str(to_map.sweep), "statistics": str(to_map.statistics)}
    by_cell = planned(to_map, to_map.scenes("a"), tmp_path / "cell", model=str(to_map.cell))
    by_file = planned(to_map, to_map.scenes("a"), tmp_path / "file", model=str(to_map.weights), **given)
    work(by_cell)
    work(by_file)
    assert by_cell.config.map.statistics == by_file.config.map.statistics
    pieces = [one["files"][0]["sha256"] for plan in (by_cell, by_file) for one in results(plan, "map").values()]
    assert pieces[0] == pieces[1]


def test_more_scenes_remake_only_the_group_they_join(to_map: Any, tmp_path: Path) -> None:
    scenes, listed = to_map.scenes("aby"), tmp_path / "list.txt"
    listed.write_text(f"{scenes}/a.tif\n{scenes}/y.tif\n")
    work(planned(to_map, listed, tmp_path / "out"))
    listed.write_text(f"{scenes}/y.tif\n{scenes}/b.tif\n{scenes}/a.tif\n")
    more = planned(to_map, listed, tmp_path / "out")
    assert [cell.label for cell in more.todo] == ["map b", "merge a and 1 more", "publish"]
    assert {cell.label for cell in more.cells if cell.id in more.done} == {"map a", "map y", "merge y"}


def test_a_lost_or_damaged_file_of_pieces_is_mapped_again_with_all_that_is_made_of_it(
    to_map: Any, tmp_path: Path
) -> None:
    plan = planned(to_map, to_map.scenes("a"), tmp_path / "out")
    work(plan)
    before = tables(plan)
    block, merge, _ = plan.cells
    plan.paths.cell(block.id).pieces.unlink()
    assert [cell.label for cell in plan_again(plan.config, plan.paths).todo] == ["map a", "merge a", "publish"]
    work(planned(to_map, to_map.scenes("a"), tmp_path / "out"))
    content = bytearray(plan.paths.cell(block.id).pieces.read_bytes())
    content[60] ^= 1
    plan.paths.cell(block.id).pieces.write_bytes(content)
    plan.paths.cell(merge.id).record.unlink()
    assert runner.run("merge", plan.paths.root, merge.id) == 2
    again = planned(to_map, to_map.scenes("a"), tmp_path / "out")
    assert [cell.label for cell in again.todo] == ["map a", "merge a", "publish"]
    work(again)
    assert tables(again) == before


def test_a_failed_block_is_named_and_leaves_its_scene_out_until_it_is_mapped(to_map: Any, tmp_path: Path) -> None:
    plan = planned(to_map, to_map.scenes("ab"), tmp_path / "out")
    prepare(plan)
    first, second, merge, publish = plan.cells
    assert runner.run("map", plan.paths.root, first.id) == 0
    assert runner.run("merge", plan.paths.root, merge.id) == 0
    assert states(plan) == {"a": "mapped", "b": "failed"}
    assert [cell.id for cell in plan_again(plan.config, plan.paths).todo] == [second.id, merge.id, publish.id]
    work(planned(to_map, to_map.scenes("ab"), tmp_path / "out"))
    assert states(plan) == {"a": "mapped", "b": "mapped"}


def test_a_launcher_goes_on_past_a_failed_block_to_the_layers_of_the_others(
    to_map: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(to_map, to_map.scenes("ay"), tmp_path / "out", "map.block_px=64")
    prepare(plan)
    victim = next(cell.id for cell in plan.cells if cell.label == "map y 2/4")

    class Over:
        def exception(self) -> None: ...

    def here(site: Any, paths: RunPaths, stage: str, tasks: Sequence[str]) -> list[Job]:
        if tasks[0] != victim:
            assert runner.run(stage, paths.root, tasks[0]) == 0
        return [Job("DEBUG", tmp_path / "log", Over())]

    monkeypatch.setattr(schedule, "submit", here)
    outcome = schedule.Scheduler(plan, Ledger(plan.paths), Display(make_console(), plan.paths)).run()
    assert [cell.label for cell, *_ in outcome.failed] == ["map y 2/4"] and not outcome.blocked
    assert states(plan) == {"a": "mapped", "y": "failed"} and LAYERS[2] in tables(plan)
    found = {row["label"]: row["state"] for row in run_status(plan.paths)["cells"]}
    assert found["map y 2/4"] == "failed" and found["merge y"] == found["publish"] == "done"
    again = [cell.label for cell in plan_again(plan.config, plan.paths).todo]
    assert again == ["map y 2/4", "merge y", "publish"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "nowhere:x"}, "no run there"),
        ({"model": "plain"}, "give RUN:CELL, the folder of a cell, or a file of weights"),
        ({"model": "RUN:finetune"}, "no cell finetune here"),
        ({"model": "lost.pt"}, "needs --config SWEEP and --statistics INDEX_JSON"),
        ({"sets": ["finetune.epochs=3"]}, "a map takes map, site, data.root"),
        ({"sets": ["map.overlap_px=1"]}, "must be at least 2"),
        ({"sets": ["map.batch=2"]}, 'Did you mean "batch_size"?'),
        ({"sets": ["map.dem=hight"]}, 'map.dem = "hight" is unknown'),
        ({"config": "demo"}, "says itself of which config and statistics it is"),
    ],
)
def test_a_wrong_model_or_key_is_refused_in_one_line(to_map: Any, change: dict[str, Any], told: str) -> None:
    model = str(change.get("model", to_map.model)).replace("RUN", str(to_map.run))
    with pytest.raises(RtshpcError) as error:
        map_config(model, Path("runs"), "region", None, change.get("sets", ()), change.get("config", ""))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_chips_that_cannot_overlap_as_asked_are_refused(to_map: Any, tmp_path: Path) -> None:
    line = ["map", to_map.scenes("a"), "--model", to_map.model, "--out", tmp_path / "out", "--set", "map.overlap_px=64"]
    answer = launch(*line)
    assert answer.returncode == 2 and "chips of 64 px need an overlap of 2 to 63 px" in answer.stderr


def test_a_folder_holds_one_run(to_map: Any, tmp_path: Path) -> None:
    plan = planned(to_map, to_map.scenes("a"), tmp_path / "out")
    prepare(plan)
    other = plan.config.map.model_copy(update={"model_sha256": "0" * 64})
    with pytest.raises(RtshpcError, match=r"was mapped with trained: pretrain rgb, of other weights"):
        refuse_other_data(map_plan(plan.config.model_copy(update={"map": other}), plan.paths))
    with pytest.raises(ConfigError, match=r"map\.model is given"):
        plan_in(plan.config, plan.paths)


def test_modalities_that_the_detector_does_not_take_reject_no_scene(to_map: Any, tmp_path: Path) -> None:
    data = planned(to_map, to_map.scenes("a"), tmp_path / "out").config.data
    assert {name: one.required for name, one in data.modalities.items()} == {"rgb": True, "ndvi": False, "dem": False}


def launch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line: Sequence[str] = [sys.executable, "-m", "rtshpc.launch", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, env=os.environ)


@pytest.mark.slow
def test_launch_map_maps_names_what_it_cannot_use_and_has_nothing_to_do_when_run_again(
    to_map: Any, tmp_path: Path
) -> None:
    out = tmp_path / "a map's $HOME"
    line = ["map", to_map.scenes("ax"), "--model", to_map.model, "--out", out, *(w for s in SETS for w in ("--set", s))]
    done = launch(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be used: x: unreadable" in done.stdout
    facts = run_status(RunPaths(out))
    assert facts["finished"] and [one["state"] for one in facts["cells"]] == ["done"] * len(facts["cells"])
    assert next(one["metric"] for one in facts["cells"] if one["label"] == "map x").startswith("rejected: x.tif")
    (out / "report" / "index.html").unlink()
    told = launch("report", out)
    assert told.returncode == 0 and told.stdout.strip() == f"{out}/report/index.html", told.stderr
    again = launch(*line)
    assert f"layers: {out}/layers" in done.stdout and (out / "layers" / "map.gpkg").is_file()
    assert again.returncode == 0 and "nothing to do, all 5 cells are done" in again.stdout
    assert read_json(out / "scenes.json") is not None


def test_what_would_be_done_is_shown_without_writing_and_prepared_for_the_template(to_map: Any, tmp_path: Path) -> None:
    out = tmp_path / "a map's $HOME"
    answer = launch("map", to_map.scenes("ax"), "--model", to_map.model, "--out", out, "--plan", "--json")
    assert answer.returncode == 0 and not out.exists(), answer.stderr
    assert [one["todo"] for one in json.loads(answer.stdout)["stages"]] == [2, 2, 1]
    plan = planned(to_map, to_map.scenes("ax"), out, "site.max_array=2", "map.block_px=64")
    given = f"RTSHPC_RUN={shlex.quote(str(out))} RTSHPC_STAGE"
    assert by_hand(plan) == [
        f"{given}=map sbatch --array=0-1%2 slurm/map.sbatch",
        f"{given}=map RTSHPC_FIRST=2 sbatch --array=0-1%2 slurm/map.sbatch",
        f"{given}=map RTSHPC_FIRST=4 sbatch --array=0-0%2 slurm/map.sbatch",
        f"{given}=merge sbatch --array=0-1%2 slurm/map.sbatch",
        f"{given}=publish sbatch --array=0-0%2 slurm/map.sbatch",
    ]


def test_merges_wait_for_the_end_of_all_blocks_however_they_end(to_map: Any, tmp_path: Path) -> None:
    plan = planned(to_map, to_map.scenes("aby"), tmp_path / "out")
    blocks, merges, publish = arrays(plan.todo, {}, 1000)
    assert (len(blocks.cells), len(merges.cells), merges.dependency({0: "7"})) == (3, 2, "afterany:7")
    assert publish.dependency({0: "7", 1: "8"}) == "afterany:8"
