"""Memory for time: tensors that are not kept for backward but made again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import checkpoint

ROWS = 128
"""Of a weight, whose gradient `linear_in_rows` makes at once."""


def recomputed(function: Callable[..., Any], inputs: Sequence[Tensor], owner: nn.Module | None = None) -> Any:
    """`function(*inputs)`, of which only the inputs are kept: backward makes the rest again, to the bit.

    The second run ends where the last tensor that backward wants is made, so a product at the end of `function`
    is not computed twice. Copies of weights in half precision are dropped as well: autocast would otherwise hold
    them to the end of the forward pass. Random numbers must be among the inputs.

    Args:
        function: of tensors.
        inputs: all tensors that the gradient flows to, but for weights.
        owner: module whose batch norms are run; their running statistics are updated once, not twice.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_kept(owner)),
        )
    finally:
        torch.set_autocast_cache_enabled(cached)


def same(x: Tensor) -> Tensor:
    """x, where a chain has nothing cheap to do."""
    return x


def linear_in_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x.flatten(1))`; under autocast the weight's gradient is made by and by.

    Autograd makes the gradient of a weight in 16 bits, whole, and then its copy in 32. For the widest layer of the
    box head that is the peak of a step: 24 MiB beside 49. Here it is made so many rows at a time.

    Args:
        layer: with a bias.
        x: (N, ...), flattened to (N, in).
    """
    x = x.flatten(1)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return layer(x)
    x = x.to(torch.get_autocast_dtype(kind))
    # The product comes last: `recomputed` need not run it again.
    nothing = _WeightGradient.apply(x.detach(), layer.weight)
    return nothing + F.linear(x, layer.weight.detach(), layer.bias)


class _WeightGradient(torch.autograd.Function):
    """Zeros in the shape of x w^T, whose gradient is that of w in x w^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return x.new_zeros(len(x), len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        found = torch.empty(ctx.shape, dtype=ctx.dtype, device=x.device)
        for rows, part in zip(grads[0].split(ROWS, dim=1), found.split(ROWS), strict=True):
            part.copy_(rows.T @ x)
        return None, found


@contextmanager
def statistics_kept(module: nn.Module | None) -> Iterator[None]:
    """Batch norms of `module` run as ever, but on copies of their running statistics, which are dropped after."""
    norms = [] if module is None else [m for m in module.modules() if isinstance(m, _BatchNorm)]
    own = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def chain(
    first: Callable[..., Tensor],
    steps: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
    inputs: Sequence[Tensor],
    again: bool,
    owner: nn.Module | None = None,
) -> Tensor:
    """Cheap and heavy steps in turn: `first`, then for each of `steps` a heavy one and a cheap one.

    Args:
        first: cheap, of `inputs`.
        steps: (heavy, cheap): a convolution or linear layer, and the norm, activation or reshape behind it.
        inputs: of `first`.
        again: keep what the heavy steps give and make what the cheap ones give again in backward, where the next
            heavy step wants it. Nothing heavy runs twice.
        owner: as in `recomputed`.
    """
    cheap = first
    for heavy, following in steps:

        def part(*given: Tensor, cheap: Callable[..., Tensor] = cheap, heavy: Any = heavy) -> Tensor:
            return heavy(cheap(*given))

        inputs = (recomputed(part, inputs, owner) if again else part(*inputs),)
        cheap = following
    return cheap(*inputs)
