"""Peak memory of the paper's model beside Table 2 of Li et al. 2025: one sample, forward and backward, no optimizer.

Every row is measured in a fresh process at the paper setting (PERFORMANCE.md): a 256 px chip, bf16 autocast, gradients
held. On a GPU the peak is the allocator's; on a CPU there is no such counter, and the sum of parameters,
gradients and saved activations stands beside the paper's figure, which was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rtshpc.core.errors import RtshpcError
from rtshpc.core.load import load_model
from rtshpc.engine.memory import MemorySpec, measure_apart

ROWS = (
    (("rgb",), "unimodal", 1649),
    (("rgb", "ndvi"), "full", 2527),
    (("rgb", "ndvi"), "pretrained", 1454),
    (("rgb", "ndvi", "nir"), "full", 3361),
    (("rgb", "ndvi", "nir"), "pretrained", 1754),
)
"""Modalities, arm and the paper's peak, MB."""

CHANNELS = {"rgb": 3, "ndvi": 1, "nir": 1}
MIB = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Measure the five arms and print them."""
    parser = argparse.ArgumentParser(description="Peak memory beside the paper's Table 2.")
    parser.add_argument("--model", default="paper", help="name or path of a model config")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--chip-px", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    given = parser.parse_args(list(arguments))
    try:
        rows = [measured(given, *row) for row in ROWS]
    except RtshpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(rows, indent=1, allow_nan=False))
    else:
        show(rows)
    return 0


def measured(given: argparse.Namespace, modalities: tuple[str, ...], arm: str, paper_mb: int) -> dict[str, Any]:
    """One arm's figures and the paper's."""
    spec = MemorySpec(
        model=load_model(given.model),
        channels={name: CHANNELS[name] for name in modalities},
        arm=arm,
        chip_px=given.chip_px,
        precision=given.precision,
        device=given.device,
        repeats=given.repeats,
        threads=given.threads,
    )
    print(f"measuring {'+'.join(modalities)} {arm} ...", file=sys.stderr, flush=True)
    return {**measure_apart(spec), "paper_mb": paper_mb}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, MiB."""
    backend = rows[0]["backend"]
    peak = "allocator" if backend == "cuda" else "sum"
    print(f"device: {rows[0]['device']}; compared with the paper: {peak}; protocol: {rows[0]['protocol']}")
    print(f"{'modalities':<14}{'arm':<12}{'params':>8}{'grads':>8}{'saved':>8}{'sum':>8}{'alloc':>8}{'rss':>8}", end="")
    print(f"{'nvml':>8}{'paper':>8}{'ratio':>7}{'s/step':>8}")
    for row in rows:
        keys = ("parameters", "gradients", "activations", "sum", "allocator_peak", "rss_peak", "nvml_peak")
        cells = [row[f"{key}_bytes"] for key in keys]
        text = "".join(f"{'-' if value is None else round(value / MIB):>8}" for value in cells)
        compared = row["allocator_peak_bytes"] if backend == "cuda" else row["sum_bytes"]
        print(f"{'+'.join(row['modalities']):<14}{row['arm']:<12}{text}{row['paper_mb']:>8}", end="")
        print(f"{compared / MIB / row['paper_mb']:>7.3f}{row['step_seconds']:>8.2f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
