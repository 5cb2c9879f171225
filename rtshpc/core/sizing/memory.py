"""What is measured or predicted of a detector's memory, said without torch."""

from __future__ import annotations

from rtshpc.core.config import ModelConfig
from rtshpc.core.config.section import Section, doc


class MemorySpec(Section):
    """What is measured, and how."""

    model: ModelConfig = doc("the detector")
    channels: dict[str, int] = doc("bands of each modality, the primary first", min_length=1)
    classes: int = doc("classes without the background", 1, ge=1)
    arm: str = doc("unimodal, full, pretrained (frozen backbones) or cached (their scales are given)", "unimodal")
    chip_px: int = doc("side of the sample, px", 256, ge=32)
    precision: str = doc("fp32, bf16 or fp16", "bf16")
    device: str = doc("auto, cpu or cuda", "auto")
    repeats: int = doc("measured steps", 3, ge=1)
    warmups: int = doc("steps before them", 1, ge=0)
    seed: int = doc("of weights, sample and RoIs", 0, ge=0)
    threads: int = doc("torch threads", 1, ge=1)
