"""Attempts by whichever books know of them, and what they took together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rtshpc.core.config import SiteConfig
from rtshpc.hpc.accounting import OUT_OF_MEMORY, Spent
from rtshpc.hpc.books import BAD_NODE, LOST, STOPPED, Attempt
from rtshpc.hpc.site import node_share

GIB = 1 << 30
HOUR = 3600.0

SLACK_SECONDS = 10.0
"""Clocks of nodes and of the controller may differ by so much."""

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
        cpus: cores it had; 0 where unknown.
        limit_s: time limit, s.
        memory_bytes: memory it had.
        peak_bytes: highest resident memory.
        cpu_s: processor time.
        gpu_share: mean use of its GPUs, 0 to 1.
        gpu_peak_bytes: peak of the CUDA allocator.
        nodes: nodes it had, or had a part of.
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
    nodes: int = 1

    @property
    def node_hours(self) -> float:
        """Nodes it was on, whole or in part, times hours."""
        return self.nodes * self.seconds / HOUR

    @property
    def gpu_hours(self) -> float:
        """GPUs held times hours."""
        return self.gpus * self.seconds / HOUR

    @property
    def cpu_hours(self) -> float | None:
        """Cores held times hours; None where no books tell how many it held."""
        return core_hours(self.cpus, self.seconds)


def core_hours(cores: int, seconds: float) -> float | None:
    """Cores held times hours; None of an attempt that took time on nobody knows how many."""
    return cores * seconds / HOUR if cores or not seconds else None


def added(hours: Iterable[float | None]) -> float | None:
    """Their sum; None where one of them is unknown, for a part would be taken for the whole."""
    found = list(hours)
    known = [one for one in found if one is not None]
    return sum(known) if len(known) == len(found) else None


@dataclass(frozen=True)
class Efficiency:
    """What attempts took together; None where no books tell.

    Attributes:
        attempts: how many.
        gpu_hours: GPU-hours held.
        cpu_hours: core-hours held.
        node_hours: hours on nodes, whole or in part.
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
    cpu_hours: float | None
    node_hours: float
    longest_seconds: float | None
    limit_seconds: int | None
    memory_asked_bytes: int | None
    memory_peak_bytes: int | None
    memory_share: float | None
    cpu_share: float | None
    gpu_share: float | None
    gpu_peak_bytes: int | None


Pair = tuple[Spent | None, Attempt | None]
"""One attempt as sacct and as our own books tell it; None where one of them does not know of it."""


def matched(spent: Sequence[Spent], noted: Sequence[Attempt]) -> list[Pair]:
    """The attempts on one cell: sacct's that ran, each with what it noted itself, then those that sacct does not know.

    Attempts of one job are one to one where there are as many of both; else those belong together of which one began while
    the other ran. None is counted twice: sacct knows more of a job than it noted, or the job noted more than sacct knows.

    Args:
        spent: what sacct says, oldest first.
        noted: what the attempts themselves said, oldest first.
    """
    ran = [one for one in spent if one.elapsed_s or one.cpu_s]
    own: dict[int, int] = {}  # places in `ran` and in `noted`
    for job in dict.fromkeys(one.job for one in ran):
        places = [place for place, one in enumerate(ran) if one.job == job]
        told = [number for number, one in enumerate(noted) if one.job == job]
        same = len(places) == len(told)
        for begun in (
            () if same else (_began_in, None)
        ):  # what no time tells apart (clocks of other zones) goes by order
            for place in places:
                fits = [number for number in told if begun is None or begun(ran[place], noted[number])]
                if place not in own and fits:
                    own[place] = fits[0]
                    told.remove(fits[0])
        own |= zip(places, told, strict=True) if same else ()
    alone = [one for number, one in enumerate(noted) if number not in own.values()]
    return [
        *((one, noted[own[place]] if place in own else None) for place, one in enumerate(ran)),
        *((None, one) for one in alone),
    ]


def _began_in(spent: Spent, noted: Attempt) -> bool:
    """Whether an attempt began while sacct's ran; sacct tells local time."""
    if spent.start is None:
        return False
    began = datetime.fromisoformat(spent.start).astimezone().timestamp()
    after = datetime.fromisoformat(noted.started).timestamp() - began
    return -SLACK_SECONDS <= after <= spent.elapsed_s + SLACK_SECONDS


def taken_by(pairs: Sequence[Pair], done: bool) -> list[Taken]:
    """The attempts on one cell: by sacct where it knows them, completed by what they noted; else by that alone.

    Args:
        pairs: see `matched`.
        done: the cell has a valid record: its last attempt that was not cut off made it.
    """
    gpus = {own.job: own.gpus for _, own in pairs if own is not None}
    found = [
        _from_sacct(spent, own, gpus.get(spent.job, 0), done) if spent is not None else _from_notes(own)
        for spent, own in pairs
        if spent is not None or own is not None
    ]
    return [one for one in found if one is not None]


def _from_sacct(spent: Spent, own: Attempt | None, noted_gpus: int, done: bool) -> Taken:
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
        gpu_peak_bytes=own.gpu_peak_bytes if own is not None else None,
        nodes=spent.node_count,
    )


def _from_notes(attempt: Attempt | None) -> Taken | None:
    if attempt is None or attempt.seconds is None:
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
        nodes=attempt.nodes,
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
        cpu_hours=added(one.cpu_hours for one in taken),
        node_hours=sum(one.node_hours for one in taken),
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


def charge(taken: Sequence[Taken], site: SiteConfig) -> float | None:
    """What attempts cost at a site, in its own unit; None where it tells no price, or nobody knows what was held."""
    if site.charge_per_gpu_hour:
        return round(site.charge_per_gpu_hour * sum(one.gpu_hours for one in taken), 4)
    if not site.charge_per_node_hour:
        return None
    if site.node_cpus and any(one.cpu_hours is None for one in taken):
        return None  # a share of a node in cores that nobody knows would be none of it
    held = [(node_share(site, one.gpus, one.cpus, (one.memory_bytes or 0) / GIB), one.seconds) for one in taken]
    return round(site.charge_per_node_hour * sum(nodes * seconds / HOUR for nodes, seconds in held), 4)


def unit_of(taken: Sequence[Taken]) -> str:
    """What their hours are counted in: of GPUs, else of cores where all are known, else of nodes."""
    if any(one.gpus for one in taken):
        return "GPU-hours"
    return "node-hours" if added(one.cpu_hours for one in taken) is None else "core-hours"


def by_end(taken: Sequence[Taken]) -> dict[str, float]:
    """Hours, in `unit_of` them, by what became of the attempt."""
    key = {"GPU-hours": "gpu_hours", "core-hours": "cpu_hours", "node-hours": "node_hours"}[unit_of(taken)]
    return {name: sum(getattr(one, key) for one in taken if one.end == name) for name in CLASSES}


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for JSON: four digits behind the point are more than any clock gives."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _share(used: float, held: float) -> float | None:
    return used / held if held > 0 else None
