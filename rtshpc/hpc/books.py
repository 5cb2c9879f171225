"""Our own books: what every attempt on a cell was given and took, noted by the attempt itself.

An attempt writes a line in `attempts.jsonl` when it begins and one in `spent.jsonl` when it ends. One that was killed
does not write the second; then the last time it told its progress is its end. So GPU-hours are known without
Slurm's accounting, to within the pause between two steps.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rtshpc.core.paths import CellPaths, RunPaths
from rtshpc.core.records import append_line, read_lines
from rtshpc.core.sizing.measured import peak_rss
from rtshpc.hpc.site import node_name, place_in_step

LOST = "lost"
"""How an attempt ended that could not say it: killed, out of memory, or with its node."""

STOPPED = "stopped"
"""How an attempt ended that saved its state and left on a signal."""

BAD_NODE = "bad node"
"""How an attempt ended that found its node or GPU broken."""

LAUNCHED = "RTSHPC_LAUNCHED"
"""Environment variable of local tasks: the launch that they are of."""

AVOIDED_HOURS = 24.0
"""So long new jobs of a run avoid a node that one of its tasks found broken: it may be mended by then."""


@dataclass(frozen=True)
class Attempt:
    """One attempt on a cell.

    Attributes:
        started: UTC, ISO 8601.
        job: the Slurm job, `123` or `123_4`; empty outside Slurm.
        host: its (first) node.
        gpus: GPUs it had.
        cpus: cores it had; 0 where unknown.
        seconds: wall time; None while it runs.
        how: done, failed, stopped (saved and left on a signal), bad node or lost; empty while it runs.
        memory_bytes: memory that Slurm gave it; None outside Slurm.
        peak_bytes: highest resident memory of a process of it; None when it could not say.
        cpu_s: processor time of all its processes, s; None when it could not say.
        gpu_peak_bytes: peak of the CUDA allocator; None without CUDA.
        nodes: nodes it had.
    """

    started: str
    job: str
    host: str
    gpus: int
    cpus: int
    seconds: float | None = None
    how: str = ""
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    cpu_s: float | None = None
    gpu_peak_bytes: int | None = None
    nodes: int = 1


def begin(folder: CellPaths, started: str, cores: int = 0) -> int:
    """Note that an attempt begins, and when the one before it was last heard of, if that left without a word.

    Args:
        folder: the cell.
        started: UTC, ISO 8601.
        cores: threads of all its processes, which count where Slurm has not given it cores; 0 = unknown.

    Returns:
        Its number, from 1.
    """
    before = read_lines(folder.attempts)
    if before and len(before) not in _ends(folder):
        last = str(before[-1]["started"])
        append_line(folder.spent, {"attempt": len(before), "how": LOST, "ended": _last_word(folder, last)})
    given = _given()
    given["cpus"] = given["cpus"] or cores
    append_line(folder.attempts, {"started": started, "host": platform.node(), "pid": os.getpid(), **given})
    return len(before) + 1


def end(folder: CellPaths, number: int, how: str) -> None:
    """Note that attempt `number`, which this process made, ends, and what it took; a full disk is passed over."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    torch = sys.modules.get("torch")
    place = place_in_step()
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    taken = {
        "attempt": number,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "how": how,
        "peak_bytes": max(peak_rss(), children.ru_maxrss * 1024),
        # Of the tasks of a training this one alone writes here; the others have worked as much.
        "cpu_s": round(
            (place.size if place else 1) * (own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime), 1
        ),
        "gpu_peak_bytes": int(torch.cuda.max_memory_reserved()) if torch is not None and on_gpu else None,
    }
    with suppress(OSError):
        append_line(folder.spent, taken)


def note_bad_node(paths: RunPaths, cell: str, why: str) -> None:
    """Note that a task of `cell` found the node it runs on broken; a disk that takes no line is passed over."""
    job = _given()["job"]
    facts = {"node": node_name(), "cell": cell, "job": job, "why": why, "time": time.time()}
    with suppress(OSError):
        append_line(paths.bad_nodes, facts)


def bad_nodes(paths: RunPaths) -> dict[str, str]:
    """Nodes that tasks of the run found broken in the last AVOIDED_HOURS, by name, and what they saw."""
    since = time.time() - AVOIDED_HOURS * 3600
    rows = [row for row in read_lines(paths.bad_nodes) if "node" in row and float(row.get("time", 0)) >= since]
    return dict(sorted((str(row["node"]), str(row.get("why", ""))) for row in rows))


def attempts(folder: CellPaths, running: bool = False) -> list[Attempt]:
    """Every attempt on a cell, oldest first.

    Args:
        folder: the cell.
        running: the last attempt may still be at work; without, one that has not said its end is lost.
    """
    ends = _ends(folder)
    found = [_begun(row) for row in read_lines(folder.attempts) if "started" in row]
    for place, attempt in enumerate(found):
        if place + 1 in ends:
            found[place] = _ended(attempt, ends[place + 1])
        elif place + 1 < len(found):  # books of an older form do not tell when it ended
            found[place] = replace(attempt, how=LOST, seconds=0.0)
        elif not running:
            found[place] = _ended(attempt, {"how": LOST, "ended": _last_word(folder, attempt.started)})
    return found


def _ends(folder: CellPaths) -> dict[int, dict[str, Any]]:
    """Number of an attempt -> the line of its end."""
    return {row["attempt"]: row for row in read_lines(folder.spent) if "attempt" in row and "ended" in row}


def _begun(row: Mapping[str, Any]) -> Attempt:
    gpus, cpus = int(row.get("gpus", 0)), int(row.get("cpus", 0))
    memory = row.get("memory_bytes")
    job, host = str(row.get("job", "")), str(row.get("host", ""))
    return Attempt(str(row["started"]), job, host, gpus, cpus, memory_bytes=memory, nodes=int(row.get("nodes", 1)))


def _ended(attempt: Attempt, row: Mapping[str, Any]) -> Attempt:
    began, ended = _time(attempt.started), _time(str(row["ended"]))
    return replace(
        attempt,
        seconds=max(0.0, ended - began),
        how=str(row.get("how", LOST)),
        peak_bytes=row.get("peak_bytes"),
        cpu_s=row.get("cpu_s"),
        gpu_peak_bytes=row.get("gpu_peak_bytes"),
    )


def _last_word(folder: CellPaths, started: str) -> str:
    """When the attempt that began at `started` last told its progress; its own begin if it never did."""
    latest = _time(started)
    for file in (folder.progress, folder.metrics):
        if file.is_file():
            latest = max(latest, file.stat().st_mtime)
    return datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")


def submission() -> tuple[str, str]:
    """(this job, what was submitted together with it): Slurm's numbers, here `host:pid` and the launch."""
    known, job = os.environ, _given()["job"]
    if job:
        return job, job.partition("_")[0]
    return f"{node_name()}:{os.getpid()}", f"{node_name()}:{known.get(LAUNCHED, os.getppid())}"


def _given() -> dict[str, Any]:
    """What Slurm gave this process; outside Slurm, the GPUs that the environment names."""
    known = os.environ
    array, element = known.get("SLURM_ARRAY_JOB_ID"), known.get("SLURM_ARRAY_TASK_ID")
    devices = known.get("CUDA_VISIBLE_DEVICES", "")
    named = [device for device in devices.split(",") if device.strip() not in ("", "-1", "NoDevFiles")]
    nodes = int(known.get("SLURM_JOB_NUM_NODES", "1"))
    memory = known.get("SLURM_MEM_PER_NODE", "")
    return {
        "job": f"{array}_{element}" if array and element else known.get("SLURM_JOB_ID", ""),
        "gpus": len(named) * nodes,
        "cpus": int(known.get("SLURM_CPUS_ON_NODE", "0")) * nodes,
        "memory_bytes": (int(memory) << 20) * nodes if memory.isdigit() else None,
        "nodes": nodes,
    }


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
