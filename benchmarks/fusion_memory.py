"""Peak memory of the paper's fusion model beside Table 2 of Li et al. 2025, plain and with the levers of docs/memory.md.

    python benchmarks/fusion_memory.py [--levers plain exact all] [--modalities 1 2 3] [--arms unimodal full pretrained
        cached] [--chip-px 256] [--precision bf16] [--instances 9] [--model paper] [--set KEY=VALUE] [--repeats 3] [--json]

One sample + model + forward + backward, gradients held, without optimizer (whose part of the time is in s/step); every
figure from a fresh process. Defaults are the paper setting: a 256 px chip with 9 slumps under bf16 autocast, whose plain figures are the paper's within a few percent.
`peak` is the allocator's on a GPU. A CPU has no allocator to ask: there it is the largest sum of all tensors alive
at once, made again or not (without the scratch memory inside of operations), and `sum` is parameters + gradients + the
distinct storages that autograd keeps. `exact` are the levers that keep the mathematics, `all` adds those that change
it; their outputs' distance from the plain model's is printed as well, on random weights. Needs torch, torchvision,
pydantic and PyYAML only; all tensors are generated.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rtshpc.core.errors import RtshpcError
from rtshpc.core.load import load_model
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.measure import measure_apart
from rtshpc.engine.memory.step import sample
from rtshpc.model.detector import build_detector

CHANNELS = {"rgb": 3, "ndvi": 1, "nir": 1}
ARMS = ("unimodal", "full", "pretrained", "cached")
PAPER = {(1, "unimodal"): 1649, (2, "full"): 2527, (2, "pretrained"): 1454, (3, "full"): 3361, (3, "pretrained"): 1754}
"""Modalities and arm -> peak of Table 2, MB."""

EXACT = ("roi.recompute=true", "fusion.recompute=true", "backbone.attention=fused", "backbone.checkpoint=light")
WINDOW = 64
"""Attention window that divides the map of a chip of a multiple of 256 px, tokens."""

LEVERS = {"plain": (), "exact": EXACT, "all": (*EXACT, f"backbone.window_px={WINDOW}", "frozen_dtype=bf16")}
TARGETS = {
    (1, "unimodal"): 1250,
    (2, "pretrained"): 1090,
    (3, "pretrained"): 1310,
    (2, "cached"): 800,
    (3, "cached"): 960,
}
"""Largest peak with all levers at the paper setting, MiB."""

SHARES = {("pretrained", 2): 0.36, ("pretrained", 3): 0.31, ("cached", 3): 0.25}
"""Largest peak over that of full training with the same levers, at 512 px in fp32."""

MIB = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Measure what is asked for, print it, and say whether the targets are met (exit code 1 if not)."""
    given = options().parse_args(list(arguments))
    try:
        rows = [measured(given, *row) for row in wanted(given)]
        changes = approximations(given) if "all" in given.levers and given.difference else {}
    except RtshpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    judged = judge(given, rows)
    report = {"machine": machine(rows[0]), "rows": rows, "approximations": changes, "judged": judged}
    print(json.dumps(report, indent=1, allow_nan=False) if given.json else "\n".join(lines(report)))
    return 0 if all(entry["met"] for entry in judged) else 1


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS)
    parser.add_argument("--modalities", nargs="+", type=int, default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--model", default="paper", help="name or path of a model config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the model, all levers")
    parser.add_argument("--chip-px", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--instances", type=int, default=9, help="slumps of the sample; 0 = as few as fill the RoIs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-difference", dest="difference", action="store_false", help="skip the approximations")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def wanted(given: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Modalities, arm and levers of every row; one modality has no other arm than `unimodal`."""
    return [
        (count, arm, levers)
        for count in given.modalities
        for arm in given.arms
        if (arm == "unimodal") == (count == 1)
        for levers in given.levers
    ]


def measured(given: argparse.Namespace, count: int, arm: str, levers: str) -> dict[str, Any]:
    """One row's figures."""
    names = list(CHANNELS)[:count]
    print(f"measuring {'+'.join(names)} {arm}, {levers} ...", file=sys.stderr, flush=True)
    spec = MemorySpec(
        model=load_model(given.model, [*given.set, *LEVERS[levers]]),
        channels={name: CHANNELS[name] for name in names},
        arm=arm,
        chip_px=given.chip_px,
        precision=given.precision,
        device=given.device,
        repeats=given.repeats,
        instances=given.instances,
        threads=given.threads,
    )
    figures = measure_apart(spec).model_dump(mode="json")
    peak = figures["alloc_peak_fb"] or figures["live_peak_fb"]
    kept = sum(figures[name] for name in ("params", "grads", "activations"))
    known = {"count": count, "levers": levers, "paper_mb": PAPER.get((count, arm))}
    return {**figures, **known, "peak": peak, "sum": kept}


@torch.no_grad()
def approximations(given: argparse.Namespace) -> dict[str, float]:
    """Relative distance of the finest to the coarsest scale from the plain model's, for each approximate lever."""
    spec = MemorySpec(model=load_model(given.model, given.set), channels={"rgb": 3}, chip_px=given.chip_px)
    images, _ = sample(spec, torch.device("cpu"))
    found: dict[str, list[torch.Tensor]] = {}
    for lever in ("", f"backbone.window_px={WINDOW}", "frozen_dtype=bf16"):
        torch.manual_seed(0)
        model = load_model(given.model, [*given.set, *([lever] if lever else [])])
        detector = build_detector(model, {"rgb": 3}, 1, frozen=True).eval()
        for name, weight in detector.named_parameters():
            if "rel_pos" in name:  # fresh tables are zero, and zeros are the same at any length
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        found[lever] = list(detector.backbone.scales(images, {})["rgb"])
    plain = found.pop("")
    return {
        f"{lever}, scale at stride {4 << i}": float((maps[i] - plain[i]).norm() / plain[i].norm())
        for lever, maps in found.items()
        for i in range(4)
    }


def judge(given: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures that have a target: name, value, limit, met."""
    found: list[dict[str, Any]] = []
    for row in rows:
        key, name = (row["count"], row["arm"]), f"{row['count']} {row['arm']}, {row['levers']}"
        peak = row["peak"] / MIB
        setting = (given.model, given.chip_px, given.precision, given.instances)
        if setting == ("paper", 256, "bf16", 9) and row["levers"] == "all" and key in TARGETS:
            found.append({"name": f"peak of {name}, MiB", "value": peak, "limit": TARGETS[key]})
        if setting == ("paper", 512, "fp32", 9):
            full = [r for r in rows if (r["count"], r["arm"], r["levers"]) == (row["count"], "full", row["levers"])]
            limit = SHARES.get((row["arm"], row["count"]))
            if full and limit:
                found.append({"name": f"{name} / full", "value": peak * MIB / full[0]["peak"], "limit": limit})
    return [{**entry, "met": entry["value"] <= entry["limit"]} for entry in found]


def machine(row: dict[str, Any]) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "device": row["device"] if row["backend"] == "cuda" else processor(),
        "backend": row["backend"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "protocol": row["protocol"],
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def lines(report: dict[str, Any]) -> list[str]:
    """The table for people, MiB and seconds."""
    place, rows = report["machine"], report["rows"]
    peak = "allocator" if place["backend"] == "cuda" else "tensors alive at once"
    out = [f"{place['device']}, torch {place['torch']}; peak: {peak}; {place['protocol']}"]
    head = ("modalities", "arm", "levers", "params", "grads", "saved", "sum", "peak", "paper", "ratio", "s/step")
    out.append(("{:<14}{:<12}{:<7}" + "{:>8}" * 8).format(*head))
    for row in rows:
        cells = [round(row[key] / MIB) for key in ("params", "grads", "activations", "sum", "peak")]
        ratio = f"{row['peak'] / MIB / row['paper_mb']:.3f}" if row["paper_mb"] else "-"
        values = [*cells, row["paper_mb"] or "-", ratio, f"{row['step_seconds']:.2f}"]
        start = f"{'+'.join(row['modalities']):<14}{row['arm']:<12}{row['levers']:<7}"
        out.append(start + "".join(f"{value:>8}" for value in values))
    out += [f"{name}: differs by {value:.4f} (relative)" for name, value in report["approximations"].items()]
    return [*out, *verdicts(report["judged"], "9.3f", "g")]


def verdicts(judged: Sequence[dict[str, Any]], value: str, limit: str) -> list[str]:
    """A line for each figure that has a target: its name, value and limit (as these formats say) and whether it is met."""
    return [
        f"{one['name']:<40} {one['value']:{value}}  (at most {one['limit']:{limit}}: {'met' if one['met'] else 'MISSED'})"
        for one in judged
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
