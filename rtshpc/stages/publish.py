"""Publishes a map: layers per scene and of the whole run, footprints, catalog, virtual rasters and a page to look at."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.grid import valid_record
from rtshpc.core.load import read_cell
from rtshpc.core.mapping.cells import inputs_of
from rtshpc.core.mapping.ground import Ground
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import Progress, file_sha256, read_json, read_lines, read_record
from rtshpc.geo.crs import LONLAT
from rtshpc.mapping import features as table
from rtshpc.mapping.between import Sheet, join
from rtshpc.mapping.catalog import Entry, write_catalog, write_mosaics
from rtshpc.mapping.features import Features, read_features
from rtshpc.mapping.layers import (
    MAPPED,
    Outcome,
    footprints,
    in_one_crs,
    outline_of,
    write_geopackage,
    write_layer,
    write_scores,
    write_table,
)
from rtshpc.report.overview.page import MapFacts, Threshold, write_overview

LAYER, FOOTPRINTS = "slumps", "footprints"


@dataclass
class Group:
    """What a merge left.

    Attributes:
        outcomes: of its scenes.
        features: its instances; None where it mapped no scene.
        looks: scene -> picture.
        notes: what it had to say.
    """

    outcomes: list[Outcome]
    features: Features | None = None
    looks: dict[str, Path] = field(default_factory=dict[str, Path])
    notes: list[str] = field(default_factory=list[str])


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write `layers/` and the page from whatever the merges left; what is missing is named in both.

    Returns:
        `scenes` (how many in each state), `instances`, `joined` (how many fewer they are than the merges', for they were
        in maps on several grids), `area_m2`, `crs` of the whole layer, `notes`, `threshold` (score, f1 in percent, source;
        null where the model's run does not say), `page`, `files` and `inputs`.

    Raises:
        RunError: a merge's table is missing or damaged, or a file does not read back as it was written.
    """
    inputs = inputs_of(cell, paths)
    groups = [_group(need, paths) for need in cell.needs]
    outcomes = sorted((one for group in groups for one in group.outcomes), key=lambda one: one.scene)
    notes = sorted({note for group in groups for note in group.notes})
    sheets = [_sheet(group.outcomes, group.features) for group in groups if group.features is not None]
    tables = join(sheets)
    joined = sum(len(sheet.features) for sheet in sheets) - sum(map(len, tables))
    whole = in_one_crs(tables) if tables else _nothing()
    counts = Counter(whole[table.SCENE])
    ground = footprints(outcomes, counts)
    written, entries = _write_scenes(cell, paths, outcomes, tables, progress)
    progress("layers", 0, 1)
    files = {
        "map": paths.layers / "map.gpkg",
        LAYER: write_table(paths.layers / f"{LAYER}.parquet", whole),
        FOOTPRINTS: write_table(paths.layers / f"{FOOTPRINTS}.parquet", ground),
    }
    write_geopackage(files["map"], {LAYER: whole, FOOTPRINTS: ground})
    images = [one.image for one in outcomes if one.state == MAPPED]
    mosaics, more = write_mosaics(lambda number: paths.layers / f"images-{number}.vrt", images)
    files |= {f"images_{number}": path for number, path in enumerate(mosaics)}
    title = cell.config.name
    written += [*files.values(), *write_catalog(paths.layers / "collection.json", title, title, entries, files)]
    _sweep(paths.layers, written)
    threshold = best_threshold(cell.config.map.model)
    progress("page", 0, 1)
    facts = _facts(cell, outcomes, whole, groups, [*notes, *more], threshold)
    write_overview(paths, facts)
    return {
        "inputs": inputs,
        "scenes": dict(Counter(one.state for one in outcomes)),
        "instances": len(whole),
        "joined": joined,
        "area_m2": float(np.nansum(whole[table.AREA])),
        "crs": whole.crs_wkt,
        "notes": [*notes, *more],
        "threshold": None if threshold is None else vars(threshold),
        "page": str(paths.report_page.relative_to(paths.root)),
        "files": [_told(path, paths.cell(cell.id)) for path in sorted({*written, paths.report_page})],
    }


def _group(need: str, paths: RunPaths) -> Group:
    """What the merge cell `need` left.

    Raises:
        RunError: its table is missing or damaged; the cell is made undone, so that the next start remakes it.
    """
    folder, record = paths.cell(need), valid_record(need, "merge", paths)
    scenes = read_cell(folder.config).scenes
    if record is None:
        failure = read_json(folder.failure)
        why = str(failure.get("error", "")) if isinstance(failure, dict) else "its merge has no record; see `status`"
        lost = [
            Outcome(one.scene.id, one.scene.site, one.scene.date, one.scene.image, one.ground, "failed", "failed", why)
            for one in scenes
        ]
        return Group(lost)
    states = record.results["scenes"]
    group = Group([_outcome(state) for state in states], notes=list(record.results["notes"]))
    if record.results["files"]:
        try:
            group.features = read_features(folder.instances)
        except RunError:
            folder.record.unlink(missing_ok=True)
            raise
    for number, state in enumerate(states):
        picture = folder.quicklook(number)
        if picture.is_file():
            group.looks[state["scene"]] = picture
    return group


def _outcome(state: Mapping[str, Any]) -> Outcome:
    """A scene as a merge's record tells of it."""
    ground = None if state["ground"] is None else Ground.model_validate(state["ground"])
    words = {key: str(state[key]) for key in ("scene", "site", "date", "image", "state", "reason", "detail")}
    return Outcome(ground=ground, valid_px=int(state["valid_px"]), **words)


def _sheet(outcomes: Sequence[Outcome], features: Features) -> Sheet:
    """A group's instances with the ground on which they would have been found."""
    grounds = [one.ground for one in outcomes if one.state == MAPPED and one.ground is not None]
    return Sheet(outcomes[0].date, shapely.union_all([outline_of(ground) for ground in grounds]), features)


def _nothing() -> Features:
    """The table of a map without instances."""
    words = (table.CLASS, table.SCENE, table.DATE, table.SITE, table.MODEL, table.CONTAINER)
    columns = {name: np.zeros(0, np.object_ if name in words else np.float64) for name in table.COLUMNS}
    return Features(LONLAT, np.zeros(0, np.object_), columns)


def _write_scenes(
    cell: Cell, paths: RunPaths, outcomes: Sequence[Outcome], tables: Sequence[Features], progress: Progress
) -> tuple[list[Path], list[Entry]]:
    """Layers of each mapped scene in its own CRS.

    Returns:
        The files, and the scenes as the catalog has them.
    """
    rows = {scene: (one, chosen) for one in tables for scene, chosen in one.rows_by(table.SCENE).items()}
    mapped = [outcome for outcome in outcomes if outcome.state == MAPPED and outcome.ground is not None]
    written, entries = list[Path](), list[Entry]()
    for number, outcome in enumerate(mapped):
        folder = paths.scene_layers(outcome.scene)
        assert outcome.ground is not None
        one, chosen = rows.get(outcome.scene, (None, None))
        own = one.take(chosen).ordered() if one is not None and chosen is not None else _nothing()
        own = own if len(own) else Features(outcome.ground.crs_wkt, own.geometry, own.columns)
        files = write_layer(folder, LAYER, own)
        if cell.config.map.scores:
            files["scores"] = folder / "scores.tif"
            write_scores(files["scores"], outcome.ground, own)
        facts = {"rtshpc:instances": len(own), "rtshpc:area_m2": float(np.nansum(own[table.AREA]))}
        entries.append(Entry(outcome, folder, files, {**facts, "rtshpc:model": cell.config.map.model_label}))
        written += files.values()
        progress("scenes", number + 1, len(mapped), outcome.scene)
    return written, entries


def _sweep(folder: Path, written: Sequence[Path]) -> None:
    """Delete what an earlier publication left and this one did not write."""
    kept = set(written)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def best_threshold(model: str) -> Threshold | None:
    """The threshold of the epoch that a trained cell's checkpoint is of; None where its run does not say."""
    folder = CellPaths(Path(model))
    record = read_record(folder.record) if folder.root.is_dir() else None
    if record is None:
        return None
    rows = [row for row in read_lines(folder.metrics) if row.get("kind") == "val"]
    for row in reversed(rows):
        if row.get("epoch") == record.results.get("best_epoch") and row.get("threshold") is not None:
            source = (
                f"{folder.metrics.parent.parent.name}/{folder.root.name}/{folder.metrics.name}, epoch {row['epoch']}"
            )
            return Threshold(float(row["threshold"]), float(row["f1"]), source)
    return None


def _facts(
    cell: Cell,
    outcomes: Sequence[Outcome],
    whole: Features,
    groups: Sequence[Group],
    notes: Sequence[str],
    threshold: Threshold | None,
) -> MapFacts:
    """What the page tells."""
    config, chip = cell.config.map, cell.config.data.chip
    overlap = config.overlap(chip.size_px)
    images = sorted({name for name in whole[table.CONTAINER] if name})
    return MapFacts(
        title=cell.config.name,
        setting=f"{config.model_label}, on chips of {chip.size_px} px that share {overlap} px with their neighbours.",
        outcomes=outcomes,
        slumps=whole,
        least=config.score_threshold,
        threshold=threshold,
        looks={scene: picture for group in groups for scene, picture in group.looks.items()},
        notes=notes,
        files=(
            "map_sites.csv",
            *(f"../layers/{name}" for name in ("map.gpkg", "slumps.parquet", "footprints.parquet", "collection.json")),
        ),
        origin=[
            ("Model", config.model_label),
            ("Weights, SHA-256", config.model_sha256),
            ("Image, SHA-256", ", ".join(images) or "none: it ran outside of an image"),
            ("Modalities", ", ".join(config.modalities)),
            ("Precision", config.precision),
            ("Least score", f"{config.score_threshold:g}"),
            ("Terrain model", config.dem or "none"),
        ],
    )


def _told(path: Path, folder: CellPaths) -> dict[str, Any]:
    """A file as a record has it, named from the cell's folder."""
    name = Path(os.path.relpath(path, folder.root))
    return {"file": name.as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
