"""`sweep` and `plan`: do what is missing of a sweep, or show what that would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtshpc.launch.commands.options import load_config, sweep_options

if TYPE_CHECKING:
    from rtshpc.launch.plan import Plan


@click.command(short_help="Run what is missing of a sweep.")
@sweep_options
@click.option("--prepare", is_flag=True, help="Only write the run folder, and print how to run it with slurm/*.sbatch.")
def sweep(config: str, site: str | None, sets: tuple[str, ...], until: str | None, runs: str, prepare: bool) -> int:
    """Run a sweep: shards, pretraining, fusion, scores, memory, report.

    CONFIG is a name of configs/sweeps (default: demo) or a YAML file. Only what is missing is done: after
    a kill, a failure or a new grid value, run the same line again.
    """
    resolved = load_config(config, site, sets)
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import make_plan

    return launch(lambda: make_plan(resolved, Path(runs), until), prepare)


@click.command(short_help="Show what a sweep would do.")
@sweep_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--sbatch", "as_scripts", is_flag=True, help="Print the batch scripts that a Slurm site would be given.")
def plan(
    config: str, site: str | None, sets: tuple[str, ...], until: str | None, runs: str, as_json: bool, as_scripts: bool
) -> int:
    """Show stages, arrays and cells of a sweep, and what is already done. Writes nothing."""
    resolved = load_config(config, site, sets)
    from rtshpc.launch.plan import make_plan
    from rtshpc.launch.submit import refuse_other_data

    found = make_plan(resolved, Path(runs), until)
    refuse_other_data(found)
    return show_plan(found, as_json, as_scripts)


def show_plan(found: Plan, as_json: bool, as_scripts: bool) -> int:
    """Print a plan: as text, as JSON, or as the batch scripts of a Slurm site."""
    from rtshpc.launch.submit import scripts

    if as_scripts:
        for array, text in scripts(found):
            click.echo(f"# JOB{array.number + 1}: {array.stage}, {len(array.cells)} cells\n{text}")
        return 0
    facts = found.describe()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return 0
    click.echo(f"{facts['path']}  (site {facts['site']}, data {facts['data']})")
    if facts["features"] is not None:
        click.echo(_disk(facts["features"]))
    for stage in facts["stages"]:
        click.echo(f"\n{stage['stage']}: {stage['cells']} cells, {stage['done']} done, {stage['todo']} to do")
        for cell in facts["cells"]:
            if cell["stage"] == stage["stage"]:
                mark = "done" if cell["done"] else "to do" if cell["todo"] else "-"
                click.echo(f"  {cell['id']}  {mark:<5}  {cell['label']}")
    return 0


def _disk(need: dict[str, Any]) -> str:
    """How much disk the feature cache takes, and what that figure rests on."""
    chips = f"{need['chips']['train']} train and {need['chips']['val']} val chips"
    basis = f"counted: {chips}" if need["exact"] else f"estimated before preprocess: about {chips}"
    sizes = [f"{need[key] / 1e9:.3g} GB" for key in ("bytes", "left_bytes", "free_bytes")]
    short = "; NOT ENOUGH" if need["left_bytes"] > need["free_bytes"] else ""
    return f"feature cache: {sizes[0]} of disk ({basis}), {sizes[1]} to write, {sizes[2]} free{short}"
