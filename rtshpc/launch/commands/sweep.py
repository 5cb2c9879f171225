"""`sweep`: do what is missing of a sweep."""

from __future__ import annotations

from pathlib import Path

import click

from rtshpc.launch.commands.options import load_config, sweep_options


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
