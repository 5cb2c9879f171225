"""Memory and time of a training step: forward and backward (Li et al. 2025, Table 2), then with the optimizer.

Each arm is measured in a process of its own: `python -m rtshpc.engine.memory.measure < spec.json`. On a GPU the figures
are the allocator's, and the driver's beside them; on a CPU, which has no such counter, activations are the storages that
autograd keeps for the backward pass, and `live_peak_fb` is of all tensors alive at once (what an allocator would have
handed out, without the scratch memory inside of operations). `backend` says which. Where NVML is a library that tests
put in its place, `backend` is `fake`, and no report takes the record. `core.sizing.measured` defines every field.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rtshpc.core.errors import RunError
from rtshpc.core.sizing.measured import FAKE, Measurement, peak_rss, protocol_of
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.counts import counts, filling
from rtshpc.engine.memory.step import Optimizer, forward, given_scales, sample, slumps, step, zero
from rtshpc.engine.memory.tensors import Live, held_bytes, own_tensors, saved_bytes
from rtshpc.hpc.nvml import NvmlSampler, is_fake, used_before
from rtshpc.model.engines import build

_NOT_READ = {"data_wait_share": "its samples are made before the steps; `scale` measures it on shards"}
CPU_NULLS = {
    **dict.fromkeys(("alloc_peak_fb", "alloc_peak_step", "reserved_peak"), "a CPU has no allocator that counts"),
    **_NOT_READ,
}
CUDA_NULLS = {"live_peak_fb": "counted on CPUs alone; alloc_peak_fb is the GPU's", **_NOT_READ}
"""Field -> why it is null on such a device."""


def measure_apart(spec: MemorySpec) -> Measurement:
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
    return Measurement.model_validate_json(done.stdout.splitlines()[-1])


def measure(spec: MemorySpec) -> Measurement:
    """The figures of one arm, in bytes and seconds.

    Gradients of the warm-up are kept and set to zero, so that parameters, gradients and activations
    lie in memory together, as they do from the second step of a training on. The optimizer comes after all that is
    measured without it; its rate is zero, so that every step is the same one.

    Raises:
        RunError: a GPU is asked for and none is visible.
    """
    before = used_before() if spec.device != "cpu" else {}
    torch.set_num_threads(spec.threads)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(spec.seed)
    device = _device(spec.device)
    with _sampler(spec, device, before) or nullcontext() as sampler:
        training = _Training(spec, device)
        figures = training.without_optimizer()
        figures |= training.with_optimizer(sampler.timed() if sampler else nullcontext())
        figures["counts"] = counts(training.detector, training.images, training.spec, device)
    figures["rss_peak"] = peak_rss()
    figures |= sampler.figures() if sampler else {}
    missing = CPU_NULLS if device.type == "cpu" else CUDA_NULLS
    reasons = {**missing, **(sampler.reasons if sampler else dict.fromkeys(NvmlSampler.FIGURES, "measured on the CPU"))}
    weights = list(training.detector.parameters())
    return Measurement(
        backend=FAKE if sampler and sampler.fake else device.type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else sampler.device if sampler else "cpu",
        arm=spec.arm,
        modalities=tuple(spec.channels),
        protocol=protocol_of(spec, training.spec.instances),
        trainable_parameters=sum(weight.numel() for weight in weights if weight.requires_grad),
        total_parameters=sum(weight.numel() for weight in weights),
        reasons=reasons,
        **{**dict.fromkeys(reasons), **figures},
    )


class _Training:
    """A detector, its samples and the steps that are measured.

    Attributes:
        spec: what is measured, with the number of slumps that the samples have.
    """

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        self.device = device
        frozen, cached = spec.arm in ("pretrained", "cached"), spec.arm == "cached"
        self.detector = build(spec.model, spec.channels, spec.classes, frozen, cached).to(device).train()
        self.detector.take_at_once(spec.micro_batch)
        self.images: Mapping[str, Any] = (
            given_scales(self.detector, spec, device) if cached else sample(spec, device)[0]
        )
        self.spec = filling(self.detector, self.images, spec, device)
        self.targets = [slumps(self.spec, device) for _ in range(spec.batch)]

    def without_optimizer(self) -> dict[str, Any]:
        """Peaks and activations of forward and backward, and what the weights and gradients hold."""
        figures = self._allocated() if self.device.type == "cuda" else self._alive()
        weights = list(self.detector.parameters())
        figures["params"] = held_bytes([*weights, *self.detector.buffers()])
        figures["grads"] = held_bytes(weight.grad for weight in weights if weight.grad is not None)
        return figures

    def with_optimizer(self, timed: AbstractContextManager[None]) -> dict[str, Any]:
        """Times of whole steps and, on a GPU, their peak; `timed` is entered for the measured ones."""
        spec, optimizer = self.spec, Optimizer(self.detector, self.spec, self.device)
        times: list[float] = []
        used = 0.0
        for _ in range(spec.warmups):
            zero(self.detector)
            optimizer.step(self.images, self.targets, spec)
        self._settle()
        with timed:
            for _ in range(spec.repeats):
                zero(self.detector)
                self._wait()
                began, used_before_it = time.perf_counter(), time.process_time()
                optimizer.step(self.images, self.targets, spec)
                self._wait()
                times.append(time.perf_counter() - began)
                used += time.process_time() - used_before_it
        figures: dict[str, Any] = {"optim_state": held_bytes(optimizer.state()), "cpu_seconds": used}
        if self.device.type == "cuda":
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
            figures |= {"alloc_peak_step": torch.cuda.max_memory_allocated(self.device), "reserved_peak": self.reserved}
        median = statistics.median(times)
        rate = spec.batch / median
        return {**figures, "step_seconds": median, "step_seconds_each": times, "samples_per_second": rate}

    def _allocated(self) -> dict[str, Any]:
        """The allocator's figures; activations are what a forward pass leaves allocated."""
        for _ in range(self.spec.warmups):
            step(self.detector, self.images, self.targets, self.spec)
        self._settle()
        kept = 0
        for _ in range(self.spec.repeats):
            zero(self.detector)
            before = torch.cuda.memory_allocated(self.device)
            loss = forward(self.detector, self.images, self.targets, self.spec)
            self._wait()
            kept = max(kept, torch.cuda.memory_allocated(self.device) - before)
            loss.backward()
            del loss
        self._wait()
        self.reserved = torch.cuda.max_memory_reserved(self.device)
        return {"activations": kept, "alloc_peak_fb": torch.cuda.max_memory_allocated(self.device)}

    def _alive(self) -> dict[str, Any]:
        """Counted on the CPU, in one step each, as every step is the same: what is saved, and what is alive at once."""
        saved = saved_bytes(self.detector, self.images, self.targets, self.spec)
        zero(self.detector)
        gradients = [weight.grad for weight in self.detector.parameters() if weight.grad is not None]
        with Live() as live:
            for tensor in (*own_tensors(self.detector, self.images, self.targets), *gradients):
                live.add(tensor)
            step(self.detector, self.images, self.targets, self.spec)
        return {"activations": saved, "live_peak_fb": live.peak}

    def _settle(self) -> None:
        """Empty the allocator's caches and forget its peaks."""
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        """Until the GPU has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _device(wanted: str) -> torch.device:
    """The device to measure on.

    Raises:
        RunError: a GPU is asked for and none is visible.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("device = cuda: no GPU is visible")
    return torch.device("cuda", 0) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _sampler(spec: MemorySpec, device: torch.device, before: Mapping[str, int]) -> NvmlSampler | None:
    """Of the GPU that is measured on; without one, of a fake driver's where there is such, which then marks the record."""
    if device.type == "cuda":
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        return NvmlSampler(None if uuid is None else str(uuid), before=before)
    return NvmlSampler(before=before) if spec.device == "auto" and is_fake() else None


def main() -> int:
    """Read a MemorySpec as JSON from standard input, print the figures as one line of JSON."""
    try:
        figures = measure(MemorySpec.model_validate_json(sys.stdin.read()))
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(figures.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
