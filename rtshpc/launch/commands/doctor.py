"""`doctor`: what is and is not usable on this machine."""

from __future__ import annotations

import json

import click

from rtshpc.launch.commands.options import runs_option

SIGNS = {"ok": "ok  ", "off": "off ", "bad": "BAD "}


@click.command(short_help="Tell what works on this machine, or at a site.")
@runs_option
@click.option("--site", metavar="NAME", help="Examine a cluster too: a name of configs/sites, or a file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(runs: str, site: str | None, as_json: bool) -> int:
    """Tell what works on this machine, what does not, and what to do about it.

    With --site, also whether a cluster takes what the site file asks for: account, partition, limits, image, binds, clocks.
    Nothing is submitted. Exit code 1 when something that every run, or every run there, needs is missing.
    """
    from pathlib import Path

    from rtshpc.core.load import load_site
    from rtshpc.launch.doctor.machine import examine

    found = load_site(site) if site is not None else None
    findings = examine(Path(runs))
    if found is not None:
        from rtshpc.launch.doctor.cluster import examine_site

        findings += examine_site(found, Path(runs))
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        for finding in findings:
            advice = f" -> {finding.advice}" if finding.advice else ""
            click.echo(f"{SIGNS[finding.state]} {finding.name}: {finding.found}{advice}")
    return int(any(finding.state == "bad" for finding in findings))
