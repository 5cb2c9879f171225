"""A chip as tensors, its labels, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtshpc.core.errors import ShapeError

IGNORE_ID = 65535
"""Value of an instance raster where the ground is not labelled."""


@dataclass(frozen=True)
class Target:
    """Labels of one chip at the detector's resolution.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in px, right and lower edge outside the last pixel.
        classes: (N,) int64, index into the data set's classes.
        masks: (N, H, W) bool.
        ignore: (H, W) bool, ground on which a prediction is neither right nor wrong.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor
    ignore: Tensor

    def __len__(self) -> int:
        return int(self.classes.shape[0])

    def to(self, device: torch.device | str) -> Target:
        """The same labels on `device`."""
        moved = (part.to(device, non_blocking=True) for part in (self.boxes, self.classes, self.masks, self.ignore))
        return Target(*moved)


@dataclass(frozen=True)
class Sample:
    """One chip, normalised, with nodata at 0 (the mean).

    Attributes:
        id: name of the chip.
        scene: scene it was cut from.
        site: site of the scene.
        images: modality -> (C, H, W) float32, zero mean and unit deviation over the train split.
        valid: (H, W) bool, ground on which the first modality has data.
        target: the labels.
        transform: affine a, b, c, d, e, f from native pixel to CRS coordinates.
        crs_wkt: CRS of `transform`.
        native_size: (h, w) of the chip before it was enlarged, px.
        modality_valid: modality -> (H, W) bool.
    """

    id: str
    scene: str
    site: str
    images: dict[str, Tensor]
    valid: Tensor
    target: Target
    transform: tuple[float, ...]
    crs_wkt: str
    native_size: tuple[int, int]
    modality_valid: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images, px."""
        return int(self.valid.shape[0]), int(self.valid.shape[1])


@dataclass(frozen=True)
class Batch:
    """Chips of one size.

    Attributes:
        images: modality -> (B, C, H, W) float32.
        targets: one per chip.
        samples: the chips themselves; their images are views into `images`.
    """

    images: dict[str, Tensor]
    targets: list[Target]
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """Images and targets on `device`; the samples stay where they are."""
        images = {name: image.to(device, non_blocking=True) for name, image in self.images.items()}
        return Batch(images, [target.to(device) for target in self.targets], self.samples)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the images of `samples`.

    Raises:
        ShapeError: the samples differ in modalities or size, or there are none.
    """
    if not samples:
        raise ShapeError("a batch needs at least one sample")
    names = list(samples[0].images)
    for sample in samples:
        if list(sample.images) != names or sample.size != samples[0].size:
            raise ShapeError(
                f"{sample.id}: modalities {list(sample.images)} of {sample.size} px do not fit those of"
                f" {samples[0].id}: {names} of {samples[0].size} px"
            )
    images = {name: torch.stack([sample.images[name] for sample in samples]) for name in names}
    return Batch(images, [sample.target for sample in samples], list(samples))


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes of masks.

    Args:
        masks: (N, H, W) bool, none empty.

    Returns:
        (N, 4) float32, x1 y1 x2 y2; the box of an empty mask is 0 0 0 0.
    """
    count, height, width = masks.shape
    if count == 0:
        return torch.zeros((0, 4), dtype=torch.float32)
    rows, columns = masks.any(dim=2).to(torch.uint8), masks.any(dim=1).to(torch.uint8)
    top, left = rows.argmax(dim=1), columns.argmax(dim=1)
    bottom, right = height - rows.flip(1).argmax(dim=1), width - columns.flip(1).argmax(dim=1)
    boxes = torch.stack((left, top, right, bottom), dim=1).to(torch.float32)
    return boxes * rows.any(dim=1, keepdim=True)


def target_of(ids: Tensor, classes: Sequence[int]) -> Target:
    """Labels from an instance raster.

    Args:
        ids: (H, W) integer, 0 ground, 1..N instances (each with at least one pixel), `IGNORE_ID` unlabelled.
        classes: class of instance 1..N.
    """
    numbers = torch.arange(1, len(classes) + 1, dtype=ids.dtype).view(-1, 1, 1)
    masks = ids.unsqueeze(0) == numbers
    return Target(boxes_of(masks), torch.tensor(list(classes), dtype=torch.int64), masks, ids == IGNORE_ID)


def keep(target: Target, chosen: Tensor) -> Target:
    """The instances of `target` that `chosen` (N bool) marks."""
    return Target(target.boxes[chosen], target.classes[chosen], target.masks[chosen], target.ignore)
