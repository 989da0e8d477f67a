"""A batch of grids and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gridcap.train.data.vocabulary import PAD


@dataclass(frozen=True)
class CaptionBatch:
    """B images with K captions each.

    Attributes:
        images: (B,) indices into the `CaptionedImages`.
        grids: (B, P, C) grids in the stored dtype, cells in row-major order.
        tokens: (B, K, T) int64: BOS, tokens, EOS unless the caption was cut, then PAD. Images with fewer than K
            captions have rows of PAD only.
        target_index: (N,) int64 flat indices of the non-padding targets among the B * K * (T - 1) targets
            `tokens[..., 1:]`.
    """

    images: np.ndarray
    grids: Tensor
    tokens: Tensor
    target_index: Tensor

    def to(self, device: torch.device) -> CaptionBatch:
        """Return the batch on another device."""
        moved = (part.to(device, non_blocking=True) for part in (self.grids, self.tokens, self.target_index))
        return CaptionBatch(self.images, *moved)

    def pin_memory(self) -> CaptionBatch:
        """Return the batch in pinned memory, for asynchronous copies to a GPU."""
        pinned = (part.pin_memory() for part in (self.grids, self.tokens, self.target_index))
        return CaptionBatch(self.images, *pinned)


def pad_captions(captions: Sequence[Sequence[Sequence[int] | np.ndarray]], captions_per_image: int) -> Tensor:
    """Return the token ids of B images with up to K captions each as a (B, K, T) int64 tensor, padded with PAD."""
    longest = max((len(tokens) for image in captions for tokens in image), default=2)
    out = np.full((len(captions), captions_per_image, longest), PAD, np.int64)
    for b, image in enumerate(captions):
        for k, tokens in enumerate(image):
            out[b, k, : len(tokens)] = tokens
    return torch.from_numpy(out)
