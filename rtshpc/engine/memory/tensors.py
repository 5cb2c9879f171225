"""Tensors of a step: those alive at once, and those that autograd keeps for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.engine.memory.step import forward
from rtshpc.model.detector import Detector


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were: every storage an operation makes, until freed."""

    def __init__(self, block: int = 1) -> None:
        """`block`: an allocator hands out multiples of so many bytes."""
        super().__init__()
        self.block = block
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
        self.sizes[key] = -(-storage.nbytes() // self.block) * self.block
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def own_tensors(detector: Detector, images: Mapping[str, Any], targets: Sequence[Target]) -> list[Tensor]:
    """Weights, buffers and the samples: what is there before a step."""
    given = [leaf for leaf in tree_leaves(dict(images)) if isinstance(leaf, Tensor)]
    truths = [tensor for target in targets for tensor in vars(target).values()]
    return [*detector.parameters(), *detector.buffers(), *given, *truths]


class Saved(saved_tensors_hooks):
    """Bytes of the distinct storages that autograd keeps for backward of what runs in this context.

    Attributes:
        bytes: their sum, of those that are no one's own.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        """`own`: tensors that are there anyway and are not counted."""
        # By storage, not by address: tensors of a trace have none.
        held = {tensor.untyped_storage()._cdata for tensor in own}
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in held:
                held.add(storage._cdata)
                self.bytes += storage.nbytes()
            # A detached view: an output kept by its own node would never be freed.
            return tensor.detach()

        super().__init__(pack, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def saved_bytes(detector: Detector, images: Mapping[str, Any], targets: Sequence[Target], spec: MemorySpec) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass, which is run too.

    Parameters, buffers and the samples themselves are not counted. The hooks take time: no step to be timed.
    """
    saved = Saved(own_tensors(detector, images, targets))
    with saved:
        loss = forward(detector, images, targets, spec)
    loss.backward()
    return saved.bytes
