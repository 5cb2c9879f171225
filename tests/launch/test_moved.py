"""Run folders that are copied or moved while Slurm has jobs of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.paths import RunPaths
from rtshpc.hpc.executor import Job
from rtshpc.launch.__main__ import main
from rtshpc.launch.plan import Plan, make_plan
from rtshpc.launch.status import run_status
from rtshpc.launch.submit import Ledger, prepare, submit_arrays

from .conftest import Launcher


@pytest.fixture
def plan(launcher: Launcher, programs: Any) -> Plan:
    """A run whose every cell waits in Slurm: job `1_0` is the first cell's, and so on."""
    found = make_plan(load_run(launcher.sweep, ["site=lab"]), launcher.runs)
    prepare(found)
    ledger = Ledger(found.paths)
    lines: list[str] = []
    for number, cell in enumerate(found.cells, 1):
        ledger.add(cell, Job(f"{number}_0", found.paths.logs / cell.stage / f"{number}_0_0_log.out", None), "slurm")
        lines.append(f"{number}_0|PENDING|Priority|N/A|0:00|10:00|\n")
    programs.says("squeue", "".join(lines))
    programs.says("sacct", "", 1)
    programs.says("scancel", "")
    programs.says("srun", "")
    programs.says("sbatch", "Submitted batch job 77")
    return found


def states(paths: RunPaths) -> set[str]:
    return {str(row["state"]) for row in run_status(paths)["cells"]}


def test_a_copy_of_a_run_has_none_of_its_jobs_and_can_neither_wait_for_them_nor_cancel_them(
    plan: Plan, programs: Any, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(launcher.runs, tmp_path / "copies")
    copy = make_plan(load_run(launcher.sweep, ["site=lab"]), tmp_path / "copies")
    assert (states(plan.paths), states(copy.paths)) == ({"submitted"}, {"waiting"})
    assert main(["cancel", str(copy.paths.root)]) == 0
    assert "0 jobs cancelled" in capsys.readouterr().out and not programs.asked("scancel")
    made = submit_arrays(copy, Ledger(copy.paths))
    assert (len(made.sent), made.left_alone) == (len(copy.todo), ())
    assert not submit_arrays(plan, Ledger(plan.paths)).sent


def test_a_run_that_was_moved_keeps_its_jobs(plan: Plan) -> None:
    moved = RunPaths(plan.paths.root.rename(plan.paths.root.with_name("moved $1 'run'")))
    assert states(moved) == {"submitted"}
