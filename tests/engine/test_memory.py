from __future__ import annotations

import pytest
import torch

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import RunError
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.measure import measure, measure_apart
from rtshpc.engine.memory.step import INSTANCES, sample
from rtshpc.engine.memory.tensors import saved_bytes

from .conftest import MODEL


def _spec(arm: str, *modalities: str, **more: object) -> MemorySpec:
    channels = {name: 3 if name == "rgb" else 1 for name in modalities}
    return MemorySpec.model_validate(
        {
            "model": ModelConfig.model_validate(MODEL).model_dump(mode="json"),
            "channels": channels,
            "arm": arm,
            "chip_px": 64,
            "precision": "fp32",
            "device": "cpu",
            "repeats": 1,
            **more,
        }
    )


def test_the_parts_add_up_and_are_those_of_the_model() -> None:
    figures = measure(_spec("unimodal", "rgb"))
    assert figures["backend"] == "cpu" and figures["device"] == "cpu"
    assert figures["gradients_bytes"] == 4 * figures["trainable_parameters"] == 4 * figures["total_parameters"]
    assert figures["parameters_bytes"] >= figures["gradients_bytes"]
    parts = ("parameters_bytes", "gradients_bytes", "activations_bytes")
    assert figures["sum_bytes"] == sum(figures[part] for part in parts)
    assert figures["rss_peak_bytes"] > figures["sum_bytes"] and figures["step_seconds"] > 0
    for missing in ("allocator_peak_bytes", "reserved_peak_bytes", "nvml_peak_bytes"):
        assert figures[missing] is None
    assert figures["nvml_reason"]


def test_frozen_backbones_need_less_and_another_modality_needs_more() -> None:
    one = measure(_spec("unimodal", "rgb"))
    full, frozen = measure(_spec("full", "rgb", "ndvi")), measure(_spec("pretrained", "rgb", "ndvi"))
    assert frozen["parameters_bytes"] == full["parameters_bytes"] > one["parameters_bytes"]
    assert frozen["gradients_bytes"] == 4 * frozen["trainable_parameters"] < full["gradients_bytes"]
    assert frozen["activations_bytes"] < full["activations_bytes"]
    assert full["activations_bytes"] > one["activations_bytes"]


def test_saved_storages_are_counted_once_and_without_weights() -> None:
    spec = _spec("unimodal", "rgb")

    class Double(torch.nn.Module):
        """A detector's interface around x * w * w, whose saved tensors are known."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: dict[str, torch.Tensor], targets: object, seeds: object) -> dict[str, torch.Tensor]:
            once = images["rgb"] * self.w  # keeps the image and w, which are not counted
            return {"loss": (once.exp() * self.w).sum()}  # exp and mul both keep exp's one output

    images, target = sample(spec, torch.device("cpu"))
    assert saved_bytes(Double(), images, target, spec) == images["rgb"].nbytes  # type: ignore[arg-type]


def test_the_sample_is_fixed_by_the_seed_and_full_of_slumps() -> None:
    (images, target), (again, _) = (sample(_spec("unimodal", "rgb"), torch.device("cpu")) for _ in range(2))
    assert torch.equal(images["rgb"], again["rgb"])
    assert len(target) == INSTANCES and target.masks.any(dim=(1, 2)).all()
    assert not (target.masks.sum(dim=0) > 1).any()


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_figures() -> None:
    spec = _spec("pretrained", "rgb", "ndvi")
    apart, here = measure_apart(spec), measure(spec)
    for key in ("parameters_bytes", "gradients_bytes", "activations_bytes", "protocol", "modalities", "arm"):
        assert apart[key] == here[key]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(RunError, match="no GPU is visible"):
        measure_apart(_spec("unimodal", "rgb", device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_allocator_gives_the_peak() -> None:
    figures = measure(_spec("unimodal", "rgb", device="cuda"))
    assert figures["backend"] == "cuda"
    assert figures["reserved_peak_bytes"] >= figures["allocator_peak_bytes"] > figures["parameters_bytes"]
    assert figures["nvml_peak_bytes"] is not None or figures["nvml_reason"]
