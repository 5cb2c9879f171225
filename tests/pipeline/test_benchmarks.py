"""The benchmark scripts run and tell both sides; whether targets are met is for a quiet machine to say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "preprocess": ["--files", "4", "--rounds", "1", "--kinds", "uint8"],
    "shard_read": ["--files", "8", "--passes", "1", "--repeats", "1"],
    "instances": ["--masks", "4", "--repeats", "1"],
    "features": ["--size", "64", "--measured", "1", "--scenes", "2", "--repeats", "1"],
    "map_scene": ["--sizes", "300", "600", "--repeats", "1", "--block", "400"],
}
LONG = ("map_scene", "features", "shard_read")
"""In full only."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in SMALL]
)
def test_a_benchmark_measures_both_sides_and_prints_their_ratios(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--json", *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["benchmark"] == name and set(report["targets"]) <= set(report["ratios"])
    assert set(report["met"]) >= set(report["targets"])
    assert done.returncode == (0 if all(report["met"].values()) else 1)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in report["ratios"].values())


@pytest.mark.full
def test_predicted_memory_is_measured_from_the_bare_source_tree(tmp_path: Path) -> None:
    options = ["--models", "tiny", "--modalities", "1", "2", "--arms", "unimodal", "cached", "--chip-px", "64"]
    command = [sys.executable, str(SCRIPTS / "memory_prediction.py"), "--json", "--repeats", "1", "--precision", "fp32"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *options, "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [row["arm"] for row in report["rows"]] == ["unimodal", "cached"]
    assert len(report["judged"]) == 3 and all(entry["met"] for entry in report["judged"])
    assert all(abs(row["predicted"]["error"]["optim_state"]) < 0.01 for row in report["rows"])
