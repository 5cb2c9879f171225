from __future__ import annotations

import pytest
import torch

from rtshpc.model.weights import (
    WeightsError,
    load_backbone,
    load_heads,
    load_strict,
    load_trainable,
    trainable_state,
)

TWO = {"rgb": 3, "ndvi": 1}


def _shaken(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}


def test_a_pretrained_backbone_arrives_under_its_modality_alone(build) -> None:
    state, fused = _shaken(build({"ndvi": 1})), build(TWO, frozen=True)
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    load_backbone(fused, "ndvi", state)
    for name, value in fused.state_dict().items():
        if name.startswith("backbone.bottom_ups.ndvi."):
            assert torch.equal(value, state[name.replace("bottom_ups.ndvi", "bottom_up")])
        else:
            assert torch.equal(value, before[name])


def test_heads_arrive_without_backbones_and_fusion(build) -> None:
    state, fused = _shaken(build({"rgb": 3})), build(TWO)
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    load_heads(fused, state)
    for name, value in fused.state_dict().items():
        kept = name.startswith(("backbone.bottom_ups.", "backbone.fusion."))
        assert torch.equal(value, before[name] if kept else state[name])


def test_trainable_state_comes_back_and_leaves_out_frozen_backbones(build) -> None:
    frozen = build(TWO, frozen=True, roi__norm="bn")
    state = trainable_state(frozen)
    assert not any("bottom_ups" in name for name in state)
    assert any("running_mean" in name for name in state) and any("fusion" in name for name in state)
    other = build(TWO, frozen=True, roi__norm="bn")
    load_trainable(other, {k: v + 1 if v.is_floating_point() else v for k, v in state.items()})
    assert torch.equal(other.roi_heads.box_head[0].fc1.bias, frozen.roi_heads.box_head[0].fc1.bias + 1)
    assert set(trainable_state(build(TWO))) == set(build(TWO).state_dict())


def test_missing_unexpected_and_misshapen_tensors_are_named(build) -> None:
    model = build({"rgb": 3})
    state = model.state_dict()
    state["backbone.stranger"] = torch.zeros(1)
    del state["backbone.fpn_output2.bias"]
    state["backbone.fpn_output3.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        load_strict(model, state, "best.pt")
    text = str(caught.value)
    assert text.startswith("best.pt:") and "\n" not in text
    assert "1 missing (backbone.fpn_output2.bias)" in text and "1 unexpected (backbone.stranger)" in text
    assert "backbone.fpn_output3.bias is (7,), must be (32,)" in text


def test_an_unknown_modality_is_named_with_a_guess(build) -> None:
    with pytest.raises(WeightsError, match='Did you mean "ndvi"'):
        load_backbone(build(TWO), "ndvy", {})
    with pytest.raises(WeightsError, match="missing"):
        load_backbone(build(TWO), "ndvi", {})
