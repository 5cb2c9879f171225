"""A small generated data set, cut into shards once for the whole folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtshpc.core.cell import Cell
from rtshpc.core.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.stages import gather, preprocess

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "name": "small",
    "scenes": {
        "generated": {
            "sites": ["banks", "peel"],
            "scenes_per_site": 3,
            "size_px": 96,
            "slumps_per_scene": [2, 4],
            "slump_px": [30, 400],
            "touching": 0.5,
            "nodata_fraction": 0.5,
        }
    },
    "modalities": {
        "rgb": {"bands": ["red", "green", "blue"]},
        "ndvi": {"bands": ["ndvi"]},
        "index": {"expression": "(nir - red) / (nir + red)"},
    },
    "primary": "rgb",
    "labels": {"kind": "instances"},
    "chip": {"size_px": 64, "overlap_px": 16},
    "split": {"test_fraction": 0.3, "val_fraction": 0.3},
}


def run_config(data: DataConfig) -> RunConfig:
    """A sweep over `data` with nothing else of note."""
    finetune = FinetuneConfig(modalities=(data.primary,), primary=data.primary)
    return RunConfig(name="test", data=data, model=ModelConfig(name="none"), finetune=finetune)


def shard_cells(data: DataConfig) -> tuple[list[Cell], Cell]:
    """The preprocess cells of `data`, and its gather cell."""
    config, tasks = run_config(data), data.shard.tasks
    cells = [
        Cell(id=f"pre{task}", stage="preprocess", label=f"preprocess {task}", task=task, tasks=tasks, config=config)
        for task in range(tasks)
    ]
    needs = tuple(cell.id for cell in cells)
    return cells, Cell(id="gather", stage="gather", label="gather", needs=needs, config=config)


def keep_record(paths: RunPaths, cell: Cell, results: dict[str, Any]) -> None:
    """Write a record as the runner of stages does."""
    record = Record(
        cell=cell.id, stage=cell.stage, label=cell.label, result_version=1, started="", seconds=0.0, results=results
    )
    write_record(paths.cell(cell.id).record, record)


def shards_of(data: DataConfig, root: Path) -> tuple[RunPaths, dict[str, Any]]:
    """Run preprocess and gather; gives the run's paths and gather's results."""
    paths = RunPaths(root)
    paths.create()
    cells, last = shard_cells(data)
    for cell in cells:
        keep_record(paths, cell, preprocess.run(cell, paths, SILENT))
    return paths, gather.run(last, paths, SILENT)


@pytest.fixture(scope="session")
def make_shards() -> Callable[[DataConfig, Path], tuple[RunPaths, dict[str, Any]]]:
    return shards_of


@pytest.fixture(scope="session")
def make_cells() -> Callable[[DataConfig], tuple[list[Cell], Cell]]:
    return shard_cells


@pytest.fixture(scope="session")
def small_data() -> Callable[..., DataConfig]:
    """The small data set with sections replaced: `small_data(chip={...})`."""

    def build(**sections: Any) -> DataConfig:
        return DataConfig.model_validate({**SMALL, **sections})

    return build


@pytest.fixture(scope="session")
def small_run(small_data: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, RunPaths, dict[str, Any]]:
    data = small_data()
    paths, results = shards_of(data, tmp_path_factory.mktemp("small"))
    return data, paths, results
