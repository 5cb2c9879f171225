"""The stage that measures how training, preprocess and map scale, on real shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, read_json, read_lines
from rtshpc.core.sizing.studies import scale_cells
from rtshpc.engine.feed import full_steps
from rtshpc.stages import scale

from .conftest import finish, small_config

SECTION = {"gpus": [1, 2], "concurrency": [1], "tasks": [1, 2], "repeats": 1, "steps": 3, "warmups": 2, "batch": 4}


def study_cell(kind: str, count: int = 1, **section: Any) -> Cell:
    config = small_config({"precision": "fp32"}, scale={**SECTION, **section}, map={"device": "cpu"})
    found = [cell for cell in scale_cells(config, "f") if cell.scaling is not None]
    return next(cell for cell in found if (cell.scaling.kind, cell.scaling.count) == (kind, count))  # type: ignore[union-attr]


@given(
    samples=st.integers(1, 9),
    batch=st.integers(1, 20),
    steps=st.integers(1, 9),
    processes=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_steps_for_timing_are_whole_batches_of_every_chip_in_turn(
    samples: int, batch: int, steps: int, processes: int, seed: int
) -> None:
    ranks = [list(full_steps(samples, batch, seed, steps, rank, processes)) for rank in range(processes)]
    seen: Counter[int] = Counter()
    for several in zip(*ranks, strict=True):
        dealt = [row for step in several if step.weight for row in step.rows]
        assert len(dealt) == batch
        assert sum(step.weight for step in several) == pytest.approx(processes)
        seen.update(dealt)
    counts = [seen[row] for row in range(samples)]
    assert sum(counts) == batch * steps
    assert max(counts) - min(counts) <= 1


def test_a_training_is_timed_step_by_step_with_its_optimizer_and_without_the_warm_up(paths: RunPaths) -> None:
    cell = study_cell("strong")
    found = finish(cell, paths, scale.run(cell, paths, SILENT))
    assert (found["kind"], found["count"], found["processes"], found["batch"]) == ("strong", 1, 1, 4)
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert found["rate"] == pytest.approx(4 / sorted(found["seconds"])[1])
    assert 0 <= found["data_wait_share"] < 1
    assert (found["unit"], found["device"], found["gpu"], found["warmups"]) == ("samples/s", "cpu", "", 2)
    rows = read_lines(paths.cell(cell.id).metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert len({row["loss"] for row in rows}) == 5 and all(row["grad_norm"] > 0 for row in rows)


def test_a_job_of_an_array_has_no_rate_of_its_own(paths: RunPaths) -> None:
    found = scale.run(study_cell("array", steps=1, warmups=0), paths, SILENT)
    assert (found["rate"], found["unit"], found["parts"]) == (None, "cells/h", 2)
    assert found["samples_per_second"] == pytest.approx(4 / found["seconds"][0])


def test_preprocess_is_timed_on_the_scenes_of_the_run_and_its_shards_are_thrown_away(shards: Path) -> None:
    cell, run = study_cell("preprocess"), RunPaths(shards)
    before = {path.name: path.stat().st_mtime_ns for path in run.shards.iterdir()}
    found = scale.run(cell, run, SILENT)
    index: Any = read_json(run.index)
    assert (found["chips"], found["scenes"]) == (len(index["chips"]), 8)
    assert found["rate"] == pytest.approx(found["chips"] / found["seconds"][0])
    assert {path.name: path.stat().st_mtime_ns for path in run.shards.iterdir()} == before
    assert not (run.cell(cell.id).root / "work").exists()


def test_map_is_timed_on_every_chip_of_the_scenes(shards: Path) -> None:
    cell, run = study_cell("map"), RunPaths(shards)
    run.cell(cell.id).root.mkdir(parents=True)
    found = scale.run(cell, run, SILENT)
    # Chips of 64 px that share 16 px: three a side of 128 px.
    assert (found["chips"], found["scenes"], found["unit"]) == (8 * 9, 8, "chips/s")
    assert list(run.cell(cell.id).root.glob("*")) == []


def test_a_task_without_the_processes_it_is_to_measure_is_refused(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "run_group", lambda *given: {"processes": 1})
    with pytest.raises(RunError, match="1 processes came, not 2; submit it by `launch scale`"):
        scale.run(study_cell("weak", 2), paths, SILENT)


@pytest.mark.full
def test_two_processes_share_the_batch_of_strong_scaling_and_the_slowest_of_them_counts(paths: RunPaths) -> None:
    found = scale.run(study_cell("strong", 2, steps=2, warmups=1), paths, SILENT)
    assert (found["processes"], found["batch"], len(found["seconds"])) == (2, 4, 2)
    assert found["rate"] == pytest.approx(4 / (sum(found["seconds"]) / 2))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["preprocess", "map"])
def test_tasks_share_the_scenes_and_each_chip_is_made_once(shards: Path, kind: str) -> None:
    run = RunPaths(shards)
    run.cell(study_cell(kind, 2).id).root.mkdir(parents=True, exist_ok=True)
    alone, both = (scale.run(study_cell(kind, count), run, SILENT) for count in (1, 2))
    assert (both["chips"], both["scenes"], len(both["task_seconds"])) == (alone["chips"], alone["scenes"], 2)
    assert both["seconds"] == [max(both["task_seconds"])]
