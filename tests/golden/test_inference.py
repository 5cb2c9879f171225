"""Inference equals Detectron2's, stage by stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
KINDS = ("cascade_mvit", "maskrcnn_resnet")
TOLERANCES = {
    "input": 0.0,
    "block": 1e-5,
    "backbone": 1e-5,
    "fpn": 1e-5,
    "rpn.anchors": 0.0,
    "rpn": 5e-5,
    "proposals": 1e-4,
    "roi": 5e-5,
    "det": 1e-4,
    "final": 1e-4,
}
"""By the longest matching start of the name: the largest absolute difference allowed."""


def _keys(kind: str) -> list[str]:
    with safe_open(HERE / f"{kind}.inference.safetensors", "pt") as file:
        # A sum over Detectron2's pooled features by another's hook; pooling itself is tested in `ops`.
        return [key for key in file.keys() if not key.startswith("roi.box_pool_sum")]  # noqa: SIM118


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in KINDS for key in _keys(kind)])
def test_inference_equals_the_reference(kind: str, key: str, inferred) -> None:
    with safe_open(HERE / f"{kind}.inference.safetensors", "pt") as file:
        wanted = file.get_tensor(key)
    found = inferred(kind)[key]
    assert found.shape == wanted.shape
    allowed = TOLERANCES[max((start for start in TOLERANCES if key.startswith(start)), key=len)]
    if wanted.is_floating_point():
        assert float((found - wanted).abs().max()) <= allowed
    else:
        assert torch.equal(found, wanted)


def test_pooled_features_of_the_first_stage_sum_to_the_reference(inferred, inputs) -> None:
    from rtshpc.model.heads.pooling import pool

    found = inferred("cascade_mvit")
    boxes = [found[f"proposals.{n}.boxes"] for n in range(2)]
    pooled = pool([found[f"fpn.p{level}"] for level in range(2, 6)], boxes, 7).sum((2, 3))
    with safe_open(HERE / "cascade_mvit.inference.safetensors", "pt") as file:
        wanted = file.get_tensor("roi.box_pool_sum_hw.first_call")
    assert float((pooled - wanted).abs().max()) <= 1e-3
