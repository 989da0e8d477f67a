"""The batch size of a new store on a GPU: doubled until the throughput of the encoder stops rising."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from gridcap.common.errors import explain_out_of_memory
from gridcap.extract.staging import NUM_SLOTS, PendingGrids

MIN_IMAGES = 20_000  # of a store; for fewer, measuring takes longer than it saves
SMALLEST = 32
LARGEST = 1024
MIN_GAIN = 1.05  # of twice the batch size; less is noise, and larger batches need more memory on the host, too
SECONDS = 0.5  # per batch size, after one batch of warmup


class Encoder(Protocol):
    """An encoder of batches, such as `GridEncoder`."""

    side: int

    def submit(self, images: np.ndarray) -> PendingGrids:
        """Encode a batch asynchronously."""
        ...


def choose_fastest_batch_size(rate_of: Callable[[int], float], largest: int) -> int:
    """Double the batch size until the throughput stops rising or the memory does not suffice.

    Args:
        rate_of: returns images per second with a batch size, or raises an out-of-memory error.
        largest: largest batch size.

    Returns:
        The batch size; SMALLEST, or `largest` if that is less, even if the memory does not suffice for it: the
        extraction divides such batches.
    """
    size = min(SMALLEST, largest)
    try:
        rate = rate_of(size)
        while 2 * size <= largest:
            doubled = rate_of(2 * size)
            if doubled < MIN_GAIN * rate:
                break
            size, rate = 2 * size, doubled
    except Exception as error:
        if explain_out_of_memory(error) is None:
            raise
    return size


def measure_rate(encoder: Encoder, batch_size: int, seconds: float = SECONDS) -> float:
    """Return images per second of an encoder, with as many pending batches as in an extraction."""
    images = np.zeros((batch_size, encoder.side, encoder.side, 3), np.uint8)
    encoder.submit(images).result()
    pending: deque[PendingGrids] = deque()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        pending.append(encoder.submit(images))
        count += batch_size
        if len(pending) >= NUM_SLOTS:
            pending.popleft().result()
    for last in pending:
        last.result()
    return count / (time.perf_counter() - start)
