"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Programs:
    """Programs by the names of Slurm's that print what a test gave them and keep what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def says(self, name: str, output: str, code: int = 0, error: str = "") -> None:
        (self.folder / f"{name}.out").write_text(output)
        script = self.folder / name
        script.write_text(
            f'#!/bin/sh\necho "$@" >> "{self.folder}/{name}.asked"\ncat "{self.folder}/{name}.out"\n'
            f"echo '{error}' >&2\nexit {code}\n"
        )
        script.chmod(0o755)

    def asked(self, name: str) -> list[str]:
        file = self.folder / f"{name}.asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Programs(folder)
