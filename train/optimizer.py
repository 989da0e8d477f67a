"""The optimiser and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from common.config import TrainConfig


def make_optimizer(settings: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) or AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def learning_rate(settings: TrainConfig, step: int, steps_an_epoch: int) -> float:
    """The learning rate of a step.

    step: times `factor` after every `every` epochs. cosine: half a cosine from the end of the warm-up down to 0
    at the end of the last epoch (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts). noam: with
    1 / sqrt(step) after the warm-up (Vaswani et al. 2017, arXiv:1706.03762, eq. 3), scaled so that
    `learning_rate` is its top.

    Args:
        settings: learning rate, schedule, epochs.
        step: from 0.
        steps_an_epoch: of the optimiser.
    """
    schedule, top = settings.schedule, settings.learning_rate
    if step < schedule.warmup_steps:
        return top * (step + 1) / schedule.warmup_steps
    if schedule.kind == "step":
        return top * schedule.factor ** (step // steps_an_epoch // schedule.every)
    if schedule.kind == "cosine":
        total = settings.epochs * steps_an_epoch
        done = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
        return top * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule.kind == "noam":
        return top * math.sqrt(schedule.warmup_steps / (step + 1))
    return top
