"""Device throughput: timing with synchronization, and the peak rate of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.measure import rate


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def device_rate(items: int, work: Callable[[], object], device: Any, seconds: float) -> float:
    """Return items per second of `work` after a warmup, synchronizing with the GPU after every call."""
    import torch

    def synchronized() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        synchronized()
    return rate(items, synchronized, seconds)


def matmul_rate(device: Any, seconds: float = 1.5) -> float:
    """Return the peak FLOP/s of a large matrix product in the default training precision of the device."""
    import torch

    from gridcap.common.device import choose_precision

    size = 8192 if device.type == "cuda" else 1536
    dtype = choose_precision("auto", device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best
