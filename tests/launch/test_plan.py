from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtshpc.core.errors import RtshpcError, RunError
from rtshpc.core.load import load_run
from rtshpc.core.records import Record, write_json, write_record
from rtshpc.hpc.executor import Job
from rtshpc.launch.plan import Plan, make_plan, stages_until
from rtshpc.launch.submit import Ledger, launcher_lock, prepare, refuse_other_data

from .conftest import Launcher


def plan_of(launcher: Launcher, *sets: str, until: str | None = None) -> Plan:
    return make_plan(load_run(launcher.sweep, sets), launcher.runs, until)


def finish(plan: Plan, stage: str) -> None:
    """Records of one stage, as its tasks would leave them."""
    for cell in plan.cells:
        if cell.stage == stage:
            folder = plan.paths.cell(cell.id)
            checkpoint = folder.best_checkpoint
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_bytes(b"x")
            record = Record(
                cell=cell.id,
                stage=stage,
                label=cell.label,
                result_version=1,
                started="",
                seconds=1,
                results={"checkpoint": "checkpoints/best.pt"},
            )
            write_record(folder.record, record)
    if stage == "gather":
        write_json(plan.paths.index, {"shards": {}})
        write_json(plan.paths.rejected, [])


def test_plan_writes_nothing(launcher: Launcher) -> None:
    answer = launcher.run("plan", "--json")
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert [stage["todo"] for stage in facts["stages"]] == [2, 1, 2, 1, 3, 3, 1]
    assert not launcher.runs.exists()


def test_a_plan_shows_what_is_done(launcher: Launcher) -> None:
    finish(plan_of(launcher), "measure")
    answer = launcher.run("plan")
    assert "measure: 3 cells, 3 done, 0 to do" in answer.stdout
    assert "done   measure rgb+ndvi full" in answer.stdout


def test_until_preprocess_takes_the_index_along() -> None:
    assert stages_until("preprocess") == ("preprocess", "gather")
    assert stages_until("pretrain") == ("preprocess", "gather", "pretrain")
    with pytest.raises(RtshpcError, match=r"--until = .* is unknown"):
        stages_until("pretran")


def test_gathered_shards_need_no_preprocess_task_though_their_number_changed(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    finish(plan, "gather")
    again = plan_of(launcher, "data.shard.tasks=7")
    assert not [cell for cell in again.todo if cell.stage in ("preprocess", "gather")]


def test_a_new_grid_value_leaves_only_its_cells_and_the_summary_to_do(launcher: Launcher) -> None:
    plan = plan_of(launcher, "grid.finetune.epochs=[1]")
    for stage in ("preprocess", "gather", "pretrain", "finetune", "evaluate", "measure"):
        finish(plan, stage)
    again = plan_of(launcher, "grid.finetune.epochs=[1, 2]")
    assert [cell.stage for cell in again.todo] == ["finetune", "evaluate", "summarise"]
    assert all(cell.varied == {"finetune.epochs": 2} for cell in again.todo[:2])


def test_other_data_in_a_run_folder_is_refused_and_named(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    refuse_other_data(plan_of(launcher, "data.chip.size_px=32"))
    finish(plan, "preprocess")
    refuse_other_data(plan_of(launcher, "finetune.epochs=9", "data.shard.tasks=4", "data.root=/elsewhere"))
    with pytest.raises(RunError, match=r"data\.chip\.size_px was 64, is 32; give another name") as caught:
        refuse_other_data(plan_of(launcher, "data.chip.size_px=32"))
    assert "\n" not in str(caught.value)


def test_a_run_folder_has_one_launcher(launcher: Launcher) -> None:
    with launcher_lock(plan_of(launcher).paths):
        answer = launcher.run("sweep", "--until", "preprocess")
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "another launcher works on this run" in answer.stderr


def test_the_runs_config_says_what_it_is_made_with(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    text = plan.paths.config.read_text()
    assert f"data_fingerprint: {plan.fingerprint}" in text
    assert "commit: " in text
    assert load_run(plan.paths.config) == plan.config


def test_a_missing_image_is_refused_before_anything_runs(launcher: Launcher) -> None:
    answer = launcher.run("sweep", "--set", "site.image=/nowhere.sif")
    assert answer.returncode == 2
    assert "site.image = /nowhere.sif: no such image" in answer.stderr


def test_the_ledger_counts_attempts_over_launches(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    plan.paths.create()
    for _ in range(2):
        Ledger(plan.paths).add(plan.cells[0], Job("7", Path("log"), None), "local")
    entries = Ledger(plan.paths).entries
    assert [entry["attempt"] for entry in entries] == [1, 2]
    assert {"time", "stage", "cell", "label", "job", "executor", "log"} < set(entries[0])
