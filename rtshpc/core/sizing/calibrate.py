"""What measurements say of predictions: a device's overhead of memory, and how fast it works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rtshpc.core.cell import Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.records import Record
from rtshpc.core.sizing.measured import refusal
from rtshpc.core.sizing.memory import TRAINED, MemorySpec
from rtshpc.core.sizing.predict import Figures, Overhead, specs_of


@dataclass(frozen=True)
class Timed:
    """A step that was timed.

    Attributes:
        label: of its cell.
        device: name of the GPU, or cpu.
        cpu: the processor's name.
        precision: autocast type.
        digest: of what was in memory.
        flops: of the step, as predicted.
        seconds: of the step.
    """

    label: str
    device: str
    cpu: str
    precision: str
    digest: str
    flops: int
    seconds: float


@dataclass(frozen=True)
class Pace:
    """Seconds that a step is expected to take, and why."""

    seconds: float
    source: str


def usable_records(cells: Iterable[Cell], done: Mapping[str, Record]) -> list[tuple[Cell, Record]]:
    """Cells whose steps were timed or measured, with their records, but for those no report may use.

    Args:
        cells: of a sweep.
        done: id -> record of the cells that are done.
    """
    found = [(cell, done[cell.id]) for cell in cells if cell.stage in (*TRAINED, "measure") and cell.id in done]
    return [(cell, record) for cell, record in found if not refusal(record.results)]


def of_site(device: str, site: SiteConfig) -> bool:
    """Whether a measurement on `device` speaks of the site's: a GPU of its type, or a processor where it has no GPU."""
    if not site.gpus:
        return device == "cpu"
    return device not in ("", "cpu") and site.gpu_type.lower() in device.lower()


def overhead(records: Iterable[tuple[Cell, Record]], site: SiteConfig) -> Overhead:
    """The largest overhead that was measured on GPUs of the site."""
    factors: list[float] = []
    contexts: list[int] = [0]
    for _, record in records:
        results = record.results
        predicted = _peak(results.get("predicted"))
        reserved = results.get("reserved_peak")
        if record.stage != "measure" or not predicted or not reserved or not of_site(str(results["device"]), site):
            continue
        factors.append(max(1.0, reserved / predicted))
        held = results.get("process_peak")
        if held is None and None not in (results.get("device_used_peak_v2"), results.get("device_baseline")):
            held = int(results["device_used_peak_v2"]) - int(results["device_baseline"])
        contexts.append(0 if held is None else int(held) - int(reserved))
    return Overhead(max(factors), max(contexts), len(factors)) if factors else Overhead()


def _peak(predicted: Any) -> int:
    return int(cast(Mapping[str, Any], predicted).get("alloc_peak_step") or 0) if isinstance(predicted, dict) else 0


def timed_steps(records: Iterable[tuple[Cell, Record]], site: SiteConfig, known: Mapping[str, Figures]) -> list[Timed]:
    """Steps that were timed on devices of the site; `known` are the figures of the run's specs, by digest.

    A training's own pace counts the wait for its data; a measurement's does not.
    """
    found: list[Timed] = []
    for cell, record in records:
        results = record.results
        specs = specs_of([cell], site)
        name, (spec, _) = next(iter(specs.items()))
        told: Any = results.get("predicted") if cell.stage == "measure" else known.get(name)
        flops = cast(Mapping[str, Any], told).get("flops") if isinstance(told, Mapping) else None
        seconds = results.get("step_seconds" if cell.stage == "measure" else "seconds_per_step")
        device = str(results.get("device", ""))
        if not flops or not seconds or not of_site(device, site):
            continue
        cpu = str(record.environment.get("cpu", ""))
        found.append(Timed(record.label, device, cpu, spec.precision, name, int(flops), float(seconds)))
    return found


def pace(spec: MemorySpec, figures: Figures, steps: Iterable[Timed]) -> Pace | None:
    """Seconds of a step of `spec`: as timed, else by the operations of the most similar one in the same precision.

    None where no step was timed, or those that were are of several kinds of devices.
    """
    alike = [one for one in steps if one.precision == spec.precision]
    kinds = {(one.device, one.cpu if one.device == "cpu" else "") for one in alike}
    flops = figures.get("flops")
    if len(kinds) != 1 or not flops:
        return None
    exact = [one for one in alike if one.digest == spec.digest]
    if exact:
        return Pace(exact[0].seconds, f"timed: {exact[0].label}")
    near = min(alike, key=lambda one: (abs(one.flops - flops), one.label))
    return Pace(near.seconds * flops / near.flops, f"by operations, from {near.label}")
