"""`model.engine: detectron2` with the reference's weights gives the reference's detections and losses."""

from __future__ import annotations

import pytest
import torch

from rtshpc.data.sample import Target
from rtshpc.model.detector import Detector
from rtshpc.model.engines import build
from rtshpc.model.weights import load_strict

from .conftest import CASES, KINDS, Inputs, read, tiny


def _detector(kind: str, **sizes: int) -> Detector:
    pytest.importorskip("detectron2", reason="needs Detectron2, built from its source (docs/detectron2.md)")
    model = build(tiny(kind, **sizes).model_copy(update={"engine": "detectron2"}), {"rgb": 3}, classes=2)
    load_strict(model, read(f"{kind}.weights"), kind)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_detections_equal_the_reference(kind: str, inputs: Inputs) -> None:
    wanted = read(f"{kind}.inference")
    with torch.inference_mode():
        found = _detector(kind).eval()({"rgb": inputs.images}, sizes=inputs.sizes)
    for n, one in enumerate(found):
        assert torch.equal(one.classes_N, wanted[f"det.{n}.classes"])
        torch.testing.assert_close(one.boxes_N4, wanted[f"det.{n}.boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores_N, wanted[f"det.{n}.scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.mask_probs_NHW, wanted[f"det.{n}.mask_probs"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_the_reference(kind: str, case: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, rois = CASES[case]
    model = _detector(kind, anchors=anchors, rois=rois).train()
    first, second = inputs.targets
    if case == "C":
        second = Target(second.boxes[:0], second.classes[:0], second.masks[:0], second.ignore)
    # The reference takes the first candidates in index order.
    monkeypatch.setattr(torch, "randperm", lambda count, **options: torch.arange(count, **options))
    found = model({"rgb": inputs.images}, [first, second], None, inputs.sizes)
    start = f"{case}.loss."
    wanted = {name.removeprefix(start): v for name, v in read(f"{kind}.training").items() if name.startswith(start)}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert abs(found[name].item() - value.item()) <= 1e-6 * max(1.0, value.item()), name
