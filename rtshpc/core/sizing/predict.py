"""What is predicted before anything is submitted: which cells, where it is kept, and whether it fits a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rtshpc.core.cell import RESULT_VERSION, Cell, digest
from rtshpc.core.config import RunConfig, SiteConfig
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import append_lines, read_lines
from rtshpc.core.sizing.memory import MemorySpec, memory_spec

GIB = 1 << 30

STAGE = "predict"

GUARDED = frozenset({"pretrain", "features", "finetune", "evaluate", "measure"})
"""Stages that wait for a prediction at a site whose GPUs' memory is known."""

COUNTED = ("alloc_peak_step", "live_peak_fb", "optim_state", "flops")
"""Fields of figures that are reckoned with: whole numbers, or None."""

Figures = Mapping[str, Any]
"""What `engine.memory.trace` says of a spec, or `reason`: why there is nothing."""


@dataclass(frozen=True)
class Overhead:
    """What a device holds beside the tensors, from measurements.

    Attributes:
        factor: allocator's reserve over the predicted peak.
        context: bytes that are not the allocator's: the driver's context and libraries.
        records: measurements it rests on; with none nothing is added, and what is said to fit may yet fail.
    """

    factor: float = 1.0
    context: int = 0
    records: int = 0

    def need(self, figures: Figures) -> int | None:
        """Bytes of a GPU that a training step needs; None where nothing is predicted."""
        peak = figures.get("alloc_peak_step")
        return None if peak is None else round(peak * self.factor) + self.context

    @property
    def words(self) -> str:
        """What the figures hold, for people."""
        if not self.records:
            return "tensors alone: no measurement on such a GPU tells the overhead"
        made = f"{self.records} measurement{'s' if self.records > 1 else ''}"
        return f"with x {self.factor:.2f} and {self.context / GIB:.2f} GiB of overhead, from {made}"


def gpu_bytes(site: SiteConfig) -> int:
    """Memory of a GPU of the site, bytes; 0 = not known."""
    return site.gpu_memory_gb * GIB if site.gpus else 0


def specs_of(cells: Iterable[Cell], site: SiteConfig) -> dict[str, tuple[MemorySpec, list[Cell]]]:
    """Digest -> what is in memory, and the cells of which that is so; on GPUs where the site has them."""
    found: dict[str, tuple[MemorySpec, list[Cell]]] = {}
    for cell in cells:
        spec = memory_spec(cell, site)
        if spec is None:
            continue
        if spec.device == "auto":
            spec = spec.model_copy(update={"device": "cuda" if site.gpus else "cpu"})
        found.setdefault(spec.digest, (spec, []))[1].append(cell)
    return found


def predict_cell(config: RunConfig, cells: Sequence[Cell], fingerprint: str) -> list[Cell]:
    """The cell that predicts the memory of `cells`, where GPUs' memory is known: only there can it say no.

    Args:
        config: of the sweep, its grid included: all cells follow from it.
        cells: of the sweep.
        fingerprint: of the input data.
    """
    if not gpu_bytes(config.site):
        return []
    specs = [[name, spec.device] for name, (spec, _) in specs_of(cells, config.site).items()]
    version = RESULT_VERSION[STAGE]
    identity = digest({"stage": STAGE, "version": version, "specs": specs, "gpu_bytes": gpu_bytes(config.site)})
    return [Cell(id=identity, stage=STAGE, label=STAGE, config=config, data_fingerprint=fingerprint)]


def read_predicted(paths: RunPaths) -> dict[str, Figures]:
    """Digest -> figures of all specs that were traced for a run, by this version of the code; what is none is left out.

    Raises:
        RunError: what is kept cannot be read.
    """
    rows = [row for row in read_lines(paths.predicted) if row.get("version") == RESULT_VERSION[STAGE]]
    return {
        row["digest"]: row["figures"] for row in rows if isinstance(row.get("digest"), str) and _are(row.get("figures"))
    }


def _are(figures: Any) -> bool:
    """Whether these are figures: a peak or a reason why there is none, and numbers where there should be."""
    if not isinstance(figures, dict):
        return False
    found = cast(dict[str, Any], figures)
    told = [found.get(name) for name in COUNTED]
    peaks = (found.get("alloc_peak_step"), found.get("live_peak_fb"), found.get("reason"))
    return all(value is None or type(value) is int for value in told) and any(value is not None for value in peaks)


def keep_predicted(paths: RunPaths, name: str, figures: Figures) -> None:
    """Add what was predicted of the spec of digest `name`."""
    append_lines(paths.predicted, [{"digest": name, "version": RESULT_VERSION[STAGE], "figures": figures}])
