"""Mixers of the paper's comparison (Li et al. 2025, Table 4): how a primary and an auxiliary map become one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import FusionConfig
from rtshpc.core.errors import ConfigError
from rtshpc.fusion.attention import fused_attention
from rtshpc.fusion.contract import Mixer
from rtshpc.fusion.recompute import chain, same


class CrossAttention(Mixer):
    """A cross-attention transformer block: the primary asks, the auxiliary answers, an MLP follows.

    The attention has no skip from the primary: whether the sources are added to the mixed map is the
    fusion's `residual`, one switch for all mixers. No matrix of all pairs of pixels is ever stored.
    """

    def __init__(self, width: int, config: FusionConfig, scale: int) -> None:
        """Args:
        width: channels of the maps.
        config: heads, pooling of keys and values, MLP ratio.
        scale: 0 to 3, index of the backbone scale.
        """
        super().__init__()
        self.heads = config.heads[scale]
        self.kv_stride = config.kv_stride[scale]
        self.again = config.recompute
        if width % self.heads:
            raise ConfigError(f"fusion.heads[{scale}] = {self.heads} does not divide the width {width} of that scale")
        hidden = int(width * config.mlp_ratio)
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.q, self.kv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """Two maps of (B, C, H, W) to one of the same shape."""
        B, C, H, W = primary.shape
        q = self._split(chain(self.norm_q, [(self.q, same)], (_tokens(primary),), self.again))
        both = chain(self._normed_answers, [(self.kv, same)], (primary, auxiliary), self.again)
        k, v = (self._split(x) for x in both.chunk(2, dim=-1))
        x = fused_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        x = chain(same, [(self.proj, same)], (x,), self.again)
        x = x + chain(self.norm2, [(self.fc1, F.gelu), (self.fc2, same)], (x,), self.again)
        return x.transpose(1, 2).reshape(B, C, H, W)

    def answers(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """The tokens that keys and values come from, (B, N, C)."""
        return self._pooled(auxiliary)

    def _normed_answers(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        return self.norm_kv(self.answers(primary, auxiliary))

    def _pooled(self, x: Tensor) -> Tensor:
        return _tokens(F.avg_pool2d(x, self.kv_stride, ceil_mode=True) if self.kv_stride > 1 else x)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class StackedAttention(CrossAttention):
    """Self-attention over the tokens of both maps, stacked; the mixed map is what the primary's tokens become.

    Only the primary's rows of that attention are ever used, so only they are computed.
    """

    def answers(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """Tokens of the primary, then of the auxiliary."""
        return torch.cat((self._pooled(primary), self._pooled(auxiliary)), dim=1)


class Convolution(Mixer):
    """A 3x3 convolution over the channels of both maps, and a ReLU: what convolutional fusion does at a scale."""

    def __init__(self, width: int, config: FusionConfig, scale: int) -> None:
        """Args:
        width: channels of the maps.
        config: whether the stacked maps are made again in backward.
        scale: not used.
        """
        super().__init__()
        self.again = config.recompute
        self.conv = nn.Conv2d(2 * width, width, 3, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)

    def forward(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """Two maps of (B, C, H, W) to one of the same shape."""
        return chain(_stacked, [(self.conv, F.relu)], (primary, auxiliary), self.again)


def _stacked(*maps: Tensor) -> Tensor:
    return torch.cat(maps, dim=1)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


MIXERS: dict[str, type[Mixer]] = {"convolution": Convolution, "stacked": StackedAttention, "cross": CrossAttention}
"""Mixers by their name in the config."""
