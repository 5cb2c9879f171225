from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import pytest

from rtshpc.core.cell import RESULT_VERSION
from rtshpc.core.errors import RtshpcError, RunError
from rtshpc.core.load import load_run, read_cell
from rtshpc.core.records import Record, read_plan, write_json, write_record
from rtshpc.hpc.executor import Job
from rtshpc.launch.launch import launch
from rtshpc.launch.plan import Plan, make_plan, stages_until
from rtshpc.launch.status import is_locked, run_status
from rtshpc.launch.submit import Ledger, launcher_lock, mend_cells, prepare, refuse_other_data
from rtshpc.stages.runner import find_cell

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
                result_version=RESULT_VERSION[stage],
                started="",
                seconds=1,
                results={"checkpoint": "checkpoints/best.pt"},
            )
            write_record(folder.record, record)
    if stage == "gather":
        write_json(plan.paths.index, {"chips": [{}], "shards": {"0000-000.h5": "sha"}})
        plan.paths.shard(0, 0).touch()
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
    assert stages_until("preprocess") == ("predict", "preprocess", "gather")
    assert stages_until("pretrain") == ("predict", "preprocess", "gather", "pretrain")
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


def finished_run(launcher: Launcher, *sets: str) -> Plan:
    """A run folder in which everything is done."""
    plan = plan_of(launcher, *sets)
    prepare(plan)
    for stage in plan.stages:
        finish(plan, stage)
    plan.paths.report_page.write_text("old")
    again = plan_of(launcher, *sets)
    assert (again.todo, again.changed) == ([], False)
    return again


def test_a_grid_value_taken_away_leaves_the_summary_to_make_and_another_site_nothing(launcher: Launcher) -> None:
    finished_run(launcher, "grid.finetune.epochs=[1, 2]")
    assert plan_of(launcher, "grid.finetune.epochs=[1, 2]", "site.max_jobs=7").todo == []
    assert plan_of(launcher, "grid.finetune.epochs=[1, 2]", until="pretrain").todo == []
    smaller = plan_of(launcher, "grid.finetune.epochs=[1]")
    assert [cell.stage for cell in smaller.todo] == ["summarise"]
    prepare(smaller)
    assert load_run(smaller.paths.config) == smaller.config
    rows = read_plan(smaller.paths.plan)
    assert rows is not None and {row["id"] for row in rows["cells"]} == {cell.id for cell in smaller.cells}
    assert plan_of(launcher, "grid.finetune.epochs=[1]").todo == []


def test_a_smaller_plan_with_nothing_to_do_is_the_plan_in_force(launcher: Launcher) -> None:
    finished_run(launcher, "grid.finetune.epochs=[1, 2]")
    smaller = plan_of(launcher, "grid.finetune.epochs=[1]", until="finetune")
    assert launch(lambda: smaller) == 0
    assert load_run(smaller.paths.config) == smaller.config


def test_a_damaged_config_of_a_done_cell_is_written_again(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = finished_run(launcher)
    damaged, lost = plan.paths.cell(plan.gather.id).config, plan.paths.cell(plan.cells[0].id).config
    damaged.write_text("id: [")
    lost.unlink()
    assert {cell["state"] for cell in run_status(plan.paths)["cells"]} == {"done", "waiting"}
    assert launch(lambda: plan) == 0
    assert "wrote 2 damaged config.yaml of done cells again" in capsys.readouterr().out
    assert read_cell(damaged) == plan.gather
    assert {cell["state"] for cell in run_status(plan.paths)["cells"]} == {"done"}
    assert mend_cells(plan) == 0


def test_a_site_without_its_slurm_is_refused_before_anything_is_written(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(launcher, "site=slurm-a5000")
    monkeypatch.setenv("PATH", str(launcher.folder))
    with pytest.raises(RunError, match="site slurm-a5000: executor = slurm cannot be used here"):
        launch(lambda: plan)
    assert not launcher.runs.exists()


def test_a_run_in_a_folder_with_a_percent_sign_is_refused(launcher: Launcher) -> None:
    plan = make_plan(load_run(launcher.sweep), launcher.runs / "50%j")
    with pytest.raises(RunError, match="% in the path of a run"):
        launch(lambda: plan)
    assert not launcher.runs.exists()


def test_a_look_at_the_status_keeps_no_launcher_from_its_run(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = plan_of(launcher).paths
    with launcher_lock(paths):
        assert is_locked(paths.lock)
    with paths.lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with launcher_lock(paths):
            assert is_locked(paths.lock)
    paths.lock.chmod(0o444)
    assert not is_locked(paths.lock)


BAD_PLANS = (
    {},
    [],
    {"cells": []},
    {"run": "r", "cells": [{}], "stages": []},
    {"run": "r", "cells": [], "stages": [{}]},
)


@pytest.mark.parametrize("plan", [*BAD_PLANS, {"run": "r", "stages": [{"stage": "x"}], "cells": [{"id": "../x"}]}])
def test_a_plan_of_another_form_is_one_line_and_the_sweep_writes_it_anew(launcher: Launcher, plan: object) -> None:
    run = plan_of(launcher)
    prepare(run)
    write_json(run.paths.plan, plan)
    with pytest.raises(RunError, match=r"plan\.json is not what a sweep writes; run the sweep again"):
        run_status(run.paths)
    with pytest.raises(RunError, match="is it a run folder"):
        find_cell(run.paths, "gather", "0")
    again = plan_of(launcher)
    prepare(again)
    assert run_status(run.paths)["run"] == "small"


def test_lines_of_the_ledger_that_tell_no_submission_are_passed_over(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    plan.paths.ledger.write_bytes(b'{}\n5\n[5]\n\xff\n{"cell": "a"}\n')
    ledger = Ledger(plan.paths)
    assert ledger.entries == []
    ledger.add(plan.cells[0], Job("7", Path("log"), None), "local")
    assert [cell["job"] for cell in run_status(plan.paths)["cells"]][:2] == ["7", None]


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
