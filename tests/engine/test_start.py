"""Pretraining from a file of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.paths import RunPaths
from rtshpc.engine.detectors import fresh, on_backbones, started, trained
from rtshpc.model.imports.export import export
from rtshpc.model.weights import WeightsError

from .conftest import MODEL, TRAINING, cell_of, small_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The smallest model with weights of another seed."""
    path = tmp_path / "start.pkl"
    cell = cell_of(small_config(seed=5), "pretrain", "rgb")
    state = fresh(cell).state_dict()
    export({name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    return path


def from_file(file: Path, modality: str = "rgb", stage: str = "pretrain", **more: Any) -> Cell:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    training = {**TRAINING, "epochs": 1, "init": str(file), "init_sha256": sha256}
    return cell_of(small_config(pretrain=training, **more), stage, *([modality] if modality else []))


def test_a_cell_starts_from_the_files_weights(file: Path, paths: RunPaths) -> None:
    found, drawn = started(from_file(file), paths).state_dict(), fresh(from_file(file)).state_dict()
    export(found, file.with_name("again.pkl"))
    assert file.with_name("again.pkl").read_bytes() == file.read_bytes()
    assert not all(torch.equal(found[name], drawn[name]) for name in drawn)


def test_a_start_leaves_full_fine_tuning_as_it_was(file: Path, paths: RunPaths) -> None:
    tuning = {**TRAINING, "modalities": ["rgb", "ndvi"], "primary": "rgb", "backbones": "full"}
    with_start = from_file(file, "", "finetune", finetune=tuning)
    without = cell_of(small_config(finetune=tuning), "finetune")
    assert with_start.id == without.id
    one, two = on_backbones(with_start, paths).state_dict(), on_backbones(without, paths).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_another_file_than_planned_or_one_that_does_not_fit_is_refused(file: Path, paths: RunPaths) -> None:
    cell = from_file(file)
    wider = from_file(file, model={"roi": {"fc_dim": 24}})
    with pytest.raises(WeightsError, match=r"start\.pkl: weights do not fit the model: .*fc1\.bias is \(16,\)"):
        started(wider, paths)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(RunError, match="but the run was planned with"):
        started(cell, paths)
    file.unlink()
    with pytest.raises(RunError, match="SHA-256 none, but the run was planned with"):
        started(cell, paths)


@pytest.mark.slow
def test_the_record_holds_the_files_hash_and_the_result_outlives_the_file(
    file: Path, paths: RunPaths, train: Any
) -> None:
    cell = from_file(file)
    results = train(cell)
    assert results["init"] == str(file)
    assert results["init_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()
    assert not trained(cell, paths).training
    assert MODEL["roi"]["fc_dim"] == 16
    plain = cell_of(small_config(training={"epochs": 1}), "pretrain", "rgb")
    results = train(plain)
    assert (results["init"], results["init_sha256"]) == (None, None)
