"""docs/cluster.md, run as written: from a clone on a login node to a finished sweep."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json

from .conftest import ROOT
from .images import image_environment
from .lab import Lab

WHOLE_IMAGE = os.environ.get("RTSHPC_WHOLE_IMAGE", "")
"""A whole image of this very commit (`make image`, minutes to an hour); nothing else here needs one."""

SITE = {
    "account": '""',
    "partition": "a5000",
    "cpus": "1",
    "gpu_memory_gb": "0",
    "memory_gb": "3",
    "minutes": "30",
    "warn_seconds": "20",
}
"""What the editor writes into the copied site file; two cores carry no more than three tasks."""


def commands() -> list[str]:
    """The lines of the page's first block."""
    block = re.search(r"```\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def editor(folder: Path, **more: str) -> Path:
    """A program that fills in a site file as a person would."""
    edits = " ".join(f"-e 's|^{key}: [^ ]*|{key}: {value}|'" for key, value in (SITE | more).items())
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\nexec sed -i {edits} -e 's/^max_jobs: [0-9]*/max_jobs: 2/' \"$1\"\n")
    path.chmod(0o755)
    return path


def test_the_page_promises_ten_commands() -> None:
    assert len(commands()) == 10


def follow(lab: Lab, folder: Path, given: dict[str, str]) -> RunPaths:
    """Do as the page says in `folder`; the run that it leads to."""
    script = "\n".join(["set -e", *commands()])
    environment = lab.environment | {"RTSHPC_GIT": str(ROOT), "HOME": str(folder)} | given
    line = ["bash", "-c", script]
    answer = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "all cells are done" in answer.stdout and "core-hours in" in answer.stdout
    run = RunPaths(folder / "rtshpc" / "runs" / "demo")
    assert run.report_page.is_file() and (folder / "rtshpc" / ".venv").is_dir()
    return run


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_ten_commands_lead_from_a_clone_to_a_finished_sweep(lab: Lab, tmp_path: Path) -> None:
    # In place of the image, whose own tests run jobs in it, this environment lends the libraries of the tasks.
    stand_in = tmp_path / "empty.sif"
    stand_in.touch()
    lent = {"PYTHONPATH": sysconfig.get_path("purelib"), "EDITOR": str(editor(tmp_path))}
    follow(lab, tmp_path, {"RTSHPC_SIF": str(stand_in), **lent})


@pytest.mark.full
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not WHOLE_IMAGE, reason="needs RTSHPC_WHOLE_IMAGE=FILE.sif, a whole image of this commit")
def test_ten_commands_lead_to_a_finished_sweep_in_the_whole_image(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "rtshpc" / "rtshpc.sif"
    given = {"RTSHPC_SIF": WHOLE_IMAGE, "EDITOR": str(editor(tmp_path, image=str(image)))}
    run = follow(lab, tmp_path, {"PATH": image_environment()["PATH"], **given})
    records = [read_json(path) for path in run.cells.glob("*/record.json")]
    assert {record["environment"]["image"]["path"] for record in records} == {str(image)}
