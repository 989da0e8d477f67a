"""Detection of sudden slowdowns during training."""

from __future__ import annotations

import statistics

from gridcap.train.engine.log import STEPS_PER_ROW

MAX_RATIO = 2.0  # relative to the median of the earlier windows
MIN_WINDOWS = 3  # windows before a slowdown can be detected
SLOW_WINDOWS = 2  # consecutive slow windows before a warning


class StepTimeMonitor:
    """Compares the duration of training steps with that of earlier steps.

    Durations are averaged over windows of 20 steps, because single steps vary with the caption lengths.
    """

    def __init__(self) -> None:
        self._normal: list[float] = []
        self._window: list[float] = []
        self._slow = 0

    def add(self, seconds: float) -> str | None:
        """Add the duration of a step.

        Returns:
            A warning if the steps have become much slower; one per slowdown.
        """
        self._window.append(seconds)
        if len(self._window) < STEPS_PER_ROW:
            return None
        mean = statistics.fmean(self._window)
        self._window.clear()
        if len(self._normal) < MIN_WINDOWS or mean <= MAX_RATIO * (baseline := statistics.median(self._normal)):
            self._normal.append(mean)
            self._slow = 0
            return None
        self._slow += 1
        if self._slow != SLOW_WINDOWS:
            return None
        return (
            f"a training step takes {mean:.3g} s instead of {baseline:.3g} s: another process may be using the CPU, "
            "the GPU, or the disk of this machine"
        )
