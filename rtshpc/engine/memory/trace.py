"""Memory and work of a training step from the shapes of its tensors, none of which is allocated.

The real detector, its optimizer and autograd run on fake tensors: each operation says what it would make, and nothing
is computed. What depends on values is counted (`model.choices`). No GPU is needed to trace a step on one: tensors are
said to be on the CPU, of the types that autocast gives on the GPU (`cuda_types`), because autograd cannot walk back
over tensors of a device that is not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from rtshpc.core.config import ModelConfig, TrainConfig
from rtshpc.core.errors import RunError
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.step import forward, given_scales, sample
from rtshpc.engine.memory.tensors import Live, Saved, held_bytes, own_tensors
from rtshpc.engine.optim import build_optimizer
from rtshpc.model.choices import Counted, decided_by
from rtshpc.model.detector import DIVISOR, Detector
from rtshpc.model.engines import build
from rtshpc.model.heads.pooling import levels_within

CPU = torch.device("cpu")

CUDA_BLOCK = 512
"""Bytes: CUDA's allocator hands out multiples of it."""

_FP32 = ("layer_norm", "softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList")
_SMALL = ("einsum",)
"""Operations of the detector that autocast runs in 32, or in 16, bits on GPUs and leaves alone on CPUs."""


def trace(spec: MemorySpec) -> dict[str, Any]:
    """What a step takes, in bytes and floating-point operations.

    Gradients are held from one step to the next, as `measure` holds them.

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
    if spec.model.engine != "native":
        raise RunError(f"model.engine = {spec.model.engine}: its heads cannot be traced; take engine: native")
    kind = device_kind(spec.device)
    side = spec.chip_px + -spec.chip_px % DIVISOR
    filled = levels_within(min(side, max(spec.model.rpn.anchor_sizes)))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of operations that fake tensors know less well: their shapes are right
        stack.enter_context(FakeTensorMode())
        stack.enter_context(decided_by(Counted(filled)))
        if kind == "cuda":
            stack.enter_context(cuda_types())
        return {**_trace(spec, kind), "counts": spec.counts, "device": kind, "digest": spec.digest}


def _trace(spec: MemorySpec, kind: str) -> dict[str, Any]:
    frozen, cached = spec.arm in ("pretrained", "cached"), spec.arm == "cached"
    with _made_of_shapes():
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
    saved, live = Saved(own), _Step(CUDA_BLOCK if kind == "cuda" else 1)
    with live:
        for tensor in (*own, *grads):
            live.add(tensor)
        with saved:
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
        "flops": live.flops,
    }


class _Step(Live):
    """Counts floating-point operations, too, as torch's FlopCounterMode does: products and convolutions.

    That one follows modules as well, for which it keeps gradients alive that are free in a step.
    """

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def _made_of_shapes() -> Iterator[None]:
    """What makes a detector does so without values, and without changing the type of a tensor that is there."""
    # Drawing again what lies too far out looks at values; there is nothing to be drawn.
    with (
        patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight),
        patch("torch.nn.Module.bfloat16", _halved),
    ):
        yield


def _halved(module: nn.Module) -> nn.Module:
    """As `Module.bfloat16`, with new tensors: a fake one cannot become another."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.detach().bfloat16(), weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.bfloat16() if buffer.is_floating_point() else buffer)
    return module


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


@contextmanager
def cuda_types() -> Iterator[None]:
    """Autocast of CPU tensors to the types that GPUs' takes, for the operations of the detector."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for names, dtype in ((_FP32, torch.float32), (_SMALL, None)):
            for name in names:
                packet, _, overload = name.partition(".")
                operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(operation, partial(_cast, operation, dtype), "AutocastCPU")
        yield


def _cast(operation: Any, dtype: torch.dtype | None, *given: Any, **named: Any) -> Any:
    """An operation on its floating-point tensors in another type; None = that of autocast."""
    wanted = torch.get_autocast_dtype("cpu") if dtype is None else dtype

    def cast(x: Any) -> Any:
        return x.to(wanted) if isinstance(x, Tensor) and x.is_floating_point() else x

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return operation(*tree_map(cast, given), **tree_map(cast, named))
