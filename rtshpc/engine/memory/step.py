"""One step of a training on a sample that nobody has to read: forward and backward, no optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.model.detector import Detector

INSTANCES = 9
"""Slumps of the sample, on a 3 x 3 grid: with few, the mask head would see next to nothing."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sample(spec: MemorySpec, device: torch.device) -> tuple[dict[str, Tensor], Target]:
    """One random sample, (1, C, S, S) per modality, with round slumps on a 3 x 3 grid."""
    generator = torch.Generator().manual_seed(spec.seed)
    side = spec.chip_px
    images = {
        name: torch.randn(1, bands, side, side, generator=generator).to(device) for name, bands in spec.channels.items()
    }
    across = 3
    cell, radius = side / across, side / across * 0.35
    place = torch.arange(side, dtype=torch.float32) + 0.5
    masks, boxes = [], []
    for number in range(INSTANCES):
        y, x = (number // across + 0.5) * cell, (number % across + 0.5) * cell
        masks.append((place[:, None] - y) ** 2 + (place[None] - x) ** 2 <= radius**2)
        boxes.append([x - radius, y - radius, x + radius, y + radius])
    classes = torch.arange(INSTANCES) % spec.classes
    ignore = torch.zeros(side, side, dtype=torch.bool)
    return images, Target(torch.tensor(boxes), classes, torch.stack(masks), ignore).to(device)


def given_scales(detector: Detector, spec: MemorySpec, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Random scales of every modality, as stored features enter a training: in the type a backbone leaves them.

    Layer norms give 16 bits under autocast on CPUs, 32 on GPUs.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    dtype = torch.float32 if device.type == "cuda" else _AUTOCAST.get(spec.precision, torch.float32)
    shapes = [
        (1, getattr(detector.backbone, f"fpn_lateral{level}").in_channels, *[spec.chip_px // 2**level] * 2)
        for level in range(2, 6)
    ]
    return {
        name: tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        for name in spec.channels
    }


def forward(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> Tensor:
    """The summed losses; `images` are scales in the arm `cached`."""
    device = target.boxes.device.type
    context = torch.autocast(device, dtype=_AUTOCAST[spec.precision]) if spec.precision != "fp32" else nullcontext()
    with context:
        if spec.arm == "cached":
            losses = detector({}, [target], [spec.seed], [(spec.chip_px, spec.chip_px)], images)
        else:
            losses = detector(images, [target], [spec.seed])
    return torch.stack([value.float() for value in losses.values()]).sum()


def step(detector: Detector, images: Mapping[str, Any], target: Target, spec: MemorySpec) -> None:
    """Forward and backward."""
    forward(detector, images, target, spec).backward()


def zero(detector: Detector) -> None:
    """Gradients to zero where they are; they stay allocated."""
    for parameter in detector.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
