"""CUDA kernels of additive attention in Triton. They recompute the values in the backward pass instead of storing them.

For 256 images with 5 captions, the values of one time step would take 84 MB in bfloat16. All kernels compute in
float32, and the sums have a fixed order, so that results are reproducible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gridcap.train.decoders.layers.additive import MAX_MAGNITUDE

_SIZE_BLOCK = 32  # elements of the attention size per block
_CELL_BLOCK = 64  # grid cells per block


def scores(powers: Tensor, query: Tensor, score: Tensor) -> Tensor:
    """Return score . tanh(key_p + query), (B, K, P) float32, for `additive_scores`."""
    (b, cells, size), k = powers.shape, query.shape[1]
    out = torch.empty(b, k, cells, dtype=torch.float32, device=powers.device)
    grid = (b * k, triton.cdiv(cells, _CELL_BLOCK))
    _scores_kernel[grid](
        powers.contiguous(),
        query.contiguous(),
        score.contiguous(),
        out,
        *(k, cells, size, MAX_MAGNITUDE),
        cell_block=_CELL_BLOCK,
        size_block=_SIZE_BLOCK,
    )
    return out


def backward(gradient: Tensor, powers: Tensor, query: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the keys (B, P, A), the query (B, K, A), and the score vector (A,), in their dtypes."""
    (b, cells, size), k = powers.shape, query.shape[1]
    blocks = triton.cdiv(cells, _CELL_BLOCK)
    keys_gradient = torch.empty_like(powers, memory_format=torch.contiguous_format)
    query_parts = torch.empty(blocks, b, k, size, dtype=torch.float32, device=powers.device)
    score_parts = torch.empty(blocks, b, size, dtype=torch.float32, device=powers.device)
    grid = (b, blocks, triton.cdiv(size, _SIZE_BLOCK))
    _backward_kernel[grid](
        gradient.contiguous(),
        powers.contiguous(),
        query.contiguous(),
        score.contiguous(),
        *(keys_gradient, query_parts, score_parts),
        *(b, k, cells, size, MAX_MAGNITUDE),
        cell_block=_CELL_BLOCK,
        size_block=_SIZE_BLOCK,
    )
    return keys_gradient, query_parts.sum(0).to(query.dtype), score_parts.sum((0, 1)).to(score.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _scores_kernel(  # type: ignore[no-untyped-def]
    powers, query, score, out, k, cells, size, limit, cell_block: tl.constexpr, size_block: tl.constexpr
):
    """Compute cell_block scores of one caption."""
    caption = tl.program_id(0).to(tl.int64)
    image = caption // k
    cell = tl.program_id(1) * cell_block + tl.arange(0, cell_block)
    total = tl.zeros((cell_block,), tl.float32)
    for start in range(0, size, size_block):
        element = start + tl.arange(0, size_block)
        inside = element < size
        q = tl.load(query + caption * size + element, mask=inside, other=0.0).to(tl.float32)
        q = tl.exp(2 * tl.minimum(tl.maximum(q, -limit), limit))
        v = tl.load(score + element, mask=inside, other=0.0).to(tl.float32)
        key = (image * cells + cell[:, None]) * size + element[None, :]
        e = tl.load(powers + key, mask=(cell < cells)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(v[None, :] * (1 - 2 / (1 + e * q[None, :])), 1)
    tl.store(out + caption * cells + cell, total, mask=cell < cells)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient,
    powers,
    query,
    score,
    keys_gradient,
    query_parts,
    score_parts,
    images,
    k,
    cells,
    size,
    limit,
    cell_block: tl.constexpr,
    size_block: tl.constexpr,
):
    """Compute the gradients of cell_block x size_block keys of one image, and their share of the other gradients."""
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cell = block * cell_block + tl.arange(0, cell_block)
    element = tl.program_id(2) * size_block + tl.arange(0, size_block)
    inside = element < size
    tile = (image * cells + cell[:, None]) * size + element[None, :]
    mask = (cell < cells)[:, None] & inside[None, :]
    e = tl.load(powers + tile, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(score + element, mask=inside, other=0.0).to(tl.float32)
    over_captions = tl.zeros((cell_block, size_block), tl.float32)
    for_score = tl.zeros((size_block,), tl.float32)
    for caption in range(0, k):
        row = image * k + caption
        q = tl.load(query + row * size + element, mask=inside, other=0.0).to(tl.float32)
        q = tl.exp(2 * tl.minimum(tl.maximum(q, -limit), limit))
        g = tl.load(gradient + row * cells + cell, mask=cell < cells, other=0.0).to(tl.float32)
        value = 1 / (1 + e * q[None, :])
        slope = 4 * g[:, None] * value * (1 - value)
        over_captions += slope
        part = (block * images + image) * k + caption
        tl.store(query_parts + part * size + element, v * tl.sum(slope, 0), mask=inside)
        for_score += tl.sum(g[:, None] * (1 - 2 * value), 0)
    tl.store(keys_gradient + tile, (v[None, :] * over_captions).to(keys_gradient.dtype.element_ty), mask=mask)
    tl.store(score_parts + (block * images + image) * size + element, for_score, mask=inside)
