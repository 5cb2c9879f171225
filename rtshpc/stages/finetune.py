"""Stage 2: fusion of several modalities, on frozen pretrained backbones, their stored scales, or all weights trained."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.engine.detectors import on_backbones, on_features
from rtshpc.engine.loop import fit
from rtshpc.engine.nearby import near


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Train the cell's detector; see `engine.loop.fit` for the results."""
    paths = near(cell, paths, progress)
    return fit(cell, paths, on_features if cell.features else on_backbones, progress)
