"""Additive attention scores (Bahdanau et al. 2015, arXiv:1409.0473, appendix A.1.2) as one fused operator.

They are the most expensive operation of a training step that is not a matmul: B x K x P x A values per time step.
`additive_scores_reference` is the formula. The operator computes it from exp(2 key) and exp(2 query), since
tanh(x) = 1 - 2 / (1 + exp(2 x)): given both powers, a value costs one multiplication and one division, a sixth of the
time of tanh on a CPU. The kernel for CPUs is below, that for CUDA in `additive_triton.py`.

Axes as in `base.py`, and A: attention size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# exp(-80) to exp(80) are representable in float32 and bfloat16. If the product of two powers underflows or overflows,
# tanh is 1 or -1, as it should be. Larger magnitudes are clamped; then a key and a query no longer cancel.
MAX_MAGNITUDE = 40.0


def additive_scores_reference(keys: Tensor, query: Tensor, score: Tensor) -> Tensor:
    """Return score . tanh(key_p + query), (B, K, P), for keys (B, P, A), queries (B, K, A), and a score vector (A,)."""
    return torch.tanh(keys[:, None] + query[:, :, None]) @ score.to(keys.dtype)


def additive_powers(keys: Tensor) -> Tensor:
    """Return exp(2 key), (B, P, A), without gradient: computed once per image, for `additive_scores`."""
    return _power(keys.detach())


def additive_scores(keys: Tensor, powers: Tensor, query: Tensor, score: Tensor) -> Tensor:
    """Return score . tanh(key_p + query).

    Args:
        keys: (B, P, A) float64, float32, or bfloat16; float16 would overflow.
        powers: (B, P, A), `additive_powers(keys)`.
        query: (B, K, A) in the dtype of the keys.
        score: (A,) float. Autograd adds up its gradient over the time steps, so it is neither cast nor rounded.

    Returns:
        (B, K, P), float32 or float64.
    """
    if keys.device.type in ("cpu", "cuda"):
        return _AdditiveScores.apply(keys, powers, query, score)  # type: ignore[no-any-return]
    return additive_scores_reference(keys, query, score).float()


def _power(values: Tensor) -> Tensor:
    return values.clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE).mul_(2).exp_()


class _AdditiveScores(torch.autograd.Function):
    """Fused forward and backward pass; autograd would keep two large tensors and sum them in separate passes."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, powers: Tensor, query: Tensor, score: Tensor) -> Tensor:
        if keys.device.type == "cuda":
            from gridcap.train.decoders.layers import additive_triton  # Triton is not installed everywhere

            ctx.save_for_backward(powers, query, score)
            return additive_triton.scores(powers, query, score)
        values = torch.addcmul(powers.new_ones(()), powers[:, None], _power(query)[:, :, None]).reciprocal_()
        ctx.save_for_backward(values, score)
        weighted = values @ (-2 * score).to(values.dtype)
        return weighted.to(torch.promote_types(keys.dtype, torch.float32)) + score.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        if gradient.device.type == "cuda":
            from gridcap.train.decoders.layers import additive_triton

            keys, query, score = additive_triton.backward(gradient, *ctx.saved_tensors)
        else:
            keys, query, score = _backward(gradient, *ctx.saved_tensors)
        return keys, None, query, score


def _backward(gradient: Tensor, values: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the keys, the query, and the score vector.

    Args:
        gradient: (B, K, P), gradient of the scores.
        values: (B, K, P, A), 1 / (1 + exp(2 (key_p + query))).
        score: (A,).
    """
    b, k, cells, size = values.shape
    gradient = gradient.to(values.dtype)
    slope = torch.ops.aten.sigmoid_backward(gradient[..., None], values)  # g e (1 - e), in one pass
    inner = 4 * score.to(values.dtype)  # tanh' = 4 e (1 - e)
    # The matmul is a fast sum over the captions of an image.
    over_captions = (slope.new_ones(b, 1, k) @ slope.view(b, k, cells * size)).view(b, cells, size)
    score_gradient = gradient.sum(dtype=score.dtype) - 2 * (gradient.reshape(-1) @ values.view(-1, size)).to(
        score.dtype
    )
    return over_captions.mul_(inner), slope.sum(2).mul_(inner), score_gradient
