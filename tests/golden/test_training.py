"""One training step equals Detectron2's: proposals, samples, losses, gradients and running statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
KINDS = ("cascade_mvit", "maskrcnn_resnet")
CASES = ("A", "B", "C")
SMALL = 1e-5
"""Gradients below this share of the total norm are rounding."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def wanted(kind: str) -> dict[str, Tensor]:
    return load_file(HERE / f"{kind}.training.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_proposals_and_samples_equal_the_reference(kind: str, case: str, wanted, trained) -> None:
    step = trained(kind, case)
    for n in range(2):
        torch.testing.assert_close(step.proposals[n], wanted[f"{case}.proposals.{n}.boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(step.sampled[n].boxes, wanted[f"{case}.sampled.{n}.boxes"], rtol=0, atol=1e-4)
        assert torch.equal(step.sampled[n].classes, wanted[f"{case}.sampled.{n}.classes"])


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_reference_under_its_names(kind: str, case: str, wanted, trained) -> None:
    losses = {name.split(".")[-1]: value for name, value in wanted.items() if name.startswith(f"{case}.loss.")}
    found = trained(kind, case).losses
    assert set(found) == set(losses)
    for name, value in losses.items():
        assert abs(float(found[name] - value)) <= 1e-6 * max(1.0, float(value)), name


@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_equal_the_reference(kind: str, case: str, wanted, trained) -> None:
    start = f"{case}.gradnorm."
    norms = {name.removeprefix(start): float(v) for name, v in wanted.items() if name.startswith(start)}
    weights = dict(trained(kind, case).model.named_parameters())
    assert set(weights) == set(norms)
    total = sum(v * v for v in norms.values()) ** 0.5
    allowed = 1e-5 if case == "B" else 1e-2
    for name, norm in norms.items():
        if norm > SMALL * total:
            assert abs(float(weights[name].grad.norm()) - norm) <= allowed * norm, name


def test_every_gradient_of_case_b_equals_the_reference(trained) -> None:
    wanted = load_file(HERE / "cascade_mvit.training.safetensors")
    grads = {name.removeprefix("B.grad."): v for name, v in wanted.items() if name.startswith("B.grad.")}
    weights = dict(trained("cascade_mvit", "B").model.named_parameters())
    total = sum(float(v.norm()) ** 2 for v in grads.values()) ** 0.5
    assert len(grads) > 100
    for name, grad in grads.items():
        if float(grad.norm()) > SMALL * total:
            assert float((weights[name].grad - grad).norm()) <= 1e-5 * float(grad.norm()), name


def test_running_statistics_after_a_step_equal_the_reference(kind: str, wanted, trained) -> None:
    buffers = dict(trained(kind, "A").model.named_buffers())
    start = "A.buffer_after."
    names = [name for name in wanted if name.startswith(start)]
    assert names
    for name in names:
        torch.testing.assert_close(buffers[name.removeprefix(start)], wanted[name], rtol=1e-5, atol=1e-6)
