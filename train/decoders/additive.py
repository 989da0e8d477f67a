"""The scores of additive attention, with their gradient written down.

They are the dearest part of a step of training that is no product of matrices: B x K x P x A values for every word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_IN_CACHE = 1 << 22  # values: eight megabytes of bfloat16
# exp(-80) to exp(80) are numbers of float32 and of bfloat16; their product may be 0 or infinite, and the energy is then
# 1 or 0, as it should be. (What is larger counts as this: beyond it a key and a query no longer cancel each other.)
_LARGEST = 40.0


def additive_keys(keys: Tensor) -> Tensor:
    """What `additive_scores` wants of the cells: exp(-2 key), made once an image and not for every word.

    Args:
        keys: (B, P, A) float32 or bfloat16; in float16 the powers would overflow.

    Returns:
        The same shape and type, for `additive_scores` alone: the gradient that it gives for them is the one of the
        keys, and goes through here as it is.
    """
    return _AdditiveKeys.apply(keys)  # type: ignore[no-any-return]


def additive_scores(keys: Tensor, query: Tensor, double: Tensor) -> Tensor:
    """v . tanh(key_p + query) + sum(v) (Bahdanau et al. 2015, arXiv:1409.0473, appendix A.1.2).

    The constant is nothing to the softmax over the cells that follows. The sum is 2 v . sigmoid(2 (key_p + query)),
    since tanh(x) = 2 sigmoid(2 x) - 1, and that sigmoid is 1 / (1 + exp(-2 key_p) exp(-2 query)): with both powers
    at hand a value costs one product and one division, on a CPU a sixth of the time of tanh.

    Args:
        keys: (B, P, A) float, from `additive_keys`.
        query: (B, K, A) in the same type.
        double: 2 v, (A,) float: so it is doubled once, and not for every word.

    Returns:
        (B, K, P) in the type of the keys.
    """
    if torch.is_grad_enabled():
        return _AdditiveScores.apply(keys, query, double)  # type: ignore[no-any-return]
    double = double.to(keys.dtype)
    # Nobody wants the energies afterwards: some images' at a time, so that a CPU's cache holds them.
    images = len(keys) if keys.is_cuda else max(1, _IN_CACHE // (query.shape[1] * keys.shape[1] * keys.shape[2]))
    parts = zip(torch.split(keys, images), torch.split(_power(query), images), strict=True)
    return torch.cat([_energies(some_keys, some_powers) @ double for some_keys, some_powers in parts])


def _power(values: Tensor) -> Tensor:
    """exp(-2 x), no larger and no smaller than what a product with another one may be made of."""
    return values.clamp(-_LARGEST, _LARGEST).mul_(-2).exp_()


def _energies(keys: Tensor, powers: Tensor) -> Tensor:
    """1 / (1 + exp(-2 key_p) exp(-2 query)), that is sigmoid(2 (key_p + query)), of both powers: (B, K, P, A)."""
    return torch.addcmul(keys.new_ones(()), keys[:, None], powers[:, :, None]).reciprocal_()


class _AdditiveKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor) -> Tensor:
        return _power(keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _AdditiveScores(torch.autograd.Function):
    """Autograd by itself would sum over captions and cells in passes of their own, and keep two large tensors."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, double: Tensor) -> Tensor:
        energy, rounded = _energies(keys, _power(query)), double.to(keys.dtype)
        ctx.save_for_backward(energy, rounded)
        ctx.dtype = double.dtype  # what autograd adds up over the words, so not the rounded one's
        return energy @ rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, rounded = ctx.saved_tensors
        b, k, cells, size = energy.shape
        slope = torch.ops.aten.sigmoid_backward(gradient[..., None], energy)  # in one pass: both factors
        inner = 2 * rounded  # as the sigmoid's argument is twice the sum of key and query
        # A product with ones sums over the captions in a third of the time that sum takes.
        over_captions = energy.new_ones(b, 1, k) @ slope.view(b, k, cells * size)
        for_keys = over_captions.view(b, cells, size).mul_(inner)
        for_query = slope.sum(2).mul_(inner)
        for_double = gradient.reshape(-1) @ energy.view(-1, size)
        return for_keys, for_query, for_double.to(ctx.dtype)
