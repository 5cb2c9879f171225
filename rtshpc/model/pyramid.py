"""Backbones of all modalities, their fusion and the feature pyramid (Lin et al. 2017) over the fused scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.core.config import ModelConfig, MViTConfig
from rtshpc.fusion.residual import ResidualFusion
from rtshpc.model.backbones.mvit import MViT
from rtshpc.model.backbones.resnet import ResNet
from rtshpc.model.layers import start_xavier


def build_backbone(model: ModelConfig, bands: int) -> MViT | ResNet:
    """The bottom-up network of one modality; one band enters as three equal ones."""
    entering = 3 if bands == 1 else bands
    if isinstance(model.backbone, MViTConfig):
        return MViT(model.backbone, entering)
    return ResNet(model.backbone, entering)


class Pyramid(nn.Module):
    """Images of every modality to the levels p2 to p6.

    Submodules carry Detectron2's names for one modality (`bottom_up`); with several there are
    `bottom_ups.<modality>` and `fusion`.

    Attributes:
        modalities: names, the primary first.
        frozen: the backbones take no gradient and stay in eval mode.
    """

    def __init__(self, model: ModelConfig, channels: Mapping[str, int], frozen: bool) -> None:
        super().__init__()
        self.modalities = tuple(channels)
        self.frozen = frozen
        built = {name: build_backbone(model, bands) for name, bands in channels.items()}
        widths = next(iter(built.values())).widths
        if len(built) == 1:
            self.bottom_up = built[self.modalities[0]]
        else:
            self.bottom_ups = nn.ModuleDict(built)
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

    def backbones(self) -> dict[str, nn.Module]:
        """The bottom-up network of every modality, the primary first."""
        if len(self.modalities) == 1:
            return {self.modalities[0]: self.bottom_up}
        return {name: self.bottom_ups[name] for name in self.modalities}

    def train(self, mode: bool = True) -> Pyramid:
        """As in torch, but frozen backbones stay in eval mode."""
        super().train(mode)
        if self.frozen:
            for backbone in self.backbones().values():
                backbone.eval()
        return self

    def scales(self, images: Mapping[str, Tensor], draws: Mapping[str, Tensor | None]) -> dict[str, tuple[Tensor, ...]]:
        """Four backbone scales of each modality (before fusion); no graph is kept for frozen backbones."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return {name: net(images[name], draws.get(name)) for name, net in self.backbones().items()}

    def levels(self, scales: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
        """Scales of each modality to p2 to p6, each (B, pyramid channels, H / 2 ** level, W / 2 ** level)."""
        fused: Any = scales[self.modalities[0]] if len(self.modalities) == 1 else self.fusion(scales)
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
        return self.levels(self.scales(images, draws))
