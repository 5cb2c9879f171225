"""Joins what the chips of a group of scenes saw into one set of instances, and measures each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.load import read_run_config
from rtshpc.core.mapping.cells import inputs_of
from rtshpc.core.mapping.ground import Ground, MapScene
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress, Record, file_facts, read_record
from rtshpc.geo.scene import OpenScene, open_scene
from rtshpc.mapping.attributes import Origin, describe
from rtshpc.mapping.features import write_features
from rtshpc.mapping.mosaic import Mask, PlacedScene, merge
from rtshpc.mapping.outlines import outlines
from rtshpc.mapping.pieces import Piece, read_pieces
from rtshpc.mapping.scenes.strips import CACHE_BYTES
from rtshpc.mapping.scenes.survey import layout_of
from rtshpc.report.overview.quicklook import write_quicklooks

State = dict[str, Any]


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write the features of the cell's group of scenes.

    A scene that could not be used, or one of whose blocks could not, is left out whole and named, so that the result
    does not depend on how it was cut.

    Returns:
        `scenes` (see `_state`, and `instances` of each), `instances`, `pieces`, `notes`, `crs_wkt` and `transform` of the
        lattice (null where no scene was mapped), `files` and `inputs`.

    Raises:
        RunError: pieces of a block are missing or damaged.
    """
    inputs = inputs_of(cell, paths)
    least = cell.config.data.min_valid_fraction
    states = [_state(scene, records, least) for scene, records in _blocks(cell, paths)]
    mapped = [scene for scene, state in zip(cell.scenes, states, strict=True) if state["state"] == "mapped"]
    told = {"inputs": inputs, "scenes": states, "instances": 0, "pieces": 0, "notes": [], "files": []}
    if not mapped:
        return {**told, "crs_wkt": None, "transform": None}
    progress("merge", 0, 1)
    own = {state["scene"]: state["blocks"] for state in states}
    with ExitStack() as stack:
        placed = [_placed(scene, _pieces(own[scene.scene.id], paths), cell, stack) for scene in mapped]
        instances = merge(placed)
    crs_wkt, transform = _lattice(mapped[0])
    progress("measure", 0, 1)
    _, provenance = read_run_config(paths.config)
    origin = Origin(cell.config.map.model_label, str((provenance.get("image") or {}).get("sha256", "")))
    shapes = outlines(instances, transform)
    table, notes = describe(
        instances, shapes, crs_wkt, transform, mapped, cell.config.data, origin, cell.config.map.dem
    )
    out = paths.cell(cell.id).instances
    write_features(out, table)
    looks = {paths.cell(cell.id).quicklook(cell.scenes.index(scene)): scene.scene for scene in mapped}
    notes += write_quicklooks(looks, cell.config.data)
    counts = Counter(instance.scene for instance in instances)
    return {
        **told,
        "scenes": [{**state, "instances": counts[state["scene"]]} for state in states],
        "instances": len(instances),
        "pieces": sum(len(scene.pieces) for scene in placed),
        "notes": notes,
        "crs_wkt": crs_wkt,
        "transform": list(transform),
        "files": [file_facts(out)],
    }


def _blocks(cell: Cell, paths: RunPaths) -> list[tuple[MapScene, list[Record | None]]]:
    """Each scene with the records of its blocks; None for one that is not done."""
    records = iter([read_record(paths.cell(need).record) for need in cell.needs])
    return [(scene, [next(records) for _ in range(scene.blocks)]) for scene in cell.scenes]


def _state(scene: MapScene, records: Sequence[Record | None], least: float) -> State:
    """What became of a scene: `mapped`, `rejected` (reason, detail) or `failed` (a block has no record).

    A scene of which a smaller share than `least` is valid is rejected as in training.

    With it: scene, site, date, image, `ground` (null where its header was refused), chips, empty, valid_px, warnings,
    missing, and the ids of the cells of its blocks where it is mapped.
    """
    results = [record.results for record in records if record is not None]
    refused = next((one["rejected"] for one in results if one["rejected"] is not None), None)
    lost = len(records) - len(results)
    state, why = "mapped", {"reason": "", "detail": ""}
    counts = {key: sum(int(one[key]) for one in results) for key in ("chips", "empty", "valid_px")}
    if refused is not None:
        state, why = "rejected", refused
    elif lost:
        state, why = "failed", {"reason": "failed", "detail": f"{lost} of {len(records)} blocks failed; see `status`"}
    elif (share := counts["valid_px"] / (_known(scene).height * _known(scene).width)) < least:
        state, why = "rejected", {"reason": "almost_empty", "detail": f"{scene.scene.id}: {share:.2%} of it is valid"}
    return {
        "scene": scene.scene.id,
        "site": scene.scene.site,
        "date": scene.scene.date,
        "image": scene.scene.image,
        "ground": None if scene.ground is None else scene.ground.model_dump(mode="json"),
        "state": state,
        **why,
        **counts,
        "warnings": list(dict.fromkeys(text for one in results for text in one["warnings"])),
        "missing": sorted({name for one in results for name in one["missing"]}),
        "instances": 0,
        "blocks": [record.cell for record in records if record is not None],
    }


def _pieces(blocks: Sequence[str], paths: RunPaths) -> list[Piece]:
    """The pieces of a scene; a block whose file is damaged is made undone, so that the next start maps it again."""
    found: list[Piece] = []
    for block in blocks:
        try:
            found += read_pieces(paths.cell(block).pieces)
        except RunError:
            paths.cell(block).record.unlink(missing_ok=True)
            raise
    return found


def _placed(scene: MapScene, pieces: list[Piece], cell: Cell, stack: ExitStack) -> PlacedScene:
    """A scene on its group's lattice; opened only if it is asked where it has data."""
    data = cell.config.data
    primary = data.model_copy(update={"modalities": {data.primary: data.modalities[data.primary]}})
    opened: list[OpenScene] = []

    def ground(top: int, left: int, bottom: int, right: int) -> Mask:
        if not opened:
            opened.append(stack.enter_context(open_scene(scene.scene, primary, False, 0, CACHE_BYTES)))
        return opened[0].part(top, left, bottom - top, right - left).valid[data.primary]

    layout = layout_of(_known(scene), data, cell.config.map)
    return PlacedScene(scene.scene.id, scene.row, scene.col, layout, pieces, ground)


def _lattice(scene: MapScene) -> tuple[str, tuple[float, float, float, float, float, float]]:
    """CRS and transform of the lattice on which a scene lies."""
    ground = _known(scene)
    a, b, c, d, e, f = ground.transform
    return ground.crs_wkt, (a, b, c - a * scene.col - b * scene.row, d, e, f - d * scene.col - e * scene.row)


def _known(scene: MapScene) -> Ground:
    if scene.ground is None:
        raise RunError(f"{scene.scene.id}: was mapped without a ground; map it again")
    return scene.ground
