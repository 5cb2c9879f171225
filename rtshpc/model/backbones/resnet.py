"""Bottleneck ResNet with frozen batch norms and four output scales (He et al. 2016), the paper's baseline."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from rtshpc.core.config import ResNetConfig
from rtshpc.model.layers import ConvNorm, start_msra


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions on a skip; a strided or widening block projects the skip."""

    def __init__(self, inside: int, outside: int, inner: int, stride: int, stride_in_1x1: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _conv(inside, outside, 1, stride) if inside != outside else None
        self.conv1 = _conv(inside, inner, 1, first, relu=True)
        self.conv2 = _conv(inner, inner, 3, second, relu=True)
        self.conv3 = _conv(inner, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) to (B, outside, H / stride, W / stride)."""
        skip = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + skip)


class Stem(nn.Module):
    """7x7 convolution with stride 2, then a 3x3 max-pool with stride 2."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(bands, width, 7, 2, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """BCHW to (B, width, H / 4, W / 4)."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """The backbone: four scales at strides 4, 8, 16 and 32.

    Attributes:
        widths: channels of the four scales.
        draws: random numbers an image that training takes: none.
    """

    def __init__(self, config: ResNetConfig, bands: int) -> None:
        super().__init__()
        self.widths = config.channels
        self.draws = 0
        self.stem = Stem(bands, config.stem_channels)
        inside = config.stem_channels
        for scale, (blocks, outside, inner) in enumerate(
            zip(config.blocks, config.channels, config.bottleneck, strict=True)
        ):
            stage = nn.Sequential()
            for i in range(blocks):
                stride = 2 if i == 0 and scale > 0 else 1
                stage.append(Bottleneck(inside, outside, inner, stride, config.stride_in_1x1))
                inside = outside
            self.add_module(f"res{scale + 2}", stage)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, ...]:
        """BCHW to four maps (B, widths[i], H / 2 ** (i + 2), W / 2 ** (i + 2)); `draws` is not used."""
        x = self.stem(x)
        scales: list[Tensor] = []
        for scale in range(2, 6):
            x = getattr(self, f"res{scale}")(x)
            scales.append(x)
        return tuple(scales)


def _conv(inside: int, outside: int, kernel: int, stride: int = 1, relu: bool = False) -> ConvNorm:
    layer = ConvNorm(inside, outside, kernel, stride, FrozenBatchNorm2d(outside), relu)
    start_msra(layer)
    return layer
