"""Batches that do not fit in the memory of the device: computed in halves instead of failing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gridcap.common.errors import explain_out_of_memory, first_line
from gridcap.common.text import plural
from gridcap.extract.staging import PendingGrids


class BatchEncoder(Protocol):
    """An encoder of batches, such as `GridEncoder`."""

    def submit(self, images: np.ndarray | Tensor, batch_size: int | None = None) -> PendingGrids:
        """Encode a batch of at most `batch_size` images asynchronously."""
        ...


class HalvingEncoder:
    """Encodes batches in parts that fit in the memory of the device.

    If the memory does not suffice, the largest number of images computed at a time is halved, for this and for all
    later batches. Rows keep their order. Rounding depends on the number of images computed at a time, which is why
    shards record it.

    Args:
        encoder: the encoder.
        batch_size: images computed at a time, as long as they fit.
    """

    def __init__(self, encoder: BatchEncoder, batch_size: int) -> None:
        self._encoder, self._largest = encoder, batch_size

    def submit(self, images: np.ndarray | Tensor, at_most: int | None = None) -> PendingGrids:
        """Encode a batch asynchronously.

        Args:
            images: uint8 (B, side, side, 3).
            at_most: images computed at a time for this batch, if fewer than fit.

        Returns:
            The grids (B, *grid), with the number of images computed at a time.

        Raises:
            Exception: the encoder's error, if the memory does not suffice for a single image.
        """
        while True:
            count = min(self._largest, at_most or self._largest)
            try:
                parts = [
                    self._encoder.submit(images[start : start + count], count) for start in range(0, len(images), count)
                ]
                return _join(parts, count)
            except Exception as error:
                count = min(count, len(images))
                if explain_out_of_memory(error) is None or count == 1:
                    raise
                message = first_line(error)
            # Not in the handler: there, the error keeps the activations of the failed pass in memory.
            self._halve(count, message)

    def _halve(self, count: int, message: str) -> None:
        self._largest = count // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the blocks of the larger batch
        tqdm.write(
            f"warning: out of memory with {plural(count, 'image')} at a time ({message}); continuing with "
            f"{self._largest}. The shards record this number, on which the last bits of their grids depend.",
            file=sys.stderr,
        )


def _join(parts: Sequence[PendingGrids], count: int) -> PendingGrids:
    """Return the parts of a batch, computed `count` images at a time, as one."""
    if len(parts) == 1:
        parts[0].batch_size = count
        return parts[0]
    return PendingGrids(lambda: np.concatenate([part.result() for part in parts]), count)
