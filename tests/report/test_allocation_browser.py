"""The allocation report in a real browser: it renders whole, says nothing on the console, and fits a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asking import GPU, SMALL, evidence_of
from browsing import asked as question, browse, needs_chromium

from rtshpc.core.paths import AllocationPaths
from rtshpc.report.allocation.page import build
from rtshpc.report.page import render_html

pytestmark = [pytest.mark.slow, needs_chromium]
SECTIONS = ("glance", "incomplete", "answers", *(f"T{number}" for number in range(8)), "formulas", "jobs", "scripts")


@pytest.fixture
def shown(study: Any, tmp_path: Path) -> AllocationPaths:
    paths = AllocationPaths(tmp_path / "report")
    paths.root.mkdir()
    paths.page.write_text(render_html(build(evidence_of(study(gpu=GPU, **SMALL).root))))
    return paths


def test_chromium_shows_every_section_and_figure_no_wider_than_a_phone(shown: AllocationPaths, tmp_path: Path) -> None:
    asked = (
        "[d.documentElement.scrollWidth,[...d.querySelectorAll('svg')].filter(i=>i.getBoundingClientRect().width>200).length,"
        "d.querySelectorAll('table').length,[...d.querySelectorAll('section')].map(i=>i.id).join(',')].join(' ')"
    )
    width, charts, tables, sections = question(shown.page, tmp_path, asked).split()
    written = shown.page.read_text()
    assert int(width) <= 360
    assert int(charts) == written.count("<svg") > 5 and int(tables) == written.count("<table")
    assert tuple(sections.split(",")) == SECTIONS


@pytest.mark.full
def test_chromium_says_nothing_on_the_console(shown: AllocationPaths, tmp_path: Path) -> None:
    found = browse(shown.page, tmp_path / "profile", "--dump-dom")
    assert [line for line in found.stderr.splitlines() if ":CONSOLE" in line] == []
    assert found.stdout.count("<svg") == shown.page.read_text().count("<svg")
