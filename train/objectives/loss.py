"""Losses over words."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor
from torch.autograd.function import once_differentiable

from gridcap.train.data.vocabulary import PAD

_IN_CACHE = 1 << 19  # float32 numbers: two megabytes


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
    loss, plain = _SmoothedCrossEntropy.apply(logits, targets, smoothing)
    return loss, plain, (targets != PAD).sum()


class _SmoothedCrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, while the probabilities lie in the processor's cache: torch's own reads and
    writes N x V float32 numbers from memory eight times, which is a tenth of a step of training. And every exponential
    is made once, where log-probabilities would want another for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        words = logits.shape[-1]
        rows = max(1, _IN_CACHE // words) if logits.device.type == "cpu" else max(1, len(logits))
        plain, spread = torch.zeros(2, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), rows):
            some = slice(start, start + rows)
            target = targets[some, None]
            there = target != PAD
            values = logits[some].float()
            probs = values.softmax(-1)
            # A word's loss is how far its logit is below the largest, and the loss of that word, which is never tiny.
            top, least = values.amax(-1, keepdim=True), -probs.amax(-1, keepdim=True).log()
            plain += ((top - values.gather(-1, target) + least) * there).sum()
            if smoothing:
                spread += ((top - values.mean(-1, keepdim=True) + least) * there).sum()
                probs -= smoothing / words
            if gradient is not None:
                probs.scatter_add_(-1, target, probs.new_full(target.shape, smoothing - 1))
                gradient[some] = probs.mul_(there)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(plain)
        return (1 - smoothing) * plain + smoothing * spread, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, by_plain: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # As it is in training; a GPU is not asked, since it would have to be waited for.
        if by_loss.device.type == "cpu" and by_loss.item() == 1:
            return gradient, None, None
        return gradient * by_loss, None, None


def attention_reg(attention: Tensor, targets: Tensor) -> Tensor:
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
