"""A detector small enough for tests, and targets with rectangles for instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rtshpc.core.load import load_model
from rtshpc.data.sample import Target
from rtshpc.model.detector import Detector, build_detector

Build = Callable[..., Detector]


@pytest.fixture
def build() -> Build:
    """Builds the shipped tiny model from a fixed seed: `build({"rgb": 3}, classes=1, frozen=False, **sets)`."""

    def made(channels: Mapping[str, int], classes: int = 1, frozen: bool = False, **sets: Any) -> Detector:
        torch.manual_seed(0)
        model = load_model("tiny", [f"{key.replace('__', '.')}={value}" for key, value in sets.items()])
        return build_detector(model, channels, classes, frozen)

    return made


@pytest.fixture
def target() -> Callable[..., Target]:
    """Makes a target from boxes (x1, y1, x2, y2), an image size and optional ignored rows."""

    def made(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 64), ignored: int = 0) -> Target:
        masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        ignore = torch.zeros(size, dtype=torch.bool)
        ignore[size[0] - ignored :] = True
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return Target(corners, torch.zeros(len(boxes), dtype=torch.int64), masks, ignore)

    return made


@pytest.fixture
def images() -> Callable[..., dict[str, Tensor]]:
    """Random normalised images: `images(rgb=3, ndvi=1, size=(64, 64), batch=2)`."""

    def made(size: tuple[int, int] = (64, 64), batch: int = 2, **channels: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(batch, bands, *size, generator=generator) for name, bands in channels.items()}

    return made
