"""`report`: make a run's report from the records that are there."""

from __future__ import annotations

import subprocess

import click

from rtshpc.launch.commands.options import run_folder, runs_option


@click.command(short_help="Make the report of a run.")
@click.argument("run")
@runs_option
def report(run: str, runs: str) -> int:
    """Write the report of RUN (of a map run: layers and page) from its records, and print its path."""
    paths = run_folder(run, runs)
    from rtshpc.core.errors import RunError
    from rtshpc.core.grid import cells
    from rtshpc.core.load import read_run_config, write_cell
    from rtshpc.core.paths import make_private
    from rtshpc.core.records import read_plan
    from rtshpc.hpc.executor import task_command
    from rtshpc.launch.plan import map_plan

    plan = read_plan(paths.plan)
    if plan is not None and any(cell["stage"] == "scale" for cell in plan["cells"]):
        raise RunError(f"{paths.root}: is a scaling study; `scale CONFIG --show` shows it, `allocation` reports it")
    config, provenance = read_run_config(paths.config)
    if config.map.model:
        cell = map_plan(config, paths).cells[-1]
    else:
        cell = cells(config, str(provenance.get("data_fingerprint", "")))[-1]
    make_private(paths.cell(cell.id).root)
    write_cell(paths.cell(cell.id).config, cell)
    line = task_command(cell.stage, str(paths.root), cell.id)
    code = subprocess.run(line, stdout=subprocess.DEVNULL, check=False).returncode
    if code == 0:
        click.echo(paths.report_page)
    return code
