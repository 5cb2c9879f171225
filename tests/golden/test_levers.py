"""Levers that keep the mathematics reproduce Detectron2's figures within the reference's tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Inputs, Levers, infer, train

HERE = Path(__file__).parent
FUSED = (("backbone", "attention", "fused"),)
HEADS = (("roi", "recompute", True),)
LIGHT, BLOCKS, STAGES = ((("backbone", "checkpoint", value),) for value in ("light", "blocks", "stages"))
TRAINED = {"heads": HEADS, "fused": FUSED, "light": LIGHT, "blocks": BLOCKS, "stages": STAGES}
TRAINED |= {"all": FUSED + HEADS + LIGHT}
NEAR = {"backbone.": 1e-5, "block.": 1e-5, "fpn.": 1e-5, "rpn.logits": 5e-5, "rpn.deltas": 5e-5, "roi.stage": 5e-5}
NEAR |= {"proposals.": 1e-4, "det.": 1e-4, "final.": 1e-4}


def test_inference_with_fused_attention_equals_the_reference(inputs: Inputs) -> None:
    wanted = load_file(HERE / "cascade_mvit.inference.safetensors")
    found = infer("cascade_mvit", inputs, FUSED)
    compared = 0
    for name, value in wanted.items():
        if name.startswith(tuple(NEAR)) and value.is_floating_point():
            near = next(v for start, v in NEAR.items() if name.startswith(start))
            torch.testing.assert_close(
                found[name], value, rtol=near, atol=near, msg=lambda m, name=name: f"{name}: {m}"
            )
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("case", ["A", "B", "C"])
@pytest.mark.parametrize("lever", TRAINED)
def test_a_step_equals_the_reference(lever: str, case: str, inputs: Inputs) -> None:
    wanted = load_file(HERE / "cascade_mvit.training.safetensors")
    levers: Levers = TRAINED[lever]
    found = train("cascade_mvit", case, inputs, levers)
    for name, loss in found.losses.items():
        value = wanted[f"{case}.loss.{name}"]
        assert abs(float(loss - value)) <= 1e-6 * max(1.0, float(value)), name
    start = f"{case}.gradnorm."
    norms = {name.removeprefix(start): float(v) for name, v in wanted.items() if name.startswith(start)}
    total = sum(v * v for v in norms.values()) ** 0.5
    for name, p in found.model.named_parameters():
        if norms[name] > 1e-5 * total:
            allowed = 1e-5 if case == "B" else 1e-2
            assert abs(float(p.grad.norm()) - norms[name]) <= allowed * norms[name], name
            if case == "B":
                grad = wanted[f"B.grad.{name}"]
                assert float((p.grad - grad).norm()) <= 1e-5 * float(grad.norm()), name
    for name, value in found.model.named_buffers():
        if case == "A" and f"A.buffer_after.{name}" in wanted:
            torch.testing.assert_close(value, wanted[f"A.buffer_after.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["A", "B"])
def test_heads_of_mask_rcnn_that_recompute_equal_the_reference(case: str, inputs: Inputs) -> None:
    wanted = load_file(HERE / "maskrcnn_resnet.training.safetensors")
    found = train("maskrcnn_resnet", case, inputs, HEADS)
    for name, loss in found.losses.items():
        value = wanted[f"{case}.loss.{name}"]
        assert abs(float(loss - value)) <= 1e-6 * max(1.0, float(value)), name
