"""The cluster that these tests share, and sweeps on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from .lab import Lab, missing

ROOT = Path(__file__).resolve().parents[2]

SWEEP = """
name: tiny
data:
  name: tiny
  scenes: {generated: {sites: [a], scenes_per_site: 6, size_px: 64, slumps_per_scene: [1, 2]}}
  modalities: {rgb: {bands: [red, green, blue]}, ndvi: {bands: [ndvi]}}
  primary: rgb
  labels: {kind: instances}
  chip: {size_px: 64, overlap_px: 0}
  split: {test_fraction: 0.3, val_fraction: 0.3}
  shard: {tasks: 1}
model:
  base: tiny
  backbone: {embed_dim: 8}
  pyramid_channels: 16
  roi: {rois_per_image: 8}
pretrain: &training {epochs: 2, batch_size: 2, checkpoint_seconds: 0.0}
finetune: *training
evaluate: {gallery: 0}
measure: {modality_sets: [[rgb]], chip_px: 64, precision: fp32, repeats: 1, warmups: 1}
site: lab
"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lab]:
    """A cluster without accounting."""
    if lacking := missing():
        pytest.skip(lacking)
    cluster = Lab(tmp_path_factory.mktemp("lab"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


class Login:
    """A login node: launch commands of one user with one sweep and one folder of runs."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.runs = folder / "runs"
        self.sweep = folder / "tiny.yaml"
        self.environment = lab.environment | {"PYTHONPATH": str(ROOT)}
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep.write_text(SWEEP)

    def __call__(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command that takes the sweep and the folder of runs."""
        line = [sys.executable, "-m", "rtshpc.launch", command, str(self.sweep), "--runs", str(self.runs), *arguments]
        return subprocess.run(
            line, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=240, check=False
        )


@pytest.fixture
def login(lab: Lab, tmp_path: Path) -> Login:
    return Login(lab, tmp_path / "a user's $HOME")  # as bad as a path may be, in every script and dependency
