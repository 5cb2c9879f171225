"""Tensors without values: quick to make, and of the types that autocast gives on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, _BypassDispatchCache
from torch.utils._pytree import tree_map

_FP32 = ("layer_norm", "softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList")
_SMALL = ("einsum",)
"""Operations of the detector that autocast runs in 32, or in 16, bits on GPUs and leaves alone on CPUs."""


class Shapes(FakeTensorMode):
    """Fake tensors, which look up what an operation makes by less than torch does; that look-up is most of a trace's time.

    What is left out of the key no tensor of a trace has: sparse or quantised layouts, symbolic sizes, conjugates.
    """

    def _cache_key(self, state: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """All that the shapes and types of `func(*args, **kwargs)` follow from; raises where torch must look itself."""
        key: list[Any] = [func, torch.is_inference_mode_enabled(), *kwargs]
        self._add(key, args)
        self._add(key, kwargs.values())
        return tuple(key)

    def _add(self, key: list[Any], values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, FakeTensor):
                if value.fake_mode is not self or value.constant is not None:
                    raise _BypassDispatchCache("a tensor with a value, or of another trace")
                place = (value.storage_offset(), value.untyped_storage().nbytes())
                key.append((value.shape, value.stride(), value.dtype, value.requires_grad, value.fake_device, *place))
            elif isinstance(value, Tensor):
                raise _BypassDispatchCache("a real tensor")
            elif isinstance(value, (list, tuple)):
                key += (type(value), len(value))
                self._add(key, value)
            else:
                key += (type(value), value)  # 1 and 1.0 are equal, and make other types


@contextmanager
def made_of_shapes() -> Iterator[None]:
    """What makes a detector does so without values, and without changing the type of a tensor that is there."""
    # Drawing again what lies too far out looks at values; there is nothing to be drawn, nor to be set one by one.
    with (
        patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight),
        patch("torch.nn.init.dirac_", lambda weight, *_, **__: weight),
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
