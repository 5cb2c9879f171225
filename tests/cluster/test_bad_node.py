"""Nodes that are broken, on a real Slurm: a task says so, and its job goes on elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from rtshpc.core.load import load_run
from rtshpc.core.records import read_lines, read_record
from rtshpc.hpc.books import attempts
from rtshpc.hpc.executor import submit
from rtshpc.launch.plan import make_plan
from rtshpc.launch.submit import prepare

from .conftest import ROOT, Login
from .lab import Lab, wait_for

SMI = """#!/bin/sh
if [ "$(hostname)" = a5n1 ]; then
  echo "Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.  Reboot the system" >&2
  exit 15
fi
echo 24564
"""
SETS = (
    "site=lab",
    "site.partition=low",
    "site.gpu_type=''",
    "site.gpu_memory_gb=24",
    "site.scratch=LAB_SCRATCH",
    "measure.modality_sets=[[rgb], [ndvi]]",
)
SOUND = "a1n1,a1n2"
BOTH = ("a5n1,a5n2", "a5n[1-2]")


@pytest.fixture
def broken(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """a5n1 has lost its GPU, a5n2 cannot write its scratch folder, and the others are kept away from jobs."""
    programs, scratch = tmp_path / "bin", tmp_path / "scratch"
    programs.mkdir()
    scratch.mkdir()
    (programs / "nvidia-smi").write_text(SMI)
    (programs / "nvidia-smi").chmod(0o755)
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}:{lab.environment['PATH']}")
    monkeypatch.setenv("LAB_SCRATCH", str(scratch))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    node = (lab.root / "run" / "node.a5n2.pid").read_text()
    inside = ["nsenter", "--mount", "--target", node]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(scratch)], check=True)
    lab("scontrol", "update", f"NodeName={SOUND}", "State=DRAIN", "Reason=test")
    yield
    lab("scontrol", "update", f"NodeName={SOUND}", "State=RESUME", check=False)  # the test may have done so
    subprocess.run([*inside, "umount", str(scratch)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("broken")
def test_a_task_that_meets_a_lost_gpu_and_a_dead_scratch_ends_on_a_third_node_and_later_jobs_avoid_both(
    login: Login,
) -> None:
    lab, plan = login.lab, make_plan(load_run(login.sweep, SETS), login.runs)
    prepare(plan)
    first, second = (cell for cell in plan.cells if cell.stage == "measure")
    own = plan.paths.cell(first.id)
    job = submit(plan.config.site, plan.paths, "measure", [first.id])[0].id
    wait_for("both are avoided", lambda: lab.job(job)["ExcNodeList"] in BOTH, 60)
    wait_for("it is in the queue", lambda: lab.job(job)["JobState"] == "PENDING", 60)
    assert not own.record.exists()

    later = submit(plan.config.site, plan.paths, "measure", [second.id])[0].id
    assert lab.job(later)["ExcNodeList"] in BOTH
    lab("scancel", later)

    lab("scontrol", "update", f"NodeName={SOUND}", "State=RESUME")
    lab.wait_until_empty(60)
    record = read_record(own.record)
    assert record is not None and record.attempts == 3
    assert record.environment["host"] in SOUND.split(",")
    assert [one.how for one in attempts(own)] == ["bad node", "bad node", "done"]
    told = {row["node"]: row["why"] for row in read_lines(plan.paths.bad_nodes)}
    assert "GPU is lost" in told["a5n1"] and "Read-only file system" in told["a5n2"]
