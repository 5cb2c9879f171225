"""The benchmark of submission runs and tells both sides; whether its targets are met is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .lab import Lab


@pytest.mark.full
def test_the_benchmark_counts_seconds_and_calls_of_both_sides(lab: Lab, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "benchmarks" / "launch.py"), "--cells", "10", "--json"]
    done = subprocess.run(line, cwd=tmp_path, env=lab.environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    sides = json.loads(done.stdout)["sides"]
    (ours,), (theirs,) = sides["arrays"], sides["job_per_cell"]
    assert theirs["sbatch"] == theirs["jobs"] == 10
    assert ours["sbatch"] < ours["jobs"] and ours["seconds"] > 0
