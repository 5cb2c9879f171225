"""What a sweep's cells are expected to take: memory from traces of shapes, time from steps that were timed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from rtshpc.core.cell import Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import RunError
from rtshpc.core.features import chips_to_cache
from rtshpc.core.paths import RunPaths, make_private
from rtshpc.core.sizing.calibrate import overhead, pace, timed_steps, usable_records
from rtshpc.core.sizing.fit import PARTITIONS, Fit, fit
from rtshpc.core.sizing.memory import TRAINED, MemorySpec
from rtshpc.core.sizing.predict import GIB, Figures, Overhead, gpu_bytes, keep_predicted, read_predicted, specs_of
from rtshpc.hpc.container import PROGRAM, command
from rtshpc.launch.plan.sweep import Plan

DURATION = ("seconds_per_epoch", "hours", "gpu_hours")


def can_trace(site: SiteConfig) -> bool:
    """Whether a trace can be made on this machine: torch is in this environment, or the image can be run."""
    if site.image:
        return shutil.which(PROGRAM) is not None
    return importlib.util.find_spec("torch") is not None


class Tracer:
    """Figures of specs: those that the run folder keeps, else from a process of the tasks' libraries, kept there."""

    def __init__(self, site: SiteConfig, paths: RunPaths) -> None:
        self._site, self._paths = site, paths
        self._process: subprocess.Popen[str] | None = None
        self._console = Console(stderr=True)
        self.known = read_predicted(paths)

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()

    def __call__(self, spec: MemorySpec) -> Figures:
        """What is kept or traced of a spec.

        Raises:
            RunError: it is not kept, and nothing here can trace it; or the process failed, in its own words.
        """
        if spec.digest not in self.known:
            with self._console.status(f"tracing {'+'.join(spec.channels)} {spec.arm}, {spec.chip_px} px"):
                self.known[spec.digest] = self._ask(spec)
            make_private(self._paths.root)
            keep_predicted(self._paths, spec.digest, self.known[spec.digest])
        return self.known[spec.digest]

    def _ask(self, spec: MemorySpec) -> Figures:
        if self._process is None:
            if not can_trace(self._site):
                raise RunError(
                    f"nothing can be predicted on this machine: torch is not installed in {sys.prefix}"
                    + (f", and there is no {PROGRAM} to run {self._site.image}" if self._site.image else "")
                )
            line = command(self._site, ["-m", "rtshpc.stages", "trace"], [Path.cwd()], sys.executable)
            self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(spec.model_dump_json() + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RunError(f"nothing could be predicted (exit code {self._process.wait()}), see above")
        return json.loads(answer)


def predict_all(plan: Plan, trace: Tracer) -> None:
    """Trace what is not kept yet of a sweep."""
    for spec, _ in specs_of(plan.cells, plan.config.site).values():
        trace(spec)


def forecast(plan: Plan) -> dict[str, Any]:
    """What is expected of each cell, by what the run folder keeps.

    Returns:
        memory (words on what the figures hold) and cells: id -> peak_bytes (None: `reason` says why it is not predicted),
        seconds_per_step and on what that rests, seconds_per_epoch, hours and gpu_hours of all epochs without validation;
        None = not predicted.
    """
    site, records, known = plan.config.site, usable_records(plan.cells, plan.done), read_predicted(plan.paths)
    extra = overhead(records, site)
    steps = timed_steps(records, site, known)
    chips = chips_to_cache(plan.config.data, plan.paths, plan.gather.id in plan.done)
    nothing = dict.fromkeys(("peak_bytes", "seconds_per_step", "timed", *DURATION))
    found: dict[str, Any] = {cell.id: {**nothing, "reason": "runs no detector"} for cell in plan.cells}
    for name, (spec, own) in specs_of(plan.cells, site).items():
        figures = known.get(name, {"reason": spec.untraceable or "not traced yet, see --predict"})
        paced = pace(spec, figures, steps) if spec.work == "train" else None
        for cell in own:
            row: dict[str, Any] = {"peak_bytes": _peak(figures, extra), "reason": figures.get("reason")}
            row |= {"seconds_per_step": paced and paced.seconds, "timed": paced and paced.source}
            found[cell.id] = row | _duration(cell, site, chips.train, paced and paced.seconds)
    told = extra.words if site.gpus else "tensors alive at once in a process, with the optimizer's state"
    return {"memory": told, "chips_counted": chips.exact, "cells": found}


def _peak(figures: Figures, extra: Overhead) -> int | None:
    """Of a GPU with its overhead, else of the tensors alive in a process."""
    on_cpu = figures.get("live_peak_fb")
    return extra.need(figures) if on_cpu is None else int(on_cpu) + int(figures.get("optim_state") or 0)


def _duration(cell: Cell, site: SiteConfig, chips: int, step: float | None) -> dict[str, Any]:
    """Seconds an epoch and hours of a training; of others nothing is said."""
    if cell.stage not in TRAINED or step is None:
        return dict.fromkeys(DURATION)
    training = cell.config.finetune if cell.stage == "finetune" else cell.config.pretrain
    epoch = step * -(-chips // training.batch_size)
    hours = epoch * training.epochs / 3600
    return {
        "seconds_per_epoch": epoch,
        "hours": hours,
        "gpu_hours": hours * site.gpus * site.nodes if site.gpus else None,
    }


def fits(plan: Plan, trace: Tracer) -> list[tuple[str, dict[str, Fit]]]:
    """For each different training of a sweep: its label, and what fits each partition, at the same global batch.

    Partitions are PARTITIONS, and the site's own GPUs where their memory is known.
    """
    site = plan.config.site
    sizes = {name: memory * GIB for name, memory in PARTITIONS.items()}
    if gpu_bytes(site):
        sizes[f"site {site.name} {site.gpu_memory_gb} GB"] = gpu_bytes(site)
    extra = overhead(usable_records(plan.cells, plan.done), site)
    found: list[tuple[str, dict[str, Fit]]] = []
    trained = [cell for cell in plan.cells if cell.stage in TRAINED]
    for spec, own in specs_of(trained, site).values():
        on_gpu = spec.model_copy(update={"device": "cuda", "micro_batch": 0})
        more = f" and {len(own) - 1} alike" if len(own) > 1 else ""
        found.append((own[0].label + more, {name: fit(on_gpu, size, extra, trace) for name, size in sizes.items()}))
    return found
