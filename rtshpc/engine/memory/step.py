"""One step on samples that nobody has to read: a training's forward and backward, then the optimizer's part; or a batch in eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.config import TrainConfig
from rtshpc.core.features import scale_shapes
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.data.sample import Target
from rtshpc.engine import optim
from rtshpc.engine.distributed import HALF_TYPES, autocast
from rtshpc.model.detector import DIVISOR, Detector

INSTANCES = 9
"""Slumps of a sample that are enough for the mask head to see something."""


def sample(spec: MemorySpec, device: torch.device) -> tuple[dict[str, Tensor], list[Target]]:
    """A batch of random samples, (B, C, S, S) per modality, each with the slumps of `slumps`."""
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.chip_px, spec.chip_px)
    images = {
        name: torch.randn(spec.batch, bands, *shape, generator=generator).to(device)
        for name, bands in spec.channels.items()
    }
    return images, [slumps(spec, device) for _ in range(spec.batch)]


def slumps(spec: MemorySpec, device: torch.device) -> Target:
    """Round slumps of one size on a square grid, row by row: with few, the mask head would see next to nothing."""
    count = spec.instances or INSTANCES
    side, across = spec.chip_px, ceil(sqrt(count))
    cell, radius = side / across, side / across * 0.35
    place = torch.arange(side, dtype=torch.float32) + 0.5
    masks, boxes = [], []
    for number in range(count):
        y, x = (number // across + 0.5) * cell, (number % across + 0.5) * cell
        masks.append((place[:, None] - y) ** 2 + (place[None] - x) ** 2 <= radius**2)
        boxes.append([x - radius, y - radius, x + radius, y + radius])
    classes = torch.arange(count) % spec.classes
    ignore = torch.zeros(side, side, dtype=torch.bool)
    return Target(torch.tensor(boxes), classes, torch.stack(masks), ignore).to(device)


def seeds(spec: MemorySpec) -> list[int]:
    """Of the choices of each sample."""
    return [spec.seed + number for number in range(spec.batch)]


def given_scales(
    detector: Detector, spec: MemorySpec, device: torch.device, kind: str = ""
) -> dict[str, tuple[Tensor, ...]]:
    """Random scales of every modality, as stored features enter a training: in the type a backbone leaves them.

    Layer norms give 16 bits under autocast on CPUs, 32 on GPUs: as on `kind` (cpu or cuda), else as on `device`.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    dtype = torch.float32 if (kind or device.type) == "cuda" else HALF_TYPES.get(spec.precision, torch.float32)
    side = spec.chip_px + -spec.chip_px % DIVISOR
    shapes = [
        (spec.batch, getattr(detector.backbone, f"fpn_lateral{level}").in_channels, *[side // 2**level] * 2)
        for level in range(2, 6)
    ]
    return {
        name: tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        for name in spec.channels
    }


def forward(detector: Detector, images: Mapping[str, Any], targets: Sequence[Target], spec: MemorySpec) -> Tensor:
    """The summed losses; `images` are scales in the arm `cached`."""
    with autocast(targets[0].boxes.device, spec.precision):
        if spec.arm == "cached":
            losses = detector({}, targets, seeds(spec), [(spec.chip_px, spec.chip_px)] * len(targets), images)
        else:
            losses = detector(images, targets, seeds(spec))
    return torch.stack([value.float() for value in losses.values()]).sum()


def infer(detector: Detector, images: Mapping[str, Any], spec: MemorySpec) -> None:
    """A batch of a detector in eval mode: its instances, or the scales of its one modality as they are stored."""
    device = next(iter(images.values())).device
    # Not in inference mode, as stages do: there operations are not parted into those that a trace can see.
    with torch.no_grad(), autocast(device, spec.precision):
        if spec.work == "detect":
            detector(images)
            return
        from rtshpc.model.features import Header, to_stored  # takes h5py, which nothing else here does

        inputs, _ = detector.prepare(images)
        ((name, scales),) = detector.backbone.scales(inputs, {}).items()
        order = "HWC" if spec.model.backbone.kind == "mvit" else "CHW"
        shapes = scale_shapes(spec.model, spec.chip_px)
        to_stored(scales, Header(name, "fp16", order, shapes, spec.precision, "", ""))


def step(detector: Detector, images: Mapping[str, Any], targets: Sequence[Target], spec: MemorySpec) -> None:
    """Forward and backward."""
    forward(detector, images, targets, spec).backward()


def zero(detector: Detector) -> None:
    """Gradients to zero where they are; they stay allocated."""
    for parameter in detector.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


class Optimizer:
    """AdamW, clipping and, in fp16, the scaled loss of a training; its rate is zero, so that every step is the same one."""

    def __init__(self, detector: Detector, spec: MemorySpec, device: torch.device) -> None:
        self._detector = detector
        self._limit = TrainConfig().clip_norm
        self._optimizer = optim.build_optimizer(detector, TrainConfig())
        optim.set_rate(self._optimizer, 0.0)
        self._scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=spec.precision == "fp16")

    def step(self, images: Mapping[str, Any], targets: Sequence[Target], spec: MemorySpec) -> None:
        """Forward, backward and the update of all that trains."""
        self._scaler.scale(forward(self._detector, images, targets, spec)).backward()
        self._scaler.unscale_(self._optimizer)
        optim.clip_gradients([weight for _, weight in optim.trainable(self._detector)], self._limit)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def state(self) -> list[Tensor]:
        """Moments and step counters."""
        found = [value for state in self._optimizer.state.values() for value in state.values()]
        return [value for value in found if isinstance(value, Tensor)]
