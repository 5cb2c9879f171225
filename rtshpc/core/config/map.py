"""The section that says how scenes are mapped with a trained detector."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rtshpc.core.config.checks import SHA256, Names
from rtshpc.core.config.section import Section, doc


class NormalConfig(Section):
    """What a modality was normalised with in training, per channel, in its unit."""

    mean: tuple[float, ...] = doc("mean of the valid pixels of the training split", min_length=1)
    std: tuple[float, ...] = doc("standard deviation of them", min_length=1)

    @model_validator(mode="after")
    def _of_the_same_channels(self) -> NormalConfig:
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std must be of the same channels, and std more than 0")
        return self


class MapConfig(Section):
    """Mapping. The first five are written by `launch map`, from the model it is given; the others are a user's."""

    model: str = doc("folder of the trained cell, or a file of weights; empty = this is no run of `launch map`", "")
    model_label: str = doc("its name for people", "")
    model_sha256: str = doc("what its checkpoint must be", "", pattern=SHA256)
    modalities: Names = doc("what it takes, the primary first", ())
    statistics: dict[str, NormalConfig] = doc("modality -> what its pixels were normalised with", {})
    scenes: str = doc("what was given to map: list, index, folder or raster", "")
    overlap_px: int = doc("shared by neighbouring chips, px; at least 2; 0 = a quarter of data.chip.size_px", 0, ge=0)
    block_px: int = doc(
        "larger scenes are mapped in blocks at most so wide and four times as tall, px, one task each", 5120, ge=64
    )
    score_threshold: float = doc("lower detections are not mapped", 0.5, ge=0, le=1)
    batch_size: int = doc(
        "chips that go through the detector together; with more than 1, the last digits of scores depend on the blocks",
        1,
        ge=1,
    )
    precision: Literal["fp32", "bf16", "fp16"] = doc("autocast type; `launch map` takes the training's", "fp32")
    device: Literal["auto", "cpu", "cuda"] = doc("auto takes a GPU where one is visible", "auto")
    threads: int = doc("torch threads of a task; part of the result on CPU", 1, ge=1)
    dem: str = doc("modality that is a terrain model, m: instances are given slope, elevation and aspect", "")

    scores: bool = doc("also write a raster of scores (COG) for each scene", False)

    @model_validator(mode="after")
    def _seams_can_be_seen(self) -> MapConfig:
        if self.overlap_px == 1:
            raise ValueError(
                "overlap_px = 1 must be at least 2, else instances cannot be joined over seams; 0 = a quarter"
            )
        return self

    def overlap(self, size_px: int) -> int:
        """Overlap of chips of `size_px`, px."""
        return self.overlap_px or max(2, size_px // 4)
