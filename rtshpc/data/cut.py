"""A scene becomes chips ready for a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rtshpc.core.config import ChipConfig, DataConfig
from rtshpc.core.errors import SceneRejected
from rtshpc.core.scenes import Scene
from rtshpc.data.normalise import Statistics, statistics_of
from rtshpc.data.sample import IGNORE_ID
from rtshpc.data.shard import MOST_INSTANCES, Chip
from rtshpc.geo.chips import ChipBox, chip_boxes
from rtshpc.geo.instances import InstanceMap
from rtshpc.geo.raster import Grid, rejecting
from rtshpc.geo.scene import OpenScene, open_scene

LARGEST = 1e100
"""Greater values cannot be summed in squares over a data set, nor can anything measured be as large."""


@dataclass(frozen=True)
class CutChip:
    """One chip with all that `ShardWriter.append` takes.

    Attributes:
        chip: name and place.
        pixels: modality -> (C, H, W) as stored.
        valid: modality -> (H, W).
        ids: (H, W) uint16, 0..n and `IGNORE_ID`.
        classes: of instance 1..n.
        scaling: modality -> scale and offset to its unit.
        statistics: modality -> moments in the unit.
        valid_fraction: share of the chip where the primary modality has data.
    """

    chip: Chip
    pixels: dict[str, npt.NDArray[Any]]
    valid: dict[str, npt.NDArray[np.bool_]]
    ids: npt.NDArray[np.uint16]
    classes: list[int]
    scaling: dict[str, tuple[float, float]]
    statistics: dict[str, Statistics]
    valid_fraction: float


@dataclass
class SceneFacts:
    """What is known of a scene once it has been cut.

    Attributes:
        crs_wkt: CRS of its grid.
        corners: (x, y) of the corners, in order around.
        instances: how many it holds; no chip holds more.
        missing: modalities it lacks.
        warnings: what was odd but usable.
    """

    crs_wkt: str = ""
    corners: list[tuple[float, float]] = field(default_factory=list)
    instances: int = 0
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def cut_scene(scene: Scene, data: DataConfig, facts: SceneFacts) -> Generator[CutChip, None, None]:
    """Chips of `scene`, row by row; those without enough valid ground are left out, `facts` is filled in.

    Raises:
        SceneRejected: by name and reason; `unreadable` for whatever the libraries fail on.
    """
    with rejecting(scene.id), open_scene(scene, data) as opened:
        grid = opened.grid
        facts.crs_wkt, facts.corners = grid.crs_wkt, corners_of(grid)
        facts.missing = sorted(opened.missing)
        instances = opened.instances()
        facts.instances = instances.count
        facts.warnings = list(opened.warnings)
        for box in chip_boxes(grid.width, grid.height, data.chip):
            chip = _cut(opened, instances, box, data)
            if chip is not None:
                yield chip
        facts.warnings = list(opened.warnings)


def _cut(opened: OpenScene, instances: InstanceMap, box: ChipBox, data: DataConfig) -> CutChip | None:
    part = opened.read(box)
    primary = part.valid[data.primary]
    fraction = int(np.count_nonzero(primary)) / primary.size
    if fraction < data.chip.min_valid_fraction:
        return None
    labels = instances.crop(box, data.labels.min_instance_px)
    scene = opened.scene
    name = f"{scene.id}_r{box.row:05d}_c{box.col:05d}"
    if labels.count == 0 and not kept_though_empty(name, data.chip):
        return None
    if labels.count > MOST_INSTANCES:
        raise SceneRejected(
            "too_many_instances", f"{name} holds {labels.count} instances, at most {MOST_INSTANCES} fit"
        )
    ids = labels.ids.astype(np.uint16)
    if labels.ignore.any():
        ids[labels.ignore & (labels.ids == 0)] = IGNORE_ID
    statistics = {
        modality: statistics_of(pixels, part.valid[modality]).scaled(*opened.scaling[modality])
        for modality, pixels in part.pixels.items()
    }
    for modality, found in statistics.items():
        if not _summable(found):
            detail = f"{name}: {modality} holds values from {found.minimum.min():g} to {found.maximum.max():g}"
            raise SceneRejected("bad_values", detail)
    return CutChip(
        Chip(name, scene.id, scene.site, chip_transform(opened.grid, box), opened.grid.crs_wkt),
        part.pixels,
        part.valid,
        ids,
        labels.classes,
        opened.scaling,
        statistics,
        fraction,
    )


def _summable(found: Statistics) -> bool:
    """Whether moments can be merged with others and written."""
    known = found.count > 0
    # The mean lies between the two; what is no number compares as false.
    within = (found.minimum >= -LARGEST) & (found.maximum <= LARGEST) & np.isfinite(found.mean) & np.isfinite(found.m2)
    return bool(within[known].all())


def kept_though_empty(name: str, config: ChipConfig) -> bool:
    """Whether a chip without instances stays; a function of its name, so that tasks and restarts agree."""
    if config.keep_empty >= 1:
        return True
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return draw < config.keep_empty


def chip_transform(grid: Grid, box: ChipBox) -> tuple[float, ...]:
    """Affine a, b, c, d, e, f of a chip of `grid`."""
    a, b, c, d, e, f = grid.transform[:6]
    return (a, b, c + a * box.col + b * box.row, d, e, f + d * box.col + e * box.row)


def corners_of(grid: Grid) -> list[tuple[float, float]]:
    """The four corners of a grid, in order around, in its CRS."""
    a, b, c, d, e, f = grid.transform[:6]
    around = ((0, 0), (grid.width, 0), (grid.width, grid.height), (0, grid.height))
    return [(c + a * x + b * y, f + d * x + e * y) for x, y in around]
