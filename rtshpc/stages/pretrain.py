"""Stage 1: one detector for one modality, from fresh weights or a file's (Li et al. 2025, section 3)."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.engine.detectors import started
from rtshpc.engine.loop import fit
from rtshpc.engine.nearby import near


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Train the cell's detector.

    Returns:
        The results of `engine.loop.fit`, and `init` and `init_sha256`: the file it started from, None without one.
    """
    paths = near(cell, paths, progress)
    results, start = fit(cell, paths, started, progress), cell.config.pretrain
    return {**results, "init": start.init if start.init_sha256 else None, "init_sha256": start.init_sha256 or None}
