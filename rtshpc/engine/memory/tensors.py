"""Tensors of a step: those alive at once, and those that autograd keeps for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.engine.memory.step import forward
from rtshpc.model.detector import Detector


class Live(TorchDispatchMode):
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


def own_tensors(detector: Detector, images: Mapping[str, Any], target: Target) -> list[Tensor]:
    """Weights, buffers and the sample: what is there before a step."""
    given = [leaf for leaf in tree_leaves(dict(images)) if isinstance(leaf, Tensor)]
    return [*detector.parameters(), *detector.buffers(), *given, target.boxes, target.masks]


def saved_bytes(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass, which is run too.

    Parameters, buffers and the sample itself are not counted. The hooks take time: no step to be timed.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in own_tensors(detector, images, target)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        # A detached view: an output kept by its own node would never be freed.
        return tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward(detector, images, target, spec)
    total = sum(kept.values())
    loss.backward()
    return total
