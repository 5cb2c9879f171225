"""Reads all that an allocation report may tell of its runs, and says of every figure which job it came from."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.errors import ConfigError, RunError
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines, read_plan
from rtshpc.core.sizing.measured import FAKE
from rtshpc.core.sizing.request import AllocationRequest, Programme
from rtshpc.core.sizing.scaling import ScalePoint, ScaleRow, is_measurement, scale_points, scale_rows
from rtshpc.hpc import books
from rtshpc.report.collect import TORN, CellResult, RunRecords, collect, dig
from rtshpc.report.entries import Entry, Table

REFUSED = "refused:"
"""How the reason of a result begins that no report may use."""

NO_USAGE = "the run has no usage.json: its attempts are not over, or were never summed up (`launch usage RUN`)"

SHOWN_JOBS = 3
"""Jobs that a row names; the others stand in the table of jobs."""

Told = TypeVar("Told")

_CELL = re.compile(r"^(?P<run>.*)/cells/(?P<cell>\w+)/record\.json")
_USED = re.compile(r"^(?P<run>.*)/usage\.json#cells\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class Job:
    """What did the work of a cell.

    Attributes:
        number: Slurm's, or that of a process here.
        host: its (first) node.
        attempts: attempts in all.
    """

    number: str
    host: str
    attempts: int


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: of the folder, told apart from the others.
        provenance: commit, data fingerprint and image that its config.yaml names.
        records: without those that a report refuses.
        refused: (record, why).
        points: of its scaling studies; their sources begin with the run's name.
        jobs: cell id -> its job.
        usage: usage.json; None where it is not there, or is not what `launch usage` writes.
        scripts: (file, text) of every batch script.
        undone: (cells without a record, cells) of its plan.
    """

    name: str
    paths: RunPaths
    config: RunConfig
    provenance: Mapping[str, Any]
    records: RunRecords
    refused: tuple[tuple[str, str], ...]
    points: tuple[ScalePoint, ...]
    jobs: Mapping[str, Job]
    usage: Mapping[str, Any] | None
    scripts: tuple[tuple[str, str], ...]
    undone: tuple[int, int] = (0, 0)

    def used(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(source, what usage.json tells) of every cell that was tried."""
        for number, facts in enumerate((self.usage or {}).get("cells", ())):
            yield f"{self.name}/usage.json#cells.{number}", facts


@dataclass(frozen=True)
class Evidence:
    """All runs, and what is asked on their grounds.

    Attributes:
        site: the one that is asked: its GPUs and its prices.
        copies: (records, why they are not used) of runs that hold nothing else than others do.
    """

    runs: tuple[Run, ...]
    request: AllocationRequest
    programme: Programme
    site: SiteConfig
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """(record or file, why) of all that is not used."""
        return (*(row for run in self.runs for row in run.refused), *self.copies)

    def of(self, *stages: str) -> tuple[CellResult, ...]:
        """Cells of these stages, of all runs."""
        return tuple(result for run in self.runs for result in run.records.of(*stages))

    def done(self, *stages: str) -> tuple[CellResult, ...]:
        """Those of them that have a record."""
        return tuple(result for result in self.of(*stages) if result.record)

    @property
    def records(self) -> RunRecords:
        """Cells of all runs as one run's: for tables that look at each cell by itself."""
        return RunRecords(tuple(cell for run in self.runs for cell in run.records.cells), (), None, None)

    @property
    def rows(self) -> list[ScaleRow]:
        """Scaling studies of all runs, repeats put together."""
        return scale_rows(point for run in self.runs for point in run.points)

    def job(self, source: str) -> tuple[str, str] | None:
        """(run, job) of what a source names, the job by its number or else its cell; None where it names no cell's file."""
        by_name = {run.name: run for run in self.runs}
        cell = _CELL.match(source) or _USED.match(source)
        if cell is None or cell["run"] not in by_name:
            return None
        run, named = by_name[cell["run"]], cell.groupdict()
        identity = named.get("cell") or str((run.usage or {})["cells"][int(named["number"])]["id"])
        job = run.jobs.get(identity)
        return run.name, job.number if job else f"cell {identity}"

    def traced(self, table: Table) -> Table:
        """`table` with a last column that names the jobs its rows came from."""
        rows = tuple((*row, self._jobs(row)) for row in table.rows)
        return dataclasses.replace(table, columns=(*table.columns, "Jobs"), rows=rows)

    def _jobs(self, row: Iterable[Entry]) -> Entry:
        sources = list(dict.fromkeys(part for entry in row for part in entry.source.split(" | ") if part))
        jobs: dict[str, list[str]] = {}
        for run, job in sorted({job for source in sources if (job := self.job(source))}, key=_natural):
            jobs.setdefault(run, []).append(job)
        told = [f"{run} {_some(own)}" if len(self.runs) > 1 else _some(own) for run, own in jobs.items()]
        return Entry("; ".join(told) or "–", "code", " | ".join(sources))


def _natural(job: tuple[str, str]) -> list[tuple[int, str]]:
    """Order of people: job 9 comes before job 10."""
    return [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", " ".join(job))]


def _some(jobs: Sequence[str]) -> str:
    more = f" and {len(jobs) - SHOWN_JOBS} more" if len(jobs) > SHOWN_JOBS else ""
    return ", ".join(jobs[:SHOWN_JOBS]) + more


def read_evidence(
    folders: Sequence[Path], request: AllocationRequest, programme: Programme, site: SiteConfig | None
) -> Evidence:
    """Read every run; nothing is written.

    Args:
        folders: of the runs.
        request: what is asked for.
        programme: who is asked.
        site: where; None = where the first run ran.

    Raises:
        ConfigError: a run's config cannot be read, or the request names a run that is not given.
    """
    runs, copies = _each_once([_read_run(name, folder) for name, folder in _names(folders).items()])
    known = [run.name for run in runs]
    items = tuple(item.model_copy(update={"run": _plain(item.run)}) for item in request.items)
    for number, item in enumerate(items):
        if item.run and item.run not in known:
            raise ConfigError(f'items.{number}.run = "{item.run}" is not given. Given: {", ".join(known)}.')
    asked = request.model_copy(update={"items": items})
    return Evidence(runs, asked, programme, site or runs[0].config.site, copies)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder under its name, with as much of its path before it as tells it from the others."""
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    for depth in range(1, max(len(folder.parts) for folder in whole)):
        names = [_plain("/".join(folder.parts[-depth:])) for folder in whole]
        if len(set(names)) == len(names):
            return dict(zip(names, whole, strict=True))
    return {f"{_plain(str(folder))} ({number})": folder for number, folder in enumerate(whole, 1)}


def _plain(name: str) -> str:
    """A folder's name as one line of text without the bar that parts the sources of a figure."""
    text = os.fsencode(name).decode("utf-8", errors="replace").replace("|", "¦")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _read_run(name: str, folder: Path) -> Run:
    paths = RunPaths(folder)
    config, provenance = read_run_config(paths.config)
    found = collect(paths, run=name)
    reading = _Reading(name, paths)
    points = reading(lambda: scale_points(paths)) or []
    return Run(
        name=name,
        paths=paths,
        config=config,
        provenance=provenance,
        records=found,
        points=tuple(_of_run(name, one) for one in points if one.device != FAKE),
        jobs=reading(lambda: _jobs(paths, found)) or {},
        usage=reading(lambda: _usage(paths.usage)),
        scripts=tuple(filter(None, (reading(partial(_script, paths, file)) for file in _script_files(paths)))),
        undone=_undone(reading(lambda: read_plan(paths.plan)), found),
        # Last: by now it is known what could not be read.
        refused=tuple(sorted({*_refused(name, found), *_of_fakes(name, points), *reading.spoilt})),
    )


class _Reading:
    """Reads files of a run: one that cannot be read is named, and the report goes on without it."""

    def __init__(self, run: str, paths: RunPaths) -> None:
        self._run, self._paths = run, paths
        self.spoilt: list[tuple[str, str]] = []

    def __call__(self, read: Callable[[], Told]) -> Told | None:
        """What `read` gives; None where it raises RunError `FILE: why`."""
        try:
            return read()
        except RunError as error:
            file, _, why = str(error).removeprefix(f"{self._paths.root}/").partition(": ")
            self.spoilt.append((f"{self._run}/{file}", f"{REFUSED} it {why}"))
            return None


def _refused(name: str, found: RunRecords) -> Iterator[tuple[str, str]]:
    """Records that no report may use, and cells that cannot be told."""
    for result in found.cells:
        if result.reason.startswith((REFUSED, TORN)):
            yield result.source, result.reason
        elif result.cell.stage == "scale" and result.record and not is_measurement(result.record):
            yield result.source, f"{REFUSED} it holds no measurement"
    yield from ((f"{name}/cells/{folder}", f"{REFUSED} {why}") for folder, why in found.unreadable)


def _of_fakes(name: str, points: Iterable[ScalePoint]) -> Iterator[tuple[str, str]]:
    return ((f"{name}/{one.sources[0]}", f"{REFUSED} device = {FAKE}") for one in points if one.device == FAKE)


def _undone(plan: Mapping[str, Any] | None, found: RunRecords) -> tuple[int, int]:
    """(cells without a record, cells) of the plan; what a finished run may do without is not counted."""
    optional = {"predict", "features", "summarise", *(("preprocess",) if found.gather else ())}
    rows: list[Any] = plan["cells"] if plan else [vars(result.cell) for result in found.cells]
    planned = [str(row["id"]) for row in rows if row["stage"] not in optional]
    done = {result.cell.id for result in found.done}
    return sum(name not in done for name in planned), len(planned)


def _each_once(runs: Sequence[Run]) -> tuple[tuple[Run, ...], tuple[tuple[str, str], ...]]:
    """Runs without what an earlier one holds too, and which run holds nothing else: a copy of a run is no repeat of it."""
    owners: dict[str, str] = {}
    kept: list[Run] = []
    copies: list[tuple[str, str]] = []
    for run in runs:
        content = {result.cell.id: result.record.model_dump_json() for result in run.records.done if result.record}
        copied = {name: owners[text] for name, text in content.items() if text in owners}
        owners |= {text: run.name for text in content.values() if text not in owners}
        others = ", ".join(sorted(set(copied.values())))
        told = (
            f"{run.name}/cells",
            f"{REFUSED} {len(copied)} of its {len(content)} records are copies of those of {others}",
        )
        if not copied:
            kept.append(run)
        elif len(copied) == len(content):
            copies.append(told)
        else:
            kept.append(dataclasses.replace(_without(run, copied), refused=(*run.refused, told)))
    return tuple(kept), tuple(copies)


def _without(run: Run, cells: Iterable[str]) -> Run:
    gone = set(cells)
    files = {f"{run.name}/cells/{name}/record.json" for name in gone}
    left = tuple(result for result in run.records.cells if result.cell.id not in gone)
    return dataclasses.replace(
        run,
        records=dataclasses.replace(run.records, cells=left),
        points=tuple(point for point in run.points if not files & set(point.sources)),
        jobs={name: job for name, job in run.jobs.items() if name not in gone},
    )


def _of_run(run: str, point: ScalePoint) -> ScalePoint:
    return point.model_copy(update={"sources": tuple(f"{run}/{source}" for source in point.sources)})


def _jobs(paths: RunPaths, records: RunRecords) -> dict[str, Job]:
    """By the tasks' own notes where they ran under Slurm, else by the ledger."""
    ledger = {str(row.get("cell")): row for row in read_lines(paths.ledger)}
    found: dict[str, Job] = {}
    for result in records.cells:
        attempts, row = books.attempts(result.paths), ledger.get(result.cell.id)
        told = str(result.get("job") or "") or (attempts[-1].job if attempts else "")
        here = f"{row.get('executor')} {row.get('job')}" if row else ""
        if told or here:
            host = (
                attempts[-1].host if attempts else str(result.record.environment.get("host")) if result.record else ""
            )
            found[result.cell.id] = Job(told or here, host, max(1, len(attempts)))
    return found


def _usage(file: Path) -> Mapping[str, Any] | None:
    """What usage.json holds; None where there is none. Raises RunError where it is not what `launch usage` writes."""
    told: Any = read_json(file)
    if told is None and not file.exists():
        return None
    sums: Any = dig(told, "reconciled") or {}
    rows: list[Any] = [dig(told, "cells"), sums.get("attempts") or []] if isinstance(sums, dict) else [None]
    if all(isinstance(each, list) and all(isinstance(row, dict) for row in each) for each in rows):
        return told
    raise RunError(f"{file}: is not what `launch usage` writes")


def _script_files(paths: RunPaths) -> list[Path]:
    """Batch scripts as Slurm was given them."""
    return sorted(paths.logs.glob("*/*_submission.sh"))


def _script(paths: RunPaths, file: Path) -> tuple[str, str]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
    return _plain(str(file.relative_to(paths.root))), text
