"""Losses over tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the conventional name)
from torch import Tensor

from gridcap.train.data.vocabulary import PAD

_CHUNK_SIZE = 1 << 19  # float32 logits per chunk: 2 MiB, which fits in the CPU cache


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over all tokens except padding.

    Args:
        logits: (..., V) float.
        targets: (...) int64, PAD at padding.

    Returns:
        The sum in nats, (), and the number of tokens, (). exp(sum / number) is the perplexity.
    """
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=PAD, reduction="sum")
    return loss, (targets != PAD).sum()


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    Args:
        logits: (N, V) float.
        targets: (N,) int64, PAD at padding.
        smoothing: share of the target probability that is spread uniformly over all V tokens.

    Returns:
        The sum to minimize, (); the sum without smoothing, (), detached, comparable to the validation loss; and the
        number of tokens, ().
    """
    chunk = max(1, _CHUNK_SIZE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    loss, plain_loss = logits.new_zeros(2, dtype=torch.float32)
    for rows, target in zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True):
        log_probs = F.log_softmax(rows.float(), -1)
        nll = F.nll_loss(log_probs, target, ignore_index=PAD, reduction="sum")
        plain_loss = plain_loss + nll.detach()
        if smoothing:
            nll = (1 - smoothing) * nll - smoothing * (log_probs.mean(-1) * (target != PAD)).sum()
        loss = loss + nll
    return loss, plain_loss, (targets != PAD).sum()


def attention_reg(attention: Tensor, targets: Tensor) -> Tensor:
    """Return the doubly stochastic attention penalty (Xu et al. 2015, arXiv:1502.03044, section 4.2.1, equation 14).

    It encourages a decoder to attend to every cell over the course of a caption: (1 - attention weight of a cell summed
    over the caption) squared, averaged over the cells and summed over the captions.

    The code released with the paper averages over the cells, too, but its loss is the mean over the batch of the
    log-probabilities of captions, to which it adds the sum over the batch of the penalties. For a batch of N captions,
    its weight of 1 therefore corresponds to a weight of N here, where both are sums.

    Args:
        attention: (B, K, T, P) float; sums to 1 over the P cells.
        targets: (B, K, T) int64, PAD at padding.

    Returns:
        (), the sum over captions; captions that are all padding do not count.
    """
    mask = targets != PAD
    cell_totals = (attention.float() * mask[..., None]).sum(2)
    return ((1 - cell_totals).square().mean(-1) * mask.any(-1)).sum()


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats per token; inf if it overflows."""
    return math.exp(loss) if loss < 709 else math.inf
