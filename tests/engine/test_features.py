"""The feature cache: stored scales are the live ones, and trainings on them end as live ones do."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from rtshpc.core import features as plan
from rtshpc.core.cell import Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import DataError, RunError
from rtshpc.core.grid import finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Progress, read_json, read_lines, read_record, write_json
from rtshpc.data.augment import geometry_of, turn
from rtshpc.data.reader import ShardDataset
from rtshpc.engine import checkpoint
from rtshpc.engine.detectors import on_backbones, on_features, stored_scales, trained
from rtshpc.engine.feed import TrainBatch, batches, plan_steps
from rtshpc.model.features import TORCH, Header, to_stored
from rtshpc.stages import evaluate, features, pretrain

from .conftest import TRAINING, cell_of, finish, small_config

Train = Callable[..., dict[str, Any]]
PLAIN = {"augment": {}, "epochs": 1}
NAMES = ("rgb", "ndvi")


def config_of(kind: str, dtype: str = "bf16", **tuning: Any) -> RunConfig:
    """The small sweep, one epoch, on live or cached scales."""
    fused = {"modalities": list(NAMES), "primary": "rgb", "features": kind, "features_dtype": dtype}
    return small_config(PLAIN, finetune={**TRAINING, **PLAIN, **fused, **tuning})


def store(config: RunConfig, paths: RunPaths, progress: Progress = SILENT) -> list[Cell]:
    """Run the features cells of a sweep."""
    cells = [cell_of(config, "features", name) for name in NAMES]
    for cell in cells:
        paths.cell(cell.id).root.mkdir(parents=True, exist_ok=True)
        finish(cell, paths, features.run(cell, paths, progress))
    return cells


@pytest.fixture(scope="module")
def cached(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run folder with pretrained RGB and NDVI and their scales."""
    torch.set_num_threads(1)
    own = RunPaths(tmp_path_factory.mktemp("cached") / "run")
    own.create()
    own.shards.rmdir()
    own.shards.symlink_to(RunPaths(shards).shards)
    config = config_of("cached")
    for name in NAMES:
        cell = cell_of(config, "pretrain", name)
        finish(cell, own, pretrain.run(cell, own, SILENT))
    store(config, own)
    return own


@pytest.fixture
def own(cached: RunPaths, tmp_path: Path) -> RunPaths:
    """A copy that a test may change."""
    shutil.copytree(cached.root, tmp_path / "own", symlinks=True)
    return RunPaths(tmp_path / "own")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_stored_scale_is_the_live_one_to_the_storage_type(own: RunPaths, dtype: str) -> None:
    config = config_of("cached", dtype)
    for stored in store(config, own):
        (name,) = stored.modalities
        detector = on_backbones(stored, own).eval()
        for split, numbers in (("train", range(8)), ("val", [0])):
            dataset = ShardDataset(own.index, config.data, split, (name,))
            cell = cell_of(config, "finetune")
            reader = stored_scales(cell, own, dataset, split)[name]
            for row in range(len(dataset)):
                image = dataset[row].images[name]
                turned = torch.stack([turn(image, geometry_of(number)) for number in numbers])
                with torch.inference_mode():
                    inputs, _ = detector.prepare({name: turned})
                    live = detector.backbone.scales(inputs, {})[name]
                found = reader.read([row] * len(turned), list(numbers))
                for a, b in zip(live, found, strict=True):
                    assert b.dtype == TORCH[dtype] and b.stride() == a.stride()
                    # Val chips go through the backbone eight at a time, which may move a rounding.
                    assert torch.equal(a.to(b.dtype), b) if split == "train" else _within_one_step(a, b)
            assert len(dataset)


def _within_one_step(live: Tensor, stored: Tensor) -> bool:
    step = torch.finfo(stored.dtype).eps
    return bool(((live - stored.float()).abs() <= step * live.abs() + 1e-6).all())


def test_a_cached_batch_is_the_live_batch_with_scales_for_images(cached: RunPaths) -> None:
    def take(kind: str) -> list[TrainBatch]:
        config = config_of(kind, epochs=3)
        cell = cell_of(config, "finetune")
        dataset = ShardDataset(cached.index, config.data, "train", NAMES, images=kind == "live")
        steps = plan_steps(len(dataset), config.finetune, 3, (1, 0))
        stored = stored_scales(cell, cached, dataset, "train")
        return list(islice(batches(dataset, config.finetune, 3, steps, stored=stored), 8))

    detector = on_backbones(cell_of(config_of("live"), "finetune"), cached)
    drawn = 0
    for one, other in zip(take("live"), take("cached"), strict=True):
        assert (one.step, one.seeds) == (other.step, other.seeds) and not other.images
        assert other.sizes == [(64, 64)] * len(other.targets)
        for a, b in zip(one.targets, other.targets, strict=True):
            assert torch.equal(a.boxes, b.boxes) and torch.equal(a.masks, b.masks) and torch.equal(a.ignore, b.ignore)
        with torch.no_grad():
            live = detector.backbone.scales(detector.prepare(one.images)[0], {})
        for name in NAMES:
            assert all(_within_one_step(a, b) for a, b in zip(live[name], other.scales[name], strict=True))
        drawn += len(other.seeds)
    assert drawn > 20


def _weights(paths: RunPaths, cell: Cell) -> Tensor:
    model = checkpoint.load(paths.cell(cell.id).last_checkpoint)["model"]
    return torch.cat([tensor.float().flatten() for _, tensor in sorted(model.items())])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_training_on_stored_scales_ends_where_the_live_one_ends(own: RunPaths, train: Train, precision: str) -> None:
    found: dict[str, tuple[dict[str, Any], Tensor]] = {}
    for kind in ("live", "cached"):
        config = config_of(kind, epochs=2, precision=precision)
        if kind == "cached" and precision == "bf16":
            store(config, own)
        cell = cell_of(config, "finetune")
        found[kind] = train(cell, own), _weights(own, cell)
    live, cached = found["live"][0], found["cached"][0]
    assert (live["features"], cached["features"]) == ("live", "cached")
    assert cached["final_loss"] == pytest.approx(live["final_loss"], rel=1e-2)
    assert cached["best_ap50"] == pytest.approx(live["best_ap50"], abs=0.5)
    assert cached["parameters"] == live["parameters"] and cached["steps"] == live["steps"]
    start = on_features(cell_of(config_of("cached"), "finetune"), own).state_dict()
    began = torch.cat([tensor.float().flatten() for _, tensor in sorted(start.items())])
    moved = (found["live"][1] - began).norm()
    # Room for a RoI that another rounding chooses on another machine; here they end 0.4 % (fp32) and 0 % (bf16) apart.
    print(
        "apart", live["final_loss"], cached["final_loss"], float((found["cached"][1] - found["live"][1]).norm() / moved)
    )
    assert (found["cached"][1] - found["live"][1]).norm() < 0.1 * moved


def test_no_backbone_is_in_memory_and_all_other_weights_start_as_with_one(cached: RunPaths) -> None:
    live = on_backbones(cell_of(config_of("live"), "finetune"), cached)
    other = on_features(cell_of(config_of("cached"), "finetune"), cached)
    own, wanted = other.state_dict(), live.state_dict()
    assert own and not [name for name in own if "bottom_up" in name]
    assert set(own) == {name for name in wanted if "bottom_up" not in name}
    assert all(torch.equal(own[name], wanted[name]) for name in own)
    assert other.backbone.backbones() == {} and not next(iter(other.backbone.parameters())).is_meta
    everything = sum(parameter.numel() for parameter in live.parameters())
    assert other.backbone.absent + sum(parameter.numel() for parameter in other.parameters()) == everything


def test_a_cached_cell_is_scored_with_its_backbones_in_place(own: RunPaths, train: Train) -> None:
    config = config_of("cached")
    cell, scored = cell_of(config, "finetune"), cell_of(config, "evaluate", *NAMES)
    train(cell, own)
    kept = checkpoint.load(own.cell(cell.id).best_checkpoint)["model"]
    whole = trained(cell, own).state_dict()
    assert any("bottom_ups.ndvi" in name for name in whole)
    assert kept and all(torch.equal(whole[name], kept[name]) for name in kept)
    shutil.rmtree(own.cell(cell.features["rgb"]).features)
    results = evaluate.run(scored, own, SILENT)
    assert results["trained"] == cell.id and results["images"] == 8


def test_files_are_as_the_plan_says_and_plain_h5py_reads_them(cached: RunPaths) -> None:
    config = config_of("cached")
    cell = cell_of(config, "features", "ndvi")
    record = read_record(cached.cell(cell.id).record)
    assert record is not None and finished(cell, cached) is not None
    chips = plan.chips_to_cache(config.data, cached, True)
    assert record.results["chips"] == {"train": chips.train, "val": chips.val} and chips.exact
    values = 0
    for entry in record.results["files"]:
        path = cached.cell(cell.id).features / entry["file"]
        with h5py.File(path) as file:
            assert file.attrs["backbone_sha256"] == record.results["backbone_sha256"]
            assert file["scales"].dtype == np.uint16 and file.attrs["dtype"] == "bf16"
            assert file["scales"].shape[1] == len(file.attrs["variants"]) == (8 if entry["split"] == "train" else 1)
            values += file["scales"].size
        assert 0 < path.stat().st_size - entry["chips"] * plan.record_bytes(cell) < 10**6
    assert 2 * values == record.results["bytes"] == plan.cell_bytes(cell, chips)


class Stop(Exception):
    pass


class After(Progress):
    """Interrupts when so many chips are done."""

    def __init__(self, done: int) -> None:
        super().__init__(None)
        self._wanted = done

    def __call__(self, phase: str, done: int, total: int, text: str = "") -> None:
        if phase == "features" and done >= self._wanted:
            raise Stop


def _files(paths: RunPaths, cell: Cell) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths.cell(cell.id).features.iterdir()}


def test_an_interrupted_cell_keeps_its_whole_files_and_ends_as_an_undisturbed_one(
    own: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cell_of(config_of("cached"), "features", "rgb")
    monkeypatch.setattr(plan, "PART_BYTES", 3 * 8 * plan.record_bytes(cell))
    calm = features.run(cell, own, SILENT)
    wanted, folder = _files(own, cell), own.cell(cell.id)
    assert len(wanted) == 6 + 1 and calm["kept"] == 0
    shutil.rmtree(folder.features)
    with pytest.raises(Stop):
        features.run(cell, own, After(10))
    entries = read_lines(folder.journal)
    assert [entry["file"] for entry in entries] == sorted(wanted)[:3]
    (folder.features / ".train-000009.h5.abc.tmp").write_bytes(b"half")
    torn = folder.features / entries[1]["file"]
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    results = features.run(cell, own, SILENT)
    assert results == {**calm, "kept": 2}
    assert _files(own, cell) == wanted


def test_lost_cut_and_changed_files_are_found(own: RunPaths) -> None:
    config = config_of("cached")
    cell = cell_of(config, "features", "rgb")
    dataset = ShardDataset(own.index, config.data, "train", NAMES, images=False)
    path = own.cell(cell.id).feature_file("train", 0)
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        offset = file["scales"].id.get_offset()
    content[offset + 5] ^= 1
    path.write_bytes(content)
    reader = stored_scales(cell_of(config, "finetune"), own, dataset, "train")["rgb"]
    with pytest.raises(DataError, match="does not match its CRC-32"):
        reader.read([0], [0])
    reader.read([0], [1])
    path.write_bytes(content[: offset + 10_000])
    assert finished(cell, own) is None
    path.unlink()
    assert finished(cell, own) is None
    finish(cell, own, features.run(cell, own, SILENT))
    assert finished(cell, own) is not None
    stored_scales(cell_of(config, "finetune"), own, dataset, "train")["rgb"].read([0], [0])


def test_scales_of_other_weights_or_other_data_are_not_trained_on(own: RunPaths, train: Train) -> None:
    config = config_of("cached")
    source, cell = cell_of(config, "pretrain", "ndvi"), cell_of(config, "features", "ndvi")
    record = read_json(own.cell(source.id).record)
    write_json(own.cell(source.id).record, {**record, "results": {**record["results"], "checkpoint_sha256": "0" * 64}})
    assert finished(cell, own) is None
    with pytest.raises(RunError, match="scales of ndvi are of another backbone"):
        train(cell_of(config, "finetune"), own)
    write_json(own.cell(source.id).record, record)
    index = json.loads(own.index.read_text())
    index["modalities"]["rgb"]["mean"][0] += 1
    shutil.copytree(own.shards.resolve(), own.root / "changed")
    own.shards.unlink()
    (own.root / "changed").rename(own.shards)
    own.index.write_text(json.dumps(index))
    with pytest.raises(RunError, match="scales of rgb are of another data"):
        train(cell_of(config, "finetune"), own)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    own: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("cached", "fp16")
    cells = [cell_of(config, "features", name) for name in NAMES]
    chips = plan.chips_to_cache(config.data, own, True)
    for cell in cells:
        finish(cell, own, {})
        own.cell(cell.id).record.unlink()
    rows = [{"id": cell.id, "stage": "features", "todo": True} for cell in cells]
    write_json(own.plan, {"cells": rows})
    need = sum(plan.cell_bytes(cell, chips) for cell in cells)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    with pytest.raises(RunError, match=r"takes 0\.00209 GB .*2 cells.*GB free; make room or .*live") as caught:
        features.run(cells[0], own, SILENT)
    assert "\n" not in str(caught.value) and not list(own.cell(cells[0].id).features.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    finish(cells[0], own, features.run(cells[0], own, SILENT))
    # What is there already needs no room again.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need // 2))
    finish(cells[1], own, features.run(cells[1], own, SILENT))


def test_a_value_beyond_the_storage_type_is_no_silent_infinity() -> None:
    header = Header("rgb", "fp16", "CHW", ((1, 2, 2),) * 4, "fp32", "", "")
    scales = [torch.full((1, 1, 2, 2), 1e6)] * 4
    with pytest.raises(RunError, match="not finite in fp16"):
        to_stored(scales, header)
    with pytest.raises(RunError, match="the plan says"):
        to_stored([torch.zeros(1, 1, 2, 3)] * 4, header)


def test_a_missing_features_cell_is_named(own: RunPaths, train: Train) -> None:
    cell = cell_of(config_of("cached"), "finetune")
    own.cell(cell.features["ndvi"]).record.unlink()
    with pytest.raises(RunError, match="no record of stored scales; run that cell first"):
        train(cell, own)


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_and_loader_processes_train_on_stored_scales_too(
    own: RunPaths, train: Train, workers: int
) -> None:
    found: dict[str, dict[str, Any]] = {}
    for kind in ("live", "cached"):
        found[kind] = train(cell_of(config_of(kind, processes=2, workers=workers), "finetune"), own)
    assert found["cached"]["features"] == "cached"
    assert found["cached"]["final_loss"] == pytest.approx(found["live"]["final_loss"], rel=1e-2)
