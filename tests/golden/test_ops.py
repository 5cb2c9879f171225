"""Single operations equal Detectron2's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rtshpc.model.backbones.attention import relative_positions
from rtshpc.model.heads.box import choose
from rtshpc.model.heads.boxes import BoxCoder
from rtshpc.model.heads.mask import crop_masks
from rtshpc.model.heads.pooling import levels_of, pool
from rtshpc.model.heads.standard import CODERS

OPS = load_file(Path(__file__).parent / "ops.safetensors")
PAIRS = sorted(name for name in OPS if name.startswith("relpos.") and name != "relpos.table")


@pytest.mark.parametrize("i", range(4))
def test_the_coder_equals_the_reference_with_the_size_clamp_hit(i: int) -> None:
    coder = BoxCoder(((1.0, 1.0, 1.0, 1.0), *CODERS)[i])
    assert torch.equal(coder.decode(OPS["coder.deltas"], OPS["coder.boxes"]), OPS[f"coder.decoded.{i}"])
    assert torch.equal(coder.encode(OPS["coder.boxes"], OPS["coder.boxes"].flip(0)), OPS[f"coder.encoded.{i}"])


@pytest.mark.parametrize("most", [12, 1000])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_the_choice_of_detections_equals_the_reference(iou: float, most: int) -> None:
    found = choose(OPS["nms.boxes"], OPS["nms.scores"], (128, 128), 0.05, iou, most)
    for value, part in zip(found, ("boxes", "scores", "classes"), strict=True):
        assert torch.equal(value, OPS[f"nms.{iou}.{most}.{part}"])


def test_boxes_of_6_to_700_px_are_pooled_from_the_levels_of_the_reference() -> None:
    assert torch.equal(levels_of(OPS["pool.boxes"]), OPS["pool.levels"])
    maps = [OPS[f"pool.feature.{i}"] for i in range(4)]
    torch.testing.assert_close(pool(maps, [OPS["pool.boxes"]], 7), OPS["pool.out7"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_relative_positions_equal_the_reference(pair: str) -> None:
    queries, keys = map(int, pair.split(".")[1:])
    assert torch.equal(relative_positions(OPS["relpos.table"], queries, keys), OPS[pair])


def test_mask_targets_equal_the_reference() -> None:
    found = crop_masks([OPS["mask.bitmask"].bool()], [OPS["mask.boxes"]], [torch.arange(2)])
    assert torch.equal(found.to(torch.uint8), OPS["mask.crop28"])
