"""Reproducible runs: deterministic kernels, and random numbers that depend only on the step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic CUDA kernels where torch provides them. On the CPU, this does nothing."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill_memory = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # filling every new tensor with NaN is a debugging aid and costs time
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill_memory
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed for the random numbers of a step (dropout, sampled tokens).

    Because it is a pure function, a checkpoint does not have to contain a random state.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + rank * 0x2545F4914F6CDD1D) % 2**64
    return (mixed ^ (mixed >> 29)) % 2**63
