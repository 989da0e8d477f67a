"""What the device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.measure import rate


def has_gpu() -> bool:
    """Whether there is one that torch can use."""
    import torch

    return torch.cuda.is_available()


def device_rate(items: int, work: Callable[[], object], device: Any, seconds: float) -> float:
    """`measure.rate` after a warm-up, of work that a GPU may still be at when the call returns."""
    import torch

    def whole() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        whole()
    return rate(items, whole, seconds)


def matrix_rate(device: Any, seconds: float = 1.5) -> float:
    """Operations a second of a large product of matrices, in the precision that training takes here."""
    import torch

    from gridcap.common.device import choose_precision

    size = 8192 if device.type == "cuda" else 1536
    kind = choose_precision("auto", device)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    for _ in range(2):
        a @ b
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
