"""What a run has spent over all attempts, how much of what it asked for it used, and what to ask for next time."""

from rtshpc.launch.usage.hints import run_hints as run_hints, stage_hints as stage_hints
from rtshpc.launch.usage.reconcile import reconcile as reconcile
from rtshpc.launch.usage.run import keep_usage as keep_usage, run_usage as run_usage, usage_kept as usage_kept
from rtshpc.launch.usage.taken import (
    Efficiency as Efficiency,
    Pair as Pair,
    Taken as Taken,
    by_end as by_end,
    charge as charge,
    matched as matched,
    taken_by as taken_by,
    together as together,
    unit_of as unit_of,
)
