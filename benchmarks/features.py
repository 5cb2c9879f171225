"""Fusion cells per hour: backbones in every step (live) against stored scales (cached), same cell, in one run.

    python benchmarks/features.py [--json] [--model tiny] [--modalities rgb ndvi nir] [--size 128] [--epochs 36]
                                  [--measured 3] [--share 6] [--scenes 4] [--repeats 2] [--set finetune.precision=bf16]

Generated scenes go through the stages preprocess, gather, features and finetune as in a sweep, reading and validation
counted; backbones keep the weights they are drawn with, on which speed does not depend. `--measured` epochs are
trained and scaled to `--epochs`; every cached cell also bears its share of the stage features, whose scales serve
`--share` cells (the paper's frozen strategies of one modality set are six).
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import conclude, options

from rtshpc.core.cell import RESULT_VERSION, Cell
from rtshpc.core.grid import cells
from rtshpc.core.load import load_run, write_cell
from rtshpc.core.paths import RunPaths
from rtshpc.core.records import SILENT, Record, write_record
from rtshpc.engine import checkpoint
from rtshpc.engine.detectors import fresh
from rtshpc.model.weights import trainable_state
from rtshpc.stages import features, finetune, gather, preprocess

TARGET = 3.0
"""Least cells per hour, cached over live, with three modalities (docs/features.md)."""


def record(cell: Cell, paths: RunPaths, results: dict[str, Any]) -> dict[str, Any]:
    """Leave a cell's record, as the runner does."""
    facts = {"cell": cell.id, "stage": cell.stage, "label": cell.label, "started": "", "seconds": 0.0}
    facts["result_version"] = RESULT_VERSION[cell.stage]
    write_cell(paths.cell(cell.id).config, cell)
    write_record(paths.cell(cell.id).record, Record(**facts, results=results))  # pyright: ignore[reportArgumentType]
    return results


def as_drawn(cell: Cell, paths: RunPaths) -> dict[str, Any]:
    """A pretrain cell's checkpoint with the weights it starts from."""
    content = {"format": checkpoint.FORMAT, "model": trainable_state(fresh(cell)), "backbones": {}}
    return {"checkpoint_sha256": checkpoint.save(paths.cell(cell.id).best_checkpoint, content)}


def sweep(given: Any) -> list[Cell]:
    """A live and a cached cell of the same detector, and all that they build on."""
    sets = [
        f"model={given.model}",
        f"data.chip.size_px={given.size}",
        f"data.scenes.generated.size_px={2 * given.size}",
        f"data.scenes.generated.scenes_per_site={given.scenes}",
        "data.shard.tasks=1",
        f"finetune.epochs={given.measured}",
        f"finetune.validate_every={given.measured}",
        f"finetune.modalities=[{', '.join(given.modalities)}]",
        "grid={finetune.features: [live, cached]}",
    ]
    return cells(load_run("demo", [*sets, *given.set]), "bench")


def timed(cell: Cell, paths: RunPaths, stage: Any) -> tuple[float, float, dict[str, Any]]:
    """Seconds of a stage's run by the clock and of CPU time, and its results."""
    began, spent = time.perf_counter(), time.process_time()
    results = stage.run(cell, paths, SILENT)
    return time.perf_counter() - began, time.process_time() - spent, results


def measure(root: Path, given: Any) -> dict[str, Any]:
    """Least seconds of each side, taken in turn, and how far the two trainings end apart."""
    paths = RunPaths(root / "run")
    paths.create()
    found, storing, stored_bytes = sweep(given), 0.0, 0
    for cell in found:
        if cell.stage in ("preprocess", "gather"):
            stage = preprocess if cell.stage == "preprocess" else gather
            record(cell, paths, stage.run(cell, paths, SILENT))
        elif cell.stage == "pretrain":
            record(cell, paths, as_drawn(cell, paths))
        elif cell.stage == "features":
            seconds, _, results = timed(cell, paths, features)
            record(cell, paths, results)
            storing, stored_bytes = storing + seconds, stored_bytes + results["bytes"]
    tuned = {"cached" if cell.features else "live": cell for cell in found if cell.stage == "finetune"}
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in tuned}
    ends: dict[str, dict[str, Any]] = {}
    for repeat in range(given.repeats):
        for side, cell in tuned.items():
            again = cell.model_copy(update={"id": f"{cell.id}-{repeat}"})
            seconds, spent, ends[side] = timed(again, paths, finetune)
            taken[side].append((seconds / given.measured, spent / given.measured))
    return {
        "epoch_seconds": {side: min(clock for clock, _ in values) for side, values in taken.items()},
        "epoch_cpu_seconds": {side: min(spent for _, spent in values) for side, values in taken.items()},
        "features_seconds": storing,
        "features_bytes": stored_bytes,
        "final_loss": {side: end["final_loss"] for side, end in ends.items()},
        "step_seconds": {side: end["seconds_per_step"] for side, end in ends.items()},
        "device": ends["live"]["device"],
        "precision": ends["live"]["precision"],
        "torch": str(torch.__version__),
    }


def main(arguments: list[str]) -> int:
    """Measure and print; exit code 1 when a target is missed."""
    parser = options(__doc__, size=128, epochs=36, measured=3, share=6, scenes=4, repeats=2)
    parser.add_argument("--model", default="tiny", help="a name of configs/models, or a file (default tiny)")
    parser.add_argument("--modalities", nargs="+", default=["rgb", "ndvi", "nir"], help="the primary first")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of the sweep")
    parser.add_argument("--folder", type=Path, help="where the run is made (default: the temporary folder)")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        figures = measure(Path(root), given)
    epoch, share = figures["epoch_seconds"], figures["features_seconds"] / given.share
    per_hour = {
        "live": 3600 / (given.epochs * epoch["live"]),
        "cached": 3600 / (given.epochs * epoch["cached"] + share),
        "cached, scales there": 3600 / (given.epochs * epoch["cached"]),
    }
    ratios = {f"{side} / live": value / per_hour["live"] for side, value in per_hour.items() if side != "live"}
    ratios["CPU time alone"] = figures["epoch_cpu_seconds"]["live"] / figures["epoch_cpu_seconds"]["cached"]
    protocol = {
        key: getattr(given, key) for key in ("model", "modalities", "size", "epochs", "measured", "share", "set")
    }
    targets = {"cached / live": TARGET} if len(given.modalities) == 3 else {}
    report = {"benchmark": "features", "protocol": protocol, **figures, "cells_per_hour": per_hour}
    lines = [
        f"{given.model}, {'+'.join(given.modalities)}, {given.size} px, {given.epochs} epochs,"
        f" {figures['precision']} on {figures['device']}; {given.share} cells share the scales",
        *(f"{side:22} {value:8.3f} cells an hour" for side, value in per_hour.items()),
        f"{'scales':22} {figures['features_bytes'] / 1e6:8.1f} MB in {figures['features_seconds']:.1f} s",
        f"{'final loss':22} {figures['final_loss']['live']:.5f} live, {figures['final_loss']['cached']:.5f} cached",
    ]
    return conclude({**report, "ratios": ratios, "targets": targets}, lines, given.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
