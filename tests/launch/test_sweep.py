"""Real tasks in real processes: what a user sees of failures, stops, kills and second runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines
from rtshpc.launch.status import is_locked

from .conftest import Launcher

SHARDS = ("--until", "preprocess")
LONG = (*SHARDS, "--set", "data.scenes.generated.size_px=2500")


def states(launcher: Launcher) -> dict[str, dict[str, Any]]:
    answer = launcher("status", "small", "--runs", str(launcher.runs), "--json")
    assert answer.returncode == 0, answer.stderr
    return {cell["label"]: cell for cell in json.loads(answer.stdout)["cells"]}


def wait_for_tasks(launcher: Launcher, count: int = 2) -> None:
    """Until `count` tasks hold their cells."""
    paths = RunPaths(launcher.runs / "small")
    for _ in range(600):
        if sum(is_locked(lock) for lock in paths.cells.glob("*/.lock")) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("no task started")


def gone(launcher: Launcher, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while launcher.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not launcher.processes()


@pytest.mark.slow
def test_a_second_sweep_does_nothing_but_say_so_and_records_tell_with_what_they_were_made(launcher: Launcher) -> None:
    first = launcher.run("sweep", *SHARDS)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "done     gather" in first.stdout
    ledger = RunPaths(launcher.runs / "small").ledger
    assert [entry["stage"] for entry in read_lines(ledger)] == ["preprocess", "preprocess", "gather"]
    record = read_json(next(ledger.parent.glob("cells/*/record.json")))
    assert {"host", "python", "cpu", "gpu", "torch", "commit", "image"} <= set(record["environment"])
    assert (record["attempts"], record["seconds"] > 0) == (1, True)
    before = ledger.read_bytes()
    second = launcher.run("sweep", *SHARDS)
    assert second.returncode == 0
    assert "nothing to do, all 3 cells are done" in second.stdout
    assert ledger.read_bytes() == before
    assert {cell["state"] for cell in states(launcher).values()} == {"done"}


@pytest.mark.slow
def test_a_failed_cell_is_named_with_its_log_stops_no_sibling_and_can_be_retried(launcher: Launcher) -> None:
    paths = RunPaths(launcher.runs / "small")
    paths.shard(0, 0).mkdir(parents=True)
    answer = launcher.run("sweep", *SHARDS)
    assert answer.returncode == 1
    found = states(launcher)
    assert {label: cell["state"] for label, cell in found.items()} == {
        "preprocess 1/2": "failed",
        "preprocess 2/2": "done",
        "gather": "blocked",
    }
    log = Path(found["preprocess 1/2"]["log"])
    assert f"log: {log}" in answer.stdout
    assert "Traceback" in log.read_text()
    assert "not run, they build on failed cells: gather" in answer.stdout
    shutil.rmtree(paths.shard(0, 0))
    again = launcher("retry", "small", "--runs", str(launcher.runs))
    assert again.returncode == 0, again.stdout + again.stderr
    assert {cell["state"] for cell in states(launcher).values()} == {"done"}
    assert states(launcher)["preprocess 1/2"]["attempts"] == 2
    assert states(launcher)["preprocess 2/2"]["attempts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_stopped_launcher_leaves_no_process_and_a_run_that_resumes(launcher: Launcher, number: int) -> None:
    process = launcher.start(*LONG)
    wait_for_tasks(launcher)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; run the same line again" in output
    assert gone(launcher, 1)
    assert not any(cell["state"] in ("running", "failed") for cell in states(launcher).values())
    assert launcher.run("sweep", *LONG).returncode == 0


@pytest.mark.slow
def test_tasks_end_with_a_launcher_that_is_killed_and_the_run_resumes(launcher: Launcher) -> None:
    process = launcher.start(*LONG)
    wait_for_tasks(launcher)
    assert {cell["state"] for cell in states(launcher).values()} == {"running", "waiting"}
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert gone(launcher, 15)
    assert launcher.run("sweep", *LONG).returncode == 0


@pytest.mark.slow
def test_a_killed_task_is_a_failed_cell_and_its_sibling_goes_on(launcher: Launcher) -> None:
    process = launcher.start(*SHARDS, "--set", "site.max_jobs=1")
    wait_for_tasks(launcher, 1)
    stages = [pid for pid in launcher.processes() if b"rtshpc.stages" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(stages[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    found = states(launcher)
    assert found["preprocess 1/2"]["state"] == "failed"
    assert "ended without a record" in found["preprocess 1/2"]["error"]
    assert found["preprocess 2/2"]["state"] == "done"


@pytest.mark.full
def test_the_debug_executor_runs_the_same_tasks_one_after_the_other(launcher: Launcher) -> None:
    answer = launcher.run("sweep", *SHARDS, "--set", "site.executor=debug")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    entries = read_lines(RunPaths(launcher.runs / "small").ledger)
    assert {entry["executor"] for entry in entries} == {"debug"}
    assert all(Path(entry["log"]).read_text() for entry in entries)
