"""The page in a real browser: it renders, says nothing on the console, and fits a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)"),
]
SECTIONS = ("glance", "data", "results", "memory", "training", "gallery", "provenance")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page headless; the console and Chromium's own log come on stderr."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


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
    # Headless windows are at least 500 px wide: a frame of 360 px is the phone, and it tells its own width.
    probe = tmp_path / "phone.html"
    script = (
        "onload=()=>{const d=document.querySelector('iframe').contentDocument.documentElement;"
        "document.title=d.scrollWidth+' '+[...d.querySelectorAll('img')].every(i=>i.complete&&i.naturalWidth>0)}"
    )
    frame = f'<iframe src="{run.paths.report_page.as_uri()}" style="width:360px;height:800px;border:0"></iframe>'
    probe.write_text(f"<!DOCTYPE html><title>?</title>{frame}<script>{script}</script>")
    shown = browse(
        probe, tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000"
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr[-2000:]
    width, pictures = title.group(1).split()
    assert int(width) <= 360 and pictures == "true"
