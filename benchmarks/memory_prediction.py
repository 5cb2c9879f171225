"""Memory of a training step as it is predicted without allocating a weight, beside what a fresh process measures.

    python benchmarks/memory_prediction.py [--models mvitv2_t paper] [--modalities 1 2 3] [--arms unimodal full pretrained
        cached] [--chip-px 512 1024] [--precision fp32 bf16] [--device auto] [--set KEY=VALUE] [--instances 0] [--json]

Left out, the options are those of the table that we claim: on a GPU MViTv2-T and -B, 1 to 3 modalities, pretrained and full, 512
and 1,024 px, fp32 and bf16; on a CPU MViTv2-T, 1 and 2 modalities, 256 px. The prediction has the RoIs and foreground RoIs that the
measurement had. On a GPU the allocator's peak of forward and backward must be met within 5 %, without any calibration; on a
CPU, which has no allocator to ask, parameters, gradients and saved tensors within 2 %. Where a GPU is too small for a
row, that is said in it. Needs torch, torchvision, pydantic and PyYAML only, and runs from the bare source tree; all tensors are generated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fusion_memory import ARMS, CHANNELS, processor, verdicts

from rtshpc.core.errors import RtshpcError, RunError
from rtshpc.core.load import load_model
from rtshpc.core.sizing.measured import PREDICTED
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.measure import measure_apart
from rtshpc.stages.measure import with_prediction

LIMITS = {"cuda": {"alloc_peak_fb": 0.05}, "cpu": dict.fromkeys(("params", "grads", "activations"), 0.02)}
"""Backend -> field -> largest error, as a share of what is measured."""

CLAIMED: dict[str, dict[str, Any]] = {
    "cuda": {"models": ["mvitv2_t", "paper"], "modalities": [1, 2, 3], "chip_px": [512, 1024]},
    "cpu": {"models": ["mvitv2_t"], "modalities": [1, 2], "chip_px": [256]},
}
"""What is measured where the options do not say."""

MIB = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Measure and predict every row, print them, and say whether the limits are met (exit code 1 if not)."""
    given = options().parse_args(list(arguments))
    on_gpu = given.device != "cpu" and torch.cuda.is_available()
    for name, value in CLAIMED["cuda" if on_gpu else "cpu"].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    try:
        rows = [both(given, *case) for case in wanted(given)]
    except RtshpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {"torch": torch.__version__, "cpu": processor(), "rows": rows, "judged": judge(rows)}
    print(json.dumps(report, indent=1, allow_nan=False) if given.json else "\n".join(lines(report)))
    return 0 if report["judged"] and all(entry["met"] for entry in report["judged"]) else 1


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names or paths of model configs")
    parser.add_argument("--modalities", nargs="+", type=int, choices=(1, 2, 3))
    parser.add_argument("--arms", nargs="+", default=["unimodal", "full", "pretrained"], choices=ARMS)
    parser.add_argument("--chip-px", nargs="+", type=int)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change all models")
    parser.add_argument("--instances", type=int, default=0, help="slumps of the sample; 0 = as few as fill the RoIs")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def wanted(given: argparse.Namespace) -> list[tuple[str, int, str, int, str]]:
    """Model, modalities, arm, px and precision of every row; one modality has no other arm than `unimodal`."""
    every = product(given.models, given.modalities, given.arms, given.chip_px, given.precision)
    return [case for case in every if (case[2] == "unimodal") == (case[1] == 1)]


def both(given: argparse.Namespace, model: str, count: int, arm: str, chip_px: int, precision: str) -> dict[str, Any]:
    """One row: what was measured with the prediction beside it, or why there is none."""
    names = list(CHANNELS)[:count]
    row = {"model": model, "modalities": "+".join(names), "arm": arm, "chip_px": chip_px, "precision": precision}
    print(f"measuring {' '.join(map(str, row.values()))} ...", file=sys.stderr, flush=True)
    spec = MemorySpec(
        model=load_model(model, given.set),
        channels={name: CHANNELS[name] for name in names},
        arm=arm,
        chip_px=chip_px,
        precision=precision,
        device=given.device,
        instances=given.instances,
        repeats=given.repeats,
        warmups=2,
    )
    try:
        measured = measure_apart(spec)
    except RunError as error:
        return {**row, "reason": str(error)}
    began = time.perf_counter()
    found = with_prediction(measured, spec)
    if found.predicted is None:
        return {**row, "reason": found.reasons["predicted"]}
    return {
        **row,
        "trace_seconds": time.perf_counter() - began,
        **found.model_dump(mode="json", exclude={"modalities"}),
    }


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest error of every field that has a limit: name, value, limit, met."""
    found: list[dict[str, Any]] = []
    for backend, limits in LIMITS.items():
        for name, limit in limits.items():
            told = [row["predicted"]["error"] for row in rows if row.get("backend") == backend]
            errors = [error[name] for error in told if name in error]
            if errors:
                worst = max(errors, key=abs)
                found.append({"name": f"{backend} {name}, largest error", "value": worst, "limit": limit})
    return [{**entry, "met": abs(entry["value"]) <= entry["limit"]} for entry in found]


def lines(report: dict[str, Any]) -> list[str]:
    """The table for people: MiB measured, predicted, and the error in percent."""
    measured = [row for row in report["rows"] if "predicted" in row]
    devices = sorted({row["device"] if row["backend"] == "cuda" else report["cpu"] for row in measured})
    out = [f"{', '.join(devices)}, torch {report['torch']}; MiB measured / predicted (error)"]
    for row in report["rows"]:
        start = f"{row['model']} {row['modalities']} {row['arm']} {row['chip_px']} px {row['precision']}"
        if "reason" in row:
            out.append(f"{start}: {row['reason']}")
            continue
        counts = row["counts"]
        rois = f"{counts['rois_per_image']:g} RoIs, {counts['foreground_per_image']['mask']:g} masks"
        out.append(f"{start} ({rois}, {row['protocol']['instances']} slumps; traced in {row['trace_seconds']:.1f} s)")
        told = row["predicted"]
        shown = [name for name in PREDICTED if name in told["error"]]
        out += [
            f"  {name:<16}{row[name] / MIB:>10.1f}{told[name] / MIB:>10.1f}  {told['error'][name]:+.2%}"
            for name in shown
        ]
    return [*out, *verdicts(report["judged"], "+.2%", ".0%")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
