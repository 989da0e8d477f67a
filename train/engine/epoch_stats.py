"""Statistics of an epoch that survive an interruption: summed terms, duration, and time spent waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from gridcap.train.engine.step import mean_terms


class EpochStats:
    """Accumulates the statistics of one epoch.

    Args:
        saved: result of `state_dict` at the checkpoint from which the epoch resumes; empty for a new epoch.
    """

    def __init__(self, saved: dict[str, float]) -> None:
        values = dict(saved)
        self._started = time.perf_counter() - values.pop("seconds", 0.0)
        self._data_wait = values.pop("data_wait", 0.0)
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the duration of the block as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the terms of a step. This does not wait for the device."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def state_dict(self) -> dict[str, float]:
        """Return the sums and times so far, for a checkpoint."""
        return {"seconds": self._seconds(), "data_wait": self._data_wait} | {k: v.item() for k, v in self.sums.items()}

    def row(self) -> dict[str, float]:
        """Return the means, the duration in seconds, and the share of it spent waiting for data."""
        seconds = self._seconds()
        return mean_terms(self.sums) | {"seconds": seconds, "data_wait": self._data_wait / seconds}

    def _seconds(self) -> float:
        return time.perf_counter() - self._started
