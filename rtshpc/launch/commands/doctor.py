"""`doctor`: what is and is not usable on this machine."""

from __future__ import annotations

import json

import click

from rtshpc.launch.commands.options import runs_option

SIGNS = {"ok": "ok  ", "off": "off ", "bad": "BAD "}


@click.command(short_help="Tell what works on this machine.")
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(runs: str, as_json: bool) -> int:
    """Tell what works on this machine, what does not, and what to do about it.

    Exit code 1 when something that every run needs is missing.
    """
    from pathlib import Path

    from rtshpc.launch.doctor.machine import examine

    findings = examine(Path(runs))
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        for finding in findings:
            advice = f" -> {finding.advice}" if finding.advice else ""
            click.echo(f"{SIGNS[finding.state]} {finding.name}: {finding.found}{advice}")
    return int(any(finding.state == "bad" for finding in findings))
