"""A batch that is worked on in parts (`site.micro_batch`), of which a trace runs but few: those of one size are alike.

Parts make the same tensors one after another, the first one first on the way forward and last on the way back. What they
leave behind, their results, only grows on the way forward and shrinks on the way back, so that of parts of one size the
last ones have the most beside them both times. On the way back autograd adds up the gradients of a weight apart from
the one that is held, until the last part has given its own: of two parts one begins these sums, and the other has all of
them beside it. What is alive at once is most in these. The earlier ones are left out but for their results, for the end of
those sums, and for the operations that such a part takes, which lie between the beginnings of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.fusion.recompute import recomputed

RUN = 2
"""Parts of one size that are run."""

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Parts:
    """In place of `recomputed` for the parts of one forward and backward pass."""

    def __init__(self, spec: MemorySpec, weights: Iterable[Tensor], work: Callable[[], int]) -> None:
        """`weights` are those of the parts; `work` tells how many operations there were."""
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._alike = spec.batch // spec.micro_batch if spec.micro_batch else 0
        self._work = work
        self._met, self._looked = 0, 0
        self._begun: list[int] = []
        self._results: list[Shape] = []

    @property
    def left_out(self) -> int:
        """Parts that are not run."""
        return max(0, self._alike - RUN)

    @property
    def operations(self) -> int:
        """Of the parts that are left out, less those of the one that was looked at; to be asked when all is over."""
        if not self.left_out:
            return 0
        forward, back = (late - early for early, late in (self._begun[:2], self._begun[-2:]))
        return self.left_out * (forward + back) - self._looked

    def __call__(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Any:
        """Results of the next part."""
        self._met += 1
        if self._met > self.left_out:

            def noted(*given: Tensor) -> list[Tensor]:
                self._begun.append(self._work())
                return function(*given)

            return recomputed(noted, inputs)
        if self._met == 1:
            before = self._work()
            self._results = [(x.shape, x.stride(), x.dtype) for x in recomputed(function, inputs)]
            self._looked = self._work() - before
        return list(_LeftOut.apply(self._results, *self._weights))


class _LeftOut(torch.autograd.Function):
    """Results of a part that is not run. It gives weights no gradient, but their sums wait for it, as they do for the part."""

    @staticmethod
    def forward(ctx: Any, results: Sequence[Shape], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = 1 + len(weights)
        return tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.inputs
