"""Attention that never stores the matrix of all pairs, or says that it cannot."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels whose memory grows with the tokens, not with the pairs: on CPUs the first, on GPUs either."""

ALIGNED = 8
"""The kernels take heads whose width is a multiple of this (16 bytes of a 16-bit number)."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v by a kernel that keeps q, k, v, the result and one number a query for backward.

    A fallback is an error. `scaled_dot_product_attention` silently takes its "math" path wherever the fused
    kernels do not fit (a value of another width than the query is enough), and that path stores the matrix:
    16 GiB in fp32 for the 65,536 queries of a 1,024 px chip at stride 4. So widths are brought into line here
    with zeros, which change neither the logits nor the kept part of the result, and the math path is shut:
    torch raises a RuntimeError where no kernel is left.

    Args:
        q: (B, heads, N, c).
        k: (B, heads, M, c).
        v: (B, heads, M, d); d may differ from c.
        scale: of the logits, c ** -0.5 by default.

    Returns:
        (B, heads, N, d).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width = max(q.shape[-1], v.shape[-1])
    width += -width % ALIGNED
    with sdpa_kernel(KERNELS):
        out = F.scaled_dot_product_attention(_widened(q, width), _widened(k, width), _widened(v, width), scale=scale)
    return out[..., : v.shape[-1]]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
