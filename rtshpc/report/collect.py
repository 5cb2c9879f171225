"""Reads what a run's records hold; the only place of the report that opens files of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rtshpc.core import grid
from rtshpc.core.cell import RESULT_VERSION, STAGES, Cell
from rtshpc.core.errors import ConfigError, RtshpcError, RunError
from rtshpc.core.load import OwnLoader, parse_yaml
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import Record, read_json, read_lines, read_record
from rtshpc.core.sizing.measured import refusal

NOT_RUN = "no record: not run, or not finished"

TORN = "the record is not valid"
"""How the reason of a record begins that is there and cannot be used."""


@dataclass(frozen=True)
class CellResult:
    """One cell of the run with its record, or with why there is none: a record that reports refuse counts as none.

    Attributes:
        reason: why there is no record; empty where there is one.
        failed: the last attempt left a failure.json (and no record).
        metrics: rows of metrics.jsonl.
        run: name of its run, where a report is of several.
    """

    cell: Cell
    paths: CellPaths
    record: Record | None
    reason: str = ""
    failed: bool = False
    metrics: tuple[Mapping[str, Any], ...] = ()
    run: str = ""

    @property
    def source(self) -> str:
        """Path of the record relative to the run, or to the folder of all runs of the report."""
        return f"{self.run}{'/' if self.run else ''}cells/{self.cell.id}/record.json"

    def get(self, key: str) -> Any | None:
        """A value of the results by dotted key, e.g. `mask.AP50`; None where the record has none."""
        return dig(self.record.results, key) if self.record else None


@dataclass(frozen=True)
class RunRecords:
    """All that a report may tell about a run.

    Attributes:
        cells: every cell with a readable config.yaml but those of stage summarise, in the order of the stages.
        unreadable: (name of the cell folder, why its config cannot be read).
        index: shards/index.json, or None.
        rejected: shards/rejected.json, or None.
    """

    cells: tuple[CellResult, ...]
    unreadable: tuple[tuple[str, str], ...]
    index: Mapping[str, Any] | None
    rejected: tuple[Mapping[str, Any], ...] | None

    @cached_property
    def by_id(self) -> dict[str, CellResult]:
        """Cells by id."""
        return {result.cell.id: result for result in self.cells}

    def of(self, *stages: str) -> tuple[CellResult, ...]:
        """Cells of these stages."""
        return tuple(result for result in self.cells if result.cell.stage in stages)

    @property
    def done(self) -> tuple[CellResult, ...]:
        """Cells with a record."""
        return tuple(result for result in self.cells if result.record)

    @property
    def gather(self) -> CellResult | None:
        """The gather cell of the index on disk: the one whose record was started last."""
        found = [result for result in self.of("gather") if result.record]
        return max(found, key=_started, default=None)

    def gather_of(self, result: CellResult) -> str:
        """Id of the gather cell that a training or an evaluation read; empty where it names none."""
        stages = {name: self.by_id[name].cell.stage for name in result.cell.needs if name in self.by_id}
        return next((name for name, stage in stages.items() if stage == "gather"), "")


def dig(value: Any, key: str) -> Any | None:
    """Follow a dotted key through mappings; None where it leads nowhere."""
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def collect(paths: RunPaths, summary: Cell | None = None, run: str = "") -> RunRecords:
    """Read every cell, record, failure and curve of a run; nothing is written and nothing is computed.

    Args:
        paths: the run.
        summary: the summarise cell; its config says which cells the sweep has, so that one nobody has
            started is named too.
        run: put before every source, where a report is of several runs.
    """
    found: list[CellResult] = []
    unreadable: list[tuple[str, str]] = []
    planned = _planned(summary) if summary else {}
    folders = sorted(paths.cells.iterdir()) if paths.cells.is_dir() else []
    for folder in folders:
        if not folder.is_dir():
            continue
        cell, why = _read_cell(CellPaths(folder))
        cell = cell or planned.get(folder.name)
        planned.pop(folder.name, None)
        if cell is None:
            unreadable.append((folder.name, why))
        elif cell.stage != "summarise":
            found.append(replace(_read_result(cell, CellPaths(folder)), run=run))
    found += [CellResult(cell, paths.cell(name), None, NOT_RUN, run=run) for name, cell in planned.items()]
    by_id = {result.cell.id: result for result in found}
    explained = [_explain(result, by_id) for result in found]
    explained.sort(key=_order)
    index, rejected = _json(paths.index), _json(paths.rejected)
    return RunRecords(
        cells=tuple(explained),
        unreadable=tuple(unreadable),
        index=index if isinstance(index, dict) else None,
        rejected=tuple(rejected) if isinstance(rejected, list) else None,
    )


def _planned(summary: Cell) -> dict[str, Cell]:
    """The sweep's cells by id but for summarise; empty where this version makes no grid of the config."""
    try:
        found = grid.cells(summary.config, summary.data_fingerprint)
    except RtshpcError:
        return {}
    return {cell.id: cell for cell in found if cell.stage != "summarise"}


def _read_cell(paths: CellPaths) -> tuple[Cell | None, str]:
    try:
        cell = Cell.model_validate(parse_yaml(paths.config.read_text(encoding="utf-8"), paths.config.name, OwnLoader))
    except FileNotFoundError:
        return None, "config.yaml is missing"
    except (OSError, UnicodeDecodeError, ConfigError):
        return None, "config.yaml cannot be read"
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return None, f"config.yaml does not fit this version: {place}: {first['msg']}"
    if cell.id != paths.root.name or cell.stage not in STAGES:
        return None, "config.yaml names another cell or an unknown stage"
    return cell, ""


def _read_result(cell: Cell, paths: CellPaths) -> CellResult:
    """One cell; what cannot be read of it is named and stops nothing else."""
    try:
        return _read_files(cell, paths)
    except RunError as error:
        return CellResult(cell, paths, None, f"{TORN}: {str(error).removeprefix(f'{paths.root}/')}")


def _read_files(cell: Cell, paths: CellPaths) -> CellResult:
    record = read_record(paths.record)
    if record is not None and record.cell == cell.id and record.stage == cell.stage:
        if refused := refusal(record.results):
            return CellResult(cell, paths, None, refused)
        if record.result_version != RESULT_VERSION[cell.stage]:
            return CellResult(cell, paths, None, "the record is of another version of the code")
        rows = tuple(row for row in read_lines(paths.metrics) if isinstance(row, dict))
        return CellResult(cell, paths, record, metrics=rows)
    failure = read_json(paths.failure)
    if isinstance(failure, dict):
        return CellResult(cell, paths, None, f"failed: {_failure_text(failure)}", failed=True)
    return CellResult(cell, paths, None, TORN if paths.record.exists() else NOT_RUN)


def _json(path: Path) -> Any | None:
    """What a file of the run holds; None where it is absent, torn, or cannot be read."""
    try:
        return read_json(path)
    except RunError:
        return None


def _failure_text(failure: Mapping[str, Any]) -> str:
    """First line of the error, with its kind before it; the traceback stays in the file."""
    lines = str(failure.get("error") or "").strip().splitlines() or ["no message"]
    kind = str(failure.get("kind") or "")
    return lines[0] if not kind or lines[0].startswith(kind) else f"{kind}: {lines[0]}"


def _explain(result: CellResult, by_id: Mapping[str, CellResult]) -> CellResult:
    """Where a cell was not run because one it needs has no record, say which."""
    if result.record or result.failed:
        return result
    for name in (*result.cell.needs, *result.cell.backbones.values()):
        needed = by_id.get(name)
        if needed is not None and needed.record is None:
            why = "failed" if needed.failed else "has no record"
            text = f"not run: it needs {needed.cell.label or needed.cell.stage} ({name}), which {why}"
            return replace(result, reason=text)
    return result


def _order(result: CellResult) -> tuple[Any, ...]:
    cell = result.cell
    return (STAGES.index(cell.stage), cell.task, len(cell.modalities), cell.label, cell.id)


def _started(result: CellResult) -> tuple[str, str]:
    return (result.record.started if result.record else "", result.cell.id)


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of `folder`; None where it is not there or points outside of the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    return path
