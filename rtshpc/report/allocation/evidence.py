"""Reads all that an allocation report may tell of its runs, and says of every figure which job it came from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines
from rtshpc.core.sizing.measured import FAKE
from rtshpc.core.sizing.request import AllocationRequest, Programme
from rtshpc.core.sizing.scaling import ScalePoint, ScaleRow, is_measurement, scale_points, scale_rows
from rtshpc.hpc import books
from rtshpc.report.collect import CellResult, RunRecords, collect, dig
from rtshpc.report.entries import Entry, Table

REFUSED = "refused:"
"""How the reason of a result begins that no report may use."""

NO_USAGE = "the run has no usage.json: its attempts are not over, or were never summed up (`launch usage RUN`)"

SHOWN_JOBS = 3
"""Jobs that a row names; the others stand in the table of jobs."""

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

    def used(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(source, what usage.json tells) of every cell that was tried."""
        for number, facts in enumerate((self.usage or {}).get("cells", ())):
            yield f"{self.name}/usage.json#cells.{number}", facts


@dataclass(frozen=True)
class Evidence:
    """All runs, and what is asked on their grounds.

    Attributes:
        site: the one that is asked: its GPUs and its prices.
    """

    runs: tuple[Run, ...]
    request: AllocationRequest
    programme: Programme
    site: SiteConfig

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
    runs = tuple(_read_run(name, folder) for name, folder in _names(folders).items())
    known = [run.name for run in runs]
    for number, item in enumerate(request.items):
        if item.run and item.run not in known:
            raise ConfigError(f'items.{number}.run = "{item.run}" is not given. Given: {", ".join(known)}.')
    return Evidence(runs, request, programme, site or runs[0].config.site)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder under its name, with as much of its path before it as tells it from the others."""
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    for depth in range(1, max(len(folder.parts) for folder in whole)):
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
        if len(set(names)) == len(names):
            return dict(zip(names, whole, strict=True))
    return {str(folder): folder for folder in whole}


def _read_run(name: str, folder: Path) -> Run:
    paths = RunPaths(folder)
    config, provenance = read_run_config(paths.config)
    found = collect(paths, run=name)
    points = scale_points(paths)
    refused = [(result.source, result.reason) for result in found.cells if result.reason.startswith(REFUSED)]
    scaled = [(result.source, result.record) for result in found.of("scale") if result.record]
    refused += [(source, f"{REFUSED} it holds no measurement") for source, one in scaled if not is_measurement(one)]
    refused += [(f"{name}/{one.sources[0]}", f"{REFUSED} device = {FAKE}") for one in points if one.device == FAKE]
    return Run(
        name=name,
        paths=paths,
        config=config,
        provenance=provenance,
        records=found,
        refused=tuple(sorted(set(refused))),
        points=tuple(_of_run(name, one) for one in points if one.device != FAKE),
        jobs=_jobs(paths, found),
        usage=_usage(paths.usage),
        scripts=_scripts(paths),
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
    """What usage.json holds, as far as its rows are rows."""
    told: Any = read_json(file)
    sums: Any = dig(told, "reconciled") or {}
    rows: list[Any] = [dig(told, "cells"), sums.get("attempts") or []] if isinstance(sums, dict) else [None]
    return told if all(isinstance(each, list) and all(isinstance(row, dict) for row in each) for each in rows) else None


def _scripts(paths: RunPaths) -> tuple[tuple[str, str], ...]:
    """Batch scripts as Slurm was given them."""
    files = sorted(paths.logs.glob("*/*_submission.sh"))
    texts = ((str(file.relative_to(paths.root)), file.read_text(encoding="utf-8", errors="replace")) for file in files)
    return tuple(texts)
