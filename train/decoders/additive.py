"""Additive attention scores with an explicit gradient.

They are the most expensive operation of a training step that is not a matmul: B x K x P x A values per time step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHE_ELEMENTS = 1 << 22  # 8 MiB of bfloat16
# exp(-80) to exp(80) are representable in float32 and bfloat16. If the product of two powers underflows or overflows,
# the energy is 1 or 0, as it should be. Larger magnitudes are clamped; then a key and a query no longer cancel.
_MAX_MAGNITUDE = 40.0


def additive_keys(keys: Tensor) -> Tensor:
    """Return exp(-2 key), the form of the keys that `additive_scores` expects; computed once per image.

    Args:
        keys: (B, P, A) float32 or bfloat16; float16 would overflow.

    Returns:
        Tensor of the same shape and dtype, for use in `additive_scores` only: the gradient that `additive_scores`
        returns for it is that of the keys, and passes through this function unchanged.
    """
    return _AdditiveKeys.apply(keys)  # type: ignore[no-any-return]


def additive_scores(keys: Tensor, query: Tensor, double: Tensor) -> Tensor:
    """Return v . tanh(key_p + query) + sum(v) (Bahdanau et al. 2015, arXiv:1409.0473, appendix A.1.2).

    The softmax over the cells cancels the constant. The sum is 2 v . sigmoid(2 (key_p + query)), since
    tanh(x) = 2 sigmoid(2 x) - 1, and the sigmoid is 1 / (1 + exp(-2 key_p) exp(-2 query)). Given both powers, a value
    costs one multiplication and one division, a sixth of the time of tanh on a CPU.

    Args:
        keys: (B, P, A) float, from `additive_keys`.
        query: (B, K, A) in the same dtype.
        double: (A,) float, 2 v; the caller doubles it once for all time steps.

    Returns:
        (B, K, P) in the dtype of the keys.
    """
    if torch.is_grad_enabled():
        return _AdditiveScores.apply(keys, query, double)  # type: ignore[no-any-return]
    double = double.to(keys.dtype)
    # The energies are not needed for a backward pass: process chunks of images that fit into the CPU cache.
    chunk = len(keys) if keys.is_cuda else max(1, _CACHE_ELEMENTS // (query.shape[1] * keys.shape[1] * keys.shape[2]))
    chunks = zip(torch.split(keys, chunk), torch.split(_power(query), chunk), strict=True)
    return torch.cat([_energies(key_chunk, power_chunk) @ double for key_chunk, power_chunk in chunks])


def _power(values: Tensor) -> Tensor:
    """Return exp(-2 x), with x clamped so that products of two powers behave."""
    return values.clamp(-_MAX_MAGNITUDE, _MAX_MAGNITUDE).mul_(-2).exp_()


def _energies(keys: Tensor, powers: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-2 key_p) exp(-2 query)) = sigmoid(2 (key_p + query)), (B, K, P, A), from both powers."""
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
    """Fused gradient; autograd would sum over captions and cells in separate passes and keep two large tensors."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, double: Tensor) -> Tensor:
        energy, rounded = _energies(keys, _power(query)), double.to(keys.dtype)
        ctx.save_for_backward(energy, rounded)
        ctx.dtype = double.dtype  # autograd accumulates this gradient over time steps, so it is not rounded
        return energy @ rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, rounded = ctx.saved_tensors
        b, k, cells, size = energy.shape
        slope = torch.ops.aten.sigmoid_backward(gradient[..., None], energy)  # both factors in one pass
        inner = 2 * rounded  # the argument of the sigmoid is 2 (key + query)
        # A matmul with ones sums over the captions in a third of the time of `sum`.
        over_captions = energy.new_ones(b, 1, k) @ slope.view(b, k, cells * size)
        for_keys = over_captions.view(b, cells, size).mul_(inner)
        for_query = slope.sum(2).mul_(inner)
        for_double = gradient.reshape(-1) @ energy.view(-1, size)
        return for_keys, for_query, for_double.to(ctx.dtype)
