"""Memory of every cell of a sweep that runs a detector, from shapes alone, before one is given a GPU that is too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rtshpc.core.cell import Cell
from rtshpc.core.errors import RtshpcError, RunError
from rtshpc.core.grid import cells, finished
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import Progress
from rtshpc.core.sizing.calibrate import overhead, usable_records
from rtshpc.core.sizing.fit import Fit, fit
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.core.sizing.predict import GIB, Figures, gpu_bytes, keep_predicted, read_predicted, specs_of

FEW = 5
"""So many cells that do not fit are named."""


def run(cell: Cell, paths: RunPaths, progress: Progress) -> dict[str, Any]:
    """Trace what the cells of the sweep have in memory; what was traced before is taken from `predicted.jsonl`.

    Returns:
        gpu_bytes, overhead (factor, context, records), predicted (digest -> figures), cells (digest -> labels).

    Raises:
        RunError: cells do not fit the site's GPUs; it names them, and what would make the largest fit.
    """
    site, size = cell.config.site, gpu_bytes(cell.config.site)
    members = cells(cell.config, cell.data_fingerprint)
    specs = specs_of(members, site)
    known = read_predicted(paths)
    done = {one.id: record for one in members if (record := finished(one, paths)) is not None}
    extra = overhead(usable_records(members, done), site)

    def figures(spec: MemorySpec) -> Figures:
        if spec.digest not in known:
            known[spec.digest] = traced(spec)
            keep_predicted(paths, spec.digest, known[spec.digest])
        return known[spec.digest]

    large: list[tuple[int, MemorySpec, Sequence[Cell]]] = []
    for number, (spec, own) in enumerate(specs.values()):
        progress("trace", number, len(specs), own[0].label)
        need = extra.need(figures(spec))
        if need is not None and need > size:
            large.append((need, spec, own))
    if large:
        large.sort(key=lambda one: -one[0])
        raise RunError(_refusal(cell, large, fit(large[0][1], size, extra, figures)))
    progress("trace", len(specs), len(specs))
    return {
        "gpu_bytes": size,
        "overhead": {"factor": extra.factor, "context": extra.context, "records": extra.records},
        "predicted": {name: dict(known[name]) for name in specs},
        "cells": {name: [one.label for one in own] for name, (_, own) in specs.items()},
    }


def traced(spec: MemorySpec) -> dict[str, Any]:
    """Figures of a spec; `reason` where it cannot be traced."""
    if spec.untraceable:
        return {"reason": spec.untraceable}
    from rtshpc.engine.memory.trace import trace  # takes seconds, which what is kept already does not need

    try:
        return trace(spec)
    except RtshpcError as error:
        return {"reason": str(error)}


def _refusal(cell: Cell, large: Sequence[tuple[int, MemorySpec, Sequence[Cell]]], found: Fit) -> str:
    """Which cells need how much, and what to change, in one line."""
    named = [f"{one.label} ({_gib(need)})" for need, _, own in large for one in own]
    more = f" and {len(named) - FEW} more" if len(named) > FEW else ""
    site = cell.config.site
    ways: Mapping[str, int | None] = (
        {f"site.micro_batch: {found.at_once}": found.need} if found.at_once is not None else found.advice
    )
    told = " or ".join(f"{words} ({_gib(need or 0)})" for words, need in ways.items())
    advice = (
        f"the first would fit with {told}" if told else "take a larger GPU: nothing that is known here makes it fit"
    )
    text = f"site {site.name}: GPUs of {site.gpu_memory_gb} GB are too small for {', '.join(named[:FEW])}{more}"
    return f"{text}; {advice}; see `plan --fit`"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
