from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rtshpc.core.config import ModelConfig
from rtshpc.core.errors import RunError
from rtshpc.core.sizing.measured import refusal
from rtshpc.core.sizing.memory import MemorySpec
from rtshpc.engine.memory.measure import measure, measure_apart
from rtshpc.engine.memory.step import INSTANCES, Optimizer, sample, seeds, slumps
from rtshpc.engine.memory.tensors import saved_bytes
from rtshpc.hpc.nvml import NvmlSampler
from rtshpc.model.engines import build

from .conftest import MODEL

CPU = torch.device("cpu")


def _spec(arm: str, *modalities: str, roi: dict[str, object] | None = None, **more: object) -> MemorySpec:
    channels = {name: 3 if name == "rgb" else 1 for name in modalities}
    model = {**MODEL, "roi": {**MODEL["roi"], **(roi or {})}}
    return MemorySpec.model_validate(
        {
            "model": ModelConfig.model_validate(model).model_dump(mode="json"),
            "channels": channels,
            "arm": arm,
            "chip_px": 64,
            "precision": "fp32",
            "device": "cpu",
            "repeats": 2,
            "warmups": 0,
            **more,
        }
    )


def test_every_field_is_measured_or_says_why_it_is_not() -> None:
    found = measure(_spec("unimodal", "rgb"))
    assert (found.backend, found.device, found.predicted) == ("cpu", "cpu", None)
    assert found.params is not None and found.grads == 4 * found.trainable_parameters == 4 * found.total_parameters
    assert found.params >= found.grads and found.optim_state is not None
    assert 2 * found.grads < found.optim_state < 2.01 * found.grads
    assert found.activations is not None and found.live_peak_fb is not None and found.rss_peak is not None
    assert found.params + found.grads + found.activations < found.live_peak_fb < found.rss_peak
    nulls = {name for name, value in found if value is None and name != "predicted"}
    assert nulls == set(found.reasons) and all(found.reasons.values())
    assert nulls == {"alloc_peak_fb", "alloc_peak_step", "reserved_peak", "data_wait_share", *NvmlSampler.FIGURES}
    assert len(found.step_seconds_each) == 2 and min(found.step_seconds_each) > 0 and found.cpu_seconds > 0
    assert found.samples_per_second == 1 / found.step_seconds
    assert not found.protocol.cudnn_benchmark and found.protocol.gradients == "held"


def test_frozen_backbones_need_less_and_another_modality_needs_more() -> None:
    one = measure(_spec("unimodal", "rgb"))
    full, frozen, cached = (measure(_spec(arm, "rgb", "ndvi")) for arm in ("full", "pretrained", "cached"))
    assert frozen.params == full.params > one.params  # type: ignore[operator]
    assert frozen.grads == cached.grads == 4 * frozen.trainable_parameters < full.grads  # type: ignore[operator]
    assert cached.params < frozen.params and cached.optim_state == frozen.optim_state  # type: ignore[operator]
    assert cached.activations <= frozen.activations < full.activations  # type: ignore[operator]
    assert full.activations > one.activations  # type: ignore[operator]


def test_the_sample_is_filled_with_as_few_slumps_as_it_takes_and_what_there_was_is_counted() -> None:
    roi = {"rois_per_image": 24, "positive_fraction": 0.5}
    few, filled = (measure(_spec("unimodal", "rgb", roi=roi, instances=count)) for count in (1, 0))
    assert few.protocol.instances == 1 and few.counts.filled is False
    assert few.counts.foreground_per_image is not None and few.counts.foreground_per_image["mask"] < 12
    assert filled.protocol.instances in (9, 16) and filled.counts.filled is True
    assert filled.counts.rois_per_image == 24 and filled.counts.foreground_per_image is not None
    assert filled.counts.foreground_per_image["stage0"] == filled.counts.foreground_per_image["mask"] == 12
    assert set(filled.counts.foreground_per_image) == {"stage0", "stage1", "stage2", "mask"}
    assert filled.counts.anchors_per_image is not None and sum(filled.counts.anchors_per_image.values()) == 32
    assert filled.activations > few.activations  # type: ignore[operator]


def test_a_batch_counts_per_image_and_keeps_as_much_for_each() -> None:
    one, two = (measure(_spec("unimodal", "rgb", batch=batch, repeats=1)) for batch in (1, 2))
    assert two.params == one.params and two.protocol.batch == 2
    assert two.counts.rois_per_image == one.counts.rois_per_image == 8
    assert 1.7 < two.activations / one.activations < 2.1  # type: ignore[operator]
    assert two.samples_per_second == 2 / two.step_seconds


def test_an_optimizer_step_changes_no_weight_so_that_every_step_is_the_same() -> None:
    spec = _spec("unimodal", "rgb")
    torch.manual_seed(0)
    detector = build(spec.model, spec.channels, 1).train()
    before = {name: weight.clone() for name, weight in detector.named_parameters()}
    optimizer = Optimizer(detector, spec, CPU)
    optimizer.step(*sample(spec, CPU), spec)
    assert optimizer.state() and any(float(state.abs().max()) > 0 for state in optimizer.state())
    assert all(torch.equal(weight, before[name]) for name, weight in detector.named_parameters())


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

    images, targets = sample(spec, CPU)
    assert saved_bytes(Double(), images, targets, spec) == images["rgb"].nbytes  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "found"), [(0, INSTANCES), (1, 1), (5, 5), (16, 16)])
def test_a_sample_is_fixed_by_its_seed_and_its_slumps_lie_apart(asked: int, found: int) -> None:
    spec = _spec("unimodal", "rgb", instances=asked, batch=2, seed=3)
    (images, targets), (again, _) = (sample(spec, CPU) for _ in range(2))
    assert torch.equal(images["rgb"], again["rgb"]) and not torch.equal(images["rgb"][0], images["rgb"][1])
    assert len(targets) == 2 and seeds(spec) == [3, 4] and targets[0].masks is not targets[1].masks
    target = slumps(spec, CPU)
    assert len(target) == found and target.masks.any(dim=(1, 2)).all()
    assert not (target.masks.sum(dim=0) > 1).any()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_fake_driver_marks_the_record_of_a_fresh_process_whose_other_figures_are_the_same(
    fake_nvml: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_nvml["current"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb-2")
    spec = _spec("pretrained", "rgb", "ndvi", instances=0, device="auto")
    found, here = measure_apart(spec), measure(spec.model_copy(update={"device": "cpu"}))
    assert (found.backend, found.device) == ("fake", "Fake GPU")
    assert refusal(found.model_dump()) and not refusal(here.model_dump())
    assert found.device_used_peak_v2 is not None and found.device_baseline is not None
    assert found.device_used_peak_v2 > found.device_baseline > 2 << 30 and found.driver_reserved == 500 << 20
    assert found.energy_joules is not None and found.energy_joules > 0 and 0 < (found.gpu_utilisation or 0) < 1
    for key in ("params", "grads", "optim_state", "activations", "live_peak_fb", "counts", "protocol", "arm"):
        assert getattr(found, key) == getattr(here, key)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(RunError, match="no GPU is visible"):
        measure_apart(_spec("unimodal", "rgb", device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_allocator_gives_the_peaks_and_the_driver_s_stand_beside_them() -> None:
    found = measure_apart(_spec("unimodal", "rgb", device="cuda", warmups=2))
    assert found.backend == "cuda" and found.params is not None and found.alloc_peak_fb is not None
    assert found.alloc_peak_step is not None and found.reserved_peak is not None
    assert found.reserved_peak >= found.alloc_peak_step > found.alloc_peak_fb > found.params
    nulls = {name for name, value in found if value is None and name != "predicted"}
    assert nulls == set(found.reasons) >= {"data_wait_share", "live_peak_fb"}
