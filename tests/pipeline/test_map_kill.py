"""SIGKILL the tasks of a map run anywhere, go on, and its tables are those of an undisturbed one, to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_plan

ROOT = Path(__file__).resolve().parents[2]


def tables(out: Path) -> dict[str, bytes]:
    paths = RunPaths(out)
    plan = read_plan(paths.plan)
    assert plan is not None
    merges = {cell["label"]: paths.cell(cell["id"]).instances for cell in plan["cells"] if cell["stage"] == "merge"}
    layers = {name: paths.layers / name for name in ("slumps.parquet", "footprints.parquet", "map.gpkg")}
    return {name: path.read_bytes() for name, path in (merges | layers).items()}


def tasks(out: Path) -> list[int]:
    """Processes of the run's tasks; not their launcher."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "rtshpc.stages" in words and str(out) in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_a_map_run_whose_tasks_are_killed_at_random_instants_ends_as_an_undisturbed_one(
    to_map: Any, tmp_path: Path, seed: int
) -> None:
    scenes, draw = to_map.scenes("abcy"), random.Random(seed)

    def line(out: str, jobs: int, block: int) -> list[str]:
        sets = [f"site.max_jobs={jobs}", f"map.block_px={block}", "map.score_threshold=0.3", "map.overlap_px=16"]
        common = [sys.executable, "-m", "rtshpc.launch", "map", str(scenes), "--model", to_map.model]
        return [*common, "--out", str(tmp_path / out), *(word for one in sets for word in ("--set", one))]

    subprocess.run(line("calm", 1, 8192), cwd=ROOT, check=True, capture_output=True, timeout=300)
    hit, deadline, done = 0, time.monotonic() + 400, False
    while not done:
        process = subprocess.Popen(line("storm", 7, 64), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{hit} kills, and no end"
            time.sleep(draw.uniform(0.5, 6.0))
            running = tasks(tmp_path / "storm")
            if running and hit < 8:
                os.kill(draw.choice(running), signal.SIGKILL)
                hit += 1
        done = process.returncode == 0
    assert hit >= 4
    assert tables(tmp_path / "storm") == tables(tmp_path / "calm")
    assert json.loads((tmp_path / "storm" / "plan.json").read_text())["run"] == "storm"
