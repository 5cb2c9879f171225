from __future__ import annotations

import pytest
import torch

from rtshpc.core.config import MViTConfig, ResNetConfig
from rtshpc.model.backbones.attention import cut, join
from rtshpc.model.backbones.mvit import MViT
from rtshpc.model.backbones.resnet import ResNet


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 4), (7, 10, 4), (3, 5, 8), (14, 14, 14)])
def test_windows_join_to_the_map_they_were_cut_from(height: int, width: int, side: int) -> None:
    x = torch.randn(2, height, width, 3)
    assert torch.equal(join(cut(x, side), side, height, width), x)


def test_blocks_follow_the_windows_and_strides_of_mvitv2_b() -> None:
    with torch.device("meta"):
        net = MViT(MViTConfig(), 3)
    assert net.widths == (96, 192, 384, 768)
    attention = [block.attn for block in net.blocks]
    assert [i for i, a in enumerate(attention) if a.pool_q.stride == (2, 2)] == [2, 5, 21]
    assert [i for i, a in enumerate(attention) if a.window_q == 0] == [4, 20, 23]
    assert [a.pool_k.stride[0] for a in attention] == [4, 4, 2, 2, 4, *[1] * 15, 2, 1, 1, 1]
    assert [a.rel_pos_h.shape[0] for a in attention][:3] == [111, 111, 55]


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_scales_have_strides_4_to_32(size: tuple[int, int]) -> None:
    mvit = MViT(MViTConfig(embed_dim=8, depth=4, last_blocks=(0, 1, 2, 3), window_px=4, pretrain_px=32), 3)
    resnet = ResNet(
        ResNetConfig(blocks=(1, 1, 1, 1), stem_channels=8, channels=(8, 16, 24, 32), bottleneck=(8, 8, 8, 8)), 3
    )
    for net in (mvit, resnet):
        scales = net(torch.randn(1, 3, *size))
        for k, (scale, width) in enumerate(zip(scales, net.widths, strict=True)):
            assert scale.shape == (1, width, size[0] // 2 ** (k + 2), size[1] // 2 ** (k + 2))


def test_drop_path_drops_whole_images_by_their_own_draws() -> None:
    config = MViTConfig(embed_dim=8, depth=4, last_blocks=(0, 1, 2, 3), window_px=4, pretrain_px=32, drop_path=0.9)
    net = MViT(config, 3)
    x = torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1)
    draws = torch.stack((torch.zeros(net.draws), torch.full((net.draws,), 0.99)))
    dropped = net(x, draws)[3]
    assert not torch.allclose(dropped[0], dropped[1])
    kept = net(x, None)[3]
    torch.testing.assert_close(kept[0], kept[1])
