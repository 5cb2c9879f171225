"""Real sweeps on a few generated scenes, run as a user runs them: `python -m rtshpc.launch` in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SWEEP = """
name: small
data:
  name: small
  scenes: {generated: {sites: [a], scenes_per_site: 4, size_px: 64, slumps_per_scene: [1, 2]}}
  modalities: {rgb: {bands: [red, green, blue]}, ndvi: {bands: [ndvi]}}
  primary: rgb
  labels: {kind: instances}
  chip: {size_px: 64, overlap_px: 0}
  split: {test_fraction: 0.3, val_fraction: 0.3}
model: tiny
site: {name: here, executor: local, max_jobs: 2}
finetune: {epochs: 1}
measure: {chip_px: 64, precision: fp32, repeats: 1, warmups: 1}
"""


class Launcher:
    """Runs launch commands with one sweep and one folder of runs."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        self.python = python
        self.runs = folder / "runs"
        self.sweep = folder / "small.yaml"
        self.sweep.write_text(SWEEP)

    def line(self, *arguments: str) -> list[str]:
        return [self.python, "-m", "rtshpc.launch", *arguments]

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*arguments),
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def run(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command that takes the sweep and the folder of runs."""
        return self(command, str(self.sweep), "--runs", str(self.runs), *arguments, **environment)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A sweep in the background, in a session of its own."""
        line = self.line("sweep", str(self.sweep), "--runs", str(self.runs), *arguments)
        return subprocess.Popen(
            line,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Tests that a shell started in the background would hand down that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def processes(self) -> list[int]:
        """Live processes whose command line names our folder of runs."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.runs) in text:
                found.append(int(path.parent.name))
        return found


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)
