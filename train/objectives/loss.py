"""Losses over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the conventional name)
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    loss, plain_loss = _SmoothedCrossEntropy.apply(logits, targets, smoothing)
    return loss, plain_loss, (targets != PAD).sum()


class _SmoothedCrossEntropy(torch.autograd.Function):
    """Label-smoothed cross-entropy that computes the gradient in the forward pass.

    On the CPU, the gradient of each chunk is computed while its probabilities are in the cache. The operator of torch
    makes eight passes over N x V float32 values in memory, which takes a tenth of a training step. Each exponential is
    computed once instead of once for the loss and once for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        vocab_size = logits.shape[-1]
        chunk = max(1, _CHUNK_SIZE // vocab_size) if logits.device.type == "cpu" else max(1, len(logits))
        plain_loss, uniform_loss = torch.zeros(2, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]
            mask = target != PAD
            values = logits[rows].float()
            probs = values.softmax(-1)
            # -log p = (max logit - target logit) + (-log max p). Both terms are exact: max p is never tiny.
            max_logit, min_loss = values.amax(-1, keepdim=True), -probs.amax(-1, keepdim=True).log()
            plain_loss += ((max_logit - values.gather(-1, target) + min_loss) * mask).sum()
            if smoothing:
                uniform_loss += ((max_logit - values.mean(-1, keepdim=True) + min_loss) * mask).sum()
                probs -= smoothing / vocab_size
            if gradient is not None:
                probs.scatter_add_(-1, target, probs.new_full(target.shape, smoothing - 1))
                gradient[rows] = probs.mul_(mask)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(plain_loss)
        return (1 - smoothing) * plain_loss + smoothing * uniform_loss, plain_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_plain_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # The common case in training. On a GPU, reading the value would synchronize with the device.
        if grad_loss.device.type == "cpu" and grad_loss.item() == 1:
            return gradient, None, None
        return gradient * grad_loss, None, None


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
