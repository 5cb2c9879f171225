"""`status`: how far a run is."""

from __future__ import annotations

import json
from typing import Any

import click

from rtshpc.launch.commands.options import run_folder, runs_option


@click.command(short_help="Show how far a run is.")
@click.argument("run")
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: str, runs: str, as_json: bool) -> int:
    """Show the state of every cell of RUN (a name under the folder of runs, or a folder)."""
    paths = run_folder(run, runs)
    from rtshpc.launch.status import run_status

    facts = run_status(paths)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return 0
    click.echo(f"{facts['path']}: {'a launcher works on it' if facts['launcher'] else _summary(facts)}")
    for cell in facts["cells"]:
        click.echo(f"  {cell['state']:<9}  {cell['label']}{_detail(cell)}")
    if facts["report"]:
        click.echo(f"report: {facts['report']}")
    return 0


def _summary(facts: dict[str, Any]) -> str:
    if facts["finished"]:
        return "all cells are done"
    failed = sum(cell["state"] == "failed" for cell in facts["cells"])
    left = sum(cell["state"] != "done" for cell in facts["cells"])
    return f"{left} cells are not done, {failed} of them failed; `retry` goes on"


def _detail(cell: dict[str, Any]) -> str:
    if cell["state"] == "done" and cell["seconds"] is not None:
        attempts = f", {cell['attempts']} attempts" if cell["attempts"] > 1 else ""
        return f"  ({cell['seconds']:.0f} s{attempts})"
    if cell["state"] == "failed":
        return f": {cell['error']}; log: {cell['log']}"
    progress: dict[str, Any] = cell["progress"] or {}
    return f"  {progress['phase']} {progress['done']}/{progress['total']} {progress['text']}" if progress else ""
