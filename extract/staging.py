"""Asynchronous encoding: pending grids and the pinned buffers for transfers between NumPy and a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_SLOTS = 3  # batches on the GPU: one queued or copied in, one computed, one copied out


class PendingGrids:
    """Grids of a batch that may still be computed, as returned by `GridEncoder.submit`.

    Args:
        collect: waits for the grids and returns them.
        batch_size: number of images computed at a time, if it is known.
    """

    def __init__(self, collect: Callable[[], np.ndarray], batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        self._collect: Callable[[], np.ndarray] | None = collect
        self._grids: np.ndarray | None = None
        self._lock = threading.Lock()

    def result(self) -> np.ndarray:
        """Wait for the grids and return them like `GridEncoder.encode`. Thread-safe and repeatable."""
        with self._lock:
            if self._collect is not None:
                self._grids = self._collect()
                self._collect = None  # releases the buffers
            assert self._grids is not None
            return self._grids


class Staging:
    """Pinned buffers, used in turn, that overlap transfers with computation.

    Args:
        device: GPU that runs the forward pass.

    Attributes:
        forward_seconds: duration of the forward pass of each batch whose grids have arrived, from CUDA events.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._downloads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = [_Slot() for _ in range(NUM_SLOTS)]
        self._next = 0
        self.forward_seconds: list[float] = []  # threads append to it

    def run(self, images: Tensor, forward: Callable[[Tensor], Tensor]) -> PendingGrids:
        """Transfer images to the GPU, start `forward` on them, and start the transfer of its result to the host.

        Args:
            images: batch on the host or, already transferred, on the GPU.
            forward: maps the batch on the GPU to its grids.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % NUM_SLOTS
        if slot.pending is not None:
            slot.pending.result()  # its grids are in the buffer that this batch reuses
        compute_stream = torch.cuda.current_stream(self._device)
        if images.is_cuda:
            images.record_stream(compute_stream)  # allocated on another stream
            batch = images
        else:
            slot.images = _pinned_like(slot.images, images)
            slot.images.copy_(images)
            batch = slot.images.to(self._device, non_blocking=True)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(compute_stream)
        grids = forward(batch)
        end.record(compute_stream)
        slot.grids = target = _pinned_like(slot.grids, grids)
        self._downloads.wait_stream(compute_stream)
        with torch.cuda.stream(self._downloads):
            target.copy_(grids, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._downloads)
        grids.record_stream(self._downloads)  # keeps the allocator from reusing the memory during the copy

        def collect() -> np.ndarray:
            done.synchronize()
            self.forward_seconds.append(start.elapsed_time(end) / 1000)
            return target.clone().numpy()  # a copy by torch, which releases the GIL

        slot.pending = PendingGrids(collect)
        return slot.pending


@dataclass
class _Slot:
    """Buffers of one batch, and the batch that occupies them."""

    images: Tensor | None = None
    grids: Tensor | None = None
    pending: PendingGrids | None = None


def _pinned_like(buffer: Tensor | None, like: Tensor) -> Tensor:
    """Return the buffer if it has the shape of `like`, else a new pinned one."""
    if buffer is not None and buffer.shape == like.shape:
        return buffer
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
