"""`retry`: run again what failed or is missing in a run folder."""

from __future__ import annotations

import click

from rtshpc.launch.commands.options import run_folder, runs_option


@click.command(short_help="Run failed and missing cells again.")
@click.argument("run")
@runs_option
def retry(run: str, runs: str) -> int:
    """Run the failed and missing cells of RUN again, with the config of the run."""
    paths = run_folder(run, runs)
    from rtshpc.core.load import read_run_config
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import plan_in
    from rtshpc.launch.status import read_plan

    config, _ = read_run_config(paths.config)
    until = str(read_plan(paths)["stages"][-1]["stage"])
    return launch(lambda: plan_in(config, paths, until))
