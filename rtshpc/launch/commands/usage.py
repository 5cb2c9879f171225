"""`usage`: what a run has cost, and what it asked for in vain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from rtshpc.launch.commands.options import run_folder, runs_option
from rtshpc.launch.commands.status import clock

GIB = 1 << 30

FEW = 5
"""So many attempts are named."""

SOURCES = {
    "sacct": "by Slurm's accounting",
    "own books": "by what the tasks noted themselves: sacct does not answer here or knows nothing of them",
    "both": "by Slurm's accounting where it knows an attempt, else by what the task noted",
    "none": "nothing has run yet",
}


@click.command(short_help="Show GPU-hours and efficiency of a run.")
@click.argument("run")
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with figures of every cell.")
def usage(run: str, runs: str, as_json: bool) -> int:
    """Show what RUN took over all attempts: GPU-hours, memory, cores and GPUs used of those asked for, and hints.

    A dash is what no books tell, e.g. the use of GPUs where the cluster does not sample it. When nothing of RUN is at work, what
    is shown is kept in its usage.json.
    """
    paths = run_folder(run, runs)
    from rtshpc.launch.usage import keep_usage

    facts = keep_usage(paths)
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    total = facts["total"]
    price = "".join(f", {amount:.2f} charged" for amount in (facts["charge"],) if amount is not None)
    yield (
        f"{facts['path']}: {total['gpu_hours']:.2f} GPU-hours, {total['node_hours']:.2f} node-hours,"
        f" {_cores(total['cpu_hours'])} in {total['attempts']} attempts{price} ({SOURCES[facts['source']]})"
    )
    ends = ", ".join(f"{hours:.2f} {name}" for name, hours in facts["by_end"].items() if hours)
    if ends:
        yield f"{facts['unit']} by what became of the attempt: {ends}"
    if facts["stages"]:
        yield f"{'stage':<11}{'tries':>6}{'GPU-h':>9}{'core-h':>9}{'longest':>10}{'memory':>15}{'cores':>7}{'GPU':>6}"
    for stage in facts["stages"]:
        asked, peak = stage["memory_asked_bytes"], stage["memory_peak_bytes"]
        memory = f"{peak / GIB:.1f}" + (f" of {asked / GIB:.1f} G" if asked else " G") if peak else "-"
        longest = clock(stage["longest_seconds"]) if stage["longest_seconds"] is not None else "-"
        yield (
            f"{stage['stage']:<11}{stage['attempts']:>6}{stage['gpu_hours']:>9.2f}{_hours(stage['cpu_hours']):>9}"
            f"{longest:>10}{memory:>15}{_percent(stage['cpu_share']):>7}{_percent(stage['gpu_share']):>6}"
        )
    yield from _both_books(facts["reconciled"])
    for hint in facts["hints"]:
        yield f"hint: {hint}"


def _both_books(found: dict[str, Any]) -> Iterator[str]:
    """What sacct and our own books say, and which attempts explain the difference."""
    if found["sacct"] is None:
        return
    for name, words in (("sacct", "sacct    "), ("own", "own books")):
        side = found[name]
        yield (
            f"{words}: {side['attempts']} attempts, {side['gpu_hours']:.2f} GPU-hours, {side['node_hours']:.2f} node-hours,"
            f" {_cores(side['cpu_hours'])}"
        )
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in found["attempts"]:
        reasons.setdefault(row["why"], []).append(row)
    for why, rows in reasons.items():
        gpus, nodes = (sum(row[key] for row in rows) for key in ("gpu_hours", "node_hours"))
        jobs = ", ".join(row["job"] or row["cell"] for row in rows[:FEW]) + (", ..." if len(rows) > FEW else "")
        yield f"they differ by {gpus:+.2f} GPU-hours, {nodes:+.2f} node-hours: {why} ({len(rows)} attempts: {jobs})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cores(hours: float | None) -> str:
    """Of attempts that do not tell the cores they held, nothing is counted."""
    return "no core-hours known" if hours is None else f"{hours:.2f} core-hours"
