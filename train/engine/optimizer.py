"""Optimizer, gradient clipping, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gridcap.common.config import AdaptedTrainConfig, TrainConfig


def make_optimizer(settings: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter, arXiv:1711.05101), or SGD."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, rate, weight_decay=decay, fused=True)


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], num_tokens: Tensor, settings: TrainConfig
) -> Tensor:
    """Apply one optimizer step to the gradient of the mean loss per token, clipped as configured.

    Unless gradient values are clipped, the gradients are read once for their norm and once for the step: the division
    by the number of tokens is fused into the optimizer kernel.

    Args:
        optimizer: from `make_optimizer`.
        parameters: all parameters of the optimizer, with the gradient of the summed loss. The gradients are modified.
        num_tokens: (), number of tokens that the loss was summed over.
        settings: `max_grad_norm` and `max_grad_value`.

    Returns:
        (), norm of the gradient of the mean loss before clipping, on the device of the parameters.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divisor = num_tokens.clamp(min=1).float()
    norm = nn.utils.get_total_norm(gradients) / divisor
    if settings.max_grad_norm is not None:
        divisor = divisor * ((norm + 1e-6) / settings.max_grad_norm).clamp(min=1)
    scale: Tensor | None = divisor
    if settings.max_grad_value is not None:
        torch._foreach_div_(gradients, divisor)
        nn.utils.clip_grad_value_(parameters, settings.max_grad_value)
        scale = None
    # Fused optimizers divide the gradients by this attribute, which GradScaler sets for float16 training.
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale  # type: ignore[attr-defined]
    return norm


def learning_rate(settings: AdaptedTrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    After a linear warmup of `schedule.warmup_steps` steps, the schedule is one of

    * constant: the peak learning rate;
    * step: multiplied by `gamma` after every `step_size` epochs;
    * linear: from the peak to 0 after the last epoch;
    * cosine: half a cosine period that ends at 0 after the last epoch (Loshchilov and Hutter 2017, arXiv:1608.03983,
      without restarts);
    * noam: proportional to 1 / sqrt(step) (Vaswani et al. 2017, arXiv:1706.03762, eq. 3), scaled so that its peak is
      `learning_rate`.

    Args:
        settings: peak learning rate, schedule, and number of epochs.
        step: index of the optimizer step, from 0.
        steps_per_epoch: number of optimizer steps per epoch.
    """
    schedule, peak = settings.schedule, settings.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "step":
        return peak * schedule.gamma ** (step // steps_per_epoch // schedule.step_size)
    if schedule.kind in ("linear", "cosine"):
        total = settings.epochs * steps_per_epoch
        progress = min(1.0, (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps))
        return peak * (1 - progress if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.kind == "noam":
        return peak * math.sqrt(schedule.warmup_steps / (step + 1))
    return peak
