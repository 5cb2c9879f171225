"""Ground on which a prediction is neither right nor wrong."""

from __future__ import annotations

import torch

from rtshpc.model.heads.sampling import Draw, in_ignored


def test_background_anchors_in_ignored_ground_are_not_sampled_but_foreground_is(build, target) -> None:
    rpn = build({"rgb": 3}, rpn__anchors_per_image=4096).proposal_generator
    anchors = torch.cat(rpn.anchors([torch.zeros(1, 1, 64 // 2**k, 64 // 2**k) for k in range(2, 7)]))
    truth = target((8, 36, 40, 60), ignored=32)
    labels, _ = rpn.label(anchors, truth, Draw(0))
    inside = in_ignored(anchors, truth.ignore)
    assert not bool(((labels == 0) & inside).any())
    assert bool(((labels == 1) & inside).any()) and bool(((labels == 0) & ~inside).any())


def test_background_rois_in_ignored_ground_are_left_out_at_every_stage(build, target) -> None:
    heads = build({"rgb": 3}).roi_heads
    truth = target((8, 4, 30, 20), ignored=32)
    boxes = torch.tensor([[2.0, 40, 30, 60], [40, 2, 60, 20], [8, 5, 30, 20]])
    for stage in range(3):
        assert heads.label(boxes, truth, stage).classes.tolist() == [-1, 1, 0]
    assert -1 not in heads.sample(boxes, truth, Draw(0)).classes.tolist()


def test_a_chip_that_is_ignored_throughout_gives_finite_losses(build, images, target) -> None:
    model = build({"rgb": 3}, roi__norm="bn")
    losses = model(images(rgb=3), [target(ignored=64)] * 2, [1, 2])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(bool(v.isfinite()) for v in losses.values())
    assert losses["loss_rpn_cls"].item() == 0 and losses["loss_cls_stage0"].item() == 0


def test_an_empty_ignore_region_changes_nothing(build, images, target) -> None:
    plain = build({"rgb": 3})(images(rgb=3), [target((4, 6, 30, 40))] * 2, [1, 2])
    truth = target((4, 6, 30, 40), ignored=1)
    tiny = build({"rgb": 3})(images(rgb=3), [truth] * 2, [1, 2])
    assert {k: v.item() for k, v in plain.items()} == {k: v.item() for k, v in tiny.items()}
