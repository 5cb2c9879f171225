"""Backbones of all modalities, their fusion and the feature pyramid (Lin et al. 2017) over the fused scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import ModelConfig, MViTConfig
from rtshpc.core.errors import ConfigError
from rtshpc.fusion.recompute import recomputed
from rtshpc.fusion.residual import ResidualFusion
from rtshpc.model.backbones.mvit import MViT
from rtshpc.model.backbones.resnet import ResNet
from rtshpc.model.choices import choices
from rtshpc.model.layers import start_xavier

EARLY = "early"
"""Name of the one backbone of early fusion, where a modality's stands otherwise."""


def build_backbone(model: ModelConfig, bands: int) -> MViT | ResNet:
    """The bottom-up network of one modality; one band enters as three equal ones."""
    entering = 3 if bands == 1 else bands
    if isinstance(model.backbone, MViTConfig):
        return MViT(model.backbone, entering)
    return ResNet(model.backbone, entering)


def without_gaps(scales: tuple[Tensor, ...], image: Tensor) -> tuple[Tensor, ...]:
    """`scales` of one modality, zero for the samples whose image (B, C, H, W) is zero throughout."""
    there = image.flatten(1).any(dim=1)
    if choices().holds(there.all(), usual=True):
        return scales
    return tuple(torch.where(there.view(-1, 1, 1, 1), scale, scale.new_zeros(())) for scale in scales)


def rows_of(given: Any, rows: slice) -> Any:
    """What is given for some images of the batch: tensors, tuples and mappings of them; None stays None."""
    if isinstance(given, Mapping):
        return {name: rows_of(value, rows) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(rows_of(value, rows) for value in given)
    return given if given is None else given[rows]


class Pyramid(nn.Module):
    """Images of every modality to the levels p2 to p6.

    Submodules carry Detectron2's names for one modality (`bottom_up`); with several there are
    `bottom_ups.<modality>` and `fusion`.

    Attributes:
        modalities: names, the primary first.
        frozen: the backbones take no gradient and stay in eval mode.
        cached: there are no backbones, `levels` is given their scales.
        absent: number of parameters of the backbones that `cached` leaves out.
        at_once: images that a training step works on together; 0 = all. Of the others only what goes in and comes out
            is kept, and backward makes the rest again: nothing here mixes images, so the result stays the same.
    """

    def __init__(self, model: ModelConfig, channels: Mapping[str, int], frozen: bool, cached: bool = False) -> None:
        super().__init__()
        self.modalities = tuple(channels)
        self.frozen, self.cached = frozen, cached
        self.halved = frozen and model.frozen_dtype == "bf16"
        self.early = model.fusion.early and len(channels) > 1
        if self.early and frozen:
            raise ConfigError(
                "fusion.mixer = early has no frozen arm: its one backbone takes the bands of all modalities"
            )
        bands = {EARLY: sum(channels.values())} if self.early else channels
        self.absent, self.at_once = 0, 0
        built: dict[str, MViT | ResNet] = {}
        widths: tuple[int, ...] = ()
        for name, count in bands.items():
            # Built in any case: the draws of all other weights come after its own. Without a name it is gone at once.
            backbone = build_backbone(model, count)
            widths = backbone.widths
            if cached:
                self.absent += sum(parameter.numel() for parameter in backbone.parameters())
            else:
                built[name] = backbone
        if built and len(bands) == 1:
            self.bottom_up = next(iter(built.values()))
        elif built:
            self.bottom_ups = nn.ModuleDict(built)
        if len(bands) > 1:
            self.fusion = ResidualFusion(widths, self.modalities[0], self.modalities[1:], model.fusion)
        for level, width in enumerate(widths, start=2):
            lateral = nn.Conv2d(width, model.pyramid_channels, 1)
            output = nn.Conv2d(model.pyramid_channels, model.pyramid_channels, 3, padding=1)
            for name, layer in (("lateral", lateral), ("output", output)):
                start_xavier(layer)
                self.add_module(f"fpn_{name}{level}", layer)
        if frozen:
            for backbone in self.backbones().values():
                backbone.requires_grad_(False)
                if self.halved:
                    backbone.bfloat16()

    def backbones(self) -> dict[str, nn.Module]:
        """The bottom-up network of every modality, the primary first; early fusion has one, of the name EARLY."""
        if self.cached:
            return {}
        if self.early or len(self.modalities) == 1:
            return {EARLY if self.early else self.modalities[0]: self.bottom_up}
        return {name: self.bottom_ups[name] for name in self.modalities}

    def train(self, mode: bool = True) -> Pyramid:
        """As in torch, but frozen backbones stay in eval mode."""
        super().train(mode)
        if self.frozen:
            for backbone in self.backbones().values():
                backbone.eval()
        return self

    def scales(self, images: Mapping[str, Tensor], draws: Mapping[str, Tensor | None]) -> dict[str, tuple[Tensor, ...]]:
        """Four backbone scales of each modality (before fusion); no graph is kept for frozen backbones.

        Where a sample lacks a modality (a sensor gap: its image is nodata throughout, that is 0) its scales are zero,
        whatever the backbone makes of an empty image.
        """
        if self.early:
            images = {EARLY: torch.cat([images[name] for name in self.modalities], dim=1)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = {name: self._run(net, images[name], draws.get(name)) for name, net in self.backbones().items()}
        return {name: without_gaps(scales, images[name]) for name, scales in found.items()}

    def _run(self, backbone: nn.Module, image: Tensor, draws: Tensor | None) -> tuple[Tensor, ...]:
        """Scales of one modality; those of a backbone kept in bf16 come back in the image's type."""
        if not self.halved:
            return backbone(image, draws)
        return tuple(scale.to(image.dtype) for scale in backbone(image.bfloat16(), draws))

    def levels(self, scales: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
        """Scales of each modality to p2 to p6, each (B, pyramid channels, H / 2 ** level, W / 2 ** level)."""
        return self._in_parts(self._fused, scales)

    def _fused(self, scales: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
        fused: Any = next(iter(scales.values())) if len(scales) == 1 else self.fusion(scales)
        found: list[Tensor] = []
        above: Tensor | None = None
        for level in range(5, 1, -1):
            side = getattr(self, f"fpn_lateral{level}")(fused[level - 2])
            above = side if above is None else side + F.interpolate(above, scale_factor=2.0, mode="nearest")
            found.insert(0, getattr(self, f"fpn_output{level}")(above))
        found.append(F.max_pool2d(found[-1], kernel_size=1, stride=2))
        return found

    def forward(self, images: Mapping[str, Tensor], draws: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Padded images of every modality, BCHW with H and W multiples of 32, to p2 to p6."""
        if self.frozen:
            return self.levels(self.scales(images, draws))
        return self._in_parts(lambda images, draws: self._fused(self.scales(images, draws)), images, draws)

    def _in_parts(self, run: Callable[..., list[Tensor]], *given: Mapping[str, Any]) -> list[Tensor]:
        """`run(*given)`, in a training by `at_once` images at a time."""
        first: Any = next(iter(given[0].values()))
        count = len(first[0] if isinstance(first, tuple) else first)
        if not (torch.is_grad_enabled() and 0 < self.at_once < count):
            return run(*given)
        parts: list[list[Tensor]] = []
        for start in range(0, count, self.at_once):
            own = [rows_of(one, slice(start, start + self.at_once)) for one in given]
            parts.append(recomputed(partial(run, *own), ()))
        return [torch.cat(level) for level in zip(*parts, strict=True)]
