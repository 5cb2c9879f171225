"""The cells of a map run, and which of them are still true.

`map`: one block of one scene. `merge`: the scenes of one group. `publish`: the layers of all groups. An id hashes what
can change the result: the weights and the normalisation, how modalities are made, how chips are cut, the scene's files;
never paths, sites or the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rtshpc.core.cell import RESULT_VERSION, Cell, digest
from rtshpc.core.config import RunConfig
from rtshpc.core.mapping.ground import MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_record

_TAKEN = ("block_px", "score_threshold", "batch_size", "precision", "threads", "modalities", "statistics")
_MAKING = ("modalities", "primary", "classes", "band_names", "missing_value", "min_valid_fraction", "max_pixels")


def map_cells(config: RunConfig, scenes: Sequence[MapScene]) -> list[Cell]:
    """All cells of a map run in stage order.

    Args:
        config: with `map.model`.
        scenes: sorted by id; a group's scenes are merged in that order.
    """
    hashed = _hashed(config)
    blocks: list[Cell] = []
    of_scene: dict[str, list[str]] = {}
    for scene in scenes:
        made = [_map_cell(config, hashed, scene, block) for block in range(scene.blocks)]
        of_scene[scene.scene.id] = [cell.id for cell in made]
        blocks += made
    groups: dict[int, list[MapScene]] = {}
    for scene in scenes:
        groups.setdefault(scene.group, []).append(scene)
    merges = [_merge_cell(config, members, of_scene) for members in groups.values()]
    return [*_numbered(blocks), *_numbered(merges), _publish_cell(config, merges)]


def _hashed(config: RunConfig) -> dict[str, Any]:
    values, data, chip = config.map.model_dump(mode="json"), config.data.model_dump(mode="json"), config.data.chip
    return {
        "weights": config.map.model_sha256,
        "model": config.model.model_dump(mode="json", exclude={"name"}),
        "map": {key: values[key] for key in _TAKEN},
        "data": {key: data[key] for key in _MAKING},
        "chip": [chip.size_px, config.map.overlap(chip.size_px), chip.enlarge],
    }


def _map_cell(config: RunConfig, hashed: dict[str, Any], scene: MapScene, block: int) -> Cell:
    of = f" {block + 1}/{scene.blocks}" if scene.blocks > 1 else ""
    seen = scene.model_dump(mode="json", include={"ground", "reason", "blocks"})
    return _cell(
        "map",
        {**hashed, **seen, "scene": scene.fingerprint, "block": block},
        f"map {scene.scene.id}{of}",
        config,
        modalities=config.map.modalities,
        scenes=(scene,),
        block=block,
        data_fingerprint=scene.fingerprint,
    )


def _merge_cell(config: RunConfig, scenes: Sequence[MapScene], of_scene: dict[str, list[str]]) -> Cell:
    needs = tuple(need for scene in scenes for need in of_scene[scene.scene.id])
    places = [[scene.row, scene.col] for scene in scenes]
    fingerprint = digest([scene.fingerprint for scene in scenes], 64)
    more = f" and {len(scenes) - 1} more" if len(scenes) > 1 else ""
    return _cell(
        "merge",
        {"needs": needs, "scenes": fingerprint, "places": places, "dem": config.map.dem},
        f"merge {scenes[0].scene.id}{more}",
        config,
        needs=needs,
        modalities=config.map.modalities,
        scenes=tuple(scenes),
        data_fingerprint=fingerprint,
    )


def _publish_cell(config: RunConfig, merges: Sequence[Cell]) -> Cell:
    needs = tuple(cell.id for cell in merges)
    fingerprint = digest([cell.data_fingerprint for cell in merges], 64)
    hashed = {"needs": needs, "scenes": fingerprint, "scores": config.map.scores}
    return _cell("publish", hashed, "publish", config, needs=needs, data_fingerprint=fingerprint)


def _cell(stage: str, hashed: dict[str, Any], label: str, config: RunConfig, **fields: Any) -> Cell:
    identity = digest({"stage": stage, "version": RESULT_VERSION[stage], **hashed})
    return Cell(id=identity, stage=stage, label=label, config=config, **fields)


def _numbered(cells: Sequence[Cell]) -> list[Cell]:
    return [cell.model_copy(update={"task": task, "tasks": len(cells)}) for task, cell in enumerate(cells)]


def inputs_of(cell: Cell, paths: RunPaths) -> dict[str, str]:
    """Needed cell -> digest of its record's results; empty for one without a record.

    A lenient stage puts this into its own results: it has to run again when, later, something else is there.
    """
    records = {need: read_record(paths.cell(need).record) for need in cell.needs}
    return {need: digest(record.results) if record is not None else "" for need, record in records.items()}


def inputs_same(cell: Cell, record: Record, paths: RunPaths) -> bool:
    """Whether what a lenient stage has taken is what is there now."""
    return record.results.get("inputs") == inputs_of(cell, paths)
