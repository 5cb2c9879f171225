"""Writes the report: one self-contained HTML page, Markdown, CSV and SVG. The same records give the same bytes."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound, select_autoescape
from markupsafe import Markup

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import write_text
from rtshpc.report.collect import RunRecords, collect
from rtshpc.report.content import Content, build
from rtshpc.report.entries import Entry, Table, csv_text, markdown, markdown_entry, markdown_table
from rtshpc.report.tables import data, memory, runs, scores

CSV_FILES = ("results", "sites", "memory", "training", "splits", "data_sites", "rejected", "cells")


class _Packaged(BaseLoader):
    """Templates from the package's data, in a clone and in an installed wheel alike."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
        try:
            return packaged(template), template, lambda: True
        except FileNotFoundError as error:
            raise TemplateNotFound(template) from error


@cache
def packaged(name: str) -> str:
    """Text of a file in rtshpc/report/templates."""
    return (resources.files("rtshpc.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    """HTML is escaped by itself; in Markdown every value passes through the `md` or `entry` filter instead."""
    environment = Environment(
        loader=_Packaged(),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(md=markdown, entry=markdown_entry, table=markdown_table, path=quote, fenced=_fenced)
    return environment


def render_html(content: Content) -> str:
    """The page, with style, figures and pictures inside; it asks no network and runs no script."""
    # Both are our own markup: matplotlib escapes the names in a figure.
    charts = {chart.name: Markup(chart.inline()) for part in content.parts for chart in part.charts}  # noqa: S704
    style = Markup(packaged("style.css"))  # noqa: S704
    template = _environment().get_template("page.html.j2")
    return template.render(content=content, charts=charts, style=style)


def render_markdown(content: Content) -> str:
    """The report as GitHub Markdown; figures and pictures are links to files of the run folder."""
    return _environment().get_template("report.md.j2").render(content=content)


def _fenced(text: str) -> str:
    """An indented code block: no fence that the text could close."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def write_report(paths: RunPaths, cell: Cell) -> tuple[list[str], RunRecords]:
    """Write every file of the report from the records of a run.

    Args:
        paths: the run.
        cell: the summarise cell.

    Returns:
        Names of the files relative to the report's folder, and the records they were made from.
    """
    records = collect(paths, cell)
    config_text = paths.config.read_text(encoding="utf-8", errors="replace") if paths.config.is_file() else ""
    beside = ("report.md", *(f"{name}.csv" for name in CSV_FILES), "figures/*.svg")
    content = dataclasses.replace(build(records, cell, config_text), files=beside)
    texts: dict[Path, str] = {
        paths.report_page: render_html(content),
        paths.report_markdown: render_markdown(content),
    }
    for part in content.parts:
        for chart in part.charts:
            texts[paths.report_figure(chart.name)] = chart.standalone()
    for name, (columns, rows) in _csv(records).items():
        texts[paths.report_table(name)] = csv_text(columns, rows)
    for path, text in texts.items():
        write_text(path, text)
    # A figure of an earlier report that these records no longer have would be a number without a record.
    for old in paths.report_figure("any").parent.glob("*.svg"):
        if old not in texts:
            old.unlink()
    return sorted(str(path.relative_to(paths.report)) for path in texts), records


def _csv(records: RunRecords) -> dict[str, tuple[list[str], list[list[Any]]]]:
    rows = scores.scored(records)
    tables: dict[str, Table | None] = {
        "training": runs.training_table(records),
        "splits": data.count_table(records),
        "data_sites": data.site_table(records),
        "rejected": data.rejected_table(records),
        "cells": runs.cells_table(records),
    }
    made = {name: flat(table) for name, table in tables.items()}
    made["results"] = scores.results_csv(rows)
    made["sites"] = scores.sites_csv(rows)
    made["memory"] = memory.memory_csv(records)
    return {name: made[name] for name in CSV_FILES}


def flat(table: Table | None) -> tuple[list[str], list[list[Any]]]:
    """A table for CSV: numbers at full precision, nothing where nothing was measured."""
    if table is None:
        return ["nothing recorded"], []
    return list(table.columns), [[_field(entry) for entry in row] for row in table.rows]


def _field(entry: Entry) -> Any:
    if entry.value is not None:
        return entry.value if entry.scale == 1 else entry.value / entry.scale  # in the unit of its column
    return None if entry.kind == "missing" or entry.text == "–" else entry.text
