"""The scores of additive attention, with their gradient written down.

They are the dearest part of a step of training that is no product of matrices: B x K x P x A values for every word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_IN_CACHE = 1 << 21  # values: four megabytes of bfloat16


def additive_scores(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """v . tanh(key_p + query) + sum(v) (Bahdanau et al. 2015, arXiv:1409.0473, appendix A.1.2).

    The constant is nothing to the softmax over the cells that follows, and the sum is 2 v . sigmoid(2 (key_p +
    query)), since tanh(x) = 2 sigmoid(2 x) - 1: on a CPU torch computes sigmoid in a third of tanh's time.

    Args:
        keys: (B, P, A) float.
        query: (B, K, A) in the same type.
        weight: v, (A,) float.

    Returns:
        (B, K, P) in the type of the keys.
    """
    if torch.is_grad_enabled():
        return _AdditiveScores.apply(keys, query, weight)  # type: ignore[no-any-return]
    # Nobody wants the energies afterwards: some images' at a time, so that a CPU's cache holds them.
    images = len(keys) if keys.is_cuda else max(1, _IN_CACHE // (query.shape[1] * keys.shape[1] * keys.shape[2]))
    double = 2 * weight.to(keys.dtype)
    parts = zip(torch.split(keys, images), torch.split(query, images), strict=True)
    return torch.cat([_energies(some_keys, some_queries) @ double for some_keys, some_queries in parts])


def _energies(keys: Tensor, query: Tensor) -> Tensor:
    """sigmoid(2 (key_p + query)): (B, K, P, A)."""
    return torch.add(2 * query[:, :, None], keys[:, None], alpha=2).sigmoid_()


class _AdditiveScores(torch.autograd.Function):
    """Autograd by itself would sum over captions and cells in passes of their own, and keep two large tensors."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        energy, weight = _energies(keys, query), weight.to(keys.dtype)
        ctx.save_for_backward(energy, weight)
        return energy @ (2 * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, weight = ctx.saved_tensors
        b, k, cells, size = energy.shape
        slope = torch.ops.aten.sigmoid_backward(gradient[..., None], energy)  # in one pass: both factors
        # A product with ones sums over the captions in a third of the time that sum takes.
        over_captions = energy.new_ones(b, 1, k) @ slope.view(b, k, cells * size)
        for_keys = over_captions.view(b, cells, size).mul_(4 * weight)
        for_query = slope.sum(2).mul_(4 * weight)
        for_weight = gradient.reshape(-1) @ energy.view(-1, size)
        return for_keys, for_query, 2 * for_weight
