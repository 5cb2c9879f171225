"""A scaling study as `launch scale` plans, submits and shows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from typing import Any

import pytest

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RunError
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_json, read_lines, read_record, write_record
from rtshpc.core.sizing.scaling import scale_points
from rtshpc.hpc.executor import Job
from rtshpc.launch import schedule
from rtshpc.launch.__main__ import main
from rtshpc.launch.display import Display, make_console
from rtshpc.launch.jobs import with_more_memory
from rtshpc.launch.plan import Plan, arrays, make_plan, plan_again, scale_plan, study_of
from rtshpc.launch.submit import Ledger, prepare, refuse_other_data, submit_arrays, undo
from rtshpc.stages.runner import processes_and_threads

from .conftest import ROOT, Launcher

SETS = (
    "site=lab",
    "site.gpus=0",
    "site.tasks_per_node=2",
    "scale.gpus=[1, 4]",
    "scale.concurrency=[2]",
    "scale.tasks=[1]",
    "scale.repeats=2",
    "scale.batch=4",
    "scale.batch_per_gpu=1",
)
STUB = Record(cell="0", stage="gather", label="", result_version=1, started="", seconds=0, results={})


def plan_of(launcher: Launcher, *sets: str) -> Plan:
    config = study_of(load_run(launcher.sweep, [*SETS, *sets]))
    return scale_plan(config, RunPaths(launcher.runs / config.name))


def finish(plan: Plan, cell: Cell, series: str) -> None:
    """A valid record of a measurement, of the submission `series`."""
    assert cell.scaling is not None
    told = {
        "series": series,
        "rate": 1.0,
        "unit": "samples/s",
        "seconds": [1.0],
        "nodes": 1,
        "device": "cpu",
        "gpu": "",
    }
    results = {**cell.scaling.model_dump(), **told, "job": series, "ended": 1e9}
    facts: dict[str, Any] = {"label": cell.label, "started": "2026-01-02T03:04:05+00:00", "seconds": 2.0}
    record = Record(cell=cell.id, stage="scale", result_version=RESULT_VERSION["scale"], results=results, **facts)
    write_record(plan.paths.cell(cell.id).record, record)


def of_kind(plan: Plan, kind: str) -> list[Cell]:
    return [cell for cell in plan.cells if cell.scaling is not None and cell.scaling.kind == kind]


def labels(cells: Any) -> set[str]:
    return {cell.label for cell in cells}


def test_each_measurement_waits_for_the_shards_and_for_the_end_of_the_one_before_it(launcher: Launcher) -> None:
    found = arrays(plan_of(launcher).todo, {}, 1000)
    names = {array.number: f"J{array.number}" for array in found}
    shards = [array.stage for array in found].index("scale")
    first, *rest = found[shards:]
    gather = f"afterok:J{shards - 1}"
    assert first.dependency(names) == gather
    assert [one.dependency(names) for one in rest] == [f"{gather},afterany:J{one.number - 1}" for one in rest]
    assert [(len(one.cells), one.site.max_jobs) for one in (first, *rest)] == [(2, 1)] * 4 + [(4, 2)] * 2 + [(2, 1)] * 2
    assert [(one.site.nodes, one.site.tasks) for one in found[shards : shards + 2]] == [(1, 1), (2, 2)]


def test_an_attempt_is_booked_with_the_threads_of_all_its_processes(launcher: Launcher) -> None:
    config = study_of(load_run(launcher.sweep, [*SETS[3:], "scale.tasks=[1, 2]", "finetune.threads=2"]))
    plan = scale_plan(config, RunPaths(launcher.runs / config.name))
    held = {(cell.scaling.kind, cell.scaling.count): processes_and_threads(cell) for cell in plan.cells if cell.scaling}
    one = {(kind, 1): (1, 2) for kind in ("strong", "weak", "preprocess", "map")}
    more = {("strong", 4): (4, 2), ("weak", 4): (4, 2), ("preprocess", 2): (2, 2), ("map", 2): (2, 2)}
    assert held == {**one, **more, ("array", 2): (1, 2)}
    assert {processes_and_threads(cell) for cell in plan.cells if cell.stage == "preprocess"} == {(1, 1)}


def test_new_measurements_wait_for_those_that_slurm_has_already(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    strong = of_kind(plan, "strong")
    found = arrays(
        [cell for cell in plan.todo if cell.stage == "scale"], {strong[0].id: "77_0", strong[1].id: "77_1"}, 99
    )
    assert found[0].dependency({}) == "afterany:77"


def test_a_measurement_of_which_a_job_is_missing_or_of_two_submissions_is_made_again_whole(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    first, second = of_kind(plan, "array")[:4], of_kind(plan, "array")[4:]
    for cell in (*first[:3], *second[:3], of_kind(plan, "strong")[0]):
        finish(plan, cell, "100")
    finish(plan, second[3], "200")
    again = plan_of(launcher)
    assert labels(again.todo) == labels(plan.todo) - {of_kind(plan, "strong")[0].label}
    finish(plan, second[3], "100")
    again = plan_of(launcher)
    assert labels(again.todo) == labels(plan.todo) - labels([*second, of_kind(plan, "strong")[0]])
    # While Slurm has a part of it, what is done of it counts and what is lost waits.
    assert labels(first) & labels(again.beside({first[3].id: "9_3"})) == {first[3].label}
    undo(again.paths, again.todo)
    assert read_record(plan.paths.cell(first[0].id).record) is None
    assert read_record(plan.paths.cell(second[0].id).record) is not None


def test_a_retry_of_one_job_of_a_measurement_takes_the_others_along(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    lost = of_kind(plan, "array")[1]
    again = replace(plan_again(plan.config, plan.paths, "scale"), only=frozenset({lost.id}))
    assert labels(again.todo) == labels(of_kind(plan, "array")[:4])


def test_measurements_that_ran_out_of_a_gpus_memory_are_made_again_by_scale_not_by_retry(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    row = {"id": of_kind(plan, "strong")[0].id, "label": "scale strong 1", "stage": "scale", "oom": "gpu"}
    with pytest.raises(RunError, match=r"run `scale` again with --set site\.micro_batch=N"):
        with_more_memory(plan.config, [row], plan.paths)


def test_a_measurement_is_submitted_whole_or_not_at_all(launcher: Launcher, programs: Any) -> None:
    plan = plan_of(launcher, "site.submit_limit=12")
    prepare(plan)
    programs.says("sbatch", "Submitted batch job 100")
    programs.says("srun", "")
    programs.says("squeue", "")
    made = submit_arrays(plan, Ledger(plan.paths))
    # Two tasks of preprocess, gather, four times two repeats; one is left of twelve, and the array takes four.
    assert len(made.sent) == 11
    assert not labels(made.sent) & labels(of_kind(plan, "array"))
    assert len(made.held_back) == len(plan.todo) - 11


def test_a_study_and_a_sweep_do_not_share_a_folder(launcher: Launcher) -> None:
    plan = plan_of(launcher)
    prepare(plan)
    config = load_run(launcher.sweep, [f"name={plan.config.name}"])
    with pytest.raises(RunError, match="is the folder of a scaling study; give another name"):
        refuse_other_data(make_plan(config, launcher.runs))
    sweep = make_plan(load_run(launcher.sweep), launcher.runs)
    prepare(sweep)
    with pytest.raises(RunError, match="is the folder of a sweep"):
        refuse_other_data(scale_plan(plan.config, sweep.paths))


class Worker:
    """In place of processes: every cell is done at the second look, and nothing runs beside another measurement."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.at_work, self.order = plan, dict[str, Cell](), list[str]()

    def submit(self, site: SiteConfig, paths: RunPaths, stage: str, tasks: list[str]) -> list[Job]:
        cell = next(cell for cell in self.plan.cells if cell.id == tasks[0])
        self.at_work[cell.id] = cell
        self.order.append(cell.label)
        kinds = {(one.scaling.kind, one.scaling.count) for one in self.at_work.values() if one.scaling is not None}
        assert len(kinds) == 1 and len(self.at_work) <= site.max_jobs
        worker = self

        class Done:
            looks = 0

            @property
            def state(self) -> str:
                self.looks += 1
                if self.looks < 2:
                    return "RUNNING"
                if worker.at_work.pop(cell.id, None) is not None:
                    finish(worker.plan, cell, "here")
                return "FINISHED"

        return [Job("1", paths.logs / "x", Done())]


def test_here_too_measurements_run_one_after_another_with_as_many_jobs_at_once_as_they_say(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study_of(load_run(launcher.sweep, SETS[3:]))
    plan = scale_plan(config, RunPaths(launcher.runs / config.name))
    prepare(plan)
    shards = {cell.id: STUB for cell in plan.cells if cell.scaling is None}
    plan = replace(plan, done=shards)
    worker = Worker(plan)
    monkeypatch.setattr(schedule, "submit", worker.submit)
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0.0)
    outcome = schedule.Scheduler(plan, Ledger(plan.paths), Display(make_console(), plan.paths)).run()
    assert not outcome.failed and len(outcome.done) == len(plan.cells) - len(shards)
    assert worker.order == [cell.label for cell in plan.cells if cell.scaling is not None]


def test_counts_are_checked_and_an_empty_kind_is_left_out(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["scale", str(launcher.sweep), "--runs", str(launcher.runs), "--plan", "--json"]
    assert main([*line, "--gpus", "1,2,zero"]) == 2
    assert capsys.readouterr().err == 'error: --gpus 1,2,zero: "zero" is no count; give whole numbers from 1, e.g. 1,2,4, or none\n'  # fmt: skip
    assert main([*line, "--gpus", "1,2", "--concurrency", "none", "--tasks", "none", "--set", "scale.batch=4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run"] == "small-scale-here"
    assert {cell["label"].split()[1] for cell in facts["cells"] if cell["stage"] == "scale"} == {"strong", "weak"}
    assert not launcher.runs.exists()


def test_what_is_measured_is_shown_with_medians_quartiles_and_efficiency(
    study: Any, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = study("small-scale-here", gpu="NVIDIA H100")
    assert main(["report", str(paths.root)]) == 2  # a sweep's report would find nothing here
    assert "is a scaling study; `scale CONFIG --show` shows it" in capsys.readouterr().err
    line = ["scale", str(launcher.sweep), "--runs", str(paths.root.parent), "--set", "scale.batch=8", "--show"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "Scaling: medians over repeats" in out and "NVIDIA H100" in out and "90%" in out
    assert main([*line, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["points"]) == len(scale_points(paths)) and facts["rows"][0]["kind"] == "strong"
    assert main(["status", str(paths.root), "--json"]) == 0
    assert {cell["state"] for cell in json.loads(capsys.readouterr().out)["cells"] if cell["stage"] == "scale"} == {
        "done"
    }


@pytest.mark.full
def test_a_study_that_is_killed_goes_on_and_says_what_it_cost(launcher: Launcher, short_study: Any) -> None:
    line = ["scale", str(launcher.sweep), "--runs", str(launcher.runs), *short_study(batch=2)]
    paths = RunPaths(launcher.runs / "small-scale-here")
    process = subprocess.Popen(launcher.line(*line), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(scale_points(paths)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in paths.cells.glob("*/record.json")}
    answer = launcher(*line)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert all(path.read_bytes() == text for path, text in kept.items())
    points = scale_points(paths)
    assert [(one.kind, one.count) for one in points] == [
        ("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2), ("array", 2), ("preprocess", 2), ("map", 2),
    ]  # fmt: skip
    assert "nothing to do" in launcher(*line).stdout
    usage: Any = read_json(paths.usage)
    tried = [row for cell in paths.cells.iterdir() for row in read_lines(RunPaths(paths.root).cell(cell.name).attempts)]
    assert usage["total"]["attempts"] == len(tried) >= len(list(paths.cells.iterdir()))
    assert usage["source"] == "own books"
    assert usage["total"]["cpu_hours"] >= usage["total"]["node_hours"] > 0
