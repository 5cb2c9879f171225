"""Summarise: every record of the run -> one HTML page, Markdown, CSV and SVG."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.report.page import write_report
from rtshpc.report.tables.runs import state_counts
from rtshpc.report.tables.scores import best, scored


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Write the report from whatever records are there; missing ones are named in it, with the reason.

    Returns:
        `files` (relative to the report's folder), `cells` (with a record), `states` (done, failed, missing) and `best`
        (cell, label, metric, AP50 in percent and allow_leakage of the best evaluation; None where there is none).
    """
    progress("report", 0, 1)
    files, records = write_report(paths, cell)
    progress("report", 1, 1, str(paths.report_page))
    top = best(scored(records))
    return {
        "files": files,
        "cells": len(records.done),
        "states": state_counts(records),
        "best": None
        if top is None
        else {
            "cell": top.result.cell.id,
            "label": top.name,
            "metric": top.metric,
            "AP50": top.value,
            "allow_leakage": top.leaky,
        },
    }
