"""`model.engine: detectron2`: Detectron2's own proposals, heads and losses agree with ours on the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import MissingExtra, RunError
from rtshpc.core.load import load_model
from rtshpc.data.sample import Target
from rtshpc.model.detections import Detections
from rtshpc.model.detector import Detector
from rtshpc.model.engines import build
from rtshpc.model.weights import load_strict, trainable_state

MODELS: dict[str, dict[str, Any]] = {
    "cascade": {},
    "cascade, batch norm, two convolutions": {"roi.norm": "bn", "rpn.convs": 2, "backbone.drop_path": 0.4},
    "boxes only": {"roi.mask": "false"},
    "Mask R-CNN": {"roi.kind": "standard", "roi.ious": "[0.5]", "roi.box_convs": 0, "roi.box_fcs": 2},
    "Mask R-CNN, ResNet": {
        "roi.kind": "standard",
        "roi.ious": "[0.5]",
        "backbone": "{kind: resnet, blocks: [1, 1, 1, 1], stem_channels: 8, channels: [8, 16, 24, 32],"
        " bottleneck: [8, 8, 8, 8]}",
    },
    "plain convolution": {"fusion.mixer": "convolution", "fusion.residual": "false"},
    "early": {"fusion.mixer": "early", "fusion.residual": "false"},
}
ALL = {"rpn.anchors_per_image": 8192, "roi.rois_per_image": 512}
"""So many that every anchor and every proposal is taken: no choice is left to chance."""
CHANNELS = {"rgb": 3, "ndvi": 1}
Pair = Callable[..., tuple[Detector, Detector]]


def model(engine: str, sets: dict[str, Any]) -> ModelConfig:
    return load_model("tiny", [f"{key}={value}" for key, value in {"engine": engine, **sets}.items()])


@pytest.fixture
def pair() -> Pair:
    """Builds one model in both engines, ours and Detectron2's, with the same weights away from their defaults."""
    pytest.importorskip("detectron2", reason="needs Detectron2, built from its source (docs/detectron2.md)")

    def made(sets: dict[str, Any], frozen: bool = False, cached: bool = False) -> tuple[Detector, Detector]:
        torch.manual_seed(3)
        ours, theirs = (
            build(model(engine, sets), CHANNELS, 2, frozen, cached).train() for engine in ("native", "detectron2")
        )
        with torch.no_grad():
            for name, weight in ours.named_parameters():
                deviation = 0.2 if "bbox_pred" in name or "anchor_deltas" in name else 0.02
                weight += deviation * torch.randn_like(weight) * (weight.std() if weight.numel() > 1 else 1)
        load_strict(theirs, ours.state_dict(), "ours")
        return ours, theirs

    return made


@pytest.fixture
def batch(images: Callable[..., dict[str, Tensor]], target: Callable[..., Target]) -> tuple[Any, Any]:
    """Two chips of 72 x 88 px, which are padded; the second has no slump."""
    size = (72, 88)
    first = target((6, 8, 30, 28), (40, 20, 80, 60), (10, 50, 22, 66), size=size)
    return images(size=size, rgb=3, ndvi=1), [first, target(size=size)]


def losses_of(detector: Detector, batch: tuple[Any, Any], seeds: list[int] | None = None) -> dict[str, Tensor]:
    return detector(batch[0], batch[1], seeds)


def assert_same_losses(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert abs(value.item() - theirs[name].item()) <= 1e-6 * max(1.0, value.item()), name


def assert_same_detections(ours: list[Detections], theirs: list[Detections]) -> None:
    assert len(ours) == len(theirs) and sum(map(len, ours)) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.classes_N, other.classes_N)
        torch.testing.assert_close(one.boxes_N4, other.boxes_N4, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores_N, other.scores_N, rtol=0, atol=1e-4)
        if one.mask_probs_NHW is None:
            assert other.mask_probs_NHW is None
        else:
            torch.testing.assert_close(one.mask_probs_NHW, other.mask_probs_NHW, rtol=0, atol=1e-4)


def test_without_detectron2_its_engine_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        build(model("detectron2", {}), CHANNELS, 1)
    assert "\n" not in str(caught.value)
    for word in ('model.engine = "detectron2"', "not installed", "docs/detectron2.md", "engine: native"):
        assert word in str(caught.value)
    build(model("native", {}), CHANNELS, 1)


def test_the_detector_is_a_generalized_rcnn_with_its_own_rpn_and_heads(pair: Pair) -> None:
    _, cascade = pair({})
    _, standard = pair(MODELS["Mask R-CNN"])
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.backbone import Backbone
    from detectron2.modeling.proposal_generator import RPN
    from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads

    for detector, heads in ((cascade, CascadeROIHeads), (standard, StandardROIHeads)):
        assert isinstance(detector, GeneralizedRCNN) and isinstance(detector.backbone, Backbone)
        assert isinstance(detector.proposal_generator, RPN) and isinstance(detector.roi_heads, heads)
    assert not isinstance(standard.roi_heads, CascadeROIHeads)
    assert [shape.stride for shape in cascade.backbone.output_shape().values()] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("kind", MODELS)
def test_one_seed_starts_both_engines_with_the_same_weights(kind: str, pair: Pair) -> None:
    started: list[dict[str, Tensor]] = []
    for engine in ("native", "detectron2"):
        torch.manual_seed(11)
        started.append(build(model(engine, MODELS[kind]), CHANNELS, 2).state_dict())
    for name, weight in started[0].items():
        assert torch.equal(weight, started[1][name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_one_engine_fit_the_other(kind: str, pair: Pair) -> None:
    ours, theirs = pair(MODELS[kind])
    own, other = ours.state_dict(), theirs.state_dict()
    assert {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in other.items()}
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    load_strict(ours, other, "theirs")


@pytest.mark.parametrize("kind", MODELS)
def test_equal_weights_find_the_same_instances(kind: str, pair: Pair, batch: tuple[Any, Any]) -> None:
    ours, theirs = (detector.eval() for detector in pair(MODELS[kind]))
    with torch.inference_mode():
        assert_same_detections(ours(batch[0]), theirs(batch[0]))


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_equal_where_all_candidates_are_taken(
    kind: str, pair: Pair, batch: tuple[Any, Any]
) -> None:
    ours, theirs = pair({**MODELS[kind], **ALL})
    found, other = losses_of(ours, batch), losses_of(theirs, batch)
    assert_same_losses(found, other)
    for losses in (found, other):
        sum(losses.values()).backward()
    norms = {name: weight.grad.norm() for name, weight in ours.named_parameters() if weight.grad is not None}
    total = float(torch.stack(list(norms.values())).norm())
    weights = dict(theirs.named_parameters())
    assert len(norms) == len(weights)
    for name, norm in norms.items():
        if float(norm) > 1e-5 * total:
            # As golden cases A and C: rounding at the kink of a ReLU.
            assert abs(float(weights[name].grad.norm() - norm)) <= 1e-2 * float(norm), name
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)


def test_seeds_choose_the_same_candidates_in_both_engines_and_leave_the_generator_alone(
    pair: Pair, batch: tuple[Any, Any]
) -> None:
    ours, theirs = pair(MODELS["cascade, batch norm, two convolutions"])
    before = torch.get_rng_state()
    found = losses_of(theirs, batch, [5, 6])
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_losses(losses_of(ours, batch, [5, 6]), found)
    torch.manual_seed(99)
    assert_same_losses(losses_of(theirs, batch, [5, 6]), found)
    others = losses_of(theirs, batch, [7, 8])
    assert all(float(others[name]) != float(found[name]) for name in ("loss_rpn_cls", "loss_cls_stage0"))


def test_ignored_ground_is_left_out_as_in_ours(pair: Pair, batch: tuple[Any, Any], target: Any) -> None:
    ours, theirs = pair(ALL)
    with torch.no_grad():
        for detector in (ours, theirs):
            detector.roi_heads.box_predictor[0].bbox_pred.bias[1] = 4  # boxes move down, onto the ignored ground
    size = (72, 88)
    slumps = target((6, 8, 30, 28), (40, 20, 80, 60), size=size, ignored=36)
    ignoring = (batch[0], [slumps, target(size=size, ignored=60)])
    found = losses_of(theirs, ignoring)
    expected = losses_of(ours, ignoring)
    for name in [name for name in expected if "stage2" not in name]:
        assert abs(float(found[name]) - float(expected[name])) <= 1e-6 * max(1.0, float(expected[name])), name
    seen = losses_of(theirs, (batch[0], [target((6, 8, 30, 28), (40, 20, 80, 60), size=size), target(size=size)]))
    for name in ("loss_rpn_cls", "loss_cls_stage0", "loss_cls_stage1"):
        assert abs(float(seen[name]) - float(found[name])) > 1e-4, name


def test_a_batch_without_slumps_trains_every_weight_and_leaves_finite_statistics(
    pair: Pair, batch: tuple[Any, Any], target: Any
) -> None:
    _, theirs = pair(MODELS["cascade, batch norm, two convolutions"])
    nothing = [target(size=(72, 88)), target(size=(72, 88))]
    sum(losses_of(theirs, (batch[0], nothing), [1, 2]).values()).backward()
    for name, weight in theirs.named_parameters():
        assert weight.grad is not None and bool(torch.isfinite(weight.grad).all()), name
    assert all(bool(torch.isfinite(buffer).all()) for buffer in theirs.buffers())


def test_frozen_backbones_stay_in_eval_mode_without_gradients_and_out_of_checkpoints(
    pair: Pair, batch: tuple[Any, Any]
) -> None:
    ours, theirs = pair({**ALL, "backbone.drop_path": 0.4}, frozen=True)
    assert theirs.training and not any(net.training for net in theirs.backbone.backbones().values())
    found = losses_of(theirs, batch, [1, 2])
    assert_same_losses(losses_of(ours, batch, [1, 2]), found)
    sum(found.values()).backward()
    for net in theirs.backbone.backbones().values():
        assert all(weight.grad is None for weight in net.parameters())
    assert set(trainable_state(theirs)) == set(trainable_state(ours))


def test_given_scales_stand_for_the_images(pair: Pair, batch: tuple[Any, Any]) -> None:
    _, live = pair({}, frozen=True)
    _, cached = pair({}, cached=True)
    load_strict(cached, trainable_state(live), "live")
    inputs, sizes = live.prepare(batch[0])
    scales = live.backbone.scales(inputs, {})
    with torch.inference_mode():
        assert_same_detections(live.eval()(batch[0]), cached.eval()({}, sizes=sizes, scales=scales))
    found = cached.train()({}, batch[1], [1, 2], sizes, scales)
    assert_same_losses(losses_of(live.train(), batch, [1, 2]), found)


def test_under_bf16_autocast_losses_are_close_to_ours(pair: Pair, batch: tuple[Any, Any]) -> None:
    ours, theirs = pair(ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, other = losses_of(ours, batch), losses_of(theirs, batch)
    for name, value in found.items():
        assert abs(float(value) - float(other[name])) <= 0.05 * max(1.0, float(value)), name
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        # In bf16 the pooler would round boxes to it.
        levels = theirs.backbone(torch.zeros(1, 6, 64, 64))
        assert {level.dtype for level in levels.values()} == {torch.float32}
        for one in theirs.eval()(batch[0]):
            assert one.boxes_N4.dtype == one.scores_N.dtype == torch.float32
            assert one.mask_probs_NHW is not None and one.mask_probs_NHW.dtype == torch.float32


def test_outputs_that_are_not_finite_end_the_training_with_one_line(pair: Pair, batch: tuple[Any, Any]) -> None:
    _, theirs = pair({})
    with torch.no_grad():
        theirs.proposal_generator.rpn_head.anchor_deltas.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="learning_rate"):
        losses_of(theirs, batch, [1, 2])
