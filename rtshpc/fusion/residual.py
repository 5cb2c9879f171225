"""Fusion of any number of auxiliary modalities into the primary, scale by scale (Li et al. 2025, Eqs. 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rtshpc.core.config import FusionConfig
from rtshpc.core.errors import ConfigError, unknown
from rtshpc.fusion.contract import check_scales
from rtshpc.fusion.mixers import MIXERS
from rtshpc.fusion.recompute import chain, same


class ResidualFusion(nn.Module):
    """F'' = Conv(F_primary + sum F_i + sum Mixer_i(F_primary, F_i)); without `residual` only the last sum.

    Every auxiliary has a mixer of its own at every scale; every scale has one 3x3 projection C -> C, which
    starts as the identity so that training starts from the sum itself.
    """

    def __init__(self, widths: Sequence[int], primary: str, auxiliaries: Sequence[str], config: FusionConfig) -> None:
        """Args:
        widths: channels of the scales.
        primary: modality that queries.
        auxiliaries: the others, one or more.
        config: mixer, residual and the mixer's sizes.
        """
        super().__init__()
        if config.mixer not in MIXERS:
            raise ConfigError(unknown("fusion.mixer", config.mixer, MIXERS))
        self.primary = primary
        self.auxiliaries = tuple(auxiliaries)
        self.residual = config.residual
        self.again = config.recompute
        mixer = MIXERS[config.mixer]
        self.mixers = nn.ModuleDict(
            {name: nn.ModuleList(mixer(width, config, i) for i, width in enumerate(widths)) for name in auxiliaries}
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        for layer in self.projections:
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, scales: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Scales of every modality, equal shapes (B, C, H, W) per scale, to one set of the same shapes.

        Raises:
            ShapeError: a modality is missing or a scale's shapes differ.
        """
        check_scales(scales, self.primary, self.auxiliaries)
        fused: list[Tensor] = []
        for i, projection in enumerate(self.projections):
            first = scales[self.primary][i]
            parts = [self.mixers[name][i](first, scales[name][i]) for name in self.auxiliaries]
            if self.residual:
                parts += [first, *(scales[name][i] for name in self.auxiliaries)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            fused.append(chain(same, [(projection, same)], (total,), self.again))
        return tuple(fused)
