"""Masked cross-entropy."""

from __future__ import annotations

import math

import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from train.vocabulary import PAD


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the words that are there; padding counts for nothing.

    Args:
        logits: (..., V) float.
        targets: (...) int64, PAD where there is no word.

    Returns:
        The sum in nats, and the number of words it was summed over; exp(sum / number) is the perplexity.
    """
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=PAD, reduction="sum")
    return loss, (targets != PAD).sum()


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a word; infinite where no float holds it."""
    return math.exp(loss) if loss < 709 else math.inf
