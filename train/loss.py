"""Losses over words."""

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


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy with smoothed labels (Szegedy et al. 2016, arXiv:1512.00567, section 7), summed as above.

    Args:
        logits: (N, V) float.
        targets: (N,) int64, PAD where there is no word.
        smoothing: share of the target that is spread over all V words.

    Returns:
        The sum to be minimised; the sum without smoothing, detached, to be compared with validation; and the
        number of words.
    """
    if not smoothing:
        loss, words = masked_cross_entropy(logits, targets)
        return loss, loss.detach(), words
    log_probs, there = logits.float().log_softmax(-1), targets != PAD
    plain = F.nll_loss(log_probs, targets, ignore_index=PAD, reduction="sum")
    spread = -(log_probs.mean(-1) * there).sum()
    return (1 - smoothing) * plain + smoothing * spread, plain.detach(), there.sum()


def doubly_stochastic(attention: Tensor, targets: Tensor) -> Tensor:
    """The penalty that makes a decoder look at every cell in the course of a caption (Xu et al. 2015,
    arXiv:1502.03044, eq. 14): (1 - sum over the caption of the looks at a cell) squared, averaged over the cells.

    Args:
        attention: (B, K, T, P), each look sums to 1.
        targets: (B, K, T) int64, PAD where there is no word.

    Returns:
        Its sum over the captions, each counted as often as it has words: divided by the number of all words it is a
        mean over captions, as in the code released with the paper, and stands beside the mean loss of a word.
    """
    there = targets != PAD
    looked = (attention.float() * there[..., None]).sum(2)
    return ((1 - looked).square().mean(-1) * there.sum(-1)).sum()


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a word; infinite where no float holds it."""
    return math.exp(loss) if loss < 709 else math.inf
