"""The page in a real browser: it renders, says nothing on the console, and fits a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browsing import asked, browse, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]
SECTIONS = ("glance", "data", "results", "memory", "training", "gallery", "provenance")


def test_chromium_renders_every_section_without_a_console_message(run: Any, tmp_path: Path) -> None:
    run.summarise()
    shown = browse(run.paths.report_page, tmp_path / "profile", "--dump-dom")
    console = [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]
    assert console == []
    for name in SECTIONS:
        assert f'<section id="{name}">' in shown.stdout
    # The parser of a browser moves what does not belong; what stays is well formed.
    assert shown.stdout.count("<svg") == run.page().count("<svg") == 7
    assert shown.stdout.count('<img src="data:image/png;base64,') == 7
    assert "RGB+NDVI+NIR fused is 4.1 points above RGB alone" in shown.stdout


def test_the_page_is_no_wider_than_a_phone(run: Any, tmp_path: Path) -> None:
    run.summarise()
    pictures = "[...d.querySelectorAll('img')].every(i=>i.complete&&i.naturalWidth>0)"
    width, shown = asked(run.paths.report_page, tmp_path, f"d.documentElement.scrollWidth+' '+{pictures}").split()
    assert int(width) <= 360 and shown == "true"
