"""Stage 1: one detector for one modality, from fresh weights (Li et al. 2025, section 3)."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.progress import Progress
from rtshpc.engine.detectors import fresh
from rtshpc.engine.loop import fit


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Train the cell's detector; see `engine.loop.fit` for the results."""
    return fit(cell, paths, fresh, progress)
