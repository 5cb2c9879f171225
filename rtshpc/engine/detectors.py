"""Detectors of cells: fresh, on frozen pretrained backbones, or as a training left them."""

from __future__ import annotations

from typing import Any

import torch

from rtshpc.core.cell import Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_record
from rtshpc.engine import checkpoint
from rtshpc.engine.feed import derive_seed
from rtshpc.model.detector import Detector, build_detector
from rtshpc.model.weights import load_backbone, load_heads, load_trainable


def channels_of(config: RunConfig, modalities: tuple[str, ...]) -> dict[str, int]:
    """Bands of each modality, in order (the primary first)."""
    return {name: config.data.modalities[name].channels for name in modalities}


def fresh(cell: Cell, paths: RunPaths | None = None) -> Detector:
    """A detector of the cell's modalities with weights drawn from the run's seed alone.

    Args:
        cell: pretrain or finetune cell; the arm `pretrained` freezes the backbones.
        paths: not used; every way to a detector is called alike.
    """
    torch.manual_seed(derive_seed(cell.config.seed, "weights", *cell.modalities))
    channels = channels_of(cell.config, cell.modalities)
    return build_detector(cell.config.model, channels, len(cell.config.data.classes), cell.arm == "pretrained")


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


def trained(cell: Cell, paths: RunPaths) -> Detector:
    """The detector as the training of `cell` left it, on the CPU, in eval mode.

    Raises:
        RunError: its checkpoint, or one of its backbones, is not the one that the records speak of.
    """
    content = read_trained(paths, cell.id)
    for modality, source in content["backbones"].items():
        sha256 = record_sha256(paths, source["cell"])
        if sha256 != source["sha256"]:
            raise RunError(
                f"cells/{cell.id}: was trained on another backbone of {modality} than cells/{source['cell']} now holds"
            )
    detector = on_backbones(cell, paths)
    load_trainable(detector, content["model"], str(paths.cell(cell.id).best_checkpoint))
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
    found = checkpoint.file_sha256(path) if path.is_file() else "none"
    if found != wanted:
        raise RunError(
            f"{path}: SHA-256 {found[:12]}, but the record says {wanted[:12]}; remove the record to train anew"
        )
    return checkpoint.load(path)
