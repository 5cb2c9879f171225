"""A batch that goes through backbones, fusion and pyramid in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtshpc.model.detector import Detector

from .test_lean import Kept

TWO = {"rgb": 3, "ndvi": 1}
SEEDS = [1, 2, 3]


def _step(model: Detector, images: Any, targets: Any) -> dict[str, torch.Tensor]:
    losses = model(images, targets, SEEDS)
    sum(losses.values()).backward()
    found = {f"loss {name}": value.detach() for name, value in losses.items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("kind", ["trained", "frozen", "early"])
def test_a_batch_in_parts_has_the_losses_gradients_and_statistics_of_the_whole(
    kind: str, build: Callable[..., Detector], images: Any, target: Any
) -> None:
    sets = {"early": {"fusion__mixer": "early", "fusion__residual": "false"}}.get(kind, {})
    given = images(**TWO, batch=3)
    targets = [target((4, 6, 30, 40)), target(), target((20, 20, 50, 44))]
    found: list[dict[str, torch.Tensor]] = []
    for at_once in (0, 2):
        model = build(TWO, frozen=kind == "frozen", roi__norm="bn", backbone__drop_path="0.3", **sets)
        model.take_at_once(at_once)
        found.append(_step(model, given, targets))
    whole, parts = found
    assert whole.keys() == parts.keys()
    assert any(name.startswith("gradient backbone") for name in whole)
    largest = max(float(value.norm()) for name, value in whole.items() if name.startswith("gradient"))
    for name, value in whole.items():
        room = 1e-5 * (largest if name.startswith("gradient") else float(value.float().norm()))
        assert float((parts[name].float() - value.float()).norm()) <= 1e-3 * float(value.float().norm()) + room, name


def test_of_a_batch_in_parts_less_is_kept_for_backward_and_nothing_changes_where_nothing_trains(
    build: Callable[..., Detector], images: Any, target: Any
) -> None:
    given, kept = images(rgb=3, batch=3), []
    for at_once in (0, 1):
        model = build({"rgb": 3})
        model.take_at_once(at_once)
        found = Kept(model)
        with found:
            model(given, [target((4, 6, 30, 40))] * 3, SEEDS)
        kept.append(found.bytes)
        model.eval()
        with torch.no_grad():
            assert len(model(given)) == 3
    assert kept[1] < 0.7 * kept[0]
