"""`logs`, `cancel` and `retry`: what to do about the cells that `status` shows."""

from __future__ import annotations

from dataclasses import replace

import click

from rtshpc.launch.commands.options import run_folder, runs_option


@click.command(short_help="Show the log of a cell.")
@click.argument("run")
@click.argument("cell")
@runs_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the cell is over.")
def logs(run: str, cell: str, runs: str, follow: bool) -> int:
    """Print the log of CELL (an id, the beginning of one, or words of its label) of RUN.

    It holds all attempts of the cell's last job, the latest at the end. Exit code 1 when there is none yet.
    """
    paths = run_folder(run, runs)
    from rtshpc.launch.jobs import follow_log, log_of
    from rtshpc.launch.status import find_planned, run_status

    name = str(find_planned(paths, cell)["id"])
    if follow:
        follow_log(paths, name, click.echo)
        return 0
    text = log_of(paths, name)
    if text is None:
        row = next(row for row in run_status(paths)["cells"] if row["id"] == name)
        click.echo(
            f"{row['label']}: no log yet; {row['state']}{': ' + row['reason'] if row['reason'] else ''}", err=True
        )
        return 1
    click.echo(text, nl=not text.endswith("\n"))
    return 0


@click.command(short_help="Cancel Slurm jobs of a run.")
@click.argument("run")
@click.argument("cell", required=False)
@runs_option
def cancel(run: str, cell: str | None, runs: str) -> int:
    """Cancel the Slurm jobs of RUN, or those of CELL and of all that builds on it.

    What was saved stays: `retry` goes on from there. A sweep that runs here is ended by Ctrl-C.
    """
    paths = run_folder(run, runs)
    from rtshpc.launch.jobs import cancel_jobs
    from rtshpc.launch.status import find_planned

    only = str(find_planned(paths, cell)["id"]) if cell is not None else None
    told = cancel_jobs(paths, only)
    click.echo("\n".join(told))
    return 0


@click.command(short_help="Run failed and missing cells again.")
@click.argument("run")
@click.option(
    "--failed",
    "wanted",
    flag_value="failed",
    multiple=True,
    help="Cells that failed or were cancelled, and what builds on them.",
)
@click.option(
    "--missing", "wanted", flag_value="missing", multiple=True, help="Cells that nobody works on and that never failed."
)
@click.option("--oom", "wanted", flag_value="oom", multiple=True, help="Cells that ran out of memory, with more of it.")
@click.option("--site", metavar="NAME", help="Run them at another site: a name of configs/sites, or a file.")
@click.option("--set", "sets", multiple=True, metavar="site.A=B", help="Override a key of the site. Repeatable.")
@runs_option
def retry(run: str, wanted: tuple[str, ...], site: str | None, sets: tuple[str, ...], runs: str) -> int:
    """Run cells of RUN again, with the config of the run: by default all that are not done.

    With every cell go those that build on it. Cells that Slurm still has are left alone, trainings go on from their
    checkpoint. --oom gives twice the node's memory, or lets trainings work on half as many chips at once on a GPU, with
    the same batch and result, unless --site or --set says what to give; it stays so for the run.
    """
    paths = run_folder(run, runs)
    from rtshpc.core.load import load_run
    from rtshpc.launch.jobs import choose, refuse_other_keys, with_more_memory
    from rtshpc.launch.launch import launch
    from rtshpc.launch.plan import plan_again
    from rtshpc.launch.status import read_plan, run_status

    refuse_other_keys(sets)
    config = load_run(paths.config, sets, site)
    until = str(read_plan(paths)["stages"][-1]["stage"])
    only = choose(paths, wanted) if wanted else None
    if "oom" in wanted and site is None and not sets:
        before, config = config.site, with_more_memory(config, run_status(paths)["cells"], paths)
        for key in ("memory_gb", "micro_batch"):
            if getattr(before, key) != getattr(config.site, key):
                click.echo(f"{paths.root}: site.{key} is {getattr(config.site, key)} from now on")
    return launch(lambda: replace(plan_again(config, paths, until), only=only))
