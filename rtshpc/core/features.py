"""What the feature cache holds and how much disk it takes, from configs and the index alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rtshpc.core.cell import Cell, digest
from rtshpc.core.config import AugmentConfig, DataConfig, ModelConfig, MViTConfig, RunConfig
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_json, read_lines, read_record
from rtshpc.core.scenes import list_scenes
from rtshpc.core.tiff import tiff_size

VARIANTS = (
    "identity",
    "turn90",
    "turn180",
    "turn270",
    "flip",
    "flip_turn90",
    "flip_turn180",
    "flip_turn270",
)
"""The dihedral group: number `4 * flip + turns`, a flip of left and right comes before the quarter turns."""

CHIPS_AT_ONCE = 8
"""Chips, variants counted, that go through a detector together where nothing is trained: to be scored or to be stored."""

ITEM_BYTES = 2
"""Of a stored value, bf16 or fp16."""

PART_BYTES = 256 << 20
"""A file of scales holds about so much: what a kill can cost."""

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Chips:
    """Chips that are cached.

    Attributes:
        train: of the train split; each in every variant.
        val: of the val split; as they are.
        exact: counted in the index, else estimated from the scenes.
    """

    train: int
    val: int
    exact: bool

    def of(self, split: str) -> int:
        """Chips of a split."""
        return {"train": self.train, "val": self.val}[split]


def variants(augment: AugmentConfig) -> tuple[int, ...]:
    """Numbers of the VARIANTS that an augmentation by flips and quarter turns can draw; identity first."""
    turns = (0, 1, 2, 3) if augment.quarter_turns else (0, 2) if augment.flip else (0,)
    return tuple(4 * flip + turn for flip in ((0, 1) if augment.flip else (0,)) for turn in turns)


def hashed_scales(config: RunConfig) -> tuple[dict[str, Any], str]:
    """What stored scales depend on beside weights and data, and how a label tells it."""
    tuning = config.finetune
    numbers = variants(tuning.augment)
    hashed = {
        # Of the model all that may change how a backbone computes.
        "model": config.model.model_dump(mode="json", exclude={"name", "fusion", "rpn", "roi", "pyramid_channels"}),
        "variants": numbers,
        "precision": tuning.precision,
        "threads": tuning.threads,
        "dtype": tuning.features_dtype,
    }
    return hashed, f"{tuning.features_dtype}, {len(numbers)} variants"


def split_variants(cell: Cell, split: str) -> tuple[int, ...]:
    """Variants in which a features cell stores the chips of a split: all for train, identity for val."""
    return variants(cell.config.finetune.augment) if split == "train" else (0,)


def scale_shapes(model: ModelConfig, side_px: int) -> tuple[tuple[int, int, int], ...]:
    """(C, H, W) of the four scales of a square chip of `side_px`, which is padded to multiples of 32."""
    backbone = model.backbone
    if isinstance(backbone, MViTConfig):
        widths: Sequence[int] = [backbone.embed_dim << scale for scale in range(4)]
    else:
        widths = backbone.channels
    padded = -(-side_px // STRIDES[-1]) * STRIDES[-1]
    return tuple((width, padded // stride, padded // stride) for width, stride in zip(widths, STRIDES, strict=True))


def record_bytes(cell: Cell) -> int:
    """Bytes of one chip in one variant, one modality."""
    chip = cell.config.data.chip
    return ITEM_BYTES * sum(math.prod(shape) for shape in scale_shapes(cell.config.model, chip.size_px * chip.enlarge))


def chips_per_file(cell: Cell, split: str) -> int:
    """Chips of a split, with all their variants, in one file."""
    return max(1, PART_BYTES // (record_bytes(cell) * len(split_variants(cell, split))))


def cell_bytes(cell: Cell, chips: Chips) -> int:
    """Bytes of all scales that a features cell stores (without the files' headers, a few kB each)."""
    return record_bytes(cell) * sum(chips.of(split) * len(split_variants(cell, split)) for split in ("train", "val"))


def left_bytes(cell: Cell, paths: RunPaths, chips: Chips) -> int:
    """Bytes that a features cell still has to write."""
    there = sum(int(entry.get("bytes", 0)) for entry in read_lines(paths.cell(cell.id).journal))
    return max(0, cell_bytes(cell, chips) - there)


def scales_there(cell: Cell, record: Record, paths: RunPaths) -> bool:
    """Whether the files of a features cell are there and of the backbone that its pretrain cell now holds."""
    source = read_record(paths.cell(cell.backbones[cell.modalities[0]]).record)
    if source is None or source.results.get("checkpoint_sha256") != record.results.get("backbone_sha256"):
        return False
    stored = cast(list[dict[str, Any]], record.results.get("files", []))
    files = [(paths.cell(cell.id).features / str(entry["file"]), entry["bytes"]) for entry in stored]
    return all(file.is_file() and size == file.stat().st_size for file, size in files)


def data_hash(index: Mapping[str, Any], gather: str) -> str:
    """SHA-256 over all of an index that scales depend on: pixels (the gather cell's id), chips, normalisation."""
    chips = [[chip["id"], chip["split"]] for chip in index["chips"]]
    return digest({"gather": gather, "chips": chips, "modalities": index["modalities"]}, 64)


def chips_to_cache(data: DataConfig, paths: RunPaths, gathered: bool) -> Chips:
    """Train and val chips: counted where the run's shards are gathered, else estimated from the scenes.

    The estimate takes every chip position of every scene as a chip; which are left out for missing data or split
    apart by site is known only after preprocess. Scenes whose size cannot be read count as one chip.
    """
    index = read_json(paths.index) if gathered else None
    if isinstance(index, dict):
        splits = [chip["split"] for chip in cast(dict[str, Any], index)["chips"]]
        return Chips(splits.count("train"), splits.count("val"), True)
    total = sum(_positions(size, data) for size in _scene_sizes(data, paths))
    test = data.split.test_fraction if data.split.rule == "stratified" else 0.0
    val = round(total * (1 - test) * data.split.val_fraction)
    return Chips(round(total * (1 - test)) - val, val, False)


def _scene_sizes(data: DataConfig, paths: RunPaths) -> list[tuple[int, int]]:
    generated = data.scenes.generated
    if generated is not None:
        return [(generated.size_px, generated.size_px)] * (len(generated.sites) * generated.scenes_per_site)
    scenes = list_scenes(data, paths.scenes)
    return [tiff_size(Path(scene.files.get(data.primary) or scene.image)) or (1, 1) for scene in scenes]


def _positions(size: tuple[int, int], data: DataConfig) -> int:
    """Chips that cover a scene, as `geo.chips` lays them."""
    step = data.chip.size_px - data.chip.overlap_px
    return math.prod(1 + max(0, -(-(side - data.chip.size_px) // step)) for side in size)
