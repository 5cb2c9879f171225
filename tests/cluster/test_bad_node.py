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
SPARE = "a1n1,a1n2"
GPU, DISK = "a5n1", "a5n2"
WHY = {GPU: "GPU is lost", DISK: "Read-only file system"}


@pytest.fixture
def broken(
    request: pytest.FixtureRequest, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[tuple[str, ...]]:
    """GPU has lost its GPU, DISK (where asked for) cannot write its scratch folder, and spare nodes take no jobs."""
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
    node = (lab.root / "run" / f"node.{DISK}.pid").read_text()
    inside = ["nsenter", "--mount", "--target", node]
    if DISK in request.param:
        subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(scratch)], check=True)
    lab("scontrol", "update", f"NodeName={SPARE}", "State=DRAIN", "Reason=test")
    yield request.param
    lab("scontrol", "update", f"NodeName={SPARE}", "State=RESUME", check=False)  # the test may have done so
    if DISK in request.param:
        subprocess.run([*inside, "umount", str(scratch)], check=True)


@pytest.mark.full
@pytest.mark.parametrize(
    "broken",
    [(GPU,), (GPU, DISK)],
    ids=["lost gpu", "lost gpu, dead disk"],
    indirect=True,
)
def test_a_task_that_meets_broken_nodes_ends_on_a_sound_one_and_later_jobs_avoid_them(
    login: Login, broken: tuple[str, ...]
) -> None:
    avoided = (",".join(broken), "a5n[1-2]" if DISK in broken else "")
    lab, plan = login.lab, make_plan(load_run(login.sweep, SETS), login.runs)
    prepare(plan)
    first, second = (cell for cell in plan.cells if cell.stage == "measure")
    own = plan.paths.cell(first.id)
    job = submit(plan.config.site, plan.paths, "measure", [first.id])[0].id
    wait_for("they are avoided", lambda: lab.job(job)["ExcNodeList"] in avoided, 60)
    assert not own.record.exists()

    later = submit(plan.config.site, plan.paths, "measure", [second.id])[0].id
    assert lab.job(later)["ExcNodeList"] in avoided
    lab("scancel", later)

    lab("scontrol", "update", f"NodeName={SPARE}", "State=RESUME")
    lab.wait_until_empty(240)
    record = read_record(own.record)
    assert record is not None and record.environment["host"] not in broken
    assert [one.how for one in attempts(own)] == [*["bad node"] * len(broken), "done"]
    told = {row["node"]: row["why"] for row in read_lines(plan.paths.bad_nodes)}
    assert told.keys() == set(broken) and all(WHY[node] in told[node] for node in broken)
