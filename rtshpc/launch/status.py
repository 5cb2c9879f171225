"""What happened to every cell of a run: its folder is asked first, then Slurm, in one question each to squeue and sacct.

A cell is done when it has a valid record, whatever Slurm says of its job. Where Slurm cannot be asked or has
forgotten a job, the cell's own sentinels tell: record, failure.json, attempts, lock and ledger.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rtshpc.core import records
from rtshpc.core.cell import LENIENT, STAGES
from rtshpc.core.errors import ConfigError, RunError, guess
from rtshpc.core.grid import finished, valid_record
from rtshpc.core.load import read_cell, read_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import Record, read_json, read_record
from rtshpc.core.sizing.predict import GUARDED, STAGE as PREDICT
from rtshpc.hpc import books
from rtshpc.hpc.accounting import OUT_OF_MEMORY, Queued, Spent, ask_books, ask_queue, how_ended, why_waiting
from rtshpc.launch.display import headline
from rtshpc.launch.submit import read_ledger

STATES = ("done", "running", "submitted", "unknown", "failed", "cancelled", "blocked", "waiting")
"""What a cell can be. `submitted`: Slurm has it; `unknown`: it was submitted and Slurm cannot be asked; `cancelled`: its job
was, by somebody; `blocked`: it builds on a failed or cancelled cell; `waiting`: nobody works on it."""

LOST_CELL = ("failed", "cancelled", "blocked")
"""States of a cell that nothing can be built on."""

HELD_CELL = ("running", "submitted", "unknown")
"""States of a cell that is being worked on, as far as one can tell."""

OOM_KINDS = ("OutOfMemoryError", "MemoryError", "OutOfMemory", OUT_OF_MEMORY)
"""Kinds of failure that mean too little memory: torch's, Python's, the batch script's and Slurm's."""

CANCELLED = "Cancelled"
"""Kind of failure.json that `cancel` writes."""

NO_WORD = "ended without a word: killed, or out of memory or time"

FEW = 20
"""So many cells are named in one line."""

TAIL_BYTES = 1 << 14
"""As much of metrics.jsonl is read to find its last row."""


@dataclass(frozen=True)
class Slurm:
    """What Slurm says of a run's jobs.

    Attributes:
        queue: job -> what squeue says; None when it could not be asked.
        endings: job -> how it ended, in Slurm's word; by squeue's short memory, else by sacct.
    """

    queue: Mapping[str, Queued] | None
    endings: Mapping[str, str]


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


def find_planned(paths: RunPaths, name: str) -> dict[str, Any]:
    """The cell of the plan that `name` means: an id, the beginning of one, a label, or words of one label alone.

    Raises:
        RunError: there is none, or more than one.
    """
    cells: list[dict[str, Any]] = read_plan(paths)["cells"]
    exact = [cell for cell in cells if name in (cell["id"], cell["label"])]
    words = name.split()
    near = [cell for cell in cells if str(cell["id"]).startswith(name)] or [
        cell for cell in cells if words and all(word in str(cell["label"]).split() for word in words)
    ]
    found = exact or near
    if len(found) == 1:
        return found[0]
    if not found:
        labels = [str(cell["label"]) for cell in cells]
        known = (
            guess(name, labels) if len(cells) <= FEW else f" `status {paths.root} --all` lists its {len(cells)} cells."
        )
        raise RunError(f"{paths.root}: no cell {name} here.{known}")
    several = ", ".join(f"{cell['id']} ({cell['label']})" for cell in found[:FEW])
    raise RunError(f"{paths.root}: {name} may mean {len(found)} cells: {several}{', ...' if len(found) > FEW else ''}")


def run_status(paths: RunPaths) -> dict[str, Any]:
    """State of every cell, and counts a stage.

    Returns:
        {run, path, launcher: bool, slurm: asked, unasked or silent, stages: [{stage, <state>: count}], cells: [{id, stage,
        label, state, reason, start, elapsed_seconds, limit_seconds, node, attempts, metric, seconds, job, log,
        error, oom: gpu, node or null, progress}], finished: bool, report}.

    Raises:
        RunError: plan.json is absent or of another form.
    """
    plan = read_plan(paths)
    last = {str(entry["cell"]): entry for entry in read_ledger(paths)}
    planned: list[dict[str, Any]] = plan["cells"]
    found = {str(cell["id"]): _record(paths, cell) for cell in planned}
    slurm = ask_slurm(
        paths, [entry for name, entry in last.items() if found.get(name) is None or _again(name, planned)]
    )
    rows: list[dict[str, Any]] = []
    lost: set[str] = set()
    for cell in planned:
        name = str(cell["id"])
        row = _cell_status(paths, cell, found[name], last.get(name), slurm)
        strict = cell["stage"] not in LENIENT and lost.intersection(cell["needs"])
        if row["state"] in ("waiting", "cancelled") and not row["attempts"] and strict:
            row |= {"state": "blocked", "reason": "builds on a cell that is not to be had", "error": None}
        if row["state"] in LOST_CELL:
            lost.add(name)
        rows.append(row)
    _preprocess_over(rows)
    _predict_over(rows)
    _features_over(rows, planned)
    stages = [
        {"stage": stage, **_counts([row for row in rows if row["stage"] == stage])}
        for stage in STAGES
        if any(row["stage"] == stage for row in rows)
    ]
    return {
        "run": plan["run"],
        "path": str(paths.root),
        "launcher": is_locked(paths.lock),
        "slurm": "unasked" if slurm is None else "silent" if slurm.queue is None else "asked",
        "stages": stages,
        "cells": rows,
        "finished": all(row["state"] == "done" for row in rows),
        "report": str(paths.report_page) if paths.report_page.is_file() else None,
    }


def accounted(paths: RunPaths, jobs: Iterable[str]) -> list[Spent]:
    """What sacct says of a run's jobs; nothing where it is not there or `site.accounting` is off."""
    try:
        asked = read_run_config(paths.config)[0].site.accounting
    except ConfigError:
        asked = True
    return (ask_books(jobs) if asked else None) or []


def ask_slurm(paths: RunPaths, entries: Iterable[Mapping[str, Any]]) -> Slurm | None:
    """What Slurm says of the jobs of ledger entries of a run; sacct is asked only for those that squeue has forgotten.

    None where no entry is of Slurm.
    """
    jobs = [str(entry["job"]) for entry in entries if entry.get("executor") == "slurm"]
    if not jobs:
        return None
    queue = ask_queue(jobs)
    known = queue or {}
    endings = {name: job.state for name, job in known.items() if not job.held}
    forgotten = [job for job in jobs if job not in known]
    for spent in accounted(paths, forgotten) if forgotten else ():
        endings[spent.job] = spent.state  # attempts come oldest first: the last one counts
    return Slurm(queue, endings)


def _again(name: str, planned: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a cell runs again though it has a record: the summary does."""
    return any(cell["id"] == name and cell["stage"] == "summarise" for cell in planned)


def _record(paths: RunPaths, cell: Mapping[str, Any]) -> Record | None:
    """The record of a planned cell that is done and can be run again from its own config."""
    name, stage = str(cell["id"]), str(cell["stage"])
    folder = paths.cell(name)
    if stage == "summarise":
        return read_record(folder.record)
    record = valid_record(name, stage, paths)
    if record is None or not _own_config(folder, name):
        return None
    if stage != "features" and stage not in LENIENT:
        return record
    try:
        return finished(read_cell(folder.config), paths)
    except ConfigError:
        return None


def _own_config(folder: CellPaths, name: str) -> bool:
    """Whether config.yaml is there and the cell's own; a thousand of them are not parsed for this."""
    try:
        lines = folder.config.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.replace("'", "") == f"id: {name}" for line in lines)


def _preprocess_over(rows: list[dict[str, Any]]) -> None:
    """Preprocess tasks that other tasks have replaced are over once the shards are gathered."""
    if any(row["stage"] == "gather" and row["state"] == "done" for row in rows):
        for row in rows:
            if row["stage"] == "preprocess" and row["state"] in ("waiting", "failed"):
                row["state"] = "done"


def _predict_over(rows: list[dict[str, Any]]) -> None:
    """A prediction is of no use once all that it is about is done."""
    if all(row["state"] == "done" for row in rows if row["stage"] in GUARDED):
        for row in rows:
            if row["stage"] == PREDICT and row["state"] == "waiting":
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
    paths: RunPaths,
    cell: Mapping[str, Any],
    record: Record | None,
    entry: Mapping[str, Any] | None,
    slurm: Slurm | None,
) -> dict[str, Any]:
    folder = paths.cell(str(cell["id"]))
    job = str(entry["job"]) if entry is not None else None
    queued = (slurm.queue or {}).get(str(job)) if slurm is not None else None
    state, why, kind = _state(folder, record, entry, slurm, queued)
    if record is not None and cell["stage"] == "summarise" and queued is not None and queued.held:
        state, why = "running" if queued.running else "submitted", None
    working = state in ("running", "submitted")
    attempts = books.attempts(folder, running=working)
    failed = state in ("failed", "cancelled")
    return {
        "id": cell["id"],
        "stage": cell["stage"],
        "label": cell["label"],
        "state": state,
        "reason": why_waiting(queued.reason)
        if state == "submitted" and queued is not None
        else None
        if failed
        else why,
        "start": queued.start if queued is not None and state == "submitted" else None,
        "elapsed_seconds": _elapsed(queued, attempts) if state == "running" else None,
        "limit_seconds": queued.limit_s if queued is not None and working else None,
        "node": (queued.nodes if queued is not None else attempts[-1].host if attempts else "") or None,
        "attempts": len(attempts),
        "metric": headline(record) if state == "done" and record is not None else last_metric(folder),
        "seconds": record.seconds if record is not None and state == "done" else None,
        "job": job,
        "log": entry.get("log") if entry is not None else None,
        "error": why if failed else None,
        "oom": _short_of(why or "") if failed and kind in OOM_KINDS else None,
        "progress": read_json(folder.progress) if state == "running" else None,
    }


def _state(
    folder: CellPaths,
    record: Record | None,
    entry: Mapping[str, Any] | None,
    slurm: Slurm | None,
    queued: Queued | None,
) -> tuple[str, str | None, str]:
    """(state, why, kind of failure): sentinels that prove something first, then Slurm, then the rest."""
    if is_locked(folder.lock):
        return "running", None, ""
    if record is not None:
        return "done", None, ""
    if queued is not None and queued.held:
        return "running" if queued.running else "submitted", None, ""
    failure: Any = read_json(folder.failure)
    facts = cast(dict[str, Any], failure) if isinstance(failure, dict) else {}
    error, kind = facts.get("error"), str(facts.get("kind", ""))
    ending = slurm.endings.get(str(entry["job"])) if slurm is not None and entry is not None else None
    if ending == OUT_OF_MEMORY or (ending is not None and error is None):  # the task's own word says more
        return "cancelled" if ending == "CANCELLED" else "failed", how_ended(ending), ending
    if error is not None:
        oom = "out of memory" in str(error).lower()
        return "cancelled" if kind == CANCELLED else "failed", str(error), OOM_KINDS[0] if oom else kind
    return *_silent(folder, entry, slurm), ""


def _short_of(error: str) -> str:
    """Which memory ran out: a GPU's or the node's."""
    return "gpu" if "cuda" in error.lower() else "node"


def _silent(folder: CellPaths, entry: Mapping[str, Any] | None, slurm: Slurm | None) -> tuple[str, str | None]:
    """(state, why) of a cell that neither left a word nor is known to Slurm."""
    if entry is None or entry.get("executor") != "slurm" or slurm is None:
        return "waiting", None
    if slurm.queue is None:
        return "unknown", "squeue cannot be asked from here"
    begun = [attempt for attempt in books.attempts(folder) if attempt.job == str(entry["job"])]
    if begun:
        return "failed", "stopped by a signal, its state is saved" if begun[-1].how == books.STOPPED else NO_WORD
    return "waiting", f"Slurm no longer knows job {entry['job']}, which never started"


def _elapsed(queued: Queued | None, attempts: list[books.Attempt]) -> float | None:
    """Run time of the attempt at work, s: Slurm's, else since it noted its begin."""
    if queued is not None and queued.running:
        return queued.elapsed_s
    if not attempts or attempts[-1].how:
        return None
    began = datetime.fromisoformat(attempts[-1].started)
    return max(0.0, (datetime.now(UTC) - began).total_seconds())


def last_metric(folder: CellPaths) -> str | None:
    """The last row of a training's metrics in a few words; only the end of the file is read."""
    try:
        with folder.metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None
    rows = [row for line in tail.splitlines() if (row := records.parse_row(line)) is not None]
    val = next((row for row in reversed(rows) if row.get("kind") == "val"), None)
    train = next((row for row in reversed(rows) if row.get("kind") == "train"), None)
    told = [f"epoch {row['epoch']}" for row in (train or val,) if row is not None]
    if train is not None:
        told.append(f"loss {train['loss']:.3f}")
    if val is not None and val.get("ap50") is not None:
        told.append(f"AP50 {val['ap50']:.1f}")
    return ", ".join(told) or None


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
