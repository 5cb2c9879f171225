"""A real headless browser for the tests of pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")


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


def asked(page: Path, folder: Path, question: str, width: int = 360) -> str:
    """What a script finds in the document `d` of a page in a frame of so many px; the page's own policy allows no script.

    Headless windows are at least 500 px wide: the frame is the phone.
    """
    probe = folder / "probe.html"
    script = f"onload=()=>{{const d=document.querySelector('iframe').contentDocument;document.title={question}}}"
    frame = f'<iframe src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>'
    probe.write_text(f"<!DOCTYPE html><title>?</title>{frame}<script>{script}</script>")
    shown = browse(
        probe, folder / "profile", "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000"
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr[-2000:]
    return title.group(1)
