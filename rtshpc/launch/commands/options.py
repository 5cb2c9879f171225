"""Arguments that several commands share, and the config they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rtshpc.core.config import RunConfig
    from rtshpc.core.paths import RunPaths

Function = TypeVar("Function", bound=Callable[..., Any])


def sweep_options(function: Function) -> Function:
    """CONFIG, --site, --set, --until and --runs."""
    until = click.option("--until", metavar="STAGE", help="Stop after this stage (preprocess includes its index).")
    return config_options(until(function))


def config_options(function: Function) -> Function:
    """CONFIG, --site, --set and --runs."""
    for option in (
        runs_option,
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="A.B=C",
            help="Override a key, e.g. --set finetune.epochs=3; the value is read as YAML. Repeatable.",
        ),
        click.option("--site", metavar="NAME", help="Where to run: a name of configs/sites, or a file."),
        click.argument("config", default="demo", metavar="[CONFIG]"),
    ):
        function = option(function)
    return function


def runs_option(function: Function) -> Function:
    """--runs, the folder of run folders."""
    return click.option(
        "--runs", default="runs", show_default=True, metavar="DIR", type=click.Path(), help="Folder of run folders."
    )(function)


def load_config(config: str, site: str | None, sets: Sequence[str]) -> RunConfig:
    """The resolved sweep; `--site` names a config, and `--set site.x=y` goes on top of it."""
    from rtshpc.core.load import load_run

    return load_run(config, sets, site)


def run_folder(run: str, runs: str) -> RunPaths:
    """The folder that RUN means."""
    from rtshpc.launch.status import find_run

    return find_run(run, Path(runs))
