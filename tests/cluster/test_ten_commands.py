"""docs/cluster.md, run as written: from a clone on a login node to a finished sweep."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from rtshpc.core.paths import RunPaths

from .conftest import ROOT
from .lab import Lab

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


def editor(folder: Path) -> Path:
    """A program that fills in a site file as a person would."""
    edits = " ".join(f"-e 's/^{key}: [^ ]*/{key}: {value}/'" for key, value in SITE.items())
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\nexec sed -i {edits} -e 's/^max_jobs: [0-9]*/max_jobs: 2/' \"$1\"\n")
    path.chmod(0o755)
    return path


def test_the_page_promises_ten_commands() -> None:
    assert len(commands()) == 10


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_ten_commands_lead_from_a_clone_to_a_finished_sweep(lab: Lab, tmp_path: Path) -> None:
    # In place of the image, whose own tests run jobs in it, this environment lends the libraries of the tasks.
    (tmp_path / "empty.sif").touch()
    given = {
        "RTSHPC_GIT": str(ROOT),
        "RTSHPC_SIF": str(tmp_path / "empty.sif"),
        "EDITOR": str(editor(tmp_path)),
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "HOME": str(tmp_path),
    }
    script = "\n".join(["set -e", *commands()])
    line = ["bash", "-c", script]
    environment = lab.environment | given
    answer = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "all cells are done" in answer.stdout and "core-hours in" in answer.stdout
    run = RunPaths(tmp_path / "rtshpc" / "runs" / "demo")
    assert run.report_page.is_file() and (tmp_path / "rtshpc" / ".venv").is_dir()
