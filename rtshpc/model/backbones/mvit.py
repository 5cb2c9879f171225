"""MViTv2, a multi-scale vision transformer with four output scales (Li et al. 2022)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rtshpc.core.config import MViTConfig
from rtshpc.fusion.recompute import chain, recomputed, same
from rtshpc.model.backbones.attention import PoolingAttention
from rtshpc.model.layers import Mlp, drop_path, layer_norm, start_transformer


class PatchEmbed(nn.Module):
    """The first convolution: 7x7 with stride 4, channels last after it."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(bands, width, 7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """BCHW to (B, H / 4, W / 4, width)."""
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention and MLP, each on a skip; where the block widens, the skip is a projection of the normed input."""

    def __init__(
        self,
        inside: int,
        outside: int,
        attention: PoolingAttention,
        stride_q: int,
        mlp_ratio: float,
        drop: float,
        again: bool = False,
    ) -> None:
        """`again`: norms and activations are made again in backward (see `fusion.recompute.chain`)."""
        super().__init__()
        self.norm1 = layer_norm(inside)
        self.attn = attention
        self.norm2 = layer_norm(outside)
        self.mlp = Mlp(outside, mlp_ratio)
        self.proj = nn.Linear(inside, outside) if inside != outside else None
        self.pool_skip = nn.MaxPool2d(stride_q + 1, stride_q, (stride_q + 1) // 2) if stride_q > 1 else None
        self.drop = drop
        self.again = again

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, H, W, inside) to (B, H / stride, W / stride, outside); draws (B, 2) uniform numbers for drop path."""
        # Made again, a norm belongs to the layer that takes it; where two take it, it is kept: the same sums.
        given, norm = (x, self.norm1) if self.again and self.proj is None else (self.norm1(x), same)
        skip = x if self.proj is None else chain(same, [(self.proj, same)], (given,), self.again)
        if self.pool_skip is not None:
            skip = self.pool_skip(skip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        first, second = (None, None) if draws is None else draws.unbind(1)
        x = skip + drop_path(self.attn(given, norm, self.again), first, self.drop)
        return x + drop_path(self.mlp(x, self.norm2, self.again), second, self.drop)


class MViT(nn.Module):
    """The backbone: four scales at strides 4, 8, 16 and 32.

    Attributes:
        widths: channels of the four scales.
        draws: uniform numbers an image that drop path takes.
    """

    def __init__(self, config: MViTConfig, bands: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(bands, config.embed_dim)
        self.blocks = nn.ModuleList()
        self.widths: tuple[int, ...] = ()
        self.draws = 2 * config.depth
        width = outside = config.embed_dim
        heads, stride_kv, window = config.num_heads, config.kv_stride, config.window_px
        side = config.pretrain_px // 4
        with unset_fake_temporarily():  # numbers, also where tensors are shapes alone
            rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        last = config.last_blocks
        for i in range(config.depth):
            stride_q = 2 if i - 1 in last else 1
            stride = 2 * stride_kv if i in last[1:3] else stride_kv
            side_q = 0 if i in last[1:] else window
            fused, again = config.attention == "fused", config.checkpoint == "light"
            attention = PoolingAttention(width, outside, heads, stride_q, stride, side_q, side, fused)
            self.blocks.append(Block(width, outside, attention, stride_q, config.mlp_ratio, rates[i], again))
            width = outside
            if i in last:
                self.widths += (width,)
                self.add_module(f"scale{len(self.widths) + 1}_norm", layer_norm(width))
                outside, heads, stride_kv = 2 * outside, 2 * heads, max(stride_kv // 2, 1)
            if i - 1 in last:
                window, side = window // 2, side // 2
        self.apply(start_transformer)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scales of an image.

        Args:
            x: BCHW, H and W multiples of 32.
            draws: (B, self.draws) uniform numbers for drop path; None drops nothing.

        Returns:
            Four maps (B, widths[i], H / 2 ** (i + 2), W / 2 ** (i + 2)), each normed.
        """
        scales: list[Tensor] = []
        x = self.patch_embed(x)
        for k in range(len(self.config.last_blocks)):
            run = partial(self._scale, k, draws)
            x, scale = recomputed(run, (x,)) if self.config.checkpoint == "stages" else run(x)
            scales.append(scale.permute(0, 3, 1, 2))
        return tuple(scales)

    def _scale(self, k: int, draws: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of scale k: their result (B, H, W, C), which the next scale takes, and its norm, the scale."""
        last = self.config.last_blocks
        for i in range(last[k - 1] + 1 if k else 0, last[k] + 1):
            run = partial(self.blocks[i], draws=None if draws is None else draws[:, 2 * i : 2 * i + 2])
            x = recomputed(run, (x,)) if self.config.checkpoint == "blocks" else run(x)
        return x, getattr(self, f"scale{k + 2}_norm")(x)
