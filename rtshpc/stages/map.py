"""Maps one block of a scene: what the detector sees in its chips, as a file of pieces."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtshpc.core.cell import Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import RunError, SceneRejected
from rtshpc.core.mapping.ground import Ground, MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, file_facts
from rtshpc.core.scenes import VIRTUAL
from rtshpc.data.normalise import normalise
from rtshpc.data.reader import enlarged_image
from rtshpc.engine.detectors import mapping_detector
from rtshpc.engine.distributed import autocast, choose_device
from rtshpc.geo.chips import ChipBox
from rtshpc.geo.scene import ChipPixels
from rtshpc.mapping.layout import Layout
from rtshpc.mapping.pieces import Piece, piece, write_pieces
from rtshpc.mapping.scenes.strips import ReadFacts, Strip, read_ahead, strips
from rtshpc.mapping.scenes.survey import layout_of
from rtshpc.model.detections import Detections
from rtshpc.model.detector import Detector

Detect = Callable[[dict[str, Tensor]], list[Detections]]
"""Modality -> images (B, C, H, W) to detections, one an image, on the CPU."""

READY = 4
"""Chips that wait for the detector."""


@dataclass(frozen=True)
class Ready:
    """One chip for the detector.

    Attributes:
        number: index into `Layout.boxes()`.
        box: its place in the scene.
        images: modality -> (C, H, W), normalised; empty where the chip holds no valid pixel.
        valid_px: valid pixels of the primary modality in the chip's core.
    """

    number: int
    box: ChipBox
    images: dict[str, Tensor]
    valid_px: int


@dataclass
class Found:
    """What a block gave.

    Attributes:
        pieces: instances as its chips saw them.
        mapped: chips that the detector has seen.
        empty: chips without a valid pixel.
        valid_px: valid pixels of the block's cores.
    """

    pieces: list[Piece] = field(default_factory=list)
    mapped: int = 0
    empty: int = 0
    valid_px: int = 0


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write the pieces of the cell's block; a scene that cannot be used is named, and is no failure.

    Returns:
        `scene`, `block`, `blocks`, `rejected` (null, or reason and detail), `warnings`, `missing` (modalities), `chips`,
        `mapped`, `empty` (chips without a valid pixel), `valid_px`, `pieces`, `device`, and `files`: name, bytes and
        SHA-256 of each.

    Raises:
        RunError: the weights are not those of the submission, or a remote scene could not be read this time.
    """
    scene = cell.scenes[0]
    told: dict[str, Any] = {"scene": scene.scene.id, "block": cell.block, "blocks": scene.blocks}
    facts, found = ReadFacts(), Found()
    try:
        if scene.ground is None:
            raise SceneRejected(scene.reason, scene.detail)
        device = choose_device(cell.config.map.device)
        torch.set_num_threads(cell.config.map.threads)
        progress("load", 0, 1)
        detect = _detect(cell, device)
        told["device"] = device.type
        found = map_block(scene, cell.block, cell.config, detect, facts, lambda done, of: progress("map", done, of))
    except SceneRejected as error:
        if scene.scene.image.startswith(VIRTUAL) and error.reason == "unreadable":
            raise RunError(f"{error.detail}; `retry` reads it again") from None
        found = Found()
        told["rejected"] = {"reason": error.reason, "detail": error.detail}
    out = paths.cell(cell.id).pieces
    write_pieces(out, found.pieces)
    counts = {"chips": found.mapped + found.empty, "mapped": found.mapped, "empty": found.empty}
    return {
        "rejected": None,
        **told,
        **counts,
        "warnings": facts.warnings,
        "missing": facts.missing,
        "valid_px": found.valid_px,
        "pieces": len(found.pieces),
        "files": [file_facts(out)],
    }


def map_block(
    scene: MapScene,
    block: int,
    config: RunConfig,
    detect: Detect,
    facts: ReadFacts,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Found:
    """What the detector sees in one block of a scene.

    Args:
        scene: one with a ground.
        block: its number.
        config: with `map.modalities` and what they are normalised with.
        detect: the detector.
        facts: filled in, see `strips`.
        told: called with the chips that are done, and all of them.

    Raises:
        SceneRejected: its files cannot be used.
    """
    assert scene.ground is not None
    layout = layout_of(scene.ground, config.data, config.map)
    chips = layout.blocks(config.map.block_px)[block]
    ready = ready_chips(scene, scene.ground, layout, chips, config, facts)
    return find_pieces(ready, detect, config, layout, lambda done: told(done, len(chips)))


def _detect(cell: Cell, device: torch.device) -> Detect:
    """The cell's detector as a function.

    Raises:
        RunError: it gives boxes only.
    """
    if not cell.config.model.roi.mask:
        raise RunError(f"{cell.config.map.model}: detects boxes without masks (roi.mask = false), which make no map")
    return detecting(mapping_detector(cell).to(device), device, cell.config.map.precision)


def detecting(detector: Detector, device: torch.device, precision: str) -> Detect:
    """A detector in eval mode on `device`, as a function."""

    def detect(images: dict[str, Tensor]) -> list[Detections]:
        with torch.inference_mode(), autocast(device, precision):
            found = detector({name: image.to(device) for name, image in images.items()})
        return [one.cpu() for one in found]

    return detect


def ready_chips(
    scene: MapScene, ground: Ground, layout: Layout, chips: Sequence[int], config: RunConfig, facts: ReadFacts
) -> Generator[Ready, None, None]:
    """The chips of a block as the detector takes them, in their order; read and normalised ahead of it.

    Args:
        scene: which scene.
        ground: its grid.
        layout: how all of it is cut.
        chips: the block's, row by row.
        config: with `map.modalities` and what they are normalised with.
        facts: filled in, see `strips`.
    """
    wanted = {
        name: config.data.modalities[name] for name in dict.fromkeys((config.data.primary, *config.map.modalities))
    }
    # How much of the scene is valid is known once all its blocks are mapped: to look at a hundredth of it in every block
    # would be to read all of a scene of a hundred blocks once more.
    data = config.data.model_copy(update={"modalities": wanted, "min_valid_fraction": 0.0})
    source = strips(scene.scene, ground, layout, chips, data, facts)
    with read_ahead(_made_ready(source, layout, config, facts), READY) as ready:
        yield from ready


def _made_ready(
    source: Generator[Strip, None, None], layout: Layout, config: RunConfig, facts: ReadFacts
) -> Generator[Ready, None, None]:
    with read_ahead(source) as read:
        for strip in read:
            for number, box in strip.chips:
                part = strip.chip(box)
                valid = part.valid[config.data.primary]
                top, left, bottom, right = layout.core(number)
                core = valid[top - box.row : bottom - box.row, left - box.col : right - box.col]
                images = _images(part, config, facts) if valid.any() else {}
                yield Ready(number, box, images, int(np.count_nonzero(core)))


def _images(part: ChipPixels, config: RunConfig, facts: ReadFacts) -> dict[str, Tensor]:
    """A chip's modalities, normalised and enlarged as in training."""
    times, images = config.data.chip.enlarge, dict[str, Tensor]()
    for name in config.map.modalities:
        normal, valid = config.map.statistics[name], part.valid[name]
        image = normalise(part.pixels[name], valid, facts.scaling[name], normal.mean, normal.std)
        images[name] = image if times == 1 else enlarged_image(image, torch.from_numpy(np.array(valid)), times)
    return images


def find_pieces(
    ready: Generator[Ready, None, None], detect: Detect, config: RunConfig, layout: Layout, told: Callable[[int], None]
) -> Found:
    """What `detect` finds in chips; those without a valid pixel are not sent to it.

    Args:
        ready: the chips.
        detect: the detector.
        config: batch and threshold.
        layout: of the scene.
        told: called with the number of chips done.
    """
    found, batch = Found(), list[Ready]()
    with closing(ready):
        for chip in ready:
            found.valid_px += chip.valid_px
            if not chip.images:
                found.empty += 1
            else:
                batch.append(chip)
            if len(batch) == config.map.batch_size:
                _take(found, batch, detect, config, layout)
                batch = []
            told(found.empty + found.mapped)
    if batch:
        _take(found, batch, detect, config, layout)
    return found


def _take(found: Found, batch: Sequence[Ready], detect: Detect, config: RunConfig, layout: Layout) -> None:
    images = {name: _stacked([chip.images[name] for chip in batch]) for name in batch[0].images}
    for chip, one in zip(batch, detect(images), strict=True):
        found.pieces += pieces_of(chip.number, chip.box, one, config, layout)
    found.mapped += len(batch)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    return images[0][None] if len(images) == 1 else torch.stack(list(images))


def pieces_of(number: int, box: ChipBox, detections: Detections, config: RunConfig, layout: Layout) -> Iterable[Piece]:
    """Detections of one chip as pieces; nothing lies beyond the scene."""
    kept = torch.nonzero(detections.scores_N >= config.map.score_threshold)[:, 0]
    if not len(kept):
        return
    chosen = detections.take(kept)
    side = box.size * config.data.chip.enlarge
    masks = chosen.masks(box.size, box.size, side, side).numpy()
    masks = masks[:, : layout.height - box.row, : layout.width - box.col]
    for mask, score, kind in zip(masks, chosen.scores_N.float().tolist(), chosen.classes_N.tolist(), strict=True):
        seen = piece(number, box, mask, score, kind)
        if seen is not None:
            yield seen
