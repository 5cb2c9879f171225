"""`python -m rtshpc.stages` by hand."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from rtshpc.core.errors import RunError
from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_record
from rtshpc.launch.plan import make_plan
from rtshpc.launch.submit import prepare
from rtshpc.stages.runner import find_cell

from .conftest import ROOT, Launcher


def stage(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rtshpc.stages", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def prepared(launcher: Launcher) -> RunPaths:
    plan = make_plan(load_run(launcher.sweep), launcher.runs)
    prepare(plan)
    return plan.paths


@pytest.mark.slow
def test_a_task_runs_by_index_or_id_and_only_once(launcher: Launcher) -> None:
    paths = prepared(launcher)
    first = stage("preprocess", "--run-dir", str(paths.root), "--task", "0")
    assert first.returncode == 0, first.stderr
    cell = next(folder for folder in paths.cells.iterdir() if (folder / "record.json").exists())
    record = read_record(cell / "record.json")
    assert record is not None
    again = stage("preprocess", "--run-dir", str(paths.root), "--task", record.cell)
    assert again.returncode == 0
    assert "done before" in again.stdout
    assert read_record(cell / "record.json") == record


@pytest.mark.slow
def test_a_failed_attempt_says_why_and_its_leftovers_are_swept(launcher: Launcher) -> None:
    paths = prepared(launcher)
    paths.shard(0, 0).mkdir()
    assert stage("preprocess", "--run-dir", str(paths.root), "--task", "0").returncode == 1
    folder = next(folder for folder in paths.cells.iterdir() if (folder / "failure.json").exists())
    failure = read_json(folder / "failure.json")
    assert failure["kind"]
    assert "Traceback" in failure["traceback"]
    assert "\n" not in failure["error"]
    (folder / ".record.json.abc.tmp").write_text("half")
    paths.shard(0, 0).rmdir()
    assert stage("preprocess", "--run-dir", str(paths.root), "--task", "0").returncode == 0
    assert not list(folder.glob(".*.tmp"))
    assert not (folder / "failure.json").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--task", "9"), "no task 9 of preprocess; it has 2"),
        (("--task", "nocell"), "no task nocell of preprocess"),
    ],
)
def test_a_task_that_is_not_there_is_one_line(launcher: Launcher, arguments: tuple[str, ...], wanted: str) -> None:
    paths = prepared(launcher)
    answer = stage("preprocess", "--run-dir", str(paths.root), *arguments)
    assert answer.returncode == 2
    assert wanted in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("task", ["²", "..", ".", "", "../../x", "a/b", "-1", "1.0", " 0"])
def test_a_task_that_is_neither_id_nor_index_is_refused(launcher: Launcher, task: str) -> None:
    paths = prepared(launcher)
    with pytest.raises(RunError, match=r"no task .* of preprocess; it has 2"):
        find_cell(paths, "preprocess", task)
    assert find_cell(paths, "preprocess", "1") == read_json(paths.plan)["cells"][1]["id"]


def test_a_folder_that_is_no_run_and_a_cell_of_another_stage_are_refused(launcher: Launcher) -> None:
    answer = stage("gather", "--run-dir", str(launcher.folder), "--task", "0")
    assert (answer.returncode, "is it a run folder?" in answer.stderr) == (2, True)
    paths = prepared(launcher)
    cell = next(cell for cell in read_json(paths.plan)["cells"] if cell["stage"] == "measure")
    answer = stage("gather", "--run-dir", str(paths.root), "--task", cell["id"])
    assert (answer.returncode, "is of stage measure, not gather" in answer.stderr) == (2, True)


@pytest.mark.slow
def test_two_attempts_at_one_cell_wait_for_each_other(launcher: Launcher) -> None:
    paths = prepared(launcher)
    cell = next(cell for cell in read_json(paths.plan)["cells"] if cell["stage"] == "preprocess")
    lock = Path(paths.cell(cell["id"]).lock)
    line = [sys.executable, "-m", "rtshpc.stages", "preprocess", "--run-dir", str(paths.root), "--task", cell["id"]]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=3)
        assert not paths.cell(cell["id"]).attempts.exists()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
