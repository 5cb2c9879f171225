"""A sweep's config -> what is to be done in its run folder, and in which order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtshpc.core.cell import STAGES, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.errors import RtshpcError, unknown
from rtshpc.core.grid import cells, finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record
from rtshpc.core.scenes import data_fingerprint, list_scenes


@dataclass(frozen=True)
class Plan:
    """Ordered stage arrays of one run.

    Attributes:
        config: the resolved sweep.
        paths: the run's folder.
        fingerprint: of the input data.
        cells: every cell of the sweep, in stage order.
        done: id -> record of the cells that are done.
        stages: stages asked for (`--until`), in order.
    """

    config: RunConfig
    paths: RunPaths
    fingerprint: str
    cells: tuple[Cell, ...]
    done: Mapping[str, Record]
    stages: tuple[str, ...]

    @property
    def gather(self) -> Cell:
        """The cell whose id says which data the run's shards hold."""
        return next(cell for cell in self.cells if cell.stage == "gather")

    @property
    def todo(self) -> list[Cell]:
        """Cells that are missing, in stage order.

        Preprocess tasks are of no use once their shards are gathered; the summary is made anew
        whenever something else was.
        """
        wanted = [cell for cell in self.cells if cell.stage in self.stages and cell.id not in self.done]
        if self.gather.id in self.done:
            wanted = [cell for cell in wanted if cell.stage != "preprocess"]
        summaries = [cell for cell in wanted if cell.stage == "summarise"]
        if len(wanted) == len(summaries) and self.paths.report_page.is_file():
            return []
        return wanted

    def describe(self) -> dict[str, Any]:
        """The plan as JSON: what plan.json holds and `plan --json` prints."""
        todo = {cell.id for cell in self.todo}
        listed: list[dict[str, Any]] = [
            {
                "id": cell.id,
                "stage": cell.stage,
                "label": cell.label,
                "task": cell.task,
                "needs": list(cell.needs),
                "modalities": list(cell.modalities),
                "arm": cell.arm,
                "varied": cell.varied,
                "done": cell.id in self.done,
                "todo": cell.id in todo,
            }
            for cell in self.cells
            if cell.stage in self.stages
        ]
        counts = [
            {
                "stage": stage,
                "cells": sum(cell.stage == stage for cell in self.cells),
                "done": sum(cell.stage == stage and cell.id in self.done for cell in self.cells),
                "todo": sum(cell.stage == stage and cell.id in todo for cell in self.cells),
            }
            for stage in self.stages
        ]
        return {
            "run": self.config.name,
            "path": str(self.paths.root),
            "site": self.config.site.name,
            "executor": self.config.site.executor,
            "data": self.config.data.name,
            "data_fingerprint": self.fingerprint,
            "gather": self.gather.id,
            "stages": counts,
            "cells": listed,
        }


def make_plan(config: RunConfig, runs: Path, until: str | None = None) -> Plan:
    """Plan a sweep in `runs/<name>`; reads, and writes nothing.

    Args:
        config: the resolved sweep.
        runs: folder of runs.
        until: last stage; None = all. The shards of preprocess are gathered with it.

    Raises:
        RtshpcError: the data cannot be listed, or there is no such stage.
    """
    return plan_in(config, RunPaths(runs / config.name), until)


def plan_in(config: RunConfig, paths: RunPaths, until: str | None = None) -> Plan:
    """As `make_plan`, for a run folder of any name."""
    fingerprint = fingerprint_of(config, paths)
    found = cells(config, fingerprint)
    records = {cell.id: finished(cell, paths) for cell in found}
    done = {name: record for name, record in records.items() if record is not None}
    return Plan(config, paths, fingerprint, tuple(found), done, stages_until(until))


def stages_until(until: str | None) -> tuple[str, ...]:
    """The stages up to and with `until`; preprocess takes gather along, which makes its index."""
    if until is None:
        return STAGES
    if until not in STAGES:
        raise RtshpcError(unknown("--until", until, STAGES))
    last = "gather" if until == "preprocess" else until
    return STAGES[: STAGES.index(last) + 1]


def fingerprint_of(config: RunConfig, paths: RunPaths, remember: bool = False) -> str:
    """Fingerprint of the inputs; hashes found before are used, new ones kept only with `remember`."""
    scenes = list_scenes(config.data, paths.scenes)
    if remember:
        return data_fingerprint(config.data, scenes, paths.fingerprints)
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / paths.fingerprints.name
        if paths.fingerprints.is_file():
            shutil.copyfile(paths.fingerprints, cache)
        return data_fingerprint(config.data, scenes, cache)
