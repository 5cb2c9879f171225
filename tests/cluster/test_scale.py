"""A scaling study on a real Slurm, 1 to 4 tasks on two nodes, and the report that asks for an allocation on its grounds."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_record
from rtshpc.core.sizing.scaling import ScalePoint, scale_points

from .conftest import ROOT, Login
from .lab import wait_for

COUNTS = (1, 2, 3, 4)
SETS = (
    "data.modalities={rgb: {bands: [red, green, blue]}}",
    "finetune.modalities=[rgb]",
    "finetune.backbones=full",
    "site.gpus=0",
    "site.tasks_per_node=3",
)


@pytest.mark.timeout(1200)
@pytest.mark.full
def test_a_study_over_two_nodes_is_measured_killed_or_not_and_every_figure_names_its_job(
    login: Login, short_study: Any, tmp_path: Path
) -> None:
    each = ",".join(map(str, COUNTS))
    small = short_study(gpus=each, concurrency=each, batch=4, steps=3)
    line = ("--site", "lab", *small, *(word for one in SETS for word in ("--set", one)))
    sent = login("scale", *line)
    assert sent.returncode == 0, sent.stderr
    assert "22 cells submitted" in sent.stdout, sent.stdout
    paths = RunPaths(login.runs / "tiny-scale-lab")
    wait_for("the first is measured", lambda: bool(scale_points(paths)), 120)
    again = login("scale", *line)
    assert "0 cells submitted" in again.stdout, again.stdout + again.stderr
    login.lab.wait_until_empty(900)
    points = {(one.kind, one.count): one for one in scale_points(paths)}
    assert set(points) == {
        *((kind, count) for kind in ("strong", "weak", "array") for count in COUNTS),
        ("preprocess", 2),
        ("map", 2),
    }
    assert [points["strong", count].nodes for count in COUNTS] == [1, 1, 1, 2]
    assert [points["weak", count].batch for count in COUNTS] == [1, 2, 3, 4]
    for (kind, count), point in points.items():
        assert point.device == "cpu" and len(set(point.jobs)) == len(point.sources) == (count if kind == "array" else 1)
        for job, source in zip(sorted(point.jobs), point.sources, strict=True) if kind != "array" else ():
            record = read_record(paths.root / source)
            assert record is not None and record.results["job"] == job and record.attempts == 1
            assert login.lab.job(job)["NumTasks"] == str(count) and login.lab.job(job)["JobState"] == "COMPLETED"
    shown = json.loads(login("scale", *line, "--show", "--json").stdout)
    assert [row["count"] for row in shown["rows"] if row["kind"] == "strong"] == [*COUNTS]
    assert "nothing to do" in login("scale", *line).stdout
    _report_twice(login, paths, points, tmp_path)


def _report_twice(login: Login, paths: RunPaths, points: Mapping[tuple[str, int], ScalePoint], folder: Path) -> None:
    """The same records give the same bytes in every form, and every row of scaling names the jobs it came from."""
    both = folder / "first", folder / "second"
    for out in both:
        line = [sys.executable, "-m", "rtshpc.launch", "allocation", str(paths.root), "--request", "example"]
        asked = subprocess.run(
            [*line, "--out", str(out)], cwd=ROOT, env=login.environment, capture_output=True, text=True, check=False
        )
        assert asked.returncode == 0, asked.stderr
    written, again = ({file.relative_to(out): file for file in out.rglob("*") if file.is_file()} for out in both)
    assert set(written) == set(again) and {Path("allocation.html"), Path("allocation.md")} <= set(written)
    assert [name for name in written if written[name].read_bytes() != again[name].read_bytes()] == []
    for table, kind in (("T1", "strong"), ("T2", "weak")):
        with written[Path(f"{table}.csv")].open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["Processes"]) for row in rows] == [*COUNTS]
        for row in rows:
            assert all(job in row["Jobs"] for job in points[kind, int(row["Processes"])].jobs), row
    with written[Path("incomplete.csv")].open(newline="") as file:
        reasons = [f"{row['Where']}: {row['What']}" for row in csv.DictReader(file)]
    # A user's study has repeats too, and its counts are enough.
    assert any("fewer than 3 repeats" in reason for reason in reasons), reasons
    unlike = ("counts were measured", "have no record", "is not used", "usage.json")
    assert not [reason for reason in reasons if any(word in reason for word in unlike)], reasons
