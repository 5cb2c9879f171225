"""Stage 2: fusion of several modalities, on frozen pretrained backbones or with all weights trained."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.progress import Progress
from rtshpc.engine.detectors import on_backbones
from rtshpc.engine.loop import fit


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Train the cell's detector; see `engine.loop.fit` for the results."""
    return fit(cell, paths, on_backbones, progress)
