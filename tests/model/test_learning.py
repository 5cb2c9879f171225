"""The shipped tiny model learns, alone and fused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtshpc.data.sample import Target, target_of
from rtshpc.model.detector import Detector


def _chips(count: int) -> list[tuple[dict[str, Tensor], Target]]:
    """Noise with one or two bright rectangles, which only the difference of both modalities tells from decoys."""
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    chips = []
    for _ in range(count):
        rgb, ndvi = torch.randn(3, 64, 64, generator=generator) / 2, torch.randn(1, 64, 64, generator=generator) / 2
        ids = torch.zeros(64, 64, dtype=torch.int32)
        for row, decoy in ((0, False), (32, bool(number(0, 2)))):
            y, x, h, w = row + number(1, 8), number(1, 36), number(12, 22), number(12, 24)
            rgb[:, y : y + h, x : x + w] += 2
            ndvi[:, y : y + h, x : x + w] += 2 if decoy else -2
            if not decoy:
                ids[y : y + h, x : x + w] = int(ids.max()) + 1
        chips.append(({"rgb": rgb, "ndvi": ndvi}, target_of(ids, [0] * int(ids.max()))))
    return chips


def _train(model: Detector, chips: list[tuple[dict[str, Tensor], Target]], steps: int) -> float:
    """The loss over the last ten steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    last: list[float] = []
    for step in range(steps):
        some = [chips[(4 * step + i) % len(chips)] for i in range(4)]
        images = {name: torch.stack([image[name] for image, _ in some]) for name in model.modalities}
        losses = model.train()(images, [target for _, target in some], [4 * step + i for i in range(4)])
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last.append(total.item())
    return sum(last[-10:]) / 10


@torch.no_grad()
def _found(model: Detector, chips: list[tuple[dict[str, Tensor], Target]]) -> float:
    """Share of instances that a detection with a score of 0.5 overlaps by half, as a mask."""
    hits = total = 0
    for image, target in chips:
        one = model.eval()({name: image[name][None] for name in model.modalities})[0]
        sure = one.scores_N >= 0.5
        masks = one.masks(64, 64, 64, 64)[sure].flatten(1).float()
        truth = target.masks.flatten(1).float()
        shared = truth @ masks.t()
        overlap = shared / (truth.sum(1)[:, None] + masks.sum(1) - shared).clamp(min=1)
        hits += int((overlap >= 0.5).any(1).sum())
        total += len(target)
    return hits / total


@pytest.mark.slow
def test_the_tiny_model_finds_what_it_was_not_shown(build) -> None:
    chips = _chips(88)
    model = build({"rgb": 3, "ndvi": 1}, rpn__anchor_sizes=[8, 16, 24, 32, 48])
    _train(model, chips[:64], 100)
    assert _found(model, chips[64:]) >= 0.5


def test_a_few_steps_lower_the_loss(build) -> None:
    chips = _chips(4)
    model = build({"rgb": 3}, rpn__anchor_sizes=[8, 16, 24, 32, 48])
    first = sum(
        float(v.detach())
        for v in model({"rgb": torch.stack([c["rgb"] for c, _ in chips])}, [t for _, t in chips]).values()
    )
    assert _train(model, chips, 15) < 0.9 * first
