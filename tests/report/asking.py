"""What an allocation report is made of, for the tests: a sweep, a scaling study, what they spent, and a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtshpc.core.config import SiteConfig
from rtshpc.core.load import shipped_folder
from rtshpc.core.records import read_json, write_json
from rtshpc.core.sizing.request import GENERIC, AllocationRequest, load_programme, load_request
from rtshpc.core.sizing.scaling import ScalePoint
from rtshpc.report.allocation.evidence import Evidence, read_evidence

GPU = "NVIDIA RTX A5000"
SMALL: dict[str, Any] = {"gpus": [1, 2], "concurrency": [1], "tasks": [1]}
WHOLE: dict[str, Any] = {"gpus": [1, 2, 4, 8], "concurrency": [1, 2, 3, 4], "waves": 1, "tasks": [1]}


def changed(evidence: Evidence, edit: Callable[[ScalePoint], ScalePoint | None]) -> Evidence:
    """The same evidence with other points; None takes one away."""
    runs = tuple(replace(run, points=tuple(filter(None, map(edit, run.points)))) for run in evidence.runs)
    return replace(evidence, runs=runs)


def spend(run: Any, gpu_hours: float = 2.0, rerun: int = 3) -> dict[str, float]:
    """Write the usage.json of a test run; every `rerun`-th cell took a second attempt of half the time. Gives the hours by cell."""
    hours = {cell: gpu_hours * (1.5 if place % rerun == 0 else 1.0) for place, cell in enumerate(run.cells)}
    rows = [
        {
            "id": cell.id,
            "label": cell.label,
            "stage": cell.stage,
            "attempts": 2 if place % rerun == 0 else 1,
            "gpu_hours": hours[cell.id],
            "cpu_hours": 4 * hours[cell.id],
            "node_hours": hours[cell.id],
        }
        for place, cell in enumerate(run.cells.values())
    ]
    sums = {key: sum(row[key] for row in rows) for key in ("attempts", "gpu_hours", "cpu_hours", "node_hours")}
    own = {**sums, "gpu_hours": sums["gpu_hours"] - 0.25}
    why = {"job": "17", "why": "was killed: its own notes end at its last word", "gpu_hours": 0.25}
    difference = {"gpu_hours": 0.25, "cpu_hours": 0.0, "node_hours": 0.0}
    books = {
        "sacct": sums,
        "own": own,
        "difference": difference,
        "attempts": [{**why, "cpu_hours": 0, "node_hours": 0}],
    }
    write_json(run.paths.usage, {"run": "test-run", "total": sums, "cells": rows, "reconciled": books})
    return hours


def asked(**changes: Any) -> AllocationRequest:
    """The shipped example with other values."""
    return AllocationRequest.model_validate({**load_request("example").model_dump(), **changes})


def one_item(**changes: Any) -> AllocationRequest:
    """A request of one kind of job."""
    return asked(items=[{"name": "training", "stage": "finetune", "arm": "full", "runs": 10, **changes}])


def evidence_of(
    *folders: Path,
    request: AllocationRequest | None = None,
    site: SiteConfig | None = None,
    programme: str | Path = GENERIC,
) -> Evidence:
    """Evidence of run folders, for the shipped example of a request."""
    return read_evidence(folders, request or asked(), load_programme(programme), site)


def priced(**changes: Any) -> SiteConfig:
    """A site with GPUs that cost two credits an hour; of the name that test runs have."""
    return SiteConfig.model_validate(
        {"name": "local", "charge_per_gpu_hour": 2.0, "charge_unit": "credits", "gpus": 1, **changes}
    )


def on_gpu(run: Any) -> None:
    """Let the records of a test run be of a GPU."""
    for cell in run.cells.values():
        path = run.paths.cell(cell.id).record
        value = read_json(path)
        assert value is not None
        value["environment"].update(gpu=GPU, driver="550.54.15", cuda="13.0")
        write_json(path, value)


def programme_file(folder: Path, **field: Any) -> Path:
    """A programme of one field."""
    text = (shipped_folder("configs") / "programmes" / f"{GENERIC}.yaml").read_text()
    assert "name: generic" in text
    path = folder / "grand.yaml"
    lines = [f"    {key}: {value}" for key, value in field.items()]
    path.write_text("name: grand\ntitle: Grand Programme\nfields:\n  - id: only\n" + "\n".join(lines) + "\n")
    return path
