"""Peak memory of one sample + model + forward + backward, without optimizer (Li et al. 2025, Table 2).

Each arm is measured in a process of its own: `python -m rtshpc.engine.memory.measure < spec.json`. On a GPU the figures
are the allocator's; on a CPU, which has no such counter, activations are the storages that autograd keeps for
the backward pass, and two peaks stand beside them: of all tensors alive at once (`live_peak_bytes`, what an allocator
would have handed out, without the scratch memory inside of operations), and of the process's resident set.
`backend` says which.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.errors import RunError
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.engine.memory.step import INSTANCES, forward, given_scales, sample, step, zero
from rtshpc.engine.memory.tensors import Live, own_tensors, saved_bytes
from rtshpc.hpc.nvml import NvmlSampler
from rtshpc.model.detector import Detector
from rtshpc.model.engines import build


def measure_apart(spec: MemorySpec) -> dict[str, Any]:
    """`measure` in a fresh process, which has allocated nothing else.

    Raises:
        RunError: the process failed (out of memory, for one); the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rtshpc.engine.memory.measure"],
        input=spec.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"measuring {'+'.join(spec.channels)} {spec.arm}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(spec: MemorySpec) -> dict[str, Any]:
    """The figures of one arm, in bytes and seconds.

    Gradients of the warm-up are kept and set to zero, so that parameters, gradients and activations
    lie in memory together, as they do from the second step of a training on.

    Returns:
        The results of a measure record.
    """
    torch.set_num_threads(spec.threads)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(spec.seed)
    device = _device(spec.device)
    frozen, cached = spec.arm in ("pretrained", "cached"), spec.arm == "cached"
    detector = build(spec.model, spec.channels, spec.classes, frozen, cached).to(device).train()
    images, target = sample(spec, device)
    if cached:
        images = given_scales(detector, spec, device)
    saved = None
    for number in range(spec.warmups):
        if number == 0 and device.type == "cpu":
            saved = saved_bytes(detector, images, target, spec)
        else:
            step(detector, images, target, spec)
    sampler = NvmlSampler(_uuid(device)) if device.type == "cuda" else None
    with sampler or nullcontext():
        if device.type == "cuda":
            figures = _measure_cuda(detector, images, target, spec)
        else:
            figures = _measure_cpu(detector, images, target, spec, saved)
    parameters = list(detector.parameters())
    held = {
        "parameters_bytes": _bytes([*parameters, *detector.buffers()]),
        "gradients_bytes": _bytes(p.grad for p in parameters if p.grad is not None),
    }
    return {
        "device": torch.cuda.get_device_name(device) if sampler else "cpu",
        "backend": device.type,
        "arm": spec.arm,
        "modalities": list(spec.channels),
        "protocol": {
            **{key: getattr(spec, key) for key in ("chip_px", "precision", "seed", "warmups", "repeats", "threads")},
            "batch": 1,
            "instances": INSTANCES,
            "gradients": "held" if spec.warmups or spec.repeats > 1 else "fresh",
        },
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        **held,
        **figures,
        "sum_bytes": sum(held.values()) + figures["activations_bytes"],
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "nvml_peak_bytes": sampler.peak_bytes if sampler else None,
        "nvml_reason": sampler.reason if sampler else "measured on the CPU",
    }


def _measure_cuda(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> dict[str, Any]:
    """The allocator's figures; activations are what the forward pass leaves allocated."""
    device = target.boxes.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    times, kept = [], 0
    for _ in range(spec.repeats):
        zero(detector)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        loss = forward(detector, images, target, spec)
        kept = max(kept, torch.cuda.memory_allocated(device) - before)
        loss.backward()
        del loss
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return {
        "activations_bytes": kept,
        "allocator_peak_bytes": torch.cuda.max_memory_allocated(device),
        "live_peak_bytes": None,
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "step_seconds": statistics.median(times),
    }


def _measure_cpu(
    detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec, saved: int | None
) -> dict[str, Any]:
    """Time of the repeats, and what the warm-up found saved (a step of its own where there was none).

    One more step finds the most bytes of tensors that are alive at once.
    """
    times: list[float] = []
    for _ in range(spec.repeats):
        zero(detector)
        began = time.perf_counter()
        step(detector, images, target, spec)
        times.append(time.perf_counter() - began)
    if saved is None:
        saved = saved_bytes(detector, images, target, spec)
    zero(detector)
    with Live() as live:
        for tensor in (
            *own_tensors(detector, images, target),
            *(p.grad for p in detector.parameters() if p.grad is not None),
        ):
            live.add(tensor)
        step(detector, images, target, spec)
    return {
        "activations_bytes": saved,
        "allocator_peak_bytes": None,
        "live_peak_bytes": live.peak,
        "reserved_peak_bytes": None,
        "step_seconds": statistics.median(times),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _device(wanted: str) -> torch.device:
    """The device to measure on.

    Raises:
        RunError: a GPU is asked for and none is visible.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("device = cuda: no GPU is visible")
    return torch.device("cuda", 0) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _uuid(device: torch.device) -> str | None:
    """UUID of a GPU; None where this torch does not tell it."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def main() -> int:
    """Read a MemorySpec as JSON from standard input, print the figures as one line of JSON."""
    try:
        figures = measure(MemorySpec.model_validate_json(sys.stdin.read()))
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(figures, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
