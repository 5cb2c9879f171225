"""What makes a training fit a GPU: chips worked on at a time, and what else there is to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.core.sizing.predict import Figures, Overhead

STRAIGHT = 4
"""So many guesses take bytes to grow evenly with the chips at a time, which they do but for steps."""

PARTITIONS = {"A5000 24 GB": 24, "A100 40 GB": 40, "A100 80 GB": 80}
"""Name -> memory of one GPU, GB, as `site.gpu_memory_gb` has it."""


def at_once(spec: MemorySpec, count: int) -> MemorySpec:
    """`spec` with so many chips of its batch worked on at a time; only a training parts its batch."""
    if spec.work != "train":
        return spec
    return spec.model_copy(update={"micro_batch": 0 if count == spec.batch else count})


def levers(spec: MemorySpec) -> dict[str, MemorySpec]:
    """What would take less memory, in the words of the config -> the spec with it, one chip at a time.

    The first ones keep the losses; from `frozen_dtype` on the result is another one.
    """
    least = at_once(spec, 1)
    trains, mvit = spec.work == "train", spec.model.backbone.kind == "mvit"
    found: dict[str, MemorySpec] = {}
    lean = _changed(
        least,
        backbone={"checkpoint": "blocks", "attention": "fused"} if mvit else {},
        roi={"recompute": True},
        fusion={"recompute": True},
    )
    if not trains and mvit:
        found["backbone.attention: fused"] = _changed(spec, backbone={"attention": "fused"})
    if trains and lean.model != spec.model:
        found["checkpointing (backbone.checkpoint: blocks, attention: fused, roi.recompute, fusion.recompute)"] = lean
    if spec.precision == "fp32":
        found["precision: bf16"] = least.model_copy(update={"precision": "bf16"})
    if spec.precision == "fp32" and trains:
        found["precision: bf16 and checkpointing"] = lean.model_copy(update={"precision": "bf16"})
    fusable = trains and len(spec.channels) > 1 and not spec.model.fusion.early
    if spec.arm == "full" and fusable:
        found["frozen (backbones: pretrained)"] = least.model_copy(update={"arm": "pretrained"})
    if spec.arm in ("full", "pretrained") and fusable:
        found["cached (backbones: pretrained, features: cached)"] = least.model_copy(update={"arm": "cached"})
    if spec.chip_px >= 64:
        half = spec.chip_px // 2
        found[f"smaller chips (chip.size_px: {half} px at the detector)"] = least.model_copy(update={"chip_px": half})
    return found


def _changed(spec: MemorySpec, **sections: Mapping[str, Any]) -> MemorySpec:
    changed = {name: getattr(spec.model, name).model_copy(update=values) for name, values in sections.items()}
    return spec.model_copy(update={"model": spec.model.model_copy(update=changed)})


@dataclass(frozen=True)
class Fit:
    """What fits into a memory.

    Attributes:
        at_once: most chips worked on at a time, at the same batch; None = not even one fits.
        need: bytes with that many, or with one where none fits; None = nothing is predicted.
        advice: what would make it fit -> bytes, with the whole batch at a time or else chip by chip.
    """

    at_once: int | None
    need: int | None
    advice: Mapping[str, int]


def fit(spec: MemorySpec, size: int, extra: Overhead, trace: Callable[[MemorySpec], Figures]) -> Fit:
    """The most chips of a batch that a GPU takes at a time, or what would make one fit.

    Args:
        spec: of a training; its batch stays.
        size: memory of the GPU, bytes.
        extra: what it holds beside tensors.
        trace: figures of a spec; asked for no more than it takes.
    """

    def need(one: MemorySpec) -> int | None:
        return extra.need(trace(one))

    def lightest(one: MemorySpec) -> int | None:
        """Of the whole batch where that fits: a trace of it takes minutes less than one chip by chip."""
        whole = need(at_once(one, one.batch))
        return whole if whole is None or whole <= size else need(one)

    whole = need(spec)
    if whole is None or whole <= size:
        return Fit(None if whole is None else spec.batch, whole, {})
    least = need(at_once(spec, 1))
    if least is None or least > size:
        asked = {words: lightest(lever) for words, lever in levers(spec).items()}
        return Fit(None, least, {words: found for words, found in asked.items() if found is not None and found <= size})
    return _most(spec, size, least, whole, need)


def _most(spec: MemorySpec, size: int, least: int, whole: int, need: Callable[[MemorySpec], int | None]) -> Fit:
    """The most chips at a time where one fits, `least`, and the whole batch does not, `whole`.

    Guesses save traces and decide nothing: what is told was traced, and one chip more was, too, and does not fit.
    """
    low, high, best, over = 1, spec.batch, least, whole
    for guesses in range(spec.batch):
        if high - low <= 1:
            break
        if guesses == 0:
            guess = high - 1  # in two parts a batch takes much less than whole
        elif guesses < STRAIGHT:
            guess = low + (size - best) * (high - low) // max(over - best, 1)
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        found = need(at_once(spec, guess))
        if found is not None and found <= size:
            low, best = guess, found
        else:
            high, over = guess, found or over
    return Fit(low, best, {})
