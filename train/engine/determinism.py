"""The same numbers from the same seed: sums in a fixed order, and random numbers that belong to a step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, sums in the same order every time, where torch has such a way; a CPU has no other."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # NaN into all new memory, against bugs that we test
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=only_warn)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers of a step: dropout, drawn words. So a resume needs no random state."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + rank * 0x2545F4914F6CDD1D) % 2**64
    return (mixed ^ (mixed >> 29)) % 2**63
