"""How many RoIs a step works on: the sample is made to fill them, and what there was is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rtshpc.core.sizing.measured import Counts
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.step import INSTANCES, forward, seeds, slumps
from rtshpc.model.detector import Detector
from rtshpc.model.heads.rpn import RPN
from rtshpc.model.heads.sampling import Draw
from rtshpc.model.heads.standard import RoIHeads

Seen = tuple[Sequence[Tensor], list[Tensor]]
"""Levels of the pyramid, and each image's proposals (N, 4)."""


def filling(detector: Detector, images: Mapping[str, Any], spec: MemorySpec, device: torch.device) -> MemorySpec:
    """The spec with as few slumps as fill the RoIs and the foreground RoIs of every image, where it asks for 0.

    Slumps lie on a square grid, and their own boxes are candidates: as many as there are foreground RoIs always do.
    Other code than ours does not say whom it would choose, and gets so many.
    """
    if spec.instances:
        return spec
    rois, most = detector.model.roi.rois_per_image, spec.counts["foreground"]
    sides = [side for side in range(3, 3 + most) if (side - 1) ** 2 < max(most, INSTANCES)]
    grids = [spec.model_copy(update={"instances": side**2}) for side in sides]
    if not isinstance(detector.roi_heads, RoIHeads):
        return grids[-1]
    _, proposals = _first_stage(detector, images, spec, device)
    for grid in grids:
        target = slumps(grid, device)
        chosen = [
            detector.roi_heads.sample(boxes, target, Draw(seed))
            for boxes, seed in zip(proposals, seeds(spec), strict=True)
        ]
        if all((len(one.boxes), int((one.classes < detector.classes).sum())) == (rois, most) for one in chosen):
            return grid
    return grids[-1]


def counts(detector: Detector, images: Mapping[str, Any], spec: MemorySpec, device: torch.device) -> Counts:
    """Candidates an image of the step before, and of the first stage, which is run once more."""
    heads, rpn = detector.roi_heads, detector.proposal_generator
    if not isinstance(heads, RoIHeads) or not isinstance(rpn, RPN):
        return Counts()
    front = {f"stage{stage}": predictor.foreground for stage, predictor in enumerate(heads.predictors())}
    if heads.mask_head is not None:
        front["mask"] = heads.mask_head.counted
    rois = heads.predictors()[0].counted / spec.batch
    levels, proposals = _first_stage(detector, images, spec, device)
    anchors = torch.cat(rpn.anchors(levels))
    labels = torch.stack([rpn.label(anchors, slumps(spec, device), Draw(seed))[0] for seed in seeds(spec)])
    return Counts(
        proposals_per_image=sum(map(len, proposals)) / spec.batch,
        rois_per_image=rois,
        foreground_per_image={name: count / spec.batch for name, count in front.items()},
        anchors_per_image={
            "foreground": int((labels == 1).sum()) / spec.batch,
            "background": int((labels == 0).sum()) / spec.batch,
        },
        filled=(rois, front["stage0"] / spec.batch) == (heads.config.rois_per_image, spec.counts["foreground"]),
    )


@torch.no_grad()
def _first_stage(detector: Detector, images: Mapping[str, Any], spec: MemorySpec, device: torch.device) -> Seen:
    """What a step's forward pass sees and proposes; targets change neither."""
    seen: list[Seen] = []

    def look(rpn: Any, given: tuple[Any, ...], found: tuple[Any, ...]) -> None:
        seen.append((given[0], [boxes for boxes, _ in found[0]]))

    hook = detector.proposal_generator.register_forward_hook(look)
    try:
        forward(detector, images, [slumps(spec, device)] * spec.batch, spec)
    finally:
        hook.remove()
    return seen[0]
