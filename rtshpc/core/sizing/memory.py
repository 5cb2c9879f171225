"""What is measured or predicted of a detector's memory, said without torch."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell, digest
from rtshpc.core.config import ModelConfig, RoIConfig, RunConfig, SiteConfig, TrainConfig
from rtshpc.core.config.section import Section, doc
from rtshpc.core.features import CHIPS_AT_ONCE

TRAINED = ("pretrain", "finetune")
"""Stages whose cells train a detector."""


class MemorySpec(Section):
    """What is measured or predicted, and how."""

    model: ModelConfig = doc("the detector")
    channels: dict[str, int] = doc("bands of each modality, the primary first", min_length=1)
    classes: int = doc("classes without the background", 1, ge=1)
    work: str = doc("train, detect (instances of chips) or scales (of a frozen backbone, to be stored)", "train")
    arm: str = doc("unimodal, full, pretrained (frozen backbones) or cached (their scales are given)", "unimodal")
    chip_px: int = doc("side of the samples, px", 256, ge=16)
    precision: str = doc("fp32, bf16 or fp16", "bf16")
    device: str = doc("auto, cpu or cuda", "auto")
    batch: int = doc("samples that a process takes in a step", 1, ge=1)
    micro_batch: int = doc("of them worked on together, see site.micro_batch; 0 = all", 0, ge=0)
    instances: int = doc("slumps of each sample; 0 = as few as fill RoIs and foreground RoIs, at least 9", 9, ge=0)
    rois: int | None = doc("RoIs an image in the losses; None = the most there can be", None, ge=0)
    foreground: int | None = doc("of them foreground, so in the mask head; None = the most there can be", None, ge=0)
    optimizer: bool = doc("the step ends with AdamW's", True)
    repeats: int = doc("measured steps", 3, ge=1)
    warmups: int = doc("steps before them", 1, ge=0)
    seed: int = doc("of weights, sample and RoIs", 0, ge=0)
    threads: int = doc("torch threads", 1, ge=1)

    @property
    def digest(self) -> str:
        """Of all that changes memory and work; names, seeds and how often it is measured do not."""
        kept = self.model_dump(mode="json", exclude={"repeats", "warmups", "seed", "threads", "channels"})
        del kept["model"]["name"]
        return digest([kept, list(self.channels.values()), self.counts])

    @property
    def untraceable(self) -> str:
        """Why nothing can be traced of it; empty where it can."""
        engine = self.model.engine
        return "" if engine == "native" else f"model.engine = {engine}: its heads cannot be traced; take engine: native"

    @property
    def counts(self) -> dict[str, int]:
        """RoIs and foreground RoIs an image: those given, else the most that the config allows."""
        roi: RoIConfig = self.model.roi
        rois = roi.rois_per_image if self.rois is None else self.rois
        most = int(rois * roi.positive_fraction)
        return {"rois": rois, "foreground": most if self.foreground is None else self.foreground}


def memory_spec(cell: Cell, site: SiteConfig) -> MemorySpec | None:
    """What one process of a cell has in memory at `site`; None for cells that run no detector.

    Args:
        cell: of any stage.
        site: where it runs; its GPUs, and how batches are parted there.
    """
    if cell.stage == "measure":
        return measure_spec(cell)
    if cell.stage not in (*TRAINED, "features", "evaluate"):
        return None
    training: TrainConfig = cell.config.pretrain if cell.arm == "unimodal" else cell.config.finetune
    shared: dict[str, Any] = {
        **_detector_of(cell),
        "arm": cell.arm,
        "chip_px": cell.config.data.chip.size_px * cell.config.data.chip.enlarge,
        "precision": training.precision,
        "device": training.device if training.device != "auto" else "cuda" if site.gpus else "cpu",
        "seed": cell.config.seed,
    }
    if cell.stage not in TRAINED:
        return MemorySpec(**shared, work="detect" if cell.stage == "evaluate" else "scales", batch=CHIPS_AT_ONCE)
    tasks = site.nodes * site.tasks
    processes = tasks if tasks > 1 else training.processes
    if cell.features:
        shared["arm"] = "cached"
    return MemorySpec(**shared, batch=-(-training.batch_size // processes), micro_batch=site.micro_batch)


def measure_spec(cell: Cell) -> MemorySpec:
    """What a measure cell measures, and how."""
    given = cell.config.measure.model_dump(exclude={"modality_sets", "arms"})
    return MemorySpec(**_detector_of(cell), **given, arm=cell.arm, seed=cell.config.seed)


def _detector_of(cell: Cell) -> dict[str, Any]:
    channels = channels_of(cell.config, cell.modalities)
    return {"model": cell.config.model, "channels": channels, "classes": len(cell.config.data.classes)}


def channels_of(config: RunConfig, modalities: tuple[str, ...]) -> dict[str, int]:
    """Bands of each modality, in order (the primary first)."""
    return {name: config.data.modalities[name].channels for name in modalities}
