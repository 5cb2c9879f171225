"""Map runs on a real Slurm: by `launch map`, and by the template of slurm/ as people submit it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_lines, read_plan, read_record
from rtshpc.launch.status import run_status

from .conftest import ROOT
from .lab import Lab, wait_for

SETS = ("map.score_threshold=0.3", "map.overlap_px=16", "site.partition=low", "site.gpus=0", "site.gpu_type=''")


class Mapping:
    """A login node, from which scenes are mapped."""

    def __init__(self, lab: Lab, to_map: Any, folder: Path) -> None:
        self.lab, self.to_map, self.paths = lab, to_map, RunPaths(folder / "a user's $HOME" / "map")
        self.environment = lab.environment | {"PYTHONPATH": str(ROOT)}

    def __call__(self, scenes: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable,
            "-m",
            "rtshpc.launch",
            "map",
            str(scenes),
            "--model",
            self.to_map.model,
            "--site",
            "lab",
        ]
        line += ["--out", str(self.paths.root), *(word for one in SETS for word in ("--set", one)), *arguments]
        return subprocess.run(
            line, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=240, check=False
        )

    def cells(self, stage: str) -> dict[str, str]:
        """Label -> id."""
        plan = read_plan(self.paths.plan)
        assert plan is not None
        return {cell["label"]: cell["id"] for cell in plan["cells"] if cell["stage"] == stage}

    def record(self, cell_id: str) -> Record:
        record = read_record(self.paths.cell(cell_id).record)
        assert record is not None, self.paths.cell(cell_id).failure.read_text()
        return record

    def states(self) -> dict[str, str]:
        merges = [self.record(cell).results for cell in self.cells("merge").values()]
        return {scene["scene"]: scene["state"] for merge in merges for scene in merge["scenes"]}

    def strike(self, cell_id: str) -> bool:
        """SIGKILL the process of a cell's task that has begun its work; False where there is none."""
        if not self.paths.cell(cell_id).attempts.exists():
            return False
        wanted = {b"rtshpc.stages", cell_id.encode(), str(self.paths.root).encode()}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = set(path.read_bytes().split(b"\0"))
            except OSError:
                continue
            if wanted <= words:
                os.kill(int(path.parent.name), signal.SIGKILL)
                return True
        return False


@pytest.fixture
def mapping(lab: Lab, to_map: Any, tmp_path: Path) -> Mapping:
    return Mapping(lab, to_map, tmp_path)


@pytest.mark.full
def test_twelve_scenes_of_which_one_is_broken_and_one_task_is_killed_end_with_eleven_mapped_and_one_named(
    mapping: Mapping,
) -> None:
    scenes = mapping.to_map.scenes("abcdefghijkx")
    answer = mapping(scenes)
    assert answer.returncode == 0, answer.stderr
    assert "cannot be used: x: unreadable" in answer.stdout and "cells submitted" in answer.stdout
    victim = mapping.cells("map")["map c"]
    wait_for("the task is at work", lambda: mapping.strike(victim), 120)
    mapping.lab.wait_until_empty(500)
    assert Counter(mapping.states().values()) == {"mapped": 11, "rejected": 1} and mapping.states()["x"] == "rejected"
    assert mapping.record(victim).attempts == 2
    ground = parquet.read_table(mapping.paths.layers / "footprints.parquet").to_pylist()
    assert {row["scene"]: row["state"] for row in ground} == mapping.states() and len(ground) == 12
    facts = run_status(mapping.paths)
    assert facts["finished"], [(cell["label"], cell["state"], cell["error"]) for cell in facts["cells"]]
    jobs = {
        str(entry["job"]).partition("_")[0] for entry in read_lines(mapping.paths.ledger) if entry["stage"] == "map"
    }
    assert len(jobs) == 1
    assert "nothing to do" in mapping(scenes).stdout


@pytest.mark.full
def test_the_template_maps_a_frozen_list_in_a_folder_of_any_name_and_is_safe_to_submit_again(mapping: Mapping) -> None:
    scenes, root = mapping.to_map.scenes("abx"), mapping.paths.root
    answer = mapping(scenes, "--prepare")
    assert answer.returncode == 0, answer.stderr
    lines = [line.split(" sbatch ") for line in answer.stdout.splitlines() if " sbatch " in line]
    assert [given.rpartition("=")[2] for given, _ in lines][:2] == ["map", "merge"]
    job = ""
    for stage, count in (("map", 3), ("merge", 2), ("map", 3)):
        line = ["sbatch", "--parsable", "--mem=2G", "--cpus-per-task=1", f"--array=0-{count - 1}"]
        line += [f"--dependency=afterany:{job}"] if job else []
        given = {"RTSHPC_PYTHON": sys.executable, "RTSHPC_RUN": str(root), "RTSHPC_STAGE": stage}
        job = subprocess.run(
            [*line, str(ROOT / "slurm" / "map.sbatch")],
            cwd=root.parent,
            env=mapping.environment | given,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    mapping.lab.wait_until_empty(400)
    assert mapping.states() == {"a": "mapped", "b": "mapped", "x": "rejected"}
    assert [mapping.record(cell).attempts for cell in mapping.cells("map").values()] == [1, 1, 1]
    again = [path.read_text() for path in root.parent.glob(f"rtshpc-map-{job}_*.out")]
    assert len(again) == 3 and all("done before" in text for text in again)
