"""How far a run is, from its folder alone: plan, records, failures, locks and ledger."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtshpc.core import records
from rtshpc.core.cell import STAGES, Cell
from rtshpc.core.errors import ConfigError, RunError, guess
from rtshpc.core.grid import finished
from rtshpc.core.load import read_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import read_json, read_lines, read_record
from rtshpc.hpc.executor import slurm_states

STATES = ("done", "running", "submitted", "failed", "blocked", "waiting")
"""What a cell can be. `submitted`: Slurm has it; `blocked`: it builds on a failed cell."""


def find_run(name_or_path: str, runs: Path) -> RunPaths:
    """The run folder that RUN means: a folder, or a name under `runs`.

    Raises:
        RunError: there is none; runs that are there are listed.
    """
    for folder in (Path(name_or_path), runs / name_or_path):
        if RunPaths(folder).config.is_file():
            return RunPaths(folder)
    known = [path.parent.name for path in runs.glob("*/config.yaml")]
    if not known:
        raise RunError(f"{name_or_path}: no run there, and none in {runs}/")
    raise RunError(f"{name_or_path}: no run there.{guess(Path(name_or_path).name, known)}")


def read_plan(paths: RunPaths) -> dict[str, Any]:
    """plan.json of a run. Raises RunError when it is absent, not whole or of another form."""
    plan = records.read_plan(paths.plan)
    if plan is None:
        what = "plan.json is not what a sweep writes" if paths.plan.exists() else "no plan.json"
        raise RunError(f"{paths.root}: {what}; run the sweep again, it goes on where it was")
    return plan


def read_ledger(paths: RunPaths) -> list[dict[str, Any]]:
    """The submissions of a run, oldest first; lines that name no cell and job are left out."""
    return [row for row in read_lines(paths.ledger) if "cell" in row and "job" in row]


def planned_cells(paths: RunPaths) -> list[Cell]:
    """The cells of the run's plan whose folders were made."""
    found: list[Cell] = []
    for row in read_plan(paths)["cells"]:
        config = paths.cell(str(row["id"])).config
        if config.is_file():
            found.append(read_cell(config))
    return found


def run_status(paths: RunPaths) -> dict[str, Any]:
    """State of every cell, and counts a stage.

    Returns:
        {run, path, launcher: bool, stages: [{stage, <state>: count}], cells: [{id, stage, label, state, seconds,
        attempts, job, log, error, progress}], finished: bool}.
    """
    plan = read_plan(paths)
    last = {str(entry["cell"]): entry for entry in read_ledger(paths)}
    queued = slurm_states([str(entry["job"]) for entry in last.values() if entry.get("executor") == "slurm"])
    rows: list[dict[str, Any]] = []
    lost: set[str] = set()
    for cell in plan["cells"]:
        row = _cell_status(paths, cell, last.get(str(cell["id"])), queued or {})
        if row["state"] == "waiting" and lost.intersection(cell["needs"]):
            row["state"] = "blocked"
        if row["state"] in ("failed", "blocked"):
            lost.add(row["id"])
        rows.append(row)
    _preprocess_over(rows)
    _features_over(rows, plan["cells"])
    stages = [
        {"stage": stage, **_counts([row for row in rows if row["stage"] == stage])}
        for stage in STAGES
        if any(row["stage"] == stage for row in rows)
    ]
    return {
        "run": plan["run"],
        "path": str(paths.root),
        "launcher": is_locked(paths.lock),
        "stages": stages,
        "cells": rows,
        "finished": all(row["state"] == "done" for row in rows),
        "report": str(paths.report_page) if paths.report_page.is_file() else None,
    }


def _preprocess_over(rows: list[dict[str, Any]]) -> None:
    """Preprocess tasks that other tasks have replaced are over once the shards are gathered."""
    if any(row["stage"] == "gather" and row["state"] == "done" for row in rows):
        for row in rows:
            if row["stage"] == "preprocess" and row["state"] in ("waiting", "failed"):
                row["state"] = "done"


def _features_over(rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> None:
    """Stored scales that were deleted are of no use once all that trains on them is done."""
    undone = {row["id"] for row in rows if row["stage"] == "finetune" and row["state"] != "done"}
    used = {need for cell in cells if cell["id"] in undone for need in cell["needs"]}
    trained = any(row["stage"] == "finetune" for row in rows)
    for row in rows:
        if trained and row["stage"] == "features" and row["state"] == "waiting" and row["id"] not in used:
            row["state"] = "done"


def _cell_status(
    paths: RunPaths, cell: Mapping[str, Any], entry: Mapping[str, Any] | None, queued: Mapping[str, str]
) -> dict[str, Any]:
    folder = paths.cell(str(cell["id"]))
    record = read_record(folder.record)
    failure: Any = read_json(folder.failure)
    if record is not None and cell["stage"] != "summarise":
        try:
            record = finished(read_cell(folder.config), paths) if folder.config.is_file() else None
        except ConfigError:
            record = None
    error = str(failure.get("error")) if isinstance(failure, dict) else None  # pyright: ignore
    if is_locked(folder.lock):
        state = "running"
    elif entry is not None and str(entry["job"]) in queued:
        state = "running" if queued[str(entry["job"])] == "RUNNING" else "submitted"
    elif record is not None:
        state = "done"
    elif error is not None:
        state = "failed"
    else:
        state = "waiting"
    return {
        "id": cell["id"],
        "stage": cell["stage"],
        "label": cell["label"],
        "state": state,
        "seconds": record.seconds if record is not None else None,
        "attempts": len(read_lines(folder.attempts)),
        "job": entry["job"] if entry is not None else None,
        "log": entry.get("log") if entry is not None else None,
        "error": error if state == "failed" else None,
        "progress": read_json(folder.progress) if state == "running" else None,
    }


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock; False where the file system cannot tell."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {state: sum(row["state"] == state for row in rows) for state in STATES}
