"""What the launcher knows of the feature cache: its cells, the disk it takes, and when it is of no more use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION
from rtshpc.core.features import Chips, cell_bytes
from rtshpc.core.grid import finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, append_line, read_record, write_json, write_record
from rtshpc.launch.plan import Plan, arrays
from rtshpc.launch.status import run_status
from rtshpc.launch.submit import prepare

from .conftest import ROOT, Launcher
from .test_plan import plan_of

CACHED = "finetune.features=cached"


def finish(plan: Plan, *stages: str) -> None:
    """Records as tasks would leave them."""
    for cell in plan.cells:
        if cell.stage not in stages:
            continue
        own = plan.paths.cell(cell.id)
        results: dict[str, object] = {
            "checkpoint": "checkpoints/best.pt",
            "checkpoint_sha256": "a",
            "backbone_sha256": "a",
        }
        own.checkpoints.mkdir(parents=True, exist_ok=True)
        own.best_checkpoint.write_bytes(b"x")
        if cell.stage == "features":
            own.features.mkdir()
            own.feature_file("train", 0).write_bytes(b"xyz")
            results["files"] = [{"file": own.feature_file("train", 0).name, "bytes": 3}]
        facts: dict[str, Any] = {"cell": cell.id, "stage": cell.stage, "label": cell.label, "started": ""}
        facts["result_version"] = RESULT_VERSION[cell.stage]
        write_record(own.record, Record(**facts, seconds=1, results=results))
    if "gather" in stages:
        chips = [{"id": str(n), "split": "val" if n == 3 else "train"} for n in range(4)]
        write_json(plan.paths.index, {"shards": {"0000-000.h5": "sha"}, "chips": chips})
        plan.paths.shard(0, 0).touch()
        write_json(plan.paths.rejected, [])


def test_plan_shows_the_disk_need_before_and_after_preprocess_and_what_is_free(launcher: Launcher) -> None:
    answer = launcher.run("plan", "--set", CACHED)
    assert answer.returncode == 0, answer.stderr
    assert "features: 2 cells, 0 done, 2 to do" in answer.stdout
    line = next(line for line in answer.stdout.splitlines() if line.startswith("feature cache"))
    assert "of disk (estimated before preprocess: about " in line and " GB free" in line
    assert not launcher.runs.exists()
    plan = plan_of(launcher, CACHED)
    finish(plan, "gather")
    facts = json.loads(launcher.run("plan", "--set", CACHED, "--json").stdout)["features"]
    cells = [cell for cell in plan.cells if cell.stage == "features"]
    assert facts["exact"] and facts["chips"] == {"train": 3, "val": 1}
    assert facts["bytes"] == facts["left_bytes"] == sum(cell_bytes(cell, Chips(3, 1, True)) for cell in cells)
    assert abs(facts["free_bytes"] - shutil.disk_usage(launcher.folder).free) < 1 << 30
    plan.paths.cell(cells[0].id).root.mkdir()
    append_line(plan.paths.cell(cells[0].id).journal, {"file": "train-000000.h5", "bytes": 1000})
    facts = json.loads(launcher.run("plan", "--set", CACHED, "--json").stdout)["features"]
    assert facts["left_bytes"] == facts["bytes"] - 1000
    assert "counted: 3 train and 1 val chips" in launcher.run("plan", "--set", CACHED).stdout


def test_a_plan_that_caches_nothing_says_nothing_of_it(launcher: Launcher) -> None:
    assert json.loads(launcher.run("plan", "--json").stdout)["features"] is None
    assert "feature" not in launcher.run("plan").stdout


def test_a_disk_that_is_too_small_is_told(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    from rtshpc.launch.commands import sweep as command

    facts = plan_of(launcher, CACHED).features()
    assert facts is not None and "NOT ENOUGH" not in command._disk(facts)
    assert command._disk({**facts, "free_bytes": facts["left_bytes"] - 1}).endswith("free; NOT ENOUGH")


def test_other_augmentation_is_refused_by_plan_on_one_line(launcher: Launcher) -> None:
    answer = launcher.run("plan", "--set", CACHED, "--set", "finetune.augment.noise=0.1")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "finetune.augment.noise = 0.1 cannot be cached: it draws other pixels in every epoch" in answer.stderr


def test_cached_cells_wait_for_pretraining_and_features_and_are_an_array_of_their_own(launcher: Launcher) -> None:
    plan = plan_of(launcher, CACHED)
    stages = [cell.stage for cell in plan.todo]
    assert stages == sorted(stages, key=plan.stages.index) and stages.count("features") == 2
    found = {array.stage: array for array in arrays(plan.todo, {}, 1000)}
    stored, tuned = found["features"], found["finetune"]
    assert {cell.id for cell in stored.cells} < set(tuned.cells[0].needs)
    assert (stored.rule, stored.after) == ("aftercorr", ((found["pretrain"].number, None),))
    assert (tuned.rule, tuned.after) == ("afterok", ((stored.number, 0), (stored.number, 1)))
    assert [cell.stage for cell in plan_of(launcher, CACHED, until="features").todo][-2:] == ["features", "features"]
    assert "finetune" not in {cell.stage for cell in plan_of(launcher, CACHED, until="features").todo}


def test_deleted_scales_are_remade_only_where_something_still_trains_on_them(launcher: Launcher) -> None:
    plan = plan_of(launcher, CACHED)
    prepare(plan)
    finish(plan, "preprocess", "gather", "pretrain", "features")
    assert not [cell for cell in plan_of(launcher, CACHED).todo if cell.stage == "features"]
    for cell in plan.cells:
        if cell.stage == "features":
            shutil.rmtree(plan.paths.cell(cell.id).features)
            assert finished(cell, plan.paths) is None
    assert len([cell for cell in plan_of(launcher, CACHED).todo if cell.stage == "features"]) == 2
    states = {row["stage"]: row["state"] for row in run_status(plan.paths)["cells"]}
    assert states["features"] == "waiting"
    finish(plan, "finetune")
    assert not [cell for cell in plan_of(launcher, CACHED).todo if cell.stage == "features"]
    states = {row["stage"]: row["state"] for row in run_status(plan.paths)["cells"]}
    assert states["features"] == states["finetune"] == "done"


@pytest.mark.full
def test_a_sweep_on_stored_scales_runs_in_one_command_beside_a_live_one(launcher: Launcher) -> None:
    sets = ("--set", "pretrain.epochs=1", "--set", "grid.finetune.features=[live, cached]", "--until", "evaluate")
    answer = launcher.run("sweep", *sets)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "MiB of scales" in answer.stdout
    paths = RunPaths(launcher.runs / "small")
    scores: dict[str, object] = {}
    for row in json.loads(paths.plan.read_text())["cells"]:
        record = read_record(Path(paths.cell(row["id"]).record))
        assert record is not None, row["label"]
        if row["stage"] == "evaluate" and record.results["stage"] == "finetune":
            scores[record.results["varied"]["finetune.features"]] = record.results["images"]
    assert scores.keys() == {"live", "cached"} and len(set(scores.values())) == 1
    assert "nothing to do" in launcher.run("sweep", *sets).stdout
    _scored_again(paths)


def _scored_again(paths: RunPaths) -> None:
    """benchmarks/ap50_changes.py finds the records' figures, and names what it changed."""
    script = ROOT / "benchmarks" / "ap50_changes.py"
    line = [sys.executable, str(script), str(paths.root), "--json", "--window", "8"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["ap50"]
    records = [
        read_record(paths.cell(row["id"]).record) for row in run_status(paths)["cells"] if row["stage"] == "evaluate"
    ]
    wanted = {r.results["trained_label"]: r.results["mask"]["AP50"] for r in records if r is not None}
    assert {label: figures["as trained"] for label, figures in found.items()} == wanted and len(wanted) == 4
    fused = {label: set(figures) for label, figures in found.items() if label.startswith("finetune")}
    changes = {"as trained", "without ndvi", "frozen_dtype=bf16", "window_px=8"}
    assert len(fused) == 2 and all(names == changes for names in fused.values())
