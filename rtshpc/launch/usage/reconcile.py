"""Slurm's accounting and our own books side by side: both sums, what they differ by, and which attempts explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rtshpc.hpc.accounting import Spent
from rtshpc.hpc.books import LOST, Attempt
from rtshpc.launch.usage.taken import HOUR, Pair, added, core_hours

Held = dict[str, float | None]
"""Hours of GPUs, nodes and cores; None where it is not known how many."""

KEYS = ("gpu_hours", "node_hours", "cpu_hours")


def reconcile(cells: Sequence[tuple[Mapping[str, Any], Sequence[Pair]]]) -> dict[str, Any]:
    """Both books of a run; attempts that are at work are in neither sum.

    Args:
        cells: rows of the plan, and their attempts.

    Returns:
        {sacct: {attempts, gpu_hours, node_hours, cpu_hours} or null where sacct knows nothing, own: the same, difference: {gpu_hours,
        node_hours, cpu_hours} (sacct less own) or null, attempts: [{cell, label, stage, job, started, why, sacct_seconds,
        own_seconds, gpu_hours, node_hours, cpu_hours}] of those that differ, the most first; their sum is the difference}. Hours
        of cores are null where an attempt does not tell how many it held.
    """
    over = [(cell, pair) for cell, pairs in cells for pair in pairs if not _at_work(*pair)]
    theirs = [_by_sacct(spent) for _, (spent, _) in over if spent is not None]
    ours = [_by_us(own) for _, (_, own) in over if own is not None]
    known = bool(theirs)
    rows = [_row(cell, *pair) for cell, pair in over] if known else []
    rows = sorted((row for row in rows if any(row[key] for key in KEYS)), key=_most_first)
    sums = {"sacct": _sum(theirs), "own": _sum(ours)}
    return {
        "sacct": {"attempts": len(theirs), **sums["sacct"]} if known else None,
        "own": {"attempts": len(ours), **sums["own"]},
        "difference": _less(sums["sacct"], sums["own"]) if known else None,
        "attempts": rows,
    }


def _most_first(row: Mapping[str, Any]) -> tuple[float, float, str, str]:
    return -abs(row["gpu_hours"]), -abs(row["node_hours"]), str(row["cell"]), str(row["started"])


def _at_work(spent: Spent | None, own: Attempt | None) -> bool:
    running = spent is not None and spent.state in ("RUNNING", "SUSPENDED", "COMPLETING")
    return running or (own is not None and own.seconds is None)


def _by_sacct(spent: Spent) -> Held:
    return _held(spent.elapsed_s, spent.gpus, spent.node_count, spent.cpus)


def _by_us(own: Attempt) -> Held:
    return _held(own.seconds or 0.0, own.gpus, own.nodes, own.cpus)


def _held(seconds: float, gpus: int, nodes: int, cpus: int) -> Held:
    return {
        "gpu_hours": gpus * seconds / HOUR,
        "node_hours": nodes * seconds / HOUR,
        "cpu_hours": core_hours(cpus, seconds),
    }


def _sum(several: Sequence[Held]) -> Held:
    sums = {key: added(one[key] for one in several) for key in KEYS}
    return {key: None if hours is None else round(hours, 6) for key, hours in sums.items()}


def _less(theirs: Held, ours: Held) -> Held:
    both = {key: (theirs[key], ours[key]) for key in KEYS}
    return {key: None if a is None or b is None else round(a - b, 6) for key, (a, b) in both.items()}


def _row(cell: Mapping[str, Any], spent: Spent | None, own: Attempt | None) -> dict[str, Any]:
    theirs = _by_sacct(spent) if spent is not None else _held(0, 0, 0, 0)
    ours = _by_us(own) if own is not None else _held(0, 0, 0, 0)
    return {
        "cell": cell["id"],
        "label": cell["label"],
        "stage": cell["stage"],
        "job": spent.job if spent is not None else own.job if own is not None else "",
        "started": own.started if own is not None else spent.start if spent is not None else None,
        "why": _why(spent, own),
        "sacct_seconds": spent.elapsed_s if spent is not None else None,
        "own_seconds": own.seconds if own is not None else None,
        **_less(theirs, ours),
    }


def _why(spent: Spent | None, own: Attempt | None) -> str:
    """What explains that the books differ on an attempt."""
    if own is None:
        return "ended before its task could note anything"
    if spent is None:
        return "sacct does not know its job" if own.job else "was no job of Slurm"
    if own.how == LOST:
        return "was killed: its own notes end at its last word"
    if spent.gpus != own.gpus:
        return "GPUs are counted differently"
    if (spent.node_count, spent.cpus) != (own.nodes, own.cpus):
        return "nodes or cores are counted differently"
    return "the job's start and end around its task"
