"""`check`, `params`, `weights`, `track` and `assess`: tools that need pixels or tensors, so they run as processes where those are installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import click

PASS_ON: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}
"""Every argument, `--help` too, is the tool's own."""


@click.command(context_settings=PASS_ON, short_help="Judge rasters, pairs or a data config.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def check(arguments: tuple[str, ...]) -> int:
    """Judge rasters, image + mask pairs or a data config: accept, warn or reject, and why."""
    return _tool("check", arguments)


@click.command(context_settings=PASS_ON, short_help="Count the parameters of a model.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def params(arguments: tuple[str, ...]) -> int:
    """Count the parameters of a model or sweep config, total and trainable, per module."""
    return _tool("params", arguments)


@click.command(context_settings=PASS_ON, short_help="Inspect or convert a file of weights.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def weights(arguments: tuple[str, ...]) -> int:
    """Say what a file of weights holds, or write it under Detectron2's names: inspect FILE, convert FILE OUT."""
    return _tool("weights", arguments)


@click.command(context_settings=PASS_ON, short_help="Link the slumps of several dates.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def track(arguments: tuple[str, ...]) -> int:
    """Link the slumps of maps of several dates: growth, new, merged, split, vanished; as one table and layer."""
    return _tool("track", arguments)


@click.command(context_settings=PASS_ON, short_help="Compare a map with reference polygons.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def assess(arguments: tuple[str, ...]) -> int:
    """Compare a map with reference polygons: precision, recall and F1 by instances and by area, per site."""
    return _tool("assess", arguments)


def _tool(name: str, arguments: tuple[str, ...]) -> int:
    line = [sys.executable, "-m", "rtshpc.stages", name, *arguments]
    return subprocess.run(line, check=False).returncode
