"""How long a run will take, and how much memory it uses."""

from __future__ import annotations

import resource
import sys

import torch

from gridcap.common.text import format_duration

STEPS = 20  # measured before the estimate
_FIRST = 5  # steps that are not measured: caches are cold


class RunEstimate:
    """Estimates the duration of the training steps of a run from the first ones.

    Args:
        steps: number of steps until the end of the run.
        device: device of the decoder.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._seconds: list[float] = []

    def add(self, seconds: float) -> str | None:
        """Add the duration of a step; return the estimate after the 20th step, and None after all others."""
        if len(self._seconds) == STEPS:
            return None
        self._seconds.append(seconds)
        if len(self._seconds) < STEPS or self._steps <= STEPS:
            return None
        per_step = sum(self._seconds[_FIRST:]) / (STEPS - _FIRST)
        left = format_duration(per_step * (self._steps - STEPS))
        return f"about {left} of training left at {per_step:.2g} s per step; {_memory(self._device)}"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"
