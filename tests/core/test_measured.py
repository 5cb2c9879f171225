from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rtshpc.core.load import load_model
from rtshpc.core.sizing.measured import Counts, Measurement, protocol_of, refusal
from rtshpc.core.sizing.memory import MemorySpec

SPEC = MemorySpec(model=load_model("tiny"), channels={"rgb": 3}, instances=0)


def measurement(**changed: Any) -> Measurement:
    nulls = {
        name: None for name, field in Measurement.model_fields.items() if field.annotation in (int | None, float | None)
    }
    given: dict[str, Any] = {
        "backend": "cpu",
        "device": "cpu",
        "arm": "unimodal",
        "modalities": ("rgb",),
        "protocol": protocol_of(SPEC, 16),
        "trainable_parameters": 25,
        "total_parameters": 25,
        "step_seconds": 0.5,
        "step_seconds_each": (0.4, 0.5, 0.6),
        "samples_per_second": 2.0,
        "cpu_seconds": 1.5,
        **nulls,
        **changed,
    }
    return Measurement(**given)


def test_a_prediction_stands_beside_what_was_measured_with_its_error() -> None:
    found = measurement(params=100, grads=200, alloc_peak_fb=None, optim_state=0)
    beside = found.beside({"params": 100, "grads": 190, "alloc_peak_fb": 7, "optim_state": 3, "flops": 11})
    assert beside.predicted is not None and beside.predicted["flops"] == 11 and beside.predicted["alloc_peak_fb"] == 7
    assert beside.predicted["error"] == {"params": 0.0, "grads": pytest.approx(-0.05)}
    assert Measurement.model_validate_json(beside.model_dump_json()) == beside


def test_what_is_predicted_for_a_measurement_has_its_counts_and_its_slumps() -> None:
    counts = Counts(rois_per_image=24, foreground_per_image={"stage0": 7.0, "mask": 6.0})
    spec = measurement(counts=counts, backend="cuda").spec_as_it_was(SPEC)
    assert (spec.instances, spec.counts, spec.device) == (16, {"rois": 24, "foreground": 6}, "cuda")
    boxes = measurement(counts=Counts(rois_per_image=24, foreground_per_image={"stage0": 7.0})).spec_as_it_was(SPEC)
    assert boxes.counts == {"rois": 24, "foreground": 7} and boxes.device == "cpu"
    assert measurement().spec_as_it_was(SPEC).counts == SPEC.counts


def test_samples_that_are_made_to_fill_the_rois_have_one_protocol_however_many_slumps_that_takes() -> None:
    assert protocol_of(SPEC, 9).words == protocol_of(SPEC, 16).words
    assert protocol_of(SPEC.model_copy(update={"instances": 9})).words != protocol_of(SPEC, 9).words
    assert protocol_of(SPEC).words.startswith(
        "256 px chip, bf16, batch 1, 1 warm-up, caches emptied, 3 measured, seed 0"
    )


@pytest.mark.parametrize("key", ["backend", "device"])
def test_results_of_a_fake_driver_are_refused_whatever_the_stage(key: str) -> None:
    assert "backend = fake" in refusal({key: "fake"}) and refusal({key: "cpu"}) == "" == refusal({})


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    child = "from rtshpc.core.sizing.measured import peak_rss\nprint(peak_rss(), bytearray(64 << 20)[0], peak_rss())"
    parent = f"import subprocess, sys\nheld = bytearray(1 << 30)\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    told = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True).stdout
    before, _, after = map(int, told.split())
    assert before < after - (60 << 20) and after < 1 << 29
