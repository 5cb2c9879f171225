"""Small parts shared by backbones, pyramid and heads, and Detectron2's ways to start weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rtshpc.fusion.recompute import chain, same


class ConvNorm(nn.Conv2d):
    """Convolution, then an optional norm (as the submodule `norm`), then an optional ReLU."""

    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int = 1, norm: nn.Module | None = None, relu: bool = False
    ) -> None:
        super().__init__(inside, outside, kernel, stride, padding=kernel // 2, bias=norm is None)
        self.norm = norm
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """BCHW to B, outside, H / stride, W / stride."""
        return self.finish(self.convolve(input))

    def convolve(self, input: Tensor) -> Tensor:
        """The convolution alone."""
        return super().forward(input)

    def finish(self, x: Tensor, channels_first: bool = False) -> Tensor:
        """What follows the convolution: norm and ReLU.

        Args:
            x: what it gave, in any order of memory.
            channels_first: put that order in place, between the two, where no copy is kept for backward.
        """
        if self.norm is not None:
            x = self.norm(x)
        if channels_first:
            x = x.contiguous()
        return F.relu(x) if self.relu else x


class _Sum(torch.autograd.Function):
    """A tensor added up over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over what all processes have, on CPUs, where torch's SyncBatchNorm does not run."""

    def forward(self, input: Tensor) -> Tensor:
        """As one process would normalise the (N, C, H, W) of all; N may be 0 here, and in all."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.float()
        # Two sums: the square of a mean is no good measure of a small variance.
        sums: Tensor = _Sum.apply(torch.cat((x.sum((0, 2, 3)), x.new_tensor([x[:, :1].numel()]))))
        count = sums[-1].detach()
        if int(count) == 0:
            return input
        mean = sums[:-1] / count
        apart = x - mean.view(1, -1, 1, 1)
        variance: Tensor = _Sum.apply(apart.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (apart * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


def share_batch_norms(module: nn.Module) -> None:
    """Put a SharedBatchNorm of the same weights in place of every batch norm in `module`."""
    for name, part in module.named_children():
        if type(part) is nn.BatchNorm2d:
            shared = SharedBatchNorm(part.num_features, part.eps, part.momentum).train(part.training)
            shared.load_state_dict(part.state_dict())
            setattr(module, name, shared)
        else:
            share_batch_norms(part)


def waits_for_others(module: nn.Module) -> bool:
    """Whether norms of `module` meet those of other processes: whoever skips them holds all up."""
    return any(isinstance(part, nn.SyncBatchNorm | SharedBatchNorm) for part in module.modules())


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between, on the last axis."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, first: Callable[[Tensor], Tensor], again: bool = False) -> Tensor:
        """(..., width) to (..., width): the MLP of first(x); `again` as in `chain`."""
        return chain(first, [(self.fc1, F.gelu), (self.fc2, same)], (x,), again)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm with the eps of vision transformers, 1e-6."""
    return nn.LayerNorm(width, eps=1e-6)


def drop_path(x: Tensor, draw: Tensor | None, rate: float) -> Tensor:
    """Stochastic depth: drops whole images of the batch.

    Args:
        x: (B, ...).
        draw: B uniform numbers in [0, 1), one an image; None keeps everything.
        rate: chance to drop.
    """
    if draw is None or rate == 0:
        return x
    keep = (draw >= rate).to(x.dtype) / (1 - rate)
    return x * keep.view(-1, *[1] * (x.dim() - 1))


def start_transformer(module: nn.Module) -> None:
    """Linear weights from a normal cut at two (0.02), biases zero, norms one and zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def start_msra(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Kaiming normal over the fan-out, for layers followed by a ReLU."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_xavier(layer: nn.Conv2d | nn.Linear) -> None:
    """Caffe2's Xavier fill: uniform over the fan-in, bias zero."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Normal weights of the given deviation, bias zero."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
