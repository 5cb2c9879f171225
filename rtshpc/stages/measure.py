"""Memory of one modality set and arm, in a process that has done nothing else (Li et al. 2025, Table 2)."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.detectors import channels_of
from rtshpc.engine.memory.measure import measure_apart


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Measure parameters, gradients, activations and peaks of the cell's arm; see `engine.memory.measure.measure`."""
    asked = cell.config.measure
    progress("measure", 0, 1, f"{'+'.join(cell.modalities)} {cell.arm}")
    results = measure_apart(
        MemorySpec(
            model=cell.config.model,
            channels=channels_of(cell.config, cell.modalities),
            classes=len(cell.config.data.classes),
            arm=cell.arm,
            chip_px=asked.chip_px,
            precision=asked.precision,
            device=asked.device,
            repeats=asked.repeats,
            warmups=asked.warmups,
            seed=cell.config.seed,
        )
    )
    progress("measure", 1, 1)
    return results
