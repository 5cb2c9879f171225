"""AdamW, its two groups of parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rtshpc.core.config import TrainConfig

WARMUP_START = 0.001
"""Share of the learning rate at the first step of the warm-up."""

BETAS = (0.9, 0.999)

_POSITIONS = ("rel_pos", "pos_embed")


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that take gradients, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: with weight decay, and without (norms, biases, relative positions)."""
    kept: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in trainable(model):
        undecayed = parameter.ndim <= 1 or any(word in name for word in _POSITIONS)
        (free if undecayed else kept).append(parameter)
    groups = [{"params": kept, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters alone; one fused kernel a group."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=base_rate(config), betas=BETAS, fused=True
    )


def base_rate(config: TrainConfig) -> float:
    """Learning rate after the warm-up: scaled linearly with the global batch (Li et al. 2025, section 4)."""
    return config.learning_rate * config.batch_size / config.reference_batch


def rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Learning rate of a step.

    Args:
        step: 1 for the first optimizer step.
        total: steps of the whole training.
        config: warm-up, schedule and rate.
    """
    rate = base_rate(config)
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / max(1, total))))
    else:
        rate *= 0.1 ** sum(step > share * total for share in config.steps)
    if step <= config.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / config.warmup_steps
    return rate


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Norm of all gradients before they are scaled down to `limit` (0 = left as they are)."""
    return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
