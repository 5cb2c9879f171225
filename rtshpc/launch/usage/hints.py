"""What to ask for next time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rtshpc.launch.usage.taken import GIB, Efficiency, Taken, by_end, unit_of

ENOUGH = 1.3
"""Memory advised is the peak seen times this."""


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
    total, unit = sum(ends.values()), unit_of(taken)
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


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
