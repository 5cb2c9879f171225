"""Mixers of the paper's comparison (Li et al. 2025, Table 4): how a primary and an auxiliary map become one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import FusionConfig
from rtshpc.core.errors import ConfigError
from rtshpc.fusion.contract import Mixer


class CrossAttention(Mixer):
    """A cross-attention transformer block: the primary asks, the auxiliary answers, an MLP follows.

    The attention has no skip from the primary: whether the sources are added to the mixed map is the
    fusion's `residual`, one switch for all mixers. Attention runs through
    scaled_dot_product_attention, so no matrix of all pairs of pixels is ever stored.
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
        if self.kv_stride > 1:
            auxiliary = F.avg_pool2d(auxiliary, self.kv_stride, ceil_mode=True)
        q = self._split(self.q(self.norm_q(_tokens(primary))))
        k, v = (self._split(x) for x in self.kv(self.norm_kv(_tokens(auxiliary))).chunk(2, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        x = self.proj(x)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x.transpose(1, 2).reshape(B, C, H, W)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


MIXERS: dict[str, type[CrossAttention]] = {"cross": CrossAttention}
"""Mixers by their name in the config."""
