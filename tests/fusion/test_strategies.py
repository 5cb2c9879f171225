"""The other mixers of the paper's comparison (Li et al. 2025, Table 4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtshpc.core.config import FusionConfig
from rtshpc.fusion.mixers import MIXERS, Convolution, StackedAttention
from rtshpc.fusion.residual import ResidualFusion

WIDTHS = (8, 16, 32, 64)


def _scales(*names: str) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: [torch.randn(2, width, 16 >> i, 12 >> i, generator=generator) for i, width in enumerate(WIDTHS)]
        for name in names
    }


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("residual", [True, False])
def test_every_mixer_fuses_any_number_of_auxiliaries_and_all_of_it_learns(mixer: str, residual: bool) -> None:
    config = FusionConfig(mixer=mixer, residual=residual)  # pyright: ignore[reportArgumentType]
    fusion = ResidualFusion(WIDTHS, "rgb", ("ndvi", "nir", "dem"), config)
    scales = _scales("rgb", "ndvi", "nir", "dem")
    fused = fusion(scales)
    assert [x.shape for x in fused] == [x.shape for x in scales["rgb"]]
    sum((x.square().sum() for x in fused), torch.zeros(())).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fusion.parameters())


def test_stacked_attention_is_self_attention_over_the_tokens_of_both_maps() -> None:
    torch.manual_seed(0)
    mixer = StackedAttention(16, FusionConfig(), 1)
    for layer in (mixer.q, mixer.kv, mixer.proj, mixer.fc1, mixer.fc2):
        torch.nn.init.normal_(layer.weight, std=0.3)
    primary, auxiliary = torch.randn(1, 16, 3, 4), torch.randn(1, 16, 3, 4)
    tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in (primary, auxiliary)], dim=1)
    q = mixer.q(mixer.norm_q(tokens)).view(1, 24, 2, 8).transpose(1, 2)
    k, v = (x.reshape(1, 24, 2, 8).transpose(1, 2) for x in mixer.kv(mixer.norm_kv(tokens)).split(16, dim=-1))
    x = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    x = mixer.proj(x.transpose(1, 2).reshape(1, 24, 16))[:, :12]
    x = x + mixer.fc2(torch.nn.functional.gelu(mixer.fc1(mixer.norm2(x))))
    found = mixer(primary, auxiliary)
    torch.testing.assert_close(found, x.transpose(1, 2).view(1, 16, 3, 4), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, mixer(primary, torch.randn_like(auxiliary)), atol=1e-3)


def test_the_convolution_sees_both_maps_and_is_not_linear() -> None:
    torch.manual_seed(0)
    mixer = Convolution(8, FusionConfig(), 0)
    primary, auxiliary = torch.randn(1, 8, 6, 5), torch.randn(1, 8, 6, 5)
    stacked = torch.cat((primary, auxiliary), dim=1)
    assert torch.equal(mixer(primary, auxiliary), mixer.conv(stacked).clamp(min=0))
    assert mixer(primary, auxiliary).shape == primary.shape
