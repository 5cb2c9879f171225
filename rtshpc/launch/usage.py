"""What a run has spent over all attempts, how much of what it asked for it used, and what to ask for next time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rtshpc.core.cell import STAGES
from rtshpc.core.config import SiteConfig
from rtshpc.core.grid import valid_record
from rtshpc.core.load import read_run_config
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Record, read_record
from rtshpc.hpc import books
from rtshpc.hpc.accounting import OUT_OF_MEMORY, Spent
from rtshpc.hpc.books import BAD_NODE, LOST, STOPPED, Attempt
from rtshpc.hpc.site import node_share
from rtshpc.launch.status import accounted, is_locked, read_plan
from rtshpc.launch.submit import read_ledger

GIB = 1 << 30
HOUR = 3600.0

ENOUGH = 1.3
"""Memory advised is the peak seen times this."""

INTERRUPTED = frozenset(
    {"PREEMPTED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "REQUEUED", "BOOT_FAIL", LOST, STOPPED, BAD_NODE}
)
"""Ends of attempts that are no fault of the task; a training goes on from its checkpoint."""

CLASSES = ("done", "failed", "interrupted", "running")
"""What became of an attempt."""


@dataclass(frozen=True)
class Taken:
    """One attempt, by whichever books know of it.

    Attributes:
        end: one of CLASSES.
        oom: Slurm ended it for its memory.
        seconds: wall time.
        gpus: GPUs it had.
        cpus: cores it had.
        limit_s: time limit, s.
        memory_bytes: memory it had.
        peak_bytes: highest resident memory.
        cpu_s: processor time.
        gpu_share: mean use of its GPUs, 0 to 1.
        gpu_peak_bytes: peak of the CUDA allocator.
    """

    end: str
    oom: bool
    seconds: float
    gpus: int
    cpus: int
    limit_s: int | None = None
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    cpu_s: float | None = None
    gpu_share: float | None = None
    gpu_peak_bytes: int | None = None

    @property
    def gpu_hours(self) -> float:
        """GPUs held times hours."""
        return self.gpus * self.seconds / HOUR

    @property
    def cpu_hours(self) -> float:
        """Cores held times hours."""
        return self.cpus * self.seconds / HOUR


@dataclass(frozen=True)
class Efficiency:
    """What attempts took together; None where no books tell.

    Attributes:
        attempts: how many.
        gpu_hours: GPU-hours held.
        cpu_hours: core-hours held.
        longest_seconds: the longest attempt.
        limit_seconds: the time limit asked.
        memory_asked_bytes: memory asked, of the attempt that used most of it.
        memory_peak_bytes: highest resident memory.
        memory_share: peak / asked.
        cpu_share: processor time / core time held.
        gpu_share: mean use of the GPUs.
        gpu_peak_bytes: peak of the CUDA allocator.
    """

    attempts: int
    gpu_hours: float
    cpu_hours: float
    longest_seconds: float | None
    limit_seconds: int | None
    memory_asked_bytes: int | None
    memory_peak_bytes: int | None
    memory_share: float | None
    cpu_share: float | None
    gpu_share: float | None
    gpu_peak_bytes: int | None


def run_usage(paths: RunPaths) -> dict[str, Any]:
    """GPU-hours, efficiency and hints of a run, from one question to sacct and every cell's attempts.

    Returns:
        {run, path, source: sacct, own books, both or none, total: Efficiency, unit, by_end: {class: hours of unit}, charge (by the site's price),
        stages: [{stage, cells, **Efficiency}], cells: [{id, label, stage, **Efficiency}], hints: [text]}; hours in h,
        memory in bytes, times in s, shares from 0 to 1, null where no books tell.

    Raises:
        RunError: plan.json is absent or of another form.
    """
    plan = read_plan(paths)
    jobs: dict[str, list[str]] = {}
    for entry in read_ledger(paths):
        if entry.get("executor") == "slurm":
            jobs.setdefault(str(entry["cell"]), []).append(str(entry["job"]))
    told = accounted(paths, (job for several in jobs.values() for job in several))
    spent: dict[str, list[Spent]] = {}
    for one in told:
        spent.setdefault(one.job, []).append(one)
    cells: list[tuple[dict[str, Any], list[Taken]]] = []
    sources: set[str] = set()
    idle: set[str] = set()
    uncounted = False
    for cell in plan["cells"]:
        name, stage = str(cell["id"]), str(cell["stage"])
        record = read_record(paths.cell(name).record) if stage == "summarise" else valid_record(name, stage, paths)
        running = is_locked(paths.cell(name).lock)
        own = [one for job in jobs.get(name, []) for one in spent.get(job, [])]
        noted = books.attempts(paths.cell(name), running)
        taken = taken_by(own, noted, record is not None, running)
        if taken:
            sources.add("sacct" if any(one.elapsed_s or one.cpu_s for one in own) else "own books")
        uncounted |= bool(own) and any(one.gpus for one in noted) and not any(one.gpus for one in own)
        if _on_cpu(record) and any(one.gpus for one in taken):
            idle.add(stage)
        cells.append((cell, taken))
    return _facts(paths, str(plan["run"]), cells, sources, idle, uncounted)


def _facts(
    paths: RunPaths,
    run: str,
    cells: list[tuple[dict[str, Any], list[Taken]]],
    sources: set[str],
    idle: set[str],
    uncounted: bool,
) -> dict[str, Any]:
    every = [one for _, taken in cells for one in taken]
    stages: list[dict[str, Any]] = []
    hints: list[str] = []
    for stage in STAGES:
        of_stage = [(cell, taken) for cell, taken in cells if cell["stage"] == stage and taken]
        if not of_stage:
            continue
        taken = [one for _, several in of_stage for one in several]
        found = together(taken)
        stages.append({"stage": stage, "cells": len(of_stage), **rounded(asdict(found))})
        hints += stage_hints(stage, found, taken)
    total = together(every)
    source = "both" if len(sources) > 1 else next(iter(sources), "none")
    return {
        "run": run,
        "path": str(paths.root),
        "source": source,
        "total": rounded(asdict(total)),
        "unit": "GPU-hours" if any(one.gpus for one in every) else "core-hours",
        "by_end": rounded(by_end(every)),
        "charge": charge(every, read_run_config(paths.config)[0].site),
        "stages": stages,
        "cells": [
            {"id": cell["id"], "label": cell["label"], "stage": cell["stage"], **rounded(asdict(together(taken)))}
            for cell, taken in cells
            if taken
        ],
        "hints": hints + run_hints(every, sorted(idle), uncounted),
    }


def _on_cpu(record: Record | None) -> bool:
    return record is not None and record.results.get("device") == "cpu"


def taken_by(spent: Sequence[Spent], noted: Sequence[Attempt], done: bool, running: bool) -> list[Taken]:
    """The attempts on one cell: sacct's where it has any, completed by our own books, else those alone.

    Args:
        spent: what sacct says, oldest first.
        noted: what the attempts themselves said, oldest first.
        done: the cell has a valid record: its last attempt that was not cut off made it.
        running: it is at work.
    """
    ran = [one for one in spent if one.elapsed_s or one.cpu_s]
    if not ran:
        found = [_from_notes(one) for one in noted]
        return [one for one in found if one is not None]
    gpus = {one.job: one.gpus for one in noted}
    found = [_from_sacct(one, gpus.get(one.job, 0), done) for one in ran]
    peaks = [one.gpu_peak_bytes for one in noted if one.gpu_peak_bytes]
    if peaks and not running:
        found[-1] = replace(found[-1], gpu_peak_bytes=max(peaks))
    return found


def _from_sacct(spent: Spent, noted_gpus: int, done: bool) -> Taken:
    if spent.state in ("RUNNING", "SUSPENDED", "COMPLETING"):
        end = "running"
    elif spent.state == "COMPLETED":
        end = "done" if done else "failed"
    else:
        end = "interrupted" if spent.state in INTERRUPTED else "failed"
    return Taken(
        end=end,
        oom=spent.state == OUT_OF_MEMORY,
        seconds=spent.elapsed_s,
        gpus=spent.gpus or noted_gpus,
        cpus=spent.cpus,
        limit_s=spent.limit_s,
        memory_bytes=spent.memory_bytes,
        peak_bytes=spent.peak_bytes,
        cpu_s=spent.cpu_s or None,
        gpu_share=spent.gpu_share,
    )


def _from_notes(attempt: Attempt) -> Taken | None:
    if attempt.seconds is None:
        return None  # at work: how long is known when it ends
    return Taken(
        end="interrupted" if attempt.how in INTERRUPTED else attempt.how,
        oom=False,
        seconds=attempt.seconds,
        gpus=attempt.gpus,
        cpus=attempt.cpus,
        memory_bytes=attempt.memory_bytes,
        peak_bytes=attempt.peak_bytes,
        cpu_s=attempt.cpu_s,
        gpu_peak_bytes=attempt.gpu_peak_bytes,
    )


def together(taken: Sequence[Taken]) -> Efficiency:
    """Sums, maxima and shares over attempts."""
    tight = max(
        (one for one in taken if one.peak_bytes),
        key=lambda one: (one.peak_bytes or 0) / (one.memory_bytes or math.inf),
        default=None,
    )
    peaks = [one.peak_bytes for one in taken if one.peak_bytes]
    on_cpu = [(one.cpu_s, one.cpus * one.seconds) for one in taken if one.cpu_s is not None and one.cpus]
    on_gpu = [(one.gpu_share, one.gpus * one.seconds) for one in taken if one.gpu_share is not None]
    return Efficiency(
        attempts=len(taken),
        gpu_hours=sum(one.gpu_hours for one in taken),
        cpu_hours=sum(one.cpu_hours for one in taken),
        longest_seconds=max((one.seconds for one in taken), default=None),
        limit_seconds=max((one.limit_s for one in taken if one.limit_s), default=None),
        memory_asked_bytes=tight.memory_bytes if tight is not None else None,
        memory_peak_bytes=max(peaks, default=None),
        memory_share=tight.peak_bytes / tight.memory_bytes
        if tight and tight.peak_bytes and tight.memory_bytes
        else None,
        cpu_share=_share(sum(used for used, _ in on_cpu), sum(held for _, held in on_cpu)),
        gpu_share=_share(sum(share * held for share, held in on_gpu), sum(held for _, held in on_gpu)),
        gpu_peak_bytes=max((one.gpu_peak_bytes for one in taken if one.gpu_peak_bytes), default=None),
    )


def charge(taken: Iterable[Taken], site: SiteConfig) -> float | None:
    """What attempts cost at a site, in its own unit; None where it tells no price."""
    if site.charge_per_gpu_hour:
        return round(site.charge_per_gpu_hour * sum(one.gpu_hours for one in taken), 4)
    if not site.charge_per_node_hour:
        return None
    held = [(node_share(site, one.gpus, one.cpus, (one.memory_bytes or 0) / GIB), one.seconds) for one in taken]
    return round(site.charge_per_node_hour * sum(nodes * seconds / HOUR for nodes, seconds in held), 4)


def by_end(taken: Iterable[Taken]) -> dict[str, float]:
    """GPU-hours (core-hours where no GPU was held) by what became of the attempt."""
    every = list(taken)
    on_gpu = any(one.gpus for one in every)
    return {
        name: sum(one.gpu_hours if on_gpu else one.cpu_hours for one in every if one.end == name) for name in CLASSES
    }


def stage_hints(stage: str, found: Efficiency, taken: Sequence[Taken]) -> list[str]:
    """What to ask for next time, in plain words; nothing where nothing is to be gained."""
    hints: list[str] = []
    share, peak, asked = found.memory_share, found.memory_peak_bytes or 0, found.memory_asked_bytes or 0
    advised = max(1, math.ceil(peak * ENOUGH / GIB))
    ooms = sum(one.oom for one in taken)
    if ooms:
        hints.append(f"{stage}: {_times(ooms)} an attempt ran out of memory; `retry --oom` gives more")
    elif share is not None and share > 0.9:
        hints.append(
            f"{stage}: used {peak / GIB:.1f} of {asked / GIB:.1f} GiB memory, which is close; ask for site.memory_gb: {advised}"
        )
    elif share is not None and share < 0.5 and asked / GIB - advised >= 1:
        hints.append(
            f"{stage}: used {peak / GIB:.1f} of {asked / GIB:.1f} GiB memory; site.memory_gb: {advised} would do"
        )
    longest, limit = found.longest_seconds, found.limit_seconds
    if longest is not None and limit and limit >= 1800 and longest < limit / 4:
        minutes = max(15, math.ceil(longest * 2 / 60))
        hints.append(
            f"{stage}: the longest attempt took {longest / 60:.0f} of {limit / 60:.0f} minutes; site.minutes: {minutes} would let Slurm start it sooner"
        )
    timeouts = sum(one.end == "interrupted" and one.limit_s is not None and one.seconds >= one.limit_s for one in taken)
    if timeouts:
        hints.append(
            f"{stage}: {_times(timeouts)} an attempt met its time limit; more site.minutes would save restarts"
        )
    most = max((one.cpus for one in taken), default=0)
    if found.cpu_share is not None and found.cpu_share < 0.35 and most > 1:
        used = max(1, math.ceil(found.cpu_share * most * ENOUGH))
        if used < most:
            hints.append(f"{stage}: kept {found.cpu_share * most:.1f} of {most} cores busy; site.cpus: {used} would do")
    if found.gpu_share is not None and found.gpu_share < 0.5:
        hints.append(
            f"{stage}: its GPUs were busy {found.gpu_share:.0%} of the time; more loader workers, a larger batch or"
            " cached features keep them busier"
        )
    return hints


def run_hints(taken: Sequence[Taken], idle_gpu: Sequence[str], gpus_uncounted: bool) -> list[str]:
    """Hints on the run as a whole.

    Args:
        taken: every attempt.
        idle_gpu: stages whose tasks held a GPU and computed on the CPU.
        gpus_uncounted: sacct tells no GPUs although tasks had some.
    """
    ends = by_end(taken)
    total, unit = sum(ends.values()), "GPU-hours" if any(one.gpus for one in taken) else "core-hours"
    hints: list[str] = [
        f"{stage}: held GPUs and computed on the CPU; check the driver and the image (`--nv`), or ask for no GPU"
        for stage in idle_gpu
    ]
    if total and ends["interrupted"] / total > 0.1:
        hints.append(
            f"{ends['interrupted'] / total:.0%} of the {unit} were in attempts that were cut off; trainings go on from their"
            " checkpoint, a shorter checkpoint_seconds loses less"
        )
    if total and ends["failed"] / total > 0.1:
        hints.append(f"{ends['failed'] / total:.0%} of the {unit} were in attempts that failed; see `status`")
    if gpus_uncounted:
        hints.append(
            "this cluster's accounting does not count GPUs (AccountingStorageTRES=gres/gpu): they are counted as the tasks saw them"
        )
    return hints


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for JSON: four digits behind the point are more than any clock gives."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _share(used: float, held: float) -> float | None:
    return used / held if held > 0 else None
