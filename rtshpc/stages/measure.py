"""Memory and time of one modality set and arm, in a process that has done nothing else (Li et al. 2025, Table 2)."""

from __future__ import annotations

from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RunError
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.core.sizing.measured import Measurement
from rtshpc.core.sizing.memory import MemorySpec, measure_spec
from rtshpc.engine.memory.measure import measure_apart
from rtshpc.engine.memory.trace import trace


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Measure the cell's arm; see `core.sizing.measured.Measurement` for what is found."""
    spec = measure_spec(cell)
    progress("measure", 0, 2, f"{'+'.join(cell.modalities)} {cell.arm}")
    found = measure_apart(spec)
    progress("predict", 1, 2)
    found = with_prediction(found, spec)
    progress("predict", 2, 2)
    return found.model_dump(mode="json")


def with_prediction(found: Measurement, spec: MemorySpec) -> Measurement:
    """A measurement of `spec` beside what is predicted of it at the counts that it came to; or why nothing is."""
    try:
        return found.beside(trace(found.spec_as_it_was(spec)))
    except RunError as error:
        return found.model_copy(update={"reasons": {**found.reasons, "predicted": str(error)}})
