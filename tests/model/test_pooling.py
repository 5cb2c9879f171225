"""RoIAlign's backward on CPUs against torchvision's own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, strategies as st
from torchvision.ops import roi_align

from rtshpc.model.choices import Counted, decided_by
from rtshpc.model.heads.pooling import SummedRoIAlign, align, entries

SCALE = 1 / 4


def gradients(features: torch.Tensor, rois: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and torchvision's gradient of the features; the values of the two are equal to the bit."""
    found: list[torch.Tensor] = []
    for way in (SummedRoIAlign.apply, lambda x, r, n, s: roi_align(x, r, n, s, 0, aligned=True)):
        leaf = features.clone().requires_grad_()
        pooled = way(leaf, rois, side, SCALE)
        torch.manual_seed(1)
        pooled.backward(torch.randn(pooled.shape))
        assert leaf.grad is not None
        found += [leaf.grad, pooled.detach()]
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=0)
    return found[0], found[2]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), *(st.floats(-60, 160, width=32) for _ in range(2)), *(st.floats(0, 200, width=32),) * 2
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([(16, 24), (1, 9), (30, 1)]),
    st.sampled_from([1, 2, 7]),
)
def test_the_gradient_is_torchvisions_wherever_boxes_lie(
    boxes: list[tuple[float, ...]], shape: tuple[int, int], side: int
) -> None:
    rois = torch.tensor([[image, x, y, x + wide, y + high] for image, x, y, wide, high in boxes])
    ours, theirs = gradients(torch.randn(2, 3, *shape), rois, side)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_of_no_boxes_the_gradient_is_zero() -> None:
    ours, theirs = gradients(torch.randn(1, 4, 8, 8), torch.zeros(0, 5), 7)
    assert not ours.any() and not theirs.any()


def test_the_gradient_is_the_same_to_the_bit_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    low = torch.rand(64, 2) * 200
    rois = torch.cat([torch.zeros(64, 1), low, low + torch.rand(64, 2) * 150], dim=1)
    before, found = torch.get_num_threads(), list[torch.Tensor]()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(gradients(torch.ones(1, 16, 64, 64), rois, 7)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_box_takes_as_many_entries_as_pixels_lie_under_its_points() -> None:
    bins, pixels, weights = entries(torch.tensor([[0.0, 8.0, 8.0, 36.0, 36.0]]), 7, SCALE, 16, 16)
    assert torch.equal(bins.unique(), torch.arange(49)) and len(bins) <= 49 * 4 and bins.equal(bins.sort().values)
    torch.testing.assert_close(torch.zeros(49).index_add(0, bins, weights), torch.ones(49))
    assert pixels.min() // 16 == 2 and pixels.max() // 16 == 9


@pytest.mark.parametrize("counted", [False, True])
def test_a_trace_pools_as_torchvision_does_for_it_has_no_places_to_look_at(counted: bool) -> None:
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    with decided_by(Counted(1)) if counted else nullcontext():
        pooled = align(features, torch.tensor([[0.0, 0, 0, 20, 20]]), 7, SCALE)
    assert pooled.grad_fn is not None and ("Summed" in type(pooled.grad_fn).__name__) != counted
