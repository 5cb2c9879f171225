"""Whose weights a file holds, told by its names, and each name under ours.

Our names are Detectron2's: what lies below `backbone.bottom_up.` is the backbone, the rest pyramid and heads.
Names were taken from the published code: facebookresearch/mvit and Detectron2's projects/MViTv2 (Li et al. 2022),
timm's mvitv2, torchvision's resnet (He et al. 2016).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rtshpc.model.imports.files import WeightFile
from rtshpc.model.weights import ONE, SEVERAL, WeightsError, listed

UNUSED = ""
"""In place of a name of ours: the tensor is known and a detector has no use for it."""

COUNTER = "num_batches_tracked"
"""Last part of the name of a batch norm's counter, which nothing here reads."""


@dataclass(frozen=True)
class Family:
    """One project's way to name its tensors.

    Attributes:
        name: short name.
        title: what files of the family are.
        signs: names that tell the family, any of them; one that ends in a point is the start of a name.
        rename: all names of a file -> name of ours, or UNUSED.
    """

    name: str
    title: str
    signs: tuple[str, ...]
    rename: Callable[[Sequence[str]], dict[str, str]]

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of the family."""
        starts = tuple(sign for sign in self.signs if sign.endswith("."))
        return any(name in self.signs or name.startswith(starts) for name in names)


def recognise(file: WeightFile) -> Family:
    """The family of a file.

    Raises:
        WeightsError: none; the names that would tell one and the file's own are listed.
    """
    for family in FAMILIES:
        if family.fits(file.tensors):
            return family
    wanted = listed("missing, of which each tells a family", (f"{one.signs[0]} of {one.name}" for one in FAMILIES))
    raise WeightsError(f"{file.path}: weights of no known family: {wanted}; {listed('unexpected', file.tensors)}")


def _of_detectron2(names: Sequence[str]) -> dict[str, str]:
    """A whole detector; Detectron2 itself passes over these buffers of old files."""
    passed_over = ("pixel_mean", "pixel_std")
    return {name: UNUSED if name in passed_over or ".anchor_generator.cell_anchors" in name else name for name in names}


def _of_mvit(names: Sequence[str]) -> dict[str, str]:
    """PySlowFast's classifiers: the names of Detectron2's backbone, and a class token, a norm and a head."""
    extra = ("cls_token", "norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias")
    return {name: UNUSED if name in extra else ONE + name for name in names}


def _of_timm(names: Sequence[str]) -> dict[str, str]:
    """timm's classifiers: blocks are counted anew in every stage."""
    extra = ("cls_token", "norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias")
    inside = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
    places = sorted({(int(m[1]), int(m[2])) for m in map(inside.fullmatch, names) if m})
    found: dict[str, str] = {}
    for name in names:
        match = inside.fullmatch(name)
        if match is None:
            found[name] = UNUSED if name in extra else ONE + name
            continue
        block = places.index((int(match[1]), int(match[2])))
        found[name] = f"{ONE}blocks.{block}.{match[3].replace('shortcut_proj_attn.', 'proj.')}"
    return found


def _of_torchvision(names: Sequence[str]) -> dict[str, str]:
    """torchvision's (and timm's) bottleneck ResNets."""
    found: dict[str, str] = {}
    for name in names:
        if name in ("fc.weight", "fc.bias"):
            found[name] = UNUSED
            continue
        ours = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
        ours = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", ours)
        ours = ours.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
        found[name] = ONE + re.sub(r"\.bn(\d)\.", r".conv\1.norm.", ours)
    return found


FAMILIES = (
    Family(
        "detectron2",
        "a detector (or its backbone) under Detectron2's names, ours too",
        (ONE, SEVERAL),
        _of_detectron2,
    ),
    Family("mvit", "an MViTv2 classifier of facebookresearch/mvit", ("blocks.0.attn.pool_q.weight",), _of_mvit),
    Family("timm", "an MViTv2 classifier of timm", ("stages.0.blocks.0.attn.pool_q.weight",), _of_timm),
    Family("torchvision", "a ResNet classifier of torchvision", ("layer1.0.conv1.weight",), _of_torchvision),
)
