"""Results of a `measure` record: every field's name, unit and meaning, and which records no report may use; and the
peak that a process reads of itself."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rtshpc.core.config.section import Section, doc
from rtshpc.core.sizing.memory import MemorySpec

FAKE = "fake"
"""Backend of a record whose figures come from no driver, but from a library that tests put in its place."""


PREDICTED = ("params", "grads", "optim_state", "activations", "alloc_peak_fb", "alloc_peak_step", "live_peak_fb")
"""Fields that are predicted as well."""


class Protocol(Section):
    """How it was measured; only figures of one protocol may be compared."""

    seed: int = doc("of weights, sample and RoIs")
    sample: str = doc("what the sample is, in words")
    chip_px: int = doc("side of the sample, px")
    precision: str = doc("fp32, bf16 or fp16")
    batch: int = doc("samples of a step", 1)
    micro_batch: int = doc("of them worked on together; 0 = all", 0)
    warmups: int = doc("steps before the measured ones, with and without optimizer")
    repeats: int = doc("measured steps, with and without optimizer")
    cudnn_benchmark: bool = doc("whether cuDNN may try out its algorithms", False)
    instances: int = doc("slumps of each sample")
    threads: int = doc("torch threads")
    gradients: str = doc("held or fresh; held: set to zero, never freed, so that every step holds them from its start")

    @property
    def words(self) -> str:
        """All of it but the number of slumps, of which a sample that is made to fill the RoIs has what it takes."""
        parts = f" ({self.micro_batch} at once)" if self.micro_batch else ""
        return (
            f"{self.chip_px} px chip, {self.precision}, batch {self.batch}{parts}, {_some(self.warmups, 'warm-up')}, caches emptied,"
            f" {self.repeats} measured, seed {self.seed}, {_some(self.threads, 'thread')}, gradients {self.gradients},"
            f" cudnn.benchmark {'on' if self.cudnn_benchmark else 'off'}; {self.sample}"
        )


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def protocol_of(spec: MemorySpec, instances: int | None = None) -> Protocol:
    """How a spec is measured.

    Args:
        spec: what is asked.
        instances: slumps that the samples have; None = as many as the spec says, however many that may come to.
    """
    kept = spec.model_dump(include=set(Protocol.model_fields) & set(MemorySpec.model_fields))
    many = "as few as fill the RoIs" if spec.instances == 0 else str(spec.instances)
    kept["instances"] = spec.instances if instances is None else instances
    return Protocol(**kept, sample=f"random pixels, round slumps on a square grid: {many}", gradients="held")


class Counts(Section):
    """Candidates an image of what depends on the data; null where the detector's code does not tell."""

    proposals_per_image: float | None = doc("first-stage boxes", None)
    rois_per_image: float | None = doc("RoIs in the losses of the first box head", None)
    foreground_per_image: dict[str, float] | None = doc("foreground RoIs of each box head (stage0, ...) and mask", None)
    anchors_per_image: dict[str, float] | None = doc("sampled anchors, foreground and background", None)
    filled: bool | None = doc("RoIs and foreground RoIs are as many as the config allows", None)


class Measurement(Section):
    """Results of a measure record: memory in bytes, time in seconds; what is null has its reason in `reasons`."""

    backend: Literal["cuda", "cpu", "fake"] = doc(
        "whose figures these are: of a CUDA allocator and driver, of a CPU, or of a fake driver"
    )
    device: str = doc("name of the GPU, or cpu")
    arm: str = doc("unimodal, full, pretrained (frozen backbones) or cached (their scales are given)")
    modalities: tuple[str, ...] = doc("the primary first")
    protocol: Protocol = doc("how it was measured")
    alloc_peak_fb: int | None = doc("CUDA allocator, most allocated in forward and backward (Table 2's figure)")
    alloc_peak_step: int | None = doc("CUDA allocator, most allocated in a step with its optimizer")
    reserved_peak: int | None = doc("CUDA allocator, most reserved over those steps")
    device_used_peak_v2: int | None = doc("NVML, memory v2: most used of the device, by all processes")
    device_baseline: int | None = doc("NVML, memory v2: used of the device before this process touched it")
    driver_reserved: int | None = doc("NVML, memory v2: what the driver keeps for itself, not in the two above")
    process_peak: int | None = doc("NVML: most that this process held of the device, context included")
    params: int | None = doc("weights and buffers")
    grads: int | None = doc("gradients")
    optim_state: int | None = doc("AdamW's moments and step counters")
    activations: int | None = doc("CPU: storages kept for backward; CUDA: what a forward pass leaves allocated")
    live_peak_fb: int | None = doc("CPU: most bytes of tensors alive at once in forward and backward")
    rss_peak: int | None = doc("most resident memory of the process")
    reasons: dict[str, str] = doc("field -> why it is null", {})
    trainable_parameters: int = doc("numbers that train")
    total_parameters: int = doc("all numbers but buffers")
    step_seconds: float = doc("median of the steps with forward, backward and optimizer, s")
    step_seconds_each: tuple[float, ...] = doc("each of them, s")
    samples_per_second: float = doc("batch over step_seconds")
    data_wait_share: float | None = doc("share of a step that waits for its samples, 0..1")
    gpu_utilisation: float | None = doc("NVML: mean over those steps, 0..1")
    energy_joules: float | None = doc("NVML: energy of the device over all of those steps, J")
    cpu_seconds: float = doc("processor time of those steps together, s")
    counts: Counts = doc("RoIs and the like, as they were", Counts())
    predicted: dict[str, Any] | None = doc("the same fields as predicted, and their errors", None)

    def spec_as_it_was(self, asked: MemorySpec) -> MemorySpec:
        """What was measured, with the counts that there were: what a prediction is to be held against.

        Args:
            asked: what was to be measured.
        """
        known: dict[str, Any] = {"instances": self.protocol.instances}
        known["device"] = "cpu" if self.backend == FAKE else self.backend
        if self.counts.rois_per_image is not None:
            known["rois"] = round(self.counts.rois_per_image)
        front = self.counts.foreground_per_image or {}
        if "mask" in front or "stage0" in front:
            known["foreground"] = round(front.get("mask", front.get("stage0", 0.0)))
        return asked.model_copy(update=known)

    def beside(self, figures: Mapping[str, Any]) -> Measurement:
        """The same with what was predicted (`engine.memory.trace`) and its errors: (predicted - measured) / measured."""
        values = {name: (figures.get(name), getattr(self, name)) for name in PREDICTED}
        error = {
            name: expected / found - 1 for name, (expected, found) in values.items() if expected is not None and found
        }
        kept = {name: value for name, value in figures.items() if name != "reason"}
        return self.model_copy(update={"predicted": {**kept, "error": error}})


def refusal(results: Mapping[str, Any]) -> str:
    """Why no report may use these results, of a record of any stage; empty where it may."""
    if FAKE in (results.get("backend"), results.get("device")):
        return "refused: backend = fake, its device figures come from a library made for tests and from no driver"
    return ""


def peak_rss() -> int:
    """The most memory that this process has had resident, bytes.

    `getrusage` may tell what the process that started this one held: its figure outlives `exec`.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
