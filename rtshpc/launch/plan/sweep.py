"""A sweep's config -> what is to be done in its run folder, and in which order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtshpc.core.cell import SWEEP_STAGES, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.config.run import NO_FILE
from rtshpc.core.errors import ConfigError, RtshpcError, unknown
from rtshpc.core.features import cell_bytes, chips_to_cache, left_bytes
from rtshpc.core.grid import cells, finished
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_plan
from rtshpc.core.scenes import data_fingerprint, list_scenes, weights_sha256
from rtshpc.core.sizing.predict import GUARDED, STAGE as PREDICT


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
        changed: the run folder was last left by another config (the site apart) or by a plan of other cells.
        only: ids of the cells that may be done now; None = any.
    """

    config: RunConfig
    paths: RunPaths
    fingerprint: str
    cells: tuple[Cell, ...]
    done: Mapping[str, Record]
    stages: tuple[str, ...]
    changed: bool = False
    only: frozenset[str] | None = None

    @property
    def gather(self) -> Cell:
        """The cell whose id says which data the run's shards hold."""
        return next(cell for cell in self.cells if cell.stage == "gather")

    @property
    def measured(self) -> list[Cell]:
        """The cells that measure memory and time."""
        return [cell for cell in self.cells if cell.stage == "measure"]

    @property
    def todo(self) -> list[Cell]:
        """Cells that are missing, in stage order.

        Preprocess tasks are of no use once their shards are gathered, nor stored scales once all that trains on
        them is done, nor a prediction when nothing that it is about is left; the summary is made anew whenever something else was, or the sweep is not what it was.
        """
        wanted = [cell for cell in self.cells if cell.stage in self.stages and cell.id not in self.done]
        if self.gather.id in self.done:
            wanted = [cell for cell in wanted if cell.stage != "preprocess"]
        used = {need for cell in wanted if cell.stage == "finetune" for need in cell.needs}
        last = self.stages[-1] == "features"
        wanted = [cell for cell in wanted if cell.stage != "features" or last or cell.id in used]
        if not any(cell.stage in GUARDED for cell in wanted):
            wanted = [cell for cell in wanted if cell.stage != PREDICT]
        summaries = [cell for cell in wanted if cell.stage == "summarise"]
        if len(wanted) == len(summaries) and self.paths.report_page.is_file() and not self.changed:
            return []
        return [cell for cell in wanted if self.only is None or cell.id in self.only]

    def beside(self, queued: Mapping[str, str]) -> list[Cell]:
        """What is to do where Slurm has some of it already: id -> job of those."""
        return self.todo

    def features(self) -> dict[str, Any] | None:
        """Disk that stored scales take, in all and yet to be written; None where nothing is cached."""
        stored = [cell for cell in self.cells if cell.stage == "features"]
        if not stored:
            return None
        todo = {cell.id for cell in self.todo}
        chips = chips_to_cache(self.config.data, self.paths, self.gather.id in self.done)
        root = next(folder for folder in (self.paths.root, *self.paths.root.absolute().parents) if folder.is_dir())
        return {
            "chips": {"train": chips.train, "val": chips.val},
            "exact": chips.exact,
            "bytes": sum(cell_bytes(cell, chips) for cell in stored),
            "left_bytes": sum(left_bytes(cell, self.paths, chips) for cell in stored if cell.id in todo),
            "free_bytes": shutil.disk_usage(root).free,
        }

    def remember(self) -> None:
        """Keep the hashes of input files, which take long to find."""
        fingerprint_of(self.config, self.paths, remember=True)
        with_known_start(self.config, self.paths, remember=True)

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
            if any(cell.stage == stage for cell in self.cells)
        ]
        return {
            "run": self.config.name,
            "path": str(self.paths.root),
            "site": self.config.site.name,
            "executor": self.config.site.executor,
            "data": self.config.data.name,
            "data_fingerprint": self.fingerprint,
            "gather": next((cell.id for cell in self.cells if cell.stage == "gather"), None),
            "features": self.features(),
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
        RtshpcError: the data cannot be listed, there is no such stage, `pretrain.init` is no file or another one, or
            the library of `model.engine` is missing where stages run in this environment.
    """
    return plan_in(config, RunPaths(runs / config.name), until)


def measure_plan(config: RunConfig, runs: Path) -> Plan:
    """As `make_plan`, of which the measure cells alone may be done: what they measure needs no data and no training.

    Raises:
        RtshpcError: see `make_plan`.
    """
    plan = make_plan(config, runs)
    return replace(plan, only=frozenset(cell.id for cell in plan.measured))


def plan_in(config: RunConfig, paths: RunPaths, until: str | None = None) -> Plan:
    """As `make_plan`, for a run folder of any name.

    Raises:
        RtshpcError: see `make_plan`; or it is the config of a map run.
    """
    if config.map.model:
        raise ConfigError("map.model is given: this is the config of a map run, which `map` and `retry` work on")
    fingerprint = fingerprint_of(config, paths)
    config = with_known_start(config, paths)
    found = cells(config, fingerprint)
    records = {cell.id: finished(cell, paths) for cell in found}
    done = {name: record for name, record in records.items() if record is not None}
    stages = stages_until(until)
    plan = Plan(config, paths, fingerprint, tuple(found), done, stages, differs(config, found, stages, paths))
    if any(cell.stage == "pretrain" for cell in plan.todo):
        _refuse_lost_start(config)
    if not config.site.image:
        for cell in plan.todo:
            if cell.modalities:
                cell.config.model.require_engine()
    return plan


def differs(config: RunConfig, found: Sequence[Cell], stages: Sequence[str], paths: RunPaths) -> bool:
    """Whether config.yaml or plan.json of the run folder say something else; cells of later stages do not count."""
    try:
        before, _ = read_run_config(paths.config)
    except ConfigError:
        return True
    listed = read_plan(paths.plan)
    if listed is None or before.model_copy(update={"site": config.site}) != config:
        return True
    # A prediction is the site's, which is no part of what a run is.
    counted = set(stages) - {PREDICT}
    rows = {row["id"] for row in listed["cells"] if row["stage"] in counted}
    return rows != {cell.id for cell in found if cell.stage in counted}


def with_known_start(config: RunConfig, paths: RunPaths, remember: bool = False) -> RunConfig:
    """The config with the SHA-256 of `pretrain.init` in place; hashes are kept only with `remember`.

    A file that is gone is no matter where its hash is known (a run's own config) and nothing trains from it any more.

    Raises:
        ConfigError: no such file, or not the one that `pretrain.init_sha256` asks for.
    """
    start = config.pretrain
    if start.init == NO_FILE:
        return config
    if not start.init_sha256:
        _refuse_lost_start(config)
    elif not Path(start.init).is_file():
        return config
    try:
        found = weights_sha256(Path(start.init), paths.weight_hashes, remember)
    except OSError as error:
        raise ConfigError(f'pretrain.init = "{start.init}" cannot be read: {error.strerror}') from None
    if start.init_sha256 not in ("", found):
        asked = f"pretrain.init_sha256 asks for {start.init_sha256[:12]}"
        raise ConfigError(f'pretrain.init = "{start.init}" has SHA-256 {found[:12]}, but {asked}')
    return config.model_copy(update={"pretrain": start.model_copy(update={"init_sha256": found})})


def _refuse_lost_start(config: RunConfig) -> None:
    """Raise ConfigError where pretraining would start from a file that is not there."""
    start = config.pretrain.init
    if start != NO_FILE and not Path(start).is_file():
        raise ConfigError(f'pretrain.init = "{start}": no such file; it is relative to the current folder')


def stages_until(until: str | None) -> tuple[str, ...]:
    """The stages up to and with `until`; preprocess takes gather along, which makes its index."""
    if until is None:
        return SWEEP_STAGES
    if until not in SWEEP_STAGES:
        raise RtshpcError(unknown("--until", until, SWEEP_STAGES))
    last = "gather" if until == "preprocess" else until
    return SWEEP_STAGES[: SWEEP_STAGES.index(last) + 1]


def fingerprint_of(config: RunConfig, paths: RunPaths, remember: bool = False) -> str:
    """Fingerprint of the inputs; hashes found before are used, new ones kept only with `remember`."""
    scenes = list_scenes(config.data, paths.scenes)
    if remember:
        return data_fingerprint(config.data, scenes, paths.fingerprints)
    with borrowed(paths.fingerprints) as cache:
        return data_fingerprint(config.data, scenes, cache)


@contextmanager
def borrowed(cache: Path) -> Generator[Path]:
    """A copy of a file of hashes, which may be changed and is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / cache.name
        if cache.is_file():
            shutil.copyfile(cache, copy)
        yield copy
