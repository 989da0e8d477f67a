"""What the device can do at most."""

from __future__ import annotations

import time
from typing import Any


def has_gpu() -> bool:
    """Whether there is one that torch can use."""
    import torch

    return torch.cuda.is_available()


def matrix_rate(device: Any, seconds: float = 1.5) -> float:
    """Operations a second of a large product of matrices, in the precision that training takes here."""
    import torch

    from common.device import choose_precision

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
