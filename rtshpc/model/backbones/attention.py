"""Pooling attention with decomposed relative positions, in windows or over the whole map (Li et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.errors import ConfigError
from rtshpc.fusion.attention import fused_attention
from rtshpc.fusion.recompute import chain, same
from rtshpc.model.layers import layer_norm


class PoolingAttention(nn.Module):
    """Multi-scale attention of MViTv2: q, k and v are pooled, q is added to the result."""

    def __init__(
        self,
        inside: int,
        outside: int,
        heads: int,
        stride_q: int,
        stride_kv: int,
        window: int,
        table_side: int,
        fused: bool = False,
    ) -> None:
        """Args:
        inside: channels of the input.
        outside: channels of the output (the block widens inside qkv).
        heads: attention heads; each has outside / heads channels.
        stride_q: pooling of queries, which is the stride of the output.
        stride_kv: pooling of keys and values.
        window: side of the attention window in input tokens; 0 attends over the whole map.
        table_side: side of the map that sizes the relative-position tables, tokens.
        fused: no matrix of all pairs is kept, see `_attend_fused`.

        Raises:
            ConfigError: windows of queries and of keys and values would not cover the same places.
        """
        super().__init__()
        if window % stride_q or window % stride_kv:
            raise ConfigError(
                f"backbone.window_px gives a window of {window} tokens, which pooling by {stride_q} and "
                f"{stride_kv} does not divide; multiples of 8 always fit"
            )
        self.fused = fused
        width = outside // heads
        self.heads = heads
        self.scale = width**-0.5
        self.window_q = window // stride_q
        self.window_kv = window // stride_kv
        self.qkv = nn.Linear(inside, outside * 3)
        self.proj = nn.Linear(outside, outside)
        self.pool_q = nn.Conv2d(width, width, 3, stride_q, padding=1, groups=width, bias=False)
        self.pool_k = nn.Conv2d(width, width, 3, stride_kv, padding=1, groups=width, bias=False)
        self.pool_v = nn.Conv2d(width, width, 3, stride_kv, padding=1, groups=width, bias=False)
        self.norm_q, self.norm_k, self.norm_v = layer_norm(width), layer_norm(width), layer_norm(width)
        rows = 2 * max(table_side // stride_q, table_side // stride_kv) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, width))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, width))

    def forward(self, x: Tensor, first: Callable[[Tensor], Tensor] = same, again: bool = False) -> Tensor:
        """first(x), (B, H, W, inside), to (B, H / stride_q, W / stride_q, outside); `again` as in `chain`."""
        B, H, W, _ = x.shape
        qkv = (
            chain(first, [(self.qkv, same)], (x,), again).reshape(B, H, W, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        )
        q, k, v = qkv.reshape(3, B * self.heads, H, W, -1).unbind(0)
        pooled = _pool(q, self.pool_q, self.norm_q)
        k, v = _pool(k, self.pool_k, self.norm_k), _pool(v, self.pool_v, self.norm_v)
        height, width = pooled.shape[1:3]
        if self.window_q:
            q, k, v = cut(pooled, self.window_q), cut(k, self.window_kv), cut(v, self.window_kv)
            out = join(self._attend(q, k, v), self.window_q, height, width)
        else:
            out = self._attend(pooled, k, v)
        out = out + pooled
        out = out.view(B, self.heads, height, width, -1).permute(0, 2, 3, 1, 4).reshape(B, height, width, -1)
        return chain(same, [(self.proj, same)], (out,), again)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, h, w, c) on k, v (N, h', w', c), with the bias from the unscaled q."""
        if self.fused:
            return self._attend_fused(q, k, v)
        N, h, w, c = q.shape
        kh, kw = k.shape[1:3]
        logits = (q * self.scale).reshape(N, h * w, c) @ k.reshape(N, kh * kw, c).transpose(-2, -1)
        bias_h = torch.einsum("bhwc,hkc->bhwk", q, relative_positions(self.rel_pos_h, h, kh))
        bias_w = torch.einsum("bhwc,wkc->bhwk", q, relative_positions(self.rel_pos_w, w, kw))
        logits = logits.view(N, h, w, kh, kw) + bias_h[..., :, None] + bias_w[..., None, :]
        weights = logits.view(N, h * w, kh * kw).softmax(dim=-1)
        return (weights @ v.reshape(N, kh * kw, c)).view(N, h, w, c)

    def _attend_fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same with the bias as part of the product: [scale q, q.Rh, q.Rw] on [k, row of k, column of k].

        Rows and columns are unit vectors, so the product adds the two numbers that belong to a pair of places.
        """
        N, h, w, c = q.shape
        kh, kw = k.shape[1:3]
        bias_h = torch.einsum("bhwc,hkc->bhwk", q, relative_positions(self.rel_pos_h, h, kh))
        bias_w = torch.einsum("bhwc,wkc->bhwk", q, relative_positions(self.rel_pos_w, w, kw))
        row = torch.eye(kh, dtype=k.dtype, device=k.device)[:, None].expand(N, kh, kw, kh)
        column = torch.eye(kw, dtype=k.dtype, device=k.device).expand(N, kh, kw, kw)
        asking = torch.cat((q * self.scale, bias_h.to(q.dtype), bias_w.to(q.dtype)), dim=-1)
        asked = torch.cat((k, row, column), dim=-1)
        out = fused_attention(
            asking.view(N, 1, h * w, -1), asked.view(N, 1, kh * kw, -1), v.reshape(N, 1, kh * kw, c), scale=1.0
        )
        return out.reshape(N, h, w, c)


def relative_positions(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of a table for every pair of positions on one axis.

    Args:
        table: (rows, c), resized linearly to 2 * max(queries, keys) - 1 rows.
        queries: tokens of the query axis.
        keys: tokens of the key axis; the finer axis counts in its own steps.

    Returns:
        (queries, keys, c).
    """
    rows = 2 * max(queries, keys) - 1
    if table.shape[0] != rows:
        table = F.interpolate(table.t()[None], size=rows, mode="linear")[0].t()
    q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    at_q = torch.arange(queries, device=table.device)[:, None] * q_step
    at_k = torch.arange(keys, device=table.device)[None, :] * k_step
    return table[(at_q - at_k + (keys - 1) * k_step).long()]


def cut(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) into windows (B * n, side, side, C), zero-padded right and bottom, padding not masked."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    x = x.view(B, rows, side, columns, side, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, C)


def join(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """The inverse of `cut`: windows back to (B, height, width, C)."""
    rows, columns = -(-height // side), -(-width // side)
    x = windows.view(-1, rows, columns, side, side, windows.shape[-1])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * side, columns * side, windows.shape[-1])
    return x[:, :height, :width]


def _pool(x: Tensor, pool: nn.Module, norm: nn.Module) -> Tensor:
    return norm(pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
