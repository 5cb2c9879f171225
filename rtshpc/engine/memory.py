"""Peak memory of one sample + model + forward + backward, without optimizer (Li et al. 2025, Table 2).

Each arm is measured in a process of its own: `python -m rtshpc.engine.memory < spec.json`. On a GPU the figures
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
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtshpc.core.config import ModelConfig
from rtshpc.core.config.section import Section, doc
from rtshpc.core.errors import RunError
from rtshpc.data.sample import Target
from rtshpc.hpc.nvml import NvmlSampler
from rtshpc.model.detector import Detector
from rtshpc.model.engines import build

INSTANCES = 9
"""Slumps of the sample, on a 3 x 3 grid: with few, the mask head would see next to nothing."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MemorySpec(Section):
    """What is measured, and how."""

    model: ModelConfig = doc("the detector")
    channels: dict[str, int] = doc("bands of each modality, the primary first", min_length=1)
    classes: int = doc("classes without the background", 1, ge=1)
    arm: str = doc("unimodal, full, pretrained (frozen backbones) or cached (their scales are given)", "unimodal")
    chip_px: int = doc("side of the sample, px", 256, ge=32)
    precision: str = doc("fp32, bf16 or fp16", "bf16")
    device: str = doc("auto, cpu or cuda", "auto")
    repeats: int = doc("measured steps", 3, ge=1)
    warmups: int = doc("steps before them", 1, ge=0)
    seed: int = doc("of weights, sample and RoIs", 0, ge=0)
    threads: int = doc("torch threads", 1, ge=1)


def measure_apart(spec: MemorySpec) -> dict[str, Any]:
    """`measure` in a fresh process, which has allocated nothing else.

    Raises:
        RunError: the process failed (out of memory, for one); the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rtshpc.engine.memory"],
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
            _step(detector, images, target, spec)
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


def sample(spec: MemorySpec, device: torch.device) -> tuple[dict[str, Tensor], Target]:
    """One random sample, (1, C, S, S) per modality, with round slumps on a 3 x 3 grid."""
    generator = torch.Generator().manual_seed(spec.seed)
    side = spec.chip_px
    images = {
        name: torch.randn(1, bands, side, side, generator=generator).to(device) for name, bands in spec.channels.items()
    }
    across = 3
    cell, radius = side / across, side / across * 0.35
    place = torch.arange(side, dtype=torch.float32) + 0.5
    masks, boxes = [], []
    for number in range(INSTANCES):
        y, x = (number // across + 0.5) * cell, (number % across + 0.5) * cell
        masks.append((place[:, None] - y) ** 2 + (place[None] - x) ** 2 <= radius**2)
        boxes.append([x - radius, y - radius, x + radius, y + radius])
    classes = torch.arange(INSTANCES) % spec.classes
    ignore = torch.zeros(side, side, dtype=torch.bool)
    return images, Target(torch.tensor(boxes), classes, torch.stack(masks), ignore).to(device)


def given_scales(detector: Detector, spec: MemorySpec, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Random scales of every modality, as stored features enter a training: in the type a backbone leaves them.

    Layer norms give 16 bits under autocast on CPUs, 32 on GPUs.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    dtype = torch.float32 if device.type == "cuda" else _AUTOCAST.get(spec.precision, torch.float32)
    shapes = [
        (1, getattr(detector.backbone, f"fpn_lateral{level}").in_channels, *[spec.chip_px // 2**level] * 2)
        for level in range(2, 6)
    ]
    return {
        name: tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        for name in spec.channels
    }


def _measure_cuda(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> dict[str, Any]:
    """The allocator's figures; activations are what the forward pass leaves allocated."""
    device = target.boxes.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    times, kept = [], 0
    for _ in range(spec.repeats):
        _zero(detector)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        loss = _forward(detector, images, target, spec)
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
        _zero(detector)
        began = time.perf_counter()
        _step(detector, images, target, spec)
        times.append(time.perf_counter() - began)
    if saved is None:
        saved = saved_bytes(detector, images, target, spec)
    _zero(detector)
    with _Live() as live:
        for tensor in (*_own(detector, images, target), *(p.grad for p in detector.parameters() if p.grad is not None)):
            live.add(tensor)
        _step(detector, images, target, spec)
    return {
        "activations_bytes": saved,
        "allocator_peak_bytes": None,
        "live_peak_bytes": live.peak,
        "reserved_peak_bytes": None,
        "step_seconds": statistics.median(times),
    }


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were: every storage an operation makes, until freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _own(detector: Detector, images: Mapping[str, Any], target: Target) -> list[Tensor]:
    """Weights, buffers and the sample: what is there before a step."""
    given = [leaf for leaf in tree_leaves(dict(images)) if isinstance(leaf, Tensor)]
    return [*detector.parameters(), *detector.buffers(), *given, target.boxes, target.masks]


def saved_bytes(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass, which is run too.

    Parameters, buffers and the sample itself are not counted. The hooks take time: no step to be timed.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in _own(detector, images, target)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # A detached view: an output kept by its own node would never be freed.
        return tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = _forward(detector, images, target, spec)
    total = sum(kept.values())
    loss.backward()
    return total


def _forward(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> Tensor:
    """The summed losses; `images` are scales in the arm `cached`."""
    device = target.boxes.device.type
    context = torch.autocast(device, dtype=_AUTOCAST[spec.precision]) if spec.precision != "fp32" else nullcontext()
    with context:
        if spec.arm == "cached":
            losses = detector({}, [target], [spec.seed], [(spec.chip_px, spec.chip_px)], images)
        else:
            losses = detector(images, [target], [spec.seed])
    return torch.stack([value.float() for value in losses.values()]).sum()


def _step(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> None:
    _forward(detector, images, target, spec).backward()


def _zero(detector: Detector) -> None:
    """Gradients to zero where they are; they stay allocated."""
    for parameter in detector.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


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
