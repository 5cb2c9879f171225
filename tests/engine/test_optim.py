from __future__ import annotations

import pytest
import torch

from rtshpc.core.config import TrainConfig
from rtshpc.engine.optim import base_rate, build_optimizer, clip_gradients, parameter_groups, rate_at
from rtshpc.model.detector import build_detector

from .conftest import small_config


def test_the_rate_grows_linearly_with_the_batch() -> None:
    small, large = (base_rate(TrainConfig(batch_size=batch)) for batch in (16, 64))
    assert large == pytest.approx(4 * small) == pytest.approx(1.6e-4)


def test_the_rate_warms_up_then_falls_tenfold_at_each_step() -> None:
    config = TrainConfig(warmup_steps=10, steps=(0.5, 0.8), batch_size=64)
    rates = [rate_at(step, 100, config) for step in range(1, 101)]
    assert rates[0] < rates[4] < rates[9] == pytest.approx(1.6e-4)
    assert rates[49] == pytest.approx(1.6e-4) and rates[50] == pytest.approx(1.6e-5)
    assert rates[79] == pytest.approx(1.6e-5) and rates[80] == pytest.approx(1.6e-6)


def test_the_cosine_falls_from_the_full_rate_to_nearly_nothing() -> None:
    config = TrainConfig(schedule="cosine", warmup_steps=0, batch_size=64)
    rates = [rate_at(step, 50, config) for step in range(1, 51)]
    assert rates[0] == pytest.approx(1.6e-4)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-6


def test_norms_biases_and_relative_positions_do_not_decay_and_frozen_weights_are_left_out() -> None:
    detector = build_detector(small_config().model, {"rgb": 3, "ndvi": 1}, 1, frozen=True)
    kept, free = (group["params"] for group in parameter_groups(detector, 0.1))
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    assert all(p.ndim > 1 for p in kept)
    assert not any("bottom_ups" in names[id(p)] for p in (*kept, *free))
    assert {id(p) for p in (*kept, *free)} == {id(p) for p in detector.parameters() if p.requires_grad}
    whole = build_detector(small_config().model, {"rgb": 3}, 1)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    kept, free = (group["params"] for group in parameter_groups(whole, 0.1))
    assert any("rel_pos" in names[id(p)] for p in free) and not any("rel_pos" in names[id(p)] for p in kept)


def test_clipping_gives_the_norm_before_and_zero_means_not() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([weight], 0.0)) == pytest.approx(5.0)
    assert weight.grad.tolist() == pytest.approx([3.0, 4.0])
    assert float(clip_gradients([weight], 1.0)) == pytest.approx(5.0)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)


def test_an_optimizer_state_survives_the_checkpoint_form() -> None:
    layer = torch.nn.Linear(3, 2)
    first = build_optimizer(layer, TrainConfig())
    layer(torch.ones(1, 3)).sum().backward()
    first.step()
    second = build_optimizer(layer, TrainConfig())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[layer.weight]["exp_avg"], first.state[layer.weight]["exp_avg"])
