"""Scenes and a trained detector -> what is to be done in the folder of a map run, and in which order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtshpc.core.cell import MAP_STAGES, Cell, digest
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.grid import finished
from rtshpc.core.load import read_run_config
from rtshpc.core.mapping.cells import map_cells
from rtshpc.core.mapping.ground import MapScene, Seen, folders_of, read_frozen, write_frozen
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_plan, read_record
from rtshpc.core.scenes import Scene, scene_fingerprints
from rtshpc.hpc.container import command
from rtshpc.launch.plan.scale import scale_plan
from rtshpc.launch.plan.sweep import Plan, borrowed, plan_in


@dataclass(frozen=True)
class MapPlan(Plan):
    """A map run.

    Attributes:
        scenes: what is mapped; frozen in the run folder when the plan is prepared.
    """

    scenes: tuple[MapScene, ...] = ()

    @property
    def todo(self) -> list[Cell]:
        """Cells that are missing, in stage order, and with every block all that is made of it."""
        lacking: dict[str, Cell] = {}
        for cell in self.cells:
            chosen = self.only is None or cell.id in self.only or cell.stage != "map"
            if (cell.id not in self.done and chosen) or not lacking.keys().isdisjoint(cell.needs):
                lacking[cell.id] = cell
        return list(lacking.values())

    def remember(self) -> None:
        """Freeze the scenes, and keep the hashes of their files."""
        write_frozen(self.paths.frozen, self.scenes)
        scene_fingerprints(self.config.data, [one.scene for one in self.scenes], self.paths.fingerprints)

    def not_mapped(self) -> list[str]:
        """The scenes that the merges left out, and why, a line each."""
        merges = [read_record(self.paths.cell(cell.id).record) for cell in self.cells if cell.stage == "merge"]
        scenes: list[dict[str, Any]] = [
            one for record in merges if record is not None for one in record.results["scenes"]
        ]
        lost = [one for one in scenes if one["state"] != "mapped"]
        return sorted(f"{one['state']}: {one['scene']}: {one['reason']}: {one['detail']}" for one in lost)

    def refuse_other_data(self) -> None:
        """Raise RunError where the folder holds a sweep, or was mapped with other weights."""
        if read_plan(self.paths.plan) is None:
            return
        try:
            before = read_run_config(self.paths.config)[0].map
        except ConfigError:
            return
        way_out = "give another --out"
        if not before.model:
            raise RunError(f"{self.paths.root}: is the folder of a sweep; {way_out}")
        if before.model_sha256 != self.config.map.model_sha256:
            raise RunError(f"{self.paths.root}: was mapped with {before.model_label}, of other weights; {way_out}")


def map_plan(config: RunConfig, paths: RunPaths, scenes: Sequence[MapScene] | None = None) -> MapPlan:
    """Plan a map run; reads, and writes nothing.

    Args:
        config: with `map.model`.
        paths: the run's folder.
        scenes: what to map; None = what the run was submitted with.

    Raises:
        RunError: the scenes are not known.
        MissingExtra: the library of `model.engine` is missing where stages run in this environment.
    """
    found = read_frozen(paths.frozen) if scenes is None else list(scenes)
    if not found:
        raise RunError(
            f"{paths.frozen}: does not say which scenes to map; run `launch map` again, it goes on where it was"
        )
    cells = map_cells(config, found)
    records = {cell.id: finished(cell, paths) for cell in cells}
    done = {name: record for name, record in records.items() if record is not None}
    if not config.site.image and any(cell.stage == "map" and cell.id not in done for cell in cells):
        config.model.require_engine()
    return MapPlan(
        config=config,
        paths=paths,
        fingerprint=digest([scene.fingerprint for scene in found], 64),
        cells=tuple(cells),
        done=done,
        stages=MAP_STAGES,
        changed=_changed(config, cells, paths),
        scenes=tuple(found),
    )


def plan_again(config: RunConfig, paths: RunPaths, until: str | None = None) -> Plan:
    """The plan of a run that is there: of a sweep, a scaling study, or a map run with the scenes it was submitted with."""
    if until == "scale":
        return scale_plan(config, paths)
    return map_plan(config, paths) if config.map.model else plan_in(config, paths, until)


def _changed(config: RunConfig, cells: Sequence[Cell], paths: RunPaths) -> bool:
    listed = read_plan(paths.plan)
    try:
        before, _ = read_run_config(paths.config)
    except ConfigError:
        return True
    same = listed is not None and {str(row["id"]) for row in listed["cells"]} == {cell.id for cell in cells}
    return not same or before.model_copy(update={"site": config.site}) != config


def look_at(scenes: Sequence[Scene], config: RunConfig, paths: RunPaths) -> list[MapScene]:
    """Scenes with what their headers say: the tool `survey` is asked, in this environment or in the site's image.

    Args:
        scenes: by id.
        config: the run's.
        paths: the run's folder; hashes of files found before are taken from there.

    Raises:
        RunError: the tool failed, in its own words.
    """
    asked = {
        "data": config.data.model_dump(mode="json"),
        "map": config.map.model_dump(mode="json"),
        "scenes": [scene.model_dump(mode="json") for scene in scenes],
    }
    folders = [Path.cwd(), Path(config.data.root), *folders_of(scenes)]
    line = command(config.site, ["-m", "rtshpc.stages", "survey"], folders, sys.executable)
    answer = subprocess.run(line, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise RunError(f"the headers of the scenes could not be read (exit code {answer.returncode}), see above")
    seen: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    with borrowed(paths.fingerprints) as cache:
        prints = scene_fingerprints(config.data, scenes, cache)
    return [
        MapScene(scene=scene, fingerprint=fingerprint, **dict(Seen.model_validate(facts)))
        for scene, fingerprint, facts in zip(scenes, prints, seen, strict=True)
    ]
