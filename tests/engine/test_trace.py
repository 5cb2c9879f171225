from __future__ import annotations

import io
import json
import resource
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rtshpc.core.config import ModelConfig, TrainConfig
from rtshpc.core.errors import RunError
from rtshpc.core.load import load_model
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory import parts
from rtshpc.engine.memory.parts import Parts
from rtshpc.engine.memory.shapes import Shapes
from rtshpc.engine.memory.step import forward, given_scales, infer, sample, step, zero
from rtshpc.engine.memory.tensors import Live, Saved, held_bytes, own_tensors, saved_bytes
from rtshpc.engine.memory.trace import Work, trace
from rtshpc.engine.optim import build_optimizer
from rtshpc.model.choices import Counted, decided_by
from rtshpc.model.engines import build
from rtshpc.stages.tools import trace as tool

from .conftest import MODEL

CPU = torch.device("cpu")
BANDS = {"rgb": 3, "ndvi": 1, "nir": 1}
LEAN = {"backbone": {"checkpoint": "light", "attention": "fused"}, "roi": {"recompute": True}}

Case = tuple[str, int, str, str, dict[str, Any]]
"""Model, modalities, arm, precision, and what else is changed."""

FAST: list[Case] = [
    ("smallest", 2, "pretrained", "bf16", {"model": {**LEAN, "frozen_dtype": "bf16"}, "batch": 2, "micro_batch": 1}),
    ("smallest", 2, "cached", "fp32", {"model": {"roi": {"kind": "standard", "ious": [0.5]}}}),
]
"""Every seam between what is kept and what is made again."""

LONG: list[Case] = [
    ("tiny", 1, "unimodal", "bf16", {}),
    ("tiny", 2, "full", "fp32", {"model": {"backbone": {"checkpoint": "blocks"}}, "batch": 4}),
    ("tiny", 3, "pretrained", "fp32", {"batch": 4, "micro_batch": 2}),
    ("tiny", 3, "cached", "bf16", {"chip_px": 256}),
    ("mvitv2_t", 1, "unimodal", "bf16", {}),
    ("mvitv2_t", 2, "full", "fp32", {"model": {"fusion": {"recompute": True}}}),
    ("mvitv2_t", 2, "pretrained", "bf16", {"model": {"frozen_dtype": "bf16"}}),
    ("mvitv2_t", 3, "pretrained", "fp32", {}),
    ("mvitv2_s", 1, "unimodal", "fp32", {"model": {"backbone": {"checkpoint": "stages"}}}),
    ("mvitv2_s", 2, "full", "bf16", {"model": LEAN}),
    ("mvitv2_s", 3, "full", "bf16", {"chip_px": 256}),
    ("mask_rcnn_r50", 1, "unimodal", "fp32", {}),
]
"""Twelve of the shipped detectors."""


def _spec(case: Case, **more: Any) -> MemorySpec:
    name, modalities, arm, precision, changed = case
    changed = dict(changed)
    values = MODEL if name == "smallest" else load_model(name).model_dump(mode="json")
    levers = changed.pop("model", {})
    merged = {
        key: {**values.get(key, {}), **levers[key]} if isinstance(levers.get(key), dict) else levers.get(key, value)
        for key, value in values.items()
    }
    merged |= {key: value for key, value in levers.items() if key not in values}
    given = {"chip_px": 64 if name == "smallest" else 128, "arm": arm, "precision": precision, "device": "cpu"}
    channels = {key: BANDS[key] for key in list(BANDS)[:modalities]}
    return MemorySpec.model_validate(
        {
            "model": ModelConfig.model_validate(merged).model_dump(mode="json"),
            "channels": channels,
            **given,
            **changed,
            **more,
        }
    )


def _measured(spec: MemorySpec) -> tuple[dict[str, int], dict[str, int]]:
    """Figures of the real detector, and the counts that its values came to."""
    torch.manual_seed(spec.seed)
    frozen, cached = spec.arm in ("pretrained", "cached"), spec.arm == "cached"
    detector = build(spec.model, spec.channels, spec.classes, frozen, cached).train()
    detector.take_at_once(spec.micro_batch)
    images, targets = sample(spec, CPU)
    if cached:
        images = given_scales(detector, spec, CPU)
    saved = saved_bytes(detector, images, targets, spec)
    counted = detector.counted()
    rois = counted.get("loss_cls", counted.get("loss_cls_stage0", 0))
    counts = {"rois": rois // spec.batch, "foreground": counted["loss_mask"] // spec.batch}
    zero(detector)
    grads = [p.grad for p in detector.parameters() if p.grad is not None]
    with Live() as live:
        for tensor in (*own_tensors(detector, images, targets), *grads):
            live.add(tensor)
        step(detector, images, targets, spec)
    build_optimizer(detector, TrainConfig()).step()
    held = [*detector.parameters(), *detector.buffers()]
    figures = {"params": held_bytes(held), "grads": held_bytes(grads), "activations": saved, "live_peak_fb": live.peak}
    return figures, counts


def _agrees(case: Case, peak: float) -> None:
    spec = _spec(case)
    measured, counts = _measured(spec)
    traced = trace(spec.model_copy(update=counts))
    for name, value in measured.items():
        error = traced[name] / value - 1
        print(f"{case[:4]} {name}: {value} measured, {traced[name]} traced, {error:+.2%}")
        assert abs(error) <= (peak if name == "live_peak_fb" else 0.02), name


@pytest.mark.parametrize("case", FAST, ids=lambda case: f"{case[1]}-{case[2]}-{case[3]}")
def test_a_trace_says_what_a_step_keeps_within_two_percent(case: Case) -> None:
    _agrees(case, 0.05)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG, ids=lambda case: "-".join(map(str, case[:4])))
def test_a_trace_of_a_shipped_detector_says_what_a_step_keeps_within_two_percent(case: Case) -> None:
    _agrees(case, 0.05)


INFERRED: list[Case] = [
    ("smallest", 2, "pretrained", "bf16", {"work": "detect", "batch": 3, "model": {"frozen_dtype": "bf16"}}),
    ("smallest", 1, "unimodal", "fp32", {"work": "detect", "model": {"roi": {"kind": "standard", "ious": [0.5]}}}),
    ("smallest", 1, "pretrained", "bf16", {"work": "scales", "batch": 2}),
]


@pytest.mark.parametrize("case", INFERRED, ids=lambda case: f"{case[1]}-{case[3]}-{case[4]['work']}")
def test_a_trace_says_what_is_alive_where_nothing_is_trained(case: Case) -> None:
    spec = _spec(case)
    spec = spec.model_copy(update={"model": _unsuppressed(spec.model)})
    torch.manual_seed(spec.seed)
    detector = build(spec.model, spec.channels, spec.classes, spec.arm == "pretrained").eval()
    images, _ = sample(spec, CPU)
    with Live() as live:
        for tensor in own_tensors(detector, images, ()):
            live.add(tensor)
        infer(detector, images, spec)
    traced = trace(spec)
    assert traced["params"] == held_bytes([*detector.parameters(), *detector.buffers()])
    assert traced["live_peak_fb"] == pytest.approx(live.peak, rel=0.02)
    assert (traced["grads"], traced["optim_state"], traced["activations"]) == (0, 0, 0)


def _unsuppressed(model: ModelConfig) -> ModelConfig:
    """The model that takes as many boxes as there can be, as a trace does."""
    rpn, roi = (part.model_copy(update={"nms_iou": 1.0}) for part in (model.rpn, model.roi))
    return model.model_copy(update={"rpn": rpn, "roi": roi})


PARTED: list[Case] = [
    ("smallest", 2, "full", "bf16", {"batch": 5, "micro_batch": 1, "device": "cuda"}),
    ("smallest", 3, "full", "fp32", {"batch": 9, "micro_batch": 2, "model": LEAN}),
    (
        "smallest",
        1,
        "unimodal",
        "bf16",
        {"batch": 7, "micro_batch": 1, "model": {"backbone": {"checkpoint": "blocks"}}},
    ),
    ("smallest", 2, "cached", "bf16", {"batch": 6, "micro_batch": 1, "device": "cuda"}),
    ("smallest", 2, "pretrained", "bf16", {"batch": 8, "micro_batch": 2, "model": {**LEAN, "frozen_dtype": "bf16"}}),
    ("tiny", 2, "full", "bf16", {"batch": 8, "micro_batch": 2, "model": {"backbone": {"checkpoint": "stages"}}}),
    ("tiny", 3, "pretrained", "fp32", {"batch": 16, "micro_batch": 3, "device": "cuda"}),
    ("mvitv2_t", 2, "full", "bf16", {"batch": 5, "micro_batch": 1, "device": "cuda"}),
    ("mask_rcnn_r50", 1, "unimodal", "bf16", {"batch": 6, "micro_batch": 1, "device": "cuda"}),
]


def _parted(batch: int, at_once: int) -> tuple[int, int, int]:
    """Most bytes alive, those alive at the end, and operations of two layers that see so many rows at once."""
    spec = _spec(("smallest", 1, "unimodal", "fp32", {"batch": batch, "micro_batch": at_once}))
    with Shapes(), Work(1) as live:
        layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
        for weight in layers.parameters():
            weight.grad = torch.zeros_like(weight)
        rows = torch.zeros(batch, 9, 64)
        run = Parts(spec, layers.parameters(), lambda: live.flops)
        found = [run(lambda part=part: [layers(part)], ())[0] for part in rows.split(at_once)]
        torch.cat(found).square().sum().backward()
        del found
    return live.peak, live.now, live.flops + run.operations


@pytest.mark.parametrize(("batch", "at_once"), [(9, 1), (16, 3), (8, 2)])
def test_parts_that_are_left_out_change_no_figure(batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _parted(batch, at_once)
    monkeypatch.setattr(parts, "RUN", batch)
    assert found == _parted(batch, at_once)


@pytest.mark.full
@pytest.mark.parametrize("case", PARTED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_neither_parts_left_out_nor_quicker_fake_tensors_change_a_figure_of_any_detector(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(case)
    found = trace(spec)
    monkeypatch.setattr("rtshpc.engine.memory.trace.Shapes", FakeTensorMode)
    monkeypatch.setattr(parts, "RUN", spec.batch)
    assert found == trace(spec)


@pytest.mark.full
def test_on_a_gpu_a_trace_keeps_what_autocast_keeps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors can be said to be on a GPU that is not there, as long as nothing walks back over them."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    spec = _spec(("smallest", 1, "unimodal", "bf16", {}))
    on_cpu, as_gpu = (trace(spec.model_copy(update={"device": kind}))["activations"] for kind in ("cpu", "cuda"))
    with FakeTensorMode(), decided_by(Counted(1)), torch.device("cuda"):
        with patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight):
            detector = build(spec.model, spec.channels, spec.classes).train()
        images, targets = sample(spec, torch.device("cuda"))
        saved = Saved(own_tensors(detector, images, targets))
        with saved:
            forward(detector, images, targets, spec)
    assert abs(as_gpu / saved.bytes - 1) < 0.001 < 0.05 < as_gpu / on_cpu - 1


def test_a_trace_of_a_step_on_a_gpu_allocates_nothing() -> None:
    spec = _spec(("smallest", 1, "unimodal", "fp32", {"chip_px": 1024, "device": "cuda"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = trace(spec)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found["alloc_peak_fb"] > 3e8 > 1e8 > grown
    assert found["optim_state"] >= 2 * found["grads"]
    assert found["alloc_peak_step"] == found["alloc_peak_fb"] + found["optim_state"]
    assert found["alloc_peak_fb"] >= found["params"] + found["grads"] + found["activations"]
    assert found["live_peak_fb"] is None


def test_specs_in_lines_are_answered_one_by_one_and_what_cannot_be_traced_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = _spec(("smallest", 1, "unimodal", "fp32", {}))
    other = spec.model_copy(update={"model": spec.model.model_copy(update={"engine": "detectron2"})})
    lines = [one.model_dump_json() for one in (other, spec, other)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert tool.main([]) == 0
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == third and "take engine: native" in first["reason"]
    assert second["digest"] == spec.digest and second["grads"] == 508520
    with pytest.raises(RunError, match=r"engine = detectron2: .* take engine: native"):
        trace(other)
