"""Detectors of cells: fresh, on frozen pretrained backbones, or as a training left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rtshpc.core.cell import Cell
from rtshpc.core.config.run import NO_FILE, WEIGHT_FORMATS
from rtshpc.core.errors import RunError
from rtshpc.core.features import data_hash
from rtshpc.core.load import read_cell
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import file_sha256, read_record
from rtshpc.core.sizing.memory import channels_of
from rtshpc.data.reader import ShardDataset, read_index
from rtshpc.engine import checkpoint
from rtshpc.engine.feed import derive_seed
from rtshpc.model.detector import Detector
from rtshpc.model.engines import build
from rtshpc.model.features import StoredScales
from rtshpc.model.imports.fit import load_file
from rtshpc.model.weights import WeightsError, listed, load_backbone, load_heads, load_trainable


def fresh(cell: Cell, paths: RunPaths | None = None, cached: bool = False) -> Detector:
    """A detector of the cell's modalities with weights drawn from the run's seed alone.

    Args:
        cell: pretrain or finetune cell; the arm `pretrained` freezes the backbones.
        paths: not used; every way to a detector is called alike.
        cached: leave the backbones out.
    """
    torch.manual_seed(derive_seed(cell.config.seed, "weights", *cell.modalities))
    channels = channels_of(cell.config, cell.modalities)
    return build(cell.config.model, channels, len(cell.config.data.classes), cell.arm == "pretrained", cached)


def started(cell: Cell, paths: RunPaths) -> Detector:
    """A fresh detector, then the weights of `pretrain.init` in it where the config names a file.

    Full fine-tuning does not use this: it starts from fresh weights alone.

    Raises:
        RunError: the file is not the one that the cell's id speaks of.
        WeightsError: it cannot be read or does not fit the detector.
    """
    detector, start = fresh(cell), cell.config.pretrain
    if start.init == NO_FILE:
        return detector
    path = Path(start.init)
    found = file_sha256(path) if path.is_file() else "none"
    if found != start.init_sha256:
        raise RunError(
            f"{path}: SHA-256 {found[:12]}, but the run was planned with {start.init_sha256[:12]};"
            " put that file back, or start the sweep anew"
        )
    load_file(detector, path)
    return detector


def on_backbones(cell: Cell, paths: RunPaths) -> Detector:
    """A detector on the pretrained backbones of its cell, and on the primary's pyramid and heads where asked.

    A fully trained cell names no backbones and starts from fresh weights (Li et al. 2025, "full training").

    Raises:
        RunError: a pretrained checkpoint is not there, or is not the one its record speaks of.
    """
    detector = fresh(cell)
    for modality, pretrained in cell.backbones.items():
        content = read_trained(paths, pretrained)
        place = str(paths.cell(pretrained).best_checkpoint)
        load_backbone(detector, modality, content["model"], place)
        if modality == cell.modalities[0] and cell.config.finetune.heads == "primary":
            load_heads(detector, content["model"], place)
    return detector


def on_features(cell: Cell, paths: RunPaths) -> Detector:
    """As `on_backbones`, for a cell that trains on stored scales: the same trainable part, no backbones.

    Raises:
        RunError: the primary's pretrained checkpoint is not there, or is not the one its record speaks of.
    """
    detector = fresh(cell, cached=True)
    if cell.config.finetune.heads == "primary":
        source = cell.backbones[cell.modalities[0]]
        load_heads(detector, read_trained(paths, source)["model"], str(paths.cell(source).best_checkpoint))
    return detector


def stored_scales(cell: Cell, paths: RunPaths, dataset: ShardDataset, split: str) -> dict[str, StoredScales]:
    """Modality -> stored scales of the chips of `dataset`; empty for a cell whose backbones run.

    Raises:
        RunError: a features cell is not done, or holds scales of other weights or other data.
    """
    found: dict[str, StoredScales] = {}
    for modality, id in cell.features.items():
        record = read_record(paths.cell(id).record)
        if record is None:
            raise RunError(f"{paths.cell(id).record}: no record of stored scales; run that cell first")
        wanted = {
            "backbone": record_sha256(paths, cell.backbones[modality]),
            "data": data_hash(read_index(paths.index), cell.needs[0]),
        }
        for what, sha256 in wanted.items():
            if record.results[f"{what}_sha256"] != sha256:
                raise RunError(f"cells/{id}: scales of {modality} are of another {what}; remove its record and go on")
        found[modality] = StoredScales(paths.cell(id).features, record.results, split, dataset.ids)
    return found


def trained(cell: Cell, paths: RunPaths) -> Detector:
    """The detector as the training of `cell` left it, on the CPU, in eval mode.

    Raises:
        RunError: its checkpoint, or one of its backbones, is not the one that the records speak of.
    """
    content = read_trained(paths, cell.id)
    for modality, source in content["backbones"].items():
        sha256 = record_sha256(paths, source["cell"])
        if sha256 != source["sha256"]:
            paths.cell(cell.id).record.unlink(missing_ok=True)
            paths.cell(cell.id).best_checkpoint.unlink(missing_ok=True)
            raise RunError(
                f"cells/{cell.id}: was trained on another backbone of {modality} than cells/{source['cell']} now holds;"
                " so its record is removed: run the sweep again, or `retry`, to train it anew"
            )
    detector = on_backbones(cell, paths)
    load_trainable(detector, content["model"], str(paths.cell(cell.id).best_checkpoint))
    return detector.eval()


def mapping_detector(cell: Cell) -> Detector:
    """The detector that a map cell maps with, on the CPU, in eval mode.

    Raises:
        RunError: its weights are not those that the run was submitted with.
        WeightsError: a file of weights cannot be read, does not fit, or leaves a part of the detector as it was drawn.
    """
    asked = cell.config.map
    path = Path(asked.model)
    if path.suffix.lower() in WEIGHT_FORMATS:
        found = file_sha256(path) if path.is_file() else "none"
    else:
        paths = RunPaths(path.parents[1])
        found = record_sha256(paths, path.name)
    if found != asked.model_sha256:
        raise RunError(
            f"{path}: its weights have SHA-256 {found[:12]}, but the run was submitted with {asked.model_sha256[:12]};"
            " put those back, or map anew in another folder"
        )
    if path.suffix.lower() not in WEIGHT_FORMATS:
        return trained(read_cell(CellPaths(path).config), paths)
    detector = fresh(cell.model_copy(update={"arm": "full"}))
    fitted = load_file(detector, path)
    if fitted.fresh:
        raise WeightsError(
            f"{path}: does not give {listed('tensors', fitted.fresh)} of the detector, so nothing can be mapped with it"
        )
    return detector.eval()


def sources(cell: Cell, paths: RunPaths) -> dict[str, dict[str, str]]:
    """Modality -> cell and SHA-256 of the checkpoint its frozen backbone comes from."""
    return {name: {"cell": id, "sha256": record_sha256(paths, id)} for name, id in cell.backbones.items()}


def record_sha256(paths: RunPaths, cell_id: str) -> str:
    """SHA-256 of a trained cell's best checkpoint by its record.

    Raises:
        RunError: the cell is not done.
    """
    record = read_record(paths.cell(cell_id).record)
    if record is None or "checkpoint_sha256" not in record.results:
        raise RunError(f"{paths.cell(cell_id).record}: no record of a training; run that cell first")
    return str(record.results["checkpoint_sha256"])


def read_trained(paths: RunPaths, cell_id: str) -> dict[str, Any]:
    """The best checkpoint of a trained cell, after its hash was compared with the record's.

    Raises:
        RunError: there is no record, or the file is not the one it speaks of.
    """
    wanted = record_sha256(paths, cell_id)
    path = paths.cell(cell_id).best_checkpoint
    found = file_sha256(path) if path.is_file() else "none"
    if found != wanted:
        # Without its record the training is undone, and it starts anew because last.pt names the same SHA-256.
        paths.cell(cell_id).record.unlink(missing_ok=True)
        raise RunError(
            f"{path}: SHA-256 {found[:12]}, but the record says {wanted[:12]}; so the record is removed: run the sweep"
            " again, or `retry`, to train that cell anew"
        )
    return checkpoint.load(path)
