"""`report` and `allocation`: what the records of runs say, for readers and for those who grant GPU-hours."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from rtshpc.launch.commands.options import run_folder, runs_option

REPORT_LIBRARIES = ("cv2", "jinja2", "matplotlib", "numpy")
"""What a report of records needs besides the base install."""


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


@click.command(short_help="Ask for an allocation on measured grounds.")
@click.argument("run", nargs=-1, required=True)
@click.option(
    "--request", required=True, metavar="FILE", help="What is asked for: a name of configs/requests, or a file."
)
@click.option("--programme", default="generic", show_default=True, metavar="NAME", help="Whose questions to answer.")
@click.option("--out", metavar="DIR", type=click.Path(), help="Folder of the report.  [default: RUN/allocation]")
@runs_option
def allocation(run: tuple[str, ...], request: str, programme: str, out: str | None, runs: str) -> int:
    """Write the report that asks for an allocation from the records of RUN...: HTML, Markdown, CSV and PDF.

    RUNs are sweeps, scaling studies and map runs; what they spent is summed up first. It runs where its libraries are: in
    this environment, else in the image of the first run.
    """
    found = [run_folder(name, runs) for name in run]
    from rtshpc.core.errors import RunError
    from rtshpc.core.load import find_config, read_run_config
    from rtshpc.hpc.container import command, refuse_start
    from rtshpc.launch.usage import keep_usage

    folder = Path(out).absolute() if out else found[0].allocation.root
    files = [find_config("request", request).absolute(), find_config("programme", programme).absolute()]
    options = ["--request", str(files[0]), "--programme", str(files[1]), "--out", str(folder)]
    for paths in found:
        try:
            keep_usage(paths)
        except RunError as error:  # the report says what it does not know of this run
            click.echo(f"note: {error}", err=True)
    line = ["-m", "rtshpc.stages", "allocation", *(str(paths.root) for paths in found), *options]
    if all(map(find_spec, REPORT_LIBRARIES)):
        return subprocess.run([sys.executable, *line], check=False).returncode
    config, provenance = read_run_config(found[0].config)
    refuse_start(config.site, provenance.get("image"))
    folders = [*(paths.root for paths in found), Path.cwd(), folder.parent, *(file.parent for file in files)]
    return subprocess.run(command(config.site, line, folders, sys.executable), check=False).returncode
