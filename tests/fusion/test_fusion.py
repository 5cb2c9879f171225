from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtshpc.core.config import FusionConfig
from rtshpc.core.errors import ConfigError, ShapeError
from rtshpc.fusion.contract import Mixer
from rtshpc.fusion.mixers import CrossAttention
from rtshpc.fusion.residual import ResidualFusion

WIDTHS = (8, 16, 32, 64)


def _scales(*names: str, side: int = 16, seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randn(2, width, side >> i, side >> i, generator=generator) for i, width in enumerate(WIDTHS)]
        for name in names
    }


@pytest.mark.parametrize("auxiliaries", [("ndvi",), ("ndvi", "nir"), ("ndvi", "nir", "dem", "thermal")])
@pytest.mark.parametrize("residual", [True, False])
def test_any_number_of_auxiliaries_keeps_the_primarys_shapes_and_trains_all(auxiliaries, residual) -> None:
    fusion = ResidualFusion(WIDTHS, "rgb", auxiliaries, FusionConfig(residual=residual))
    scales = _scales("rgb", *auxiliaries)
    fused = fusion(scales)
    assert [x.shape for x in fused] == [x.shape for x in scales["rgb"]]
    sum(x.square().sum() for x in fused).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fusion.parameters())


def test_the_fused_scale_is_the_projection_of_primary_auxiliaries_and_mixed_maps() -> None:
    torch.manual_seed(0)
    fusion = ResidualFusion(WIDTHS, "rgb", ("ndvi", "nir"), FusionConfig())
    for layer in fusion.projections:
        torch.nn.init.normal_(layer.weight)
    scales = _scales("rgb", "ndvi", "nir")
    for i, found in enumerate(fusion(scales)):
        mixed = sum(fusion.mixers[name][i](scales["rgb"][i], scales[name][i]) for name in ("ndvi", "nir"))
        total = scales["rgb"][i] + scales["ndvi"][i] + scales["nir"][i] + mixed
        torch.testing.assert_close(found, fusion.projections[i](total), rtol=1e-4, atol=1e-4)


def test_without_the_residual_only_the_mixed_maps_are_projected() -> None:
    torch.manual_seed(0)
    fusion = ResidualFusion(WIDTHS, "rgb", ("ndvi",), FusionConfig(residual=False))
    scales = _scales("rgb", "ndvi")
    mixed = fusion.mixers["ndvi"][0](scales["rgb"][0], scales["ndvi"][0])
    torch.testing.assert_close(fusion(scales)[0], fusion.projections[0](mixed))


def test_the_order_of_the_modalities_given_does_not_matter_and_the_primary_does() -> None:
    torch.manual_seed(0)
    fusion = ResidualFusion(WIDTHS, "ndvi", ("rgb",), FusionConfig())
    scales = _scales("rgb", "ndvi")
    turned = dict(reversed(scales.items()))
    swapped = {"rgb": scales["ndvi"], "ndvi": scales["rgb"]}
    assert all(torch.equal(a, b) for a, b in zip(fusion(scales), fusion(turned), strict=True))
    assert not torch.allclose(fusion(scales)[0], fusion(swapped)[0])


def test_cross_attention_asks_with_the_primary_and_answers_with_the_auxiliary() -> None:
    torch.manual_seed(0)
    mixer = CrossAttention(16, FusionConfig(heads=(1, 2, 4, 8)), 1)
    for layer in (mixer.q, mixer.kv, mixer.proj, mixer.fc1, mixer.fc2):
        torch.nn.init.normal_(layer.weight, std=0.3)
    primary, auxiliary = torch.randn(2, 16, 6, 5), torch.randn(2, 16, 6, 5)
    asked = mixer.q(mixer.norm_q(primary.flatten(2).transpose(1, 2))).view(2, 30, 2, 8).transpose(1, 2)
    answers = mixer.kv(mixer.norm_kv(auxiliary.flatten(2).transpose(1, 2)))
    k, v = (answers[..., part].reshape(2, 30, 2, 8).transpose(1, 2) for part in (slice(0, 16), slice(16, 32)))
    x = (asked @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    x = mixer.proj(x.transpose(1, 2).reshape(2, 30, 16))
    x = x + mixer.fc2(torch.nn.functional.gelu(mixer.fc1(mixer.norm2(x))))
    torch.testing.assert_close(mixer(primary, auxiliary), x.transpose(1, 2).view(2, 16, 6, 5), rtol=1e-4, atol=1e-5)


def test_no_matrix_of_all_pairs_of_pixels_is_kept_for_backward() -> None:
    mixer = CrossAttention(8, FusionConfig(), 0)
    largest = 0

    def weigh(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda x: x):
        mixer(torch.randn(1, 8, 32, 32), torch.randn(1, 8, 32, 32)).sum().backward()
    assert largest < 1024 * 1024 / 8


def test_pooled_keys_keep_the_shape() -> None:
    mixer = CrossAttention(8, FusionConfig(kv_stride=(4, 1, 1, 1)), 0)
    assert mixer(torch.randn(1, 8, 6, 7), torch.randn(1, 8, 6, 7)).shape == (1, 8, 6, 7)


def test_disagreeing_scales_are_named() -> None:
    fusion = ResidualFusion(WIDTHS, "rgb", ("ndvi",), FusionConfig())
    scales = _scales("rgb", "ndvi")
    with pytest.raises(ShapeError, match="was given rgb"):
        fusion({"rgb": scales["rgb"]})
    with pytest.raises(ShapeError, match=r"scale 0 of ndvi is \(2, 8, 8, 8\)"):
        fusion({"rgb": scales["rgb"], "ndvi": _scales("ndvi", side=8)["ndvi"]})
    with pytest.raises(ConfigError, match="heads"):
        CrossAttention(10, FusionConfig(heads=(1, 2, 4, 8)), 2)


def test_a_mixer_without_a_way_to_mix_cannot_be_made() -> None:
    class Idle(Mixer):
        pass

    with pytest.raises(TypeError, match="forward"):
        Idle()  # pyright: ignore[reportAbstractUsage]
