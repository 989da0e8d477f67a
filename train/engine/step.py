"""One training step: gradients, their reduction over the ranks, optimizer step, and EMA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gridcap.train.data.batch import CaptionBatch
from gridcap.train.engine.determinism import step_seed
from gridcap.train.engine.gradients import Gradients
from gridcap.train.engine.job import TrainingJob
from gridcap.train.engine.log import Row
from gridcap.train.engine.optimizer import learning_rate, take_step
from gridcap.train.engine.state import RunState


@dataclass(frozen=True)
class StepResult:
    """The result of a step. Reading a tensor waits for the device.

    Attributes:
        sums: terms of the objective, (), float64, summed over all ranks.
        learning_rate: learning rate of the step.
        grad_norm: (), norm of the gradient before clipping.
    """

    sums: dict[str, Tensor]
    learning_rate: float
    grad_norm: Tensor

    def row(self) -> Row:
        """Return the values for steps.jsonl."""
        means = {name.removeprefix("train_"): value for name, value in mean_terms(self.sums).items()}
        return means | {"learning_rate": self.learning_rate, "grad_norm": self.grad_norm.item()}


def train_step(
    job: TrainingJob, run: RunState, batches: Sequence[CaptionBatch], gradients: Gradients, steps_per_epoch: int
) -> StepResult:
    """Update the weights once. This does not wait for the device.

    Args:
        job: the run.
        run: state to update.
        batches: this rank's images of the step, one batch per gradient accumulation step. Some may be empty.
        gradients: computes the gradients of a batch.
        steps_per_epoch: number of steps per epoch.
    """
    run.decoder.train()
    torch.manual_seed(step_seed(job.config.seed, run.step, job.runtime.ranks.rank))
    sums = gradients.compute(batches, run.step // steps_per_epoch)
    names, values = list(sums), torch.stack(list(sums.values()))
    job.runtime.ranks.all_reduce([*(p.grad for p in gradients.parameters if p.grad is not None), values])
    sums = dict(zip(names, values, strict=True))
    rate = learning_rate(job.settings, run.step, steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    grad_norm = take_step(run.optimizer, gradients.parameters, sums["tokens"], job.settings)
    run.step += 1
    if run.ema is not None:
        run.ema.update(run.decoder, run.step)
    return StepResult(sums, rate, grad_norm)


def mean_terms(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of summed terms: train_loss per token; reward, baseline, and advantage per caption."""
    means = {}
    if "loss" in sums:
        means["train_loss"] = (sums["loss"] / sums["tokens"]).item()
    for name in ("reward", "baseline", "advantage"):
        if name in sums:
            means[name] = (sums[name] / sums["captions"]).item()
    return means
