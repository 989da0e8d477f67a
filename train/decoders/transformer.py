"""Transformer decoder over the projected grid.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), in the pre-norm variant of Xiong et al. 2020
(arXiv:2002.04745), which does not need a carefully tuned warmup. The grid of the frozen CNN takes the place of the
encoder output: it is normalized, projected, and given learned position embeddings.

Captions are padded at the end only, so the causal mask hides the padding from all tokens, and no padding mask is
needed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name in PyTorch code)
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from gridcap.common.config import DecoderConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.registry import register_decoder


class TransformerConfig(DecoderConfig):
    """Transformer decoder with cross-attention over the projected grid."""

    family: Literal["transformer"] = "transformer"
    layers: PositiveInt = Field(3, description="decoder layers")
    heads: PositiveInt = Field(8, description="attention heads; must divide embed_size")
    feedforward_size: PositiveInt = Field(1024, description="hidden size of the feedforward layers")

    @model_validator(mode="after")
    def _heads_divide_embed_size(self) -> TransformerConfig:
        if self.embed_size % self.heads:
            raise ValueError(f"embed_size {self.embed_size} is not a multiple of heads {self.heads}")
        return self


@register_decoder("transformer")
class TransformerDecoder(Decoder):
    """Pre-norm Transformer decoder.

    memory = keys and values of the grid for every layer, (B, heads, P, D / heads) each, where D is `embed_size`.
    state = keys and values of the previous tokens for every layer, (B, K, T, D) each, with T growing from 0. The
    returned attention is the cross-attention of the last layer, averaged over heads.

    Args:
        config: sizes.
        vocabulary_size: V.
        cells: P.
        channels: C.
    """

    config_class = TransformerConfig
    has_attention = True

    def __init__(self, config: TransformerConfig, vocabulary_size: int, cells: int, channels: int) -> None:
        super().__init__(config.zero_features)
        size = config.embed_size
        self._heads = config.heads
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, size)
        self.position = nn.Parameter(torch.randn(cells, size) * 0.02)
        self.memory_norm = nn.LayerNorm(size)
        self.memory = nn.Linear(size, config.layers * 2 * size, bias=False)
        self.embedding = nn.Embedding(vocabulary_size, size, padding_idx=PAD)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.output_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(size, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        cells = self.dropout(self.memory_norm(self.project(self.norm(grid)) + self.position))
        parts = self.memory(cells).chunk(2 * len(self.layers), -1)
        return tuple(_split_heads(part, self._heads) for part in parts)

    def initial_state(self, memory: Memory) -> State:
        empty = memory[0].new_zeros(len(memory[0]), 1, 0, self.embedding.embedding_dim)
        return (empty,) * len(memory)

    def _run(
        self, tokens: Tensor, state: State, memory: Memory, positions: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """Process (B, K, T) tokens after those in the state.

        Returns:
            Logits (B, K, T, V) or (N, V), the next state, and attention weights (B, K, T, P).
        """
        embedded = self.embedding(tokens)
        x = self.dropout(embedded + _sinusoids(state[0].shape[2], embedded))
        after: list[Tensor] = []
        attention = None
        for i, layer in enumerate(self.layers):
            part = slice(2 * i, 2 * i + 2)
            x, cache, attention = layer(x, state[part], memory[part], i == len(self.layers) - 1)
            after += cache
        assert attention is not None
        features = self.dropout(self.output_norm(self._gather_positions(x, positions)))
        return self.output(features), tuple(after), attention

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        logits, state, attention = self._run(tokens[..., None], state, memory)
        return logits[:, :, 0], state, attention[:, :, 0]

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1, -1) for part in self.initial_state(memory))
        logits, _, attention = self._run(tokens, state, memory, positions)
        return logits, attention


class _Layer(nn.Module):
    """Self-attention, cross-attention to the grid, and a feed-forward network, each with a residual connection.

    Queries, keys, and values have no bias: a key bias does not change the softmax, and a value bias is redundant with
    that of the output projection.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.embed_size
        self._heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn_norm = nn.LayerNorm(size)
        self.self_attn_qkv = nn.Linear(size, 3 * size, bias=False)
        self.self_attn_output = nn.Linear(size, size)
        self.cross_attn_norm = nn.LayerNorm(size)
        self.cross_attn_query = nn.Linear(size, size, bias=False)
        self.cross_attn_output = nn.Linear(size, size)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, config.feedforward_size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward_size, size),
        )

    def forward(
        self, x: Tensor, cache: State, memory: Memory, needs_attention: bool
    ) -> tuple[Tensor, State, Tensor | None]:
        """Apply one layer.

        Args:
            x: (B, K, T, D); T is 1 if the cache is not empty.
            cache: keys and values of the previous tokens, (B, K, t, D).
            memory: keys and values of the grid, (B, heads, P, D / heads).
            needs_attention: return the cross-attention weights, which rules out the fused kernel.

        Returns:
            (B, K, T, D), the cache extended by T tokens, and attention weights (B, K, T, P) float32 or None.
        """
        attended, cache = self._self_attention(self.self_attn_norm(x), cache)
        x = x + self.dropout(self.self_attn_output(attended))
        attended, attention = self._cross_attention(self.cross_attn_norm(x), memory, needs_attention)
        x = x + self.dropout(self.cross_attn_output(attended))
        return x + self.dropout(self.feedforward(x)), cache, attention

    def _self_attention(self, x: Tensor, cache: State) -> tuple[Tensor, State]:
        query, key, value = self.self_attn_qkv(x).chunk(3, -1)
        cache = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        queries, keys, values = (_split_heads(part.flatten(0, 1), self._heads) for part in (query, *cache))
        # A single token attends to the whole cache; with several tokens (`forward`) the cache was empty.
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=x.shape[2] > 1)
        return _join_heads(attended).reshape(x.shape), cache

    def _cross_attention(self, x: Tensor, memory: Memory, needs_attention: bool) -> tuple[Tensor, Tensor | None]:
        keys, values = memory
        # (B, heads, K * T, D / heads): all captions of an image share its keys and values.
        query = _split_heads(self.cross_attn_query(x).flatten(1, 2), self._heads)
        if not needs_attention:
            return _join_heads(F.scaled_dot_product_attention(query, keys, values)).reshape(x.shape), None
        scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])
        weights = scores.float().softmax(-1)
        attended = _join_heads(weights.to(values.dtype) @ values).reshape(x.shape)
        return attended, weights.mean(1).reshape(*x.shape[:3], -1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (N, L, D) to (N, heads, L, D / heads)."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    """Reshape (N, heads, L, D / heads) to (N, L, D)."""
    return x.transpose(1, 2).flatten(2)


def _sinusoids(start: int, embedded: Tensor) -> Tensor:
    """Return sinusoidal position embeddings (T, D) for embeddings (..., T, D) at positions `start`, `start` + 1, ...

    The sines are in the first half and the cosines in the second; interleaving them, as in the paper, is equivalent up
    to a permutation. For odd D, the last cosine is missing.
    """
    count, size = embedded.shape[-2:]
    half = (size + 1) // 2
    rates = torch.exp(torch.arange(half, device=embedded.device) * (-math.log(10000.0) / half))
    angles = torch.arange(start, start + count, device=embedded.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :size].to(embedded.dtype)
