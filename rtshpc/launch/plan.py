"""A sweep's config -> what is to be done in its run folder, and in which order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtshpc.core.cell import STAGES, Cell
from rtshpc.core.config import RunConfig
from rtshpc.core.config.run import NO_FILE
from rtshpc.core.errors import ConfigError, RtshpcError, unknown
from rtshpc.core.features import cell_bytes, chips_to_cache, left_bytes
from rtshpc.core.grid import cells, finished
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_plan
from rtshpc.core.scenes import data_fingerprint, list_scenes, weights_sha256


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
    def todo(self) -> list[Cell]:
        """Cells that are missing, in stage order.

        Preprocess tasks are of no use once their shards are gathered, nor stored scales once all that trains on
        them is done; the summary is made anew whenever something else was, or the sweep is not what it was.
        """
        wanted = [cell for cell in self.cells if cell.stage in self.stages and cell.id not in self.done]
        if self.gather.id in self.done:
            wanted = [cell for cell in wanted if cell.stage != "preprocess"]
        used = {need for cell in wanted if cell.stage == "finetune" for need in cell.needs}
        last = self.stages[-1] == "features"
        wanted = [cell for cell in wanted if cell.stage != "features" or last or cell.id in used]
        summaries = [cell for cell in wanted if cell.stage == "summarise"]
        if len(wanted) == len(summaries) and self.paths.report_page.is_file() and not self.changed:
            return []
        return [cell for cell in wanted if self.only is None or cell.id in self.only]

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
            "gather": self.gather.id,
            "features": self.features(),
            "stages": counts,
            "cells": listed,
        }


Link = tuple[int | str, int | None]
"""What a job waits for: an array of the same plan by number, or a job by Slurm's; and its element, None = all of it."""


@dataclass(frozen=True)
class Array:
    """Cells of one stage that are submitted together and wait for the same.

    Attributes:
        number: place in the order of submission.
        stage: of all its cells.
        cells: element i is the i-th.
        rule: Slurm's word for what it waits for: afterok (all went well), aftercorr (element i waits for element i),
            afterany (all are over); empty where it waits for nothing.
        after: what it waits for.
    """

    number: int
    stage: str
    cells: tuple[Cell, ...]
    rule: str
    after: tuple[Link, ...]

    def dependency(self, jobs: Mapping[int, str]) -> str:
        """As sbatch spells it; `jobs` are the numbers that Slurm gave to the arrays before this one."""
        spelled = [
            (jobs[job] if isinstance(job, int) else job) + ("" if element is None else f"_{element}")
            for job, element in self.after
        ]
        return ":".join([self.rule, *dict.fromkeys(spelled)]) if spelled else ""


def arrays(todo: Sequence[Cell], queued: Mapping[str, str], most: int) -> list[Array]:
    """Cells to do -> the arrays to submit, in order.

    Cells that build on the same cells are one array, and wait for those elements only: a cell starts as soon as its
    own backbones are there, and a failed one takes none along that does not build on it. What is one to one (the
    evaluations of trained cells) waits element by element. The index and the summary wait for the end of what they
    read, however it ended: both say what is missing.

    Args:
        todo: cells to do, in stage order.
        queued: id -> Slurm's job (`12` or `12_3`) of those that Slurm has already.
        most: elements of an array.
    """
    return _Arranger(todo, queued, most).arrays


class _Arranger:
    def __init__(self, todo: Sequence[Cell], queued: Mapping[str, str], most: int) -> None:
        self.arrays: list[Array] = []
        self._most = most
        self._pending = {cell.id: cell for cell in todo}
        self._place: dict[str, Link] = {name: _job_link(job) for name, job in queued.items()}
        self._above: dict[str, set[str]] = {}
        # First in their arrays, so that the elements of the evaluations' array are numbered as these.
        self._scored = {need for cell in todo if cell.stage == "evaluate" for need in cell.needs}
        for cell in todo:
            self._above[cell.id] = {name for need in self._needs(cell) for name in (need, *self._above[need])}
        for stage in STAGES:
            cells = [cell for cell in todo if cell.stage == stage and cell.id not in queued]
            if stage == "summarise":
                # One that is queued already does not know of what is submitted now: another comes after it.
                cells = [cell for cell in todo if cell.stage == stage] if self.arrays else cells
                everything = [(array.number, None) for array in self.arrays]
                before = [(_job_link(job)[0], None) for job in queued.values()]
                self._add(cells, "afterany", [*everything, *before])
            elif stage == "gather":
                whole = [(self._place[need][0], None) for cell in cells for need in self._needs(cell)]
                self._add(cells, "afterany", whole)
            else:
                self._add_groups(cells)

    def _needs(self, cell: Cell) -> list[str]:
        return [need for need in cell.needs if need in self._pending]

    def _links(self, cell: Cell) -> list[Link]:
        """What the cell must wait for itself: a need that another one waits for is met with that."""
        needs = self._needs(cell)
        met = {name for need in needs for name in self._above[need]}
        return [self._place[need] for need in needs if need not in met]

    def _add_groups(self, cells: Sequence[Cell]) -> None:
        paired: dict[int | str, list[tuple[int, Cell]]] = {}
        groups: dict[tuple[Link, ...], list[Cell]] = {}
        for cell in cells:
            links = self._links(cell)
            groups.setdefault(tuple(sorted(links, key=str)), []).append(cell)
            if len(links) == 1 and links[0][1] is not None:
                paired.setdefault(links[0][0], []).append((links[0][1], cell))
        for job, found in paired.items():
            found.sort(key=lambda one: one[0])
            if len(found) > 1 and [element for element, _ in found] == list(range(len(found))):
                for element, _ in found:
                    del groups[(job, element),]
                self._add([cell for _, cell in found], "aftercorr", [(job, None)])
        for links, members in groups.items():
            self._add(sorted(members, key=lambda cell: cell.id not in self._scored), "afterok", links)

    def _add(self, cells: Sequence[Cell], rule: str, after: Sequence[Link]) -> None:
        for first in range(0, len(cells), self._most):
            part, number = tuple(cells[first : first + self._most]), len(self.arrays)
            links = tuple(dict.fromkeys(after))
            self.arrays.append(Array(number, part[0].stage, part, rule if links else "", links))
            for element, cell in enumerate(part):
                self._place[cell.id] = (number, element if len(part) > 1 else None)


def _job_link(job: str) -> Link:
    base, _, element = job.partition("_")
    return base, int(element) if element else None


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


def plan_in(config: RunConfig, paths: RunPaths, until: str | None = None) -> Plan:
    """As `make_plan`, for a run folder of any name."""
    fingerprint = fingerprint_of(config, paths)
    config = with_known_start(config, paths)
    found = cells(config, fingerprint)
    records = {cell.id: finished(cell, paths) for cell in found}
    done = {name: record for name, record in records.items() if record is not None}
    stages = stages_until(until)
    plan = Plan(config, paths, fingerprint, tuple(found), done, stages, _changed(config, found, stages, paths))
    if any(cell.stage == "pretrain" for cell in plan.todo):
        _refuse_lost_start(config)
    if not config.site.image:
        for cell in plan.todo:
            if cell.modalities:
                cell.config.model.require_engine()
    return plan


def _changed(config: RunConfig, found: Sequence[Cell], stages: Sequence[str], paths: RunPaths) -> bool:
    """Whether config.yaml or plan.json of the run folder say something else; cells of later stages do not count."""
    try:
        before, _ = read_run_config(paths.config)
    except ConfigError:
        return True
    listed = read_plan(paths.plan)
    if listed is None or before.model_copy(update={"site": config.site}) != config:
        return True
    rows = {row["id"] for row in listed["cells"] if row["stage"] in stages}
    return rows != {cell.id for cell in found if cell.stage in stages}


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
