from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rtshpc.core.errors import ConfigError, ShapeError
from rtshpc.core.load import load_model
from rtshpc.model.detections import Detections
from rtshpc.model.detector import build_detector

THREE = {"rgb": 3, "ndvi": 1, "nir": 1}
LOSSES = {
    *(f"loss_{kind}_stage{k}" for kind in ("cls", "box_reg") for k in range(3)),
    *("loss_mask", "loss_rpn_cls", "loss_rpn_loc"),
}


def test_training_gives_losses_under_detectron2_names_and_reaches_every_weight(build, images, target) -> None:
    model = build(THREE)
    losses = model(images(**THREE), [target((4, 6, 30, 40)), target((20, 20, 50, 44))], [1, 2])
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_images_without_ground_truth_train_with_finite_losses_and_gradients_everywhere(build, images, target) -> None:
    model = build({"rgb": 3})
    losses = model(images(rgb=3), [target(), target()], [1, 2])
    assert losses["loss_mask"].item() == 0 and losses["loss_rpn_loc"].item() == 0
    assert all(math.isfinite(v.item()) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


class FakeSyncBatchNorm(nn.SyncBatchNorm):
    """Stands in for the norm that GPUs share, which does not run on CPUs: counts its calls, norms what there is."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        if len(input) == 0:
            return input * self.weight[:, None, None] + self.bias[:, None, None]
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, True)


@pytest.mark.parametrize("recompute", [False, True])
def test_images_without_ground_truth_meet_every_norm_that_other_processes_wait_in(
    recompute: bool, build, images, target, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    for boxes in ([], [(4, 6, 30, 40)]):
        model = build({"rgb": 3}, roi__norm="bn", roi__recompute=recompute)
        for head in [part for part in model.modules() if isinstance(getattr(part, "norm", None), nn.BatchNorm2d)]:
            head.norm = FakeSyncBatchNorm(head.norm.num_features)
        monkeypatch.setattr(FakeSyncBatchNorm, "calls", 0)
        losses = model(images(rgb=3), [target(*boxes), target(*boxes)], [1, 2])
        assert all(math.isfinite(v.item()) for v in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        calls.append(FakeSyncBatchNorm.calls)
    assert calls[0] == calls[1] > 0


@pytest.mark.parametrize("size", [(33, 61), (64, 64), (97, 40)])
def test_any_height_and_width_is_taken_and_detections_stay_inside(size, build, images) -> None:
    model = build({"rgb": 3}, roi__score_threshold=0.0).eval()
    with torch.no_grad():
        found = model(images(size=size, rgb=3))
    assert len(found) == 2 and len(found[0]) > 0
    for one in found:
        assert float(one.boxes_N4[:, 0::2].max()) <= size[1] and float(one.boxes_N4[:, 1::2].max()) <= size[0]
        assert float(one.boxes_N4.min()) >= 0
        assert one.masks(2 * size[0], 2 * size[1], *size).shape == (len(one), 2 * size[0], 2 * size[1])
        assert bool((one.scores_N.diff() <= 0).all())


def test_padding_is_zero_after_normalisation(build, images) -> None:
    given = images(size=(33, 40), rgb=3, ndvi=1)
    found, sizes = build({"rgb": 3, "ndvi": 1}).prepare(given)
    assert sizes == [(33, 40)] * 2
    for x in found.values():
        assert x.shape == (2, 3, 64, 64)
        assert float(x[:, :, 33:].abs().max()) == 0 and float(x[..., 40:].abs().max()) == 0
    assert torch.equal(found["ndvi"][:, 2, :33, :40], given["ndvi"][:, 0])


def test_two_bands_enter_as_two(build, images) -> None:
    model = build({"dem": 2})
    assert model.backbone.bottom_up.patch_embed.proj.in_channels == 2
    assert len(model.eval()(images(dem=2))) == 2


def test_no_proposals_at_all_give_empty_detections(build, images) -> None:
    model = build({"rgb": 3}).eval()
    bad = images(rgb=3)
    bad["rgb"] = bad["rgb"] * float("nan")
    with torch.no_grad():
        found = model(bad)
    assert [len(one) for one in found] == [0, 0]
    assert found[0].masks(64, 64, 64, 64).shape == (0, 64, 64)


def test_frozen_backbones_keep_out_of_training(build, images, target) -> None:
    model = build(THREE, frozen=True).train()
    before = {k: v.clone() for k, v in model.backbone.bottom_ups.state_dict().items()}
    assert all(not net.training for net in model.backbone.bottom_ups.values())
    assert not any(p.requires_grad for p in model.backbone.bottom_ups.parameters())
    scales = model.backbone.scales(model.prepare(images(**THREE))[0], {})
    assert not any(scale.requires_grad for group in scales.values() for scale in group)
    losses = model(images(**THREE), [target((4, 6, 30, 40))] * 2, [1, 2])
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.backbone.bottom_ups.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.bottom_ups.state_dict().items())


def test_the_same_seeds_give_the_same_step_to_the_bit_and_other_seeds_another(build, images, target) -> None:
    def step(seeds: list[int]) -> tuple[dict[str, float], torch.Tensor]:
        model = build({"rgb": 3}, rpn__anchors_per_image=8, roi__rois_per_image=8, backbone__drop_path=0.5)
        losses = model(images(rgb=3), [target((4, 6, 30, 40)), target((2, 2, 60, 20))], seeds)
        sum(losses.values()).backward()
        return {k: float(v.detach()) for k, v in losses.items()}, model.backbone.bottom_up.blocks[1].mlp.fc1.weight.grad

    (a, grad_a), (b, grad_b), (c, _) = step([1, 2]), step([1, 2]), step([3, 4])
    assert a == b and torch.equal(grad_a, grad_b)
    assert a != c


def test_random_choices_do_not_touch_the_global_generator(build, images, target) -> None:
    model = build({"rgb": 3}, backbone__drop_path=0.5)
    state = torch.get_rng_state()
    model(images(rgb=3), [target((4, 6, 30, 40))] * 2, [1, 2])
    assert torch.equal(state, torch.get_rng_state())


def test_bf16_autocast_trains_and_detects(build, images, target) -> None:
    model = build({"rgb": 3, "ndvi": 1}, roi__norm="bn")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images(rgb=3, ndvi=1), [target((4, 6, 30, 40)), target()], [1, 2])
    sum(losses.values()).backward()
    assert all(v.dtype == torch.float32 and math.isfinite(v.item()) for v in losses.values())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert len(model.eval()(images(rgb=3, ndvi=1))) == 2


def test_boxes_alone_can_be_detected(build, images, target) -> None:
    model = build({"rgb": 3}, roi__mask="false", roi__score_threshold=0.0)
    assert "loss_mask" not in model(images(rgb=3), [target((4, 6, 30, 40))] * 2, [1, 2])
    found = model.eval()(images(rgb=3))[0]
    assert found.mask_probs_NHW is None
    with pytest.raises(ValueError, match="no masks"):
        found.masks(64, 64, 64, 64)


@pytest.mark.parametrize("name", ["mask_rcnn_r50", "mask_rcnn_mvitv2_b", "mvitv2_t", "mvitv2_s", "paper"])
def test_every_shipped_model_is_built(name: str) -> None:
    with torch.device("meta"):
        model = build_detector(load_model(name), {"rgb": 3, "ndvi": 1}, 1, frozen=True)
    assert set(model.backbone.backbones()) == {"rgb", "ndvi"}


def test_names_are_detectron2s_for_one_modality_and_tell_modalities_apart_for_several(build) -> None:
    one, several = set(build({"rgb": 3}).state_dict()), set(build(THREE).state_dict())
    assert "backbone.bottom_up.blocks.0.attn.rel_pos_h" in one
    assert "backbone.bottom_ups.ndvi.blocks.0.attn.rel_pos_h" in several
    rest = {name for name in one if not name.startswith("backbone.bottom_up.")}
    assert rest == {n for n in several if not n.startswith(("backbone.bottom_ups.", "backbone.fusion."))}


def test_mistakes_are_named(build, images, target) -> None:
    model = build({"rgb": 3, "ndvi": 1})
    with pytest.raises(ShapeError, match="rgb, ndvi"):
        model(images(rgb=3))
    with pytest.raises(ShapeError, match=r"images\['ndvi'\] is \(2, 2, 64, 64\)"):
        model(images(rgb=3, ndvi=2))
    with pytest.raises(ShapeError, match="one target"):
        model(images(rgb=3, ndvi=1), [target()])
    with pytest.raises(ConfigError, match="type"):
        build({"rgb": 3, "type": 1})
    with pytest.raises(ConfigError, match="at least one modality"):
        build({})


def test_a_mask_of_ones_pastes_to_its_box() -> None:
    boxes = torch.tensor([[2.0, 3.0, 6.0, 9.0], [4.0, 4.0, 4.0, 8.0]])
    found = Detections(boxes, torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.ones(2, 28, 28))
    masks = found.masks(32, 32, 16, 16)
    wanted = torch.zeros(32, 32, dtype=torch.bool)
    wanted[6:18, 4:12] = True
    assert torch.equal(masks[0], wanted)
    assert not masks[1].any()
