"""Early fusion: one backbone for the bands of all modalities; and samples that lack a modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rtshpc.core.config import FusionConfig, ModelConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.load import load_model
from rtshpc.model.detector import Detector, build_detector
from rtshpc.model.pyramid import EARLY

CHANNELS = {"rgb": 3, "ndvi": 1, "nir": 1}


def _tiny(**fusion: Any) -> ModelConfig:
    return load_model("tiny").model_copy(update={"fusion": FusionConfig(**fusion)})


def _images(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, bands, 64, 64, generator=generator) for name, bands in CHANNELS.items()}


def test_early_fusion_is_one_backbone_with_a_channel_for_every_band() -> None:
    torch.manual_seed(0)
    detector = build_detector(_tiny(mixer="early"), CHANNELS, 1).eval()
    alone = build_detector(_tiny(), {"rgb": 3}, 1)
    first = detector.state_dict()["backbone.bottom_up.patch_embed.proj.weight"]
    assert first.shape[1] == 5 and list(detector.backbone.backbones()) == [EARLY]
    assert not any("fusion" in name for name in detector.state_dict())
    extra = 2 * first.shape[0] * 49
    assert _count(detector) == _count(alone) + extra
    images = _images()
    found = detector.backbone.scales(detector.prepare(images)[0], {})[EARLY]
    wanted = detector.backbone.bottom_up(torch.cat(list(images.values()), dim=1))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(detector(images)) == 2


def test_early_fusion_of_one_modality_is_that_modality_alone() -> None:
    early, plain = (build_detector(_tiny(mixer=mixer), {"rgb": 3}, 1) for mixer in ("early", "cross"))
    assert early.state_dict().keys() == plain.state_dict().keys()


def test_early_fusion_has_no_frozen_arm() -> None:
    with pytest.raises(ConfigError, match="no frozen arm"):
        build_detector(_tiny(mixer="early"), CHANNELS, 1, frozen=True)


@pytest.mark.parametrize("mixer", ["convolution", "stacked", "cross"])
def test_a_sample_without_an_auxiliary_enters_fusion_as_zeros_and_leaves_its_neighbours_alone(mixer: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(_tiny(mixer=mixer), CHANNELS, 1, frozen=True).eval()
    images = _images()
    whole = detector.backbone.scales(detector.prepare(images)[0], {})
    images["ndvi"][1] = 0
    gap = detector.backbone.scales(detector.prepare(images)[0], {})
    assert all(not scale[1].any() for scale in gap["ndvi"]) and all(scale[0].any() for scale in gap["ndvi"])
    for name in CHANNELS:
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[name], gap[name], strict=True))
    levels, lacking = detector.backbone.levels(whole), detector.backbone.levels(gap)
    for a, b in zip(levels, lacking, strict=True):
        torch.testing.assert_close(a[0], b[0])
        assert bool(b.isfinite().all()) and not torch.equal(a[1], b[1])


def _count(detector: Detector) -> int:
    return sum(p.numel() for p in detector.parameters())
