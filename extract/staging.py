"""Batches on their way through an encoder: pending grids, and the buffers between numpy and a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_RING = 3  # batches on the GPU at once: one waiting or being copied in, one computed, one copied out


class PendingGrids:
    """A batch on its way through the encoder, from `GridEncoder.submit`."""

    def __init__(self, collect: Callable[[], np.ndarray]) -> None:
        self._collect: Callable[[], np.ndarray] | None = collect
        self._grids: np.ndarray | None = None
        self._lock = threading.Lock()

    def result(self) -> np.ndarray:
        """The grids, as `GridEncoder.encode` gives them; waits for them. Any thread may ask, and more than once."""
        with self._lock:
            if self._collect is not None:
                self._grids = self._collect()
                self._collect = None  # and with it the buffers it reads from
            assert self._grids is not None
            return self._grids


class Staging:
    """Page-locked buffers between numpy and a GPU, used in turn, so that no copy waits for arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._downloads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = [_Slot() for _ in range(_RING)]
        self._next = 0

    def run(self, images: Tensor, forward: Callable[[Tensor], Tensor]) -> PendingGrids:
        """Copy images in, unless they are there, start `forward` on them, and start to copy out what it gives."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % _RING
        if slot.pending is not None:
            slot.pending.result()  # its grids lie where this batch's will
        computing = torch.cuda.current_stream(self._device)
        if images.is_cuda:
            images.record_stream(computing)  # they were made on another
            there = images
        else:
            slot.images = _fitting(slot.images, images)
            slot.images.copy_(images)
            there = slot.images.to(self._device, non_blocking=True)
        grids = forward(there)
        slot.grids = target = _fitting(slot.grids, grids)
        self._downloads.wait_stream(computing)
        with torch.cuda.stream(self._downloads):
            target.copy_(grids, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._downloads)
        grids.record_stream(self._downloads)  # or its memory is given to the next batch while it is being copied

        def collect() -> np.ndarray:
            done.synchronize()
            return target.clone().numpy()  # by torch, which lets other threads run meanwhile

        slot.pending = PendingGrids(collect)
        return slot.pending


@dataclass
class _Slot:
    """The buffers of one batch, and the batch that is in them."""

    images: Tensor | None = None
    grids: Tensor | None = None
    pending: PendingGrids | None = None


def _fitting(buffer: Tensor | None, like: Tensor) -> Tensor:
    """The buffer if it has the shape of `like`, else a new page-locked one."""
    if buffer is not None and buffer.shape == like.shape:
        return buffer
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
