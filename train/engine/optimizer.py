"""The optimizer and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gridcap.common.config import TrainConfig


def make_optimizer(settings: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) or AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], words: Tensor, settings: TrainConfig
) -> Tensor:
    """One step on the gradient of the mean loss of a word, clipped as the settings say.

    Unless values are clipped, the weights' gradients are read once for their norm and once for the step: what they are
    divided by goes into the optimizer's own pass.

    Args:
        optimizer: from `make_optimizer`.
        parameters: all of the optimizer's, with the gradient of the summed loss; it is not kept.
        words: (), how many the loss was summed over.
        settings: `max_grad_norm` and `max_grad_value`.

    Returns:
        The norm of the mean loss's gradient before it was clipped, (), on the parameters' device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divisor = words.clamp(min=1).float()
    norm = nn.utils.get_total_norm(gradients) / divisor
    if settings.max_grad_norm is not None:
        divisor = divisor * ((norm + 1e-6) / settings.max_grad_norm).clamp(min=1)
    scale: Tensor | None = divisor
    if settings.max_grad_value is not None:
        torch._foreach_div_(gradients, divisor)
        nn.utils.clip_grad_value_(parameters, settings.max_grad_value)
        scale = None
    # What torch's scaler for float16 sets, and every fused optimizer divides by.
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale  # type: ignore[attr-defined]
    return norm


def learning_rate(settings: TrainConfig, step: int, steps_an_epoch: int) -> float:
    """The learning rate of a step.

    step: times `factor` after every `every` epochs. cosine: half a cosine from the end of the warm-up down to 0
    at the end of the last epoch (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts). noam: with
    1 / sqrt(step) after the warm-up (Vaswani et al. 2017, arXiv:1706.03762, eq. 3), scaled so that
    `learning_rate` is its top.

    Args:
        settings: learning rate, schedule, epochs.
        step: from 0.
        steps_an_epoch: of the optimizer.
    """
    schedule, top = settings.schedule, settings.learning_rate
    if step < schedule.warmup_steps:
        return top * (step + 1) / schedule.warmup_steps
    if schedule.kind == "step":
        return top * schedule.gamma ** (step // steps_an_epoch // schedule.step_size)
    if schedule.kind == "cosine":
        total = settings.epochs * steps_an_epoch
        done = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
        return top * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule.kind == "noam":
        return top * math.sqrt(schedule.warmup_steps / (step + 1))
    return top
