from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st
from torchvision.ops import box_iou

from rtshpc.model.heads.boxes import BoxCoder, Matcher, clip, iou, nonempty
from rtshpc.model.heads.sampling import Draw, in_ignored, subsample
from rtshpc.model.heads.standard import CODERS


def _boxes(seed: int, count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 100
    side = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1)) * 60 + 1
    return torch.cat((corner, corner + side), dim=1)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), stage=st.integers(0, 2))
def test_decoding_undoes_encoding(seed: int, stage: int) -> None:
    coder, source, target = BoxCoder(CODERS[stage]), _boxes(seed, 20), _boxes(seed + 7, 20)
    torch.testing.assert_close(coder.decode(coder.encode(source, target), source), target, rtol=1e-4, atol=1e-3)


def test_overlap_equals_torchvisions_and_empty_boxes_overlap_nothing() -> None:
    a, b = _boxes(1, 30), _boxes(5, 40)
    torch.testing.assert_close(iou(a, b), box_iou(a, b))
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert float(iou(empty, empty)) == 0
    assert iou(a[:0], b).shape == (0, 40)


def test_clipping_keeps_boxes_in_the_image() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 200.0, 10.0], [300.0, 2.0, 400.0, 8.0]])
    found = clip(boxes, (50, 100))
    assert found.tolist() == [[0, 0, 100, 10], [100, 2, 100, 8]]
    assert nonempty(found).tolist() == [True, False]


def test_the_matcher_keeps_every_truths_best_anchors_with_ties() -> None:
    overlap = torch.tensor([[0.2, 0.2, 0.1, 0.0], [0.0, 0.1, 0.5, 0.8], [0.0, 0.0, 0.0, 0.0]])
    matched, labels = Matcher(0.3, 0.7, keep_best=True).match(overlap)
    assert labels.tolist() == [1, 1, -1, 1]
    assert matched.tolist() == [0, 0, 1, 1]
    assert Matcher(0.5, 0.5).match(overlap)[1].tolist() == [0, 0, 1, 1]
    assert Matcher(0.3, 0.7, keep_best=True).match(overlap[:0])[1].tolist() == [0] * 4


def test_sampling_fills_up_with_background_and_never_takes_the_ignored() -> None:
    labels = torch.tensor([1, 0, -1, 0, 1, 1, 0, 0, -1, 0])
    first, second = subsample(labels, 6, 0.25, 0, Draw(None))
    assert first.tolist() == [0] and second.tolist() == [1, 3, 6, 7, 9]
    chosen = {tuple(torch.cat(subsample(labels, 6, 0.5, 0, Draw(seed))).tolist()) for seed in range(20)}
    assert len(chosen) > 1
    assert all(int(labels[i]) != -1 for row in chosen for i in row)


def test_a_box_is_ignored_by_the_share_of_its_area_on_the_image() -> None:
    ignore = torch.zeros(20, 20, dtype=torch.bool)
    ignore[10:] = True
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 4, 10, 18], [0, 8, 10, 40], [0, 0, 5, 5]])
    assert in_ignored(boxes, ignore).tolist() == [False, True, True, False]
    assert not in_ignored(boxes, torch.zeros_like(ignore)).any()
