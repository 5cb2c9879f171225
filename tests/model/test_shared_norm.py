"""Batch norm over several processes on CPUs."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import nn

from rtshpc.model.layers import SharedBatchNorm, share_batch_norms, waits_for_others


@pytest.fixture
def group(tmp_path: Path) -> Generator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """A batch norm as torch has it, and as several processes share it."""
    own, shared = (nn.Sequential(nn.BatchNorm2d(3)) for _ in range(2))
    with torch.no_grad():
        own[0].weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    shared.load_state_dict(own.state_dict())
    share_batch_norms(shared)
    assert isinstance(shared[0], SharedBatchNorm) and waits_for_others(shared) and not waits_for_others(own)
    return own, shared


@pytest.mark.usefixtures("group")
def test_it_normalises_learns_and_remembers_as_torchs_own() -> None:
    own, shared = pair()
    for seed in range(3):
        given = 5 + torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        found: list[list[torch.Tensor]] = []
        for model in (own, shared):
            model.zero_grad()
            x = given.clone().requires_grad_()
            y = model(x)
            (y * torch.arange(y.numel()).view_as(y) / 48).sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])  # type: ignore[list-item]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    own.eval()
    shared.eval()
    torch.testing.assert_close(shared(given), own(given), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("group")
def test_of_nothing_at_all_it_remembers_nothing() -> None:
    _, shared = pair()
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    assert shared(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
