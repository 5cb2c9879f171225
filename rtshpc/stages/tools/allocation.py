"""Tool: the report that asks for an allocation, from the records of runs; see docs/allocation.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rtshpc.core.load import load_site
from rtshpc.core.paths import AllocationPaths, RunPaths
from rtshpc.core.sizing.request import GENERIC, load_programme, load_request
from rtshpc.report.allocation.evidence import read_evidence
from rtshpc.report.allocation.page import write_allocation


def main(arguments: Sequence[str]) -> int:
    """Write the report and print the path of its page.

    Raises:
        ConfigError: a file is not what it should be, or names what is not there.
        RunError: the report cannot be written into its folder.
    """
    given = _parser().parse_args(list(arguments))
    request, programme = load_request(given.request), load_programme(given.programme)
    site = load_site(request.site) if request.site else None
    evidence = read_evidence(given.runs, request, programme, site)
    paths = AllocationPaths(given.out) if given.out else RunPaths(given.runs[0]).allocation
    write_allocation(paths, evidence)
    print(paths.page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allocation", description="Report what runs have measured, to ask for more.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folders of runs: sweeps, scaling studies, maps"
    )
    parser.add_argument("--request", required=True, metavar="FILE", help="what is asked for (configs/requests)")
    parser.add_argument("--programme", default=GENERIC, metavar="NAME", help="whose fields to answer, default generic")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report, default RUN/allocation")
    return parser
