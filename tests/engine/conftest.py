from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.grid import cells
from rtshpc.core.load import write_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.data.reader import ShardDataset
from rtshpc.stages import finetune, gather, preprocess, pretrain

MODEL: dict[str, Any] = {
    "name": "smallest",
    "backbone": {
        "kind": "mvit",
        "embed_dim": 8,
        "depth": 4,
        "last_blocks": [0, 1, 2, 3],
        "window_px": 8,
        "pretrain_px": 64,
        "drop_path": 0.2,
    },
    "pyramid_channels": 16,
    "rpn": {
        "anchor_sizes": [8, 16, 24, 32, 48],
        "convs": 1,
        "anchors_per_image": 32,
        "pre_nms_train": 40,
        "pre_nms_test": 40,
        "post_nms_train": 20,
        "post_nms_test": 20,
    },
    "roi": {"box_convs": 1, "fc_dim": 16, "mask_convs": 1, "rois_per_image": 8, "score_threshold": 0.0},
}
GENERATED = {"sites": ["north", "south"], "scenes_per_site": 4, "size_px": 128, "slumps_per_scene": [5, 8]}
DATA: dict[str, Any] = {
    "name": "generated",
    "scenes": {"generated": {**GENERATED, "slump_px": [60, 400], "nodata_fraction": 0.3}},
    "modalities": {"rgb": {"bands": ["red", "green", "blue"]}, "ndvi": {"bands": ["ndvi"]}},
    "primary": "rgb",
    "labels": {"kind": "instances"},
    "chip": {"size_px": 64, "overlap_px": 0},
    "split": {"rule": "stratified", "test_fraction": 0.25, "val_fraction": 0.3},
    "shard": {"tasks": 1},
}
TRAINING: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 4,
    "reference_batch": 4,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "augment": {"contrast": 0.1, "noise": 0.1},
    "device": "cpu",
}


def small_config(training: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    """A sweep of the smallest model on the smallest data, with changed training or RoI values."""
    trained = {**TRAINING, **(training or {})}
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": DATA,
            "model": {**MODEL, **{key: {**MODEL[key], **value} for key, value in (model or {}).items()}},
            "pretrain": trained,
            "finetune": {**trained, "modalities": ["rgb", "ndvi"], "primary": "rgb"},
            **more,
        }
    )


def cell_of(config: RunConfig, stage: str, *modalities: str) -> Cell:
    found = [c for c in cells(config, "f") if c.stage == stage and modalities in ((), c.modalities)]
    assert found, f"no cell of {stage}"
    return found[0]


def finish(cell: Cell, paths: RunPaths, results: dict[str, Any]) -> dict[str, Any]:
    """Write a cell's record, as the runner does."""
    version = RESULT_VERSION[cell.stage]
    record = Record(
        cell=cell.id, stage=cell.stage, label=cell.label, result_version=version, started="", seconds=0, results=results
    )
    write_cell(paths.cell(cell.id).config, cell)
    write_record(paths.cell(cell.id).record, record)
    return results


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with shards of 8 generated scenes, two sites, 32 chips of 64 px."""
    paths = RunPaths(tmp_path_factory.mktemp("run"))
    paths.create()
    for cell in cells(small_config(), "f"):
        if cell.stage in ("preprocess", "gather"):
            stage = preprocess if cell.stage == "preprocess" else gather
            finish(cell, paths, stage.run(cell, paths, SILENT))
    return paths.root


@pytest.fixture
def paths(shards: Path, tmp_path: Path) -> RunPaths:
    """A fresh run folder on the same shards."""
    own = RunPaths(tmp_path / "run")
    own.create()
    shutil.rmtree(own.shards)
    own.shards.symlink_to(RunPaths(shards).shards)
    return own


@pytest.fixture
def train(paths: RunPaths) -> Callable[..., dict[str, Any]]:
    """Runs a pretrain or finetune cell to its record."""

    def run(cell: Cell, where: RunPaths = paths) -> dict[str, Any]:
        stage = pretrain if cell.stage == "pretrain" else finetune
        return finish(cell, where, stage.run(cell, where, SILENT))

    return run


@pytest.fixture
def dataset(shards: Path) -> ShardDataset:
    return ShardDataset(RunPaths(shards).index, small_config().data, "train", ("rgb", "ndvi"))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """One thread, and warnings of torch about operations without a deterministic kernel are no news."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
