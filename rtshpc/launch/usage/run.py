"""What a run has spent, by Slurm's accounting and by our own books, and a copy of it for when Slurm has forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

from rtshpc.core.cell import STAGES
from rtshpc.core.config import SiteConfig
from rtshpc.core.grid import valid_record
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import Record, read_json, read_record, write_json
from rtshpc.hpc import books
from rtshpc.hpc.accounting import Spent
from rtshpc.launch.status import HELD_CELL, accounted, is_locked, read_plan, run_status
from rtshpc.launch.submit import read_ledger
from rtshpc.launch.usage.hints import run_hints, stage_hints
from rtshpc.launch.usage.reconcile import reconcile
from rtshpc.launch.usage.taken import Pair, Taken, by_end, charge, matched, rounded, taken_by, together, unit_of

Row = Mapping[str, Any]
Spending = list[tuple[Row, list[Pair], list[Taken]]]
"""Rows of the plan, their attempts by both books, and what they took."""


def run_usage(paths: RunPaths) -> dict[str, Any]:
    """What a run has spent over all attempts, failed and requeued ones too, from one question to sacct and every cell's notes.

    Returns:
        {run, path, source: sacct, own books, both or none, total: Efficiency, unit, by_end: {class: hours of unit}, charge (by the site's price),
        stages: [{stage, cells, by_end, charge, **Efficiency}], cells: [{id, label, stage, charge, **Efficiency}], reconciled: see `reconcile`,
        sacct: [Spent] (what Slurm's accounting said, kept in usage.json too), hints: [text]}; hours in h, memory in bytes, times
        in s, shares from 0 to 1, null where no books tell.

    Raises:
        RunError: plan.json is absent or of another form.
    """
    plan = read_plan(paths)
    jobs: dict[str, list[str]] = {}
    for entry in read_ledger(paths):
        if entry.get("executor") == "slurm":
            jobs.setdefault(str(entry["cell"]), []).append(str(entry["job"]))
    told = _remembered(paths, accounted(paths, (job for several in jobs.values() for job in several)))
    spent: dict[str, list[Spent]] = {}
    for one in told:
        spent.setdefault(one.job, []).append(one)
    spending: Spending = []
    sources: set[str] = set()
    idle: set[str] = set()
    uncounted = False
    for cell in plan["cells"]:
        name, stage = str(cell["id"]), str(cell["stage"])
        record = read_record(paths.cell(name).record) if stage == "summarise" else valid_record(name, stage, paths)
        own = [one for job in dict.fromkeys(jobs.get(name, [])) for one in spent.get(job, [])]
        noted = books.attempts(paths.cell(name), is_locked(paths.cell(name).lock))
        pairs = matched(own, noted)
        taken = taken_by(pairs, record is not None)
        sources |= {"own books" if by_slurm is None else "sacct" for by_slurm, _ in pairs} if taken else set()
        uncounted |= bool(own) and any(one.gpus for one in noted) and not any(one.gpus for one in own)
        if _on_cpu(record) and any(one.gpus for one in taken):
            idle.add(stage)
        spending.append((cell, pairs, taken))
    site = read_run_config(paths.config)[0].site
    facts = {"run": str(plan["run"]), "path": str(paths.root)}
    facts |= {"source": "both" if len(sources) > 1 else next(iter(sources), "none")}
    return {**facts, **_sums(spending, site, idle, uncounted), "sacct": [asdict(one) for one in told]}


def _sums(spending: Spending, site: SiteConfig, idle: set[str], uncounted: bool) -> dict[str, Any]:
    every = [one for _, _, taken in spending for one in taken]
    stages: list[dict[str, Any]] = []
    hints: list[str] = []
    for stage in STAGES:
        of_stage = [taken for cell, _, taken in spending if cell["stage"] == stage and taken]
        if not of_stage:
            continue
        taken = [one for several in of_stage for one in several]
        found = together(taken)
        own = {"by_end": rounded(by_end(taken)), "charge": charge(taken, site)}
        stages.append({"stage": stage, "cells": len(of_stage), **own, **rounded(asdict(found))})
        hints += stage_hints(stage, found, taken)
    cells = [
        {
            "id": cell["id"],
            "label": cell["label"],
            "stage": cell["stage"],
            "charge": charge(taken, site),
            **rounded(asdict(together(taken))),
        }
        for cell, _, taken in spending
        if taken
    ]
    return {
        "total": rounded(asdict(together(every))),
        "unit": unit_of(every),
        "by_end": rounded(by_end(every)),
        "charge": charge(every, site),
        "stages": stages,
        "cells": cells,
        "reconciled": reconcile([(cell, pairs) for cell, pairs, _ in spending]),
        "hints": hints + run_hints(every, sorted(idle), uncounted),
    }


def keep_usage(paths: RunPaths, launching: bool = False) -> dict[str, Any]:
    """As `run_usage`; what it gives is also written to usage.json, if that can be, where nothing of the run is at work or queued.

    Args:
        paths: the run.
        launching: the caller is the run's launcher, and at its end.

    Raises:
        RunError: plan.json is absent or of another form.
    """
    facts, state = run_usage(paths), run_status(paths)
    at_work = any(cell["state"] in HELD_CELL for cell in state["cells"]) or (state["launcher"] and not launching)
    if not at_work and facts["source"] != "none" and read_json(paths.usage) != facts:
        with suppress(OSError):  # of a folder of somebody else's, or on a full disk, it is told all the same
            write_json(paths.usage, facts)
    return facts


def usage_kept(paths: RunPaths) -> bool:
    """Whether usage.json is younger than all that attempts have noted."""
    if not paths.usage.is_file():
        return False
    notes = (file for cell in paths.cells.iterdir() for file in (CellPaths(cell).attempts, CellPaths(cell).spent))
    return (
        max((file.stat().st_mtime_ns for file in notes if file.is_file()), default=0) < paths.usage.stat().st_mtime_ns
    )


def _remembered(paths: RunPaths, told: Sequence[Spent]) -> list[Spent]:
    """What sacct says, and what it has forgotten since usage.json was written; oldest first within a job."""
    known: dict[tuple[str, str | None], Spent] = {}
    before: Any = read_json(paths.usage)
    if isinstance(before, dict):
        rows = cast(dict[str, Any], before).get("sacct")
        for row in cast(list[dict[str, Any]], rows) if isinstance(rows, list) else []:
            try:
                one = Spent(**row)
            except TypeError:  # of another version
                continue
            known[one.job, one.start] = one
    known |= {(one.job, one.start): one for one in told}
    return sorted(known.values(), key=lambda one: (one.job, one.start or ""))


def _on_cpu(record: Record | None) -> bool:
    return record is not None and record.results.get("device") == "cpu"
