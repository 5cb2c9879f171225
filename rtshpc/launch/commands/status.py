"""`status`: what happened to every cell of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click

from rtshpc.launch.commands.options import run_folder, runs_option

MOST_DONE = 40
"""Cells that are done are listed one by one in runs of up to so many cells; `--all` lists them always."""

QUIET = {"asked": "", "unasked": "", "silent": "; squeue cannot be asked from here: what the tasks left is shown"}


@click.command(short_help="Show what happened to every cell of a run.")
@click.argument("run")
@runs_option
@click.option("--watch", is_flag=True, help="Show it again and again until nothing works on the run any more.")
@click.option(
    "--every", default=10.0, show_default=True, metavar="SECONDS", help="Pause of --watch.", type=click.FloatRange(1)
)
@click.option("--all", "everything", is_flag=True, help="List every cell, also of large runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: str, runs: str, watch: bool, every: float, everything: bool, as_json: bool) -> int:
    """Show every cell of RUN (a name under the folder of runs, or a folder), by stage.

    State, why it waits or failed, when Slurm expects to start it, run time of its limit, attempt, last metric, log.
    A cell is `done` when it has a valid record. Slurm is asked once; without squeue or sacct, the run folder tells.
    """
    paths = run_folder(run, runs)
    from rtshpc.launch.display import watching
    from rtshpc.launch.status import run_status

    facts = run_status(paths)
    if watch:
        with watching() as show:
            while show(_text(facts, everything, as_json)) and _works(facts):
                time.sleep(every)
                facts = run_status(paths)
    else:
        click.echo(_text(facts, everything, as_json))
    if facts["finished"]:
        from rtshpc.launch.usage import keep_usage, usage_kept

        if not usage_kept(paths):  # while Slurm's accounting still knows
            keep_usage(paths)
    return 0


def _text(facts: dict[str, Any], everything: bool, as_json: bool) -> str:
    return json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts, everything))


def _works(facts: dict[str, Any]) -> bool:
    from rtshpc.launch.status import HELD_CELL

    return facts["launcher"] or any(cell["state"] in HELD_CELL for cell in facts["cells"])


def _lines(facts: dict[str, Any], everything: bool) -> Iterator[str]:
    yield f"{facts['path']}: {_summary(facts)}{QUIET[facts['slurm']]}"
    cells: list[dict[str, Any]] = facts["cells"]
    everything = everything or len(cells) <= MOST_DONE
    for stage in facts["stages"]:
        counts = ", ".join(f"{count} {state}" for state, count in stage.items() if state != "stage" and count)
        yield f"{stage['stage']}: {counts}"
        for cell in cells:
            if cell["stage"] == stage["stage"] and (everything or cell["state"] != "done"):
                yield f"  {cell['state']:<9}  {cell['id']}  {cell['label']}{_detail(cell)}"
    if facts["report"]:
        yield f"report: {facts['report']}"


def _summary(facts: dict[str, Any]) -> str:
    states = [cell["state"] for cell in facts["cells"]]
    if facts["launcher"]:
        return "a launcher works on it"
    if facts["finished"]:
        return "all cells are done"
    left = len(states) - states.count("done")
    if _works(facts):
        return f"{left} cells are not done, {states.count('running')} of them run, {states.count('submitted')} wait in Slurm"
    return f"{left} cells are not done, {states.count('failed')} of them failed; `retry` goes on"


def _detail(cell: dict[str, Any]) -> str:
    """What there is to say of a cell, in the order in which one asks."""
    told: list[str] = []
    if cell["error"] or cell["reason"]:
        told.append(str(cell["error"] or cell["reason"]))
    if cell["start"]:
        told.append(f"start expected {cell['start'].replace('T', ' ')}")
    if cell["elapsed_seconds"] is not None:
        of = f" of {clock(cell['limit_seconds'])}" if cell["limit_seconds"] else ""
        told.append(f"{clock(cell['elapsed_seconds'])}{of}" + (f" on {cell['node']}" if cell["node"] else ""))
    progress: dict[str, Any] = cell["progress"] or {}
    if progress:
        told.append(f"{progress['phase']} {progress['done']}/{progress['total']} {progress['text']}".strip())
    if cell["seconds"] is not None:
        told.append(clock(cell["seconds"]))
    if cell["metric"]:
        told.append(str(cell["metric"]))
    if cell["attempts"] > 1:
        told.append(f"attempt {cell['attempts']}" if cell["state"] == "running" else f"{cell['attempts']} attempts")
    if cell["log"] and cell["state"] in ("running", "failed", "cancelled"):
        told.append(f"log: {cell['log']}")
    return f"  {'; '.join(told)}" if told else ""


def clock(seconds: float) -> str:
    """`12 s`, `3:05`, `1:02:03` or `2-01:02:03`, as Slurm writes times."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    days, rest = divmod(whole, 86400)
    hours, minutes = divmod(rest // 60, 60)
    if not days and not hours:
        return f"{minutes}:{rest % 60:02}"
    return (f"{days}-{hours:02}" if days else f"{hours}") + f":{minutes:02}:{rest % 60:02}"
