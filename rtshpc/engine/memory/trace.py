"""Memory and work of a step from the shapes of its tensors, none of which is allocated.

The real detector, its optimizer and autograd run on fake tensors: each operation says what it would make, and nothing
is computed. What depends on values is counted (`model.choices`). No GPU is needed to trace a step on one: tensors are
said to be on the CPU, of the types that autocast gives on the GPU (`cuda_types`), because autograd cannot walk back
over tensors of a device that is not there.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rtshpc.core.config import ModelConfig, TrainConfig
from rtshpc.core.errors import RunError
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.parts import Parts
from rtshpc.engine.memory.shapes import Shapes, cuda_types, made_of_shapes
from rtshpc.engine.memory.step import forward, given_scales, infer, sample
from rtshpc.engine.memory.tensors import Live, Saved, held_bytes, own_tensors
from rtshpc.engine.optim import build_optimizer
from rtshpc.model.choices import Counted, decided_by
from rtshpc.model.detector import DIVISOR, Detector
from rtshpc.model.engines import build
from rtshpc.model.heads.pooling import levels_within

CPU = torch.device("cpu")

CUDA_BLOCK = 512
"""Bytes: CUDA's allocator hands out multiples of it."""


def trace(spec: MemorySpec) -> dict[str, Any]:
    """What a step takes, in bytes and floating-point operations.

    Gradients are held from one step to the next, as `measure` holds them. Where nothing is trained a step is a forward
    pass: there are no gradients, and nothing is kept for backward.

    Args:
        spec: device is cpu or cuda (auto: a GPU where one is visible).

    Returns:
        params (with buffers), grads, optim_state, activations (what the forward pass keeps for backward),
        live_peak_fb (most bytes of tensors alive at once, forward and backward), alloc_peak_fb and alloc_peak_step
        (the same as an allocator counts them, without and with the optimizer; None on CPUs, which have none), counts
        (RoIs and foreground RoIs an image), flops (of forward and backward, as torch counts them), device, digest.

    Raises:
        RunError: the detector's engine is not ours, so what its values decide cannot be counted.
    """
    if spec.untraceable:
        raise RunError(spec.untraceable)
    kind = device_kind(spec.device)
    side = spec.chip_px + -spec.chip_px % DIVISOR
    filled = levels_within(min(side, max(spec.model.rpn.anchor_sizes)))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of operations that fake tensors know less well: their shapes are right
        stack.enter_context(Shapes())
        stack.enter_context(decided_by(Counted(filled)))
        if kind == "cuda":
            stack.enter_context(cuda_types())
        found = _train(spec, kind) if spec.work == "train" else _infer(spec, kind)
        return {**found, "counts": spec.counts, "device": kind, "digest": spec.digest}


def _train(spec: MemorySpec, kind: str) -> dict[str, Any]:
    frozen, cached = spec.arm in ("pretrained", "cached"), spec.arm == "cached"
    with made_of_shapes():
        detector = build(_with_counts(spec), spec.channels, spec.classes, frozen, cached).train()
    detector.take_at_once(spec.micro_batch)
    images, targets = sample(spec, CPU)
    if cached:
        images = given_scales(detector, spec, CPU, kind)
    parameters = list(detector.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    grads = [p.grad for p in parameters if p.grad is not None]
    own = own_tensors(detector, images, targets)
    saved, live = Saved(own), Work(CUDA_BLOCK if kind == "cuda" else 1)
    parts = Parts(spec, detector.backbone.parameters(), lambda: live.flops)
    with live:
        for tensor in (*own, *grads):
            live.add(tensor)
        with saved, patch("rtshpc.model.pyramid.recomputed", parts):
            loss = forward(detector, images, targets, spec)
        loss.backward()
        del loss
    peak, on_gpu = live.peak, kind == "cuda"
    optim, ended = _optimizer(detector, live) if spec.optimizer else (0, 0)
    return {
        "params": held_bytes([*parameters, *detector.buffers()]),
        "grads": held_bytes(grads),
        "optim_state": optim,
        "activations": saved.bytes,
        "live_peak_fb": None if on_gpu else peak,
        "alloc_peak_fb": peak if on_gpu else None,
        "alloc_peak_step": max(peak + optim, ended) if on_gpu else None,
        "flops": live.flops + parts.operations,
    }


def _infer(spec: MemorySpec, kind: str) -> dict[str, Any]:
    """A batch in eval mode: as many proposals and detections as there can be, or scales as they are stored."""
    with made_of_shapes():
        detector = build(spec.model, spec.channels, spec.classes, spec.arm == "pretrained").eval()
    images, _ = sample(spec, CPU)
    own, live = own_tensors(detector, images, ()), Work(CUDA_BLOCK if kind == "cuda" else 1)
    with live:
        for tensor in own:
            live.add(tensor)
        infer(detector, images, spec)
    on_gpu = kind == "cuda"
    return {
        "params": held_bytes([*detector.parameters(), *detector.buffers()]),
        "grads": 0,
        "optim_state": 0,
        "activations": 0,
        "live_peak_fb": None if on_gpu else live.peak,
        "alloc_peak_fb": live.peak if on_gpu else None,
        "alloc_peak_step": live.peak if on_gpu else None,
        "flops": live.flops,
    }


class Work(Live):
    """Counts floating-point operations, too, as torch's FlopCounterMode does: products and convolutions.

    That one follows modules as well, for which it keeps gradients alive that are free in a step.
    """

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for every tensor of every operation, more often than all else
        out = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def _with_counts(spec: MemorySpec) -> ModelConfig:
    """The model whose most RoIs and foreground RoIs are those of the spec."""
    rois, foreground = spec.counts["rois"], spec.counts["foreground"]
    share = (foreground + 0.5) / rois if rois else 0.0  # rounded down again where it is multiplied
    roi = spec.model.roi.model_copy(update={"rois_per_image": rois, "positive_fraction": share})
    return spec.model.model_copy(update={"roi": roi})


def _optimizer(detector: Detector, live: Live) -> tuple[int, int]:
    """Bytes of the optimizer's state, and most bytes alive in its step; `live` knows what is there before."""
    optimizer = build_optimizer(detector, TrainConfig())
    live.peak = live.now
    with live:
        optimizer.step()
    state = [leaf for leaf in tree_leaves(optimizer.state_dict()["state"]) if isinstance(leaf, Tensor)]
    return held_bytes(state), live.peak


def device_kind(wanted: str) -> str:
    """cpu or cuda; auto takes a GPU where one is visible."""
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
