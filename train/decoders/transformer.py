"""Transformer decoder over the projected grid.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), with the normalisation before each sublayer
instead of after it (Xiong et al. 2020, arXiv:2002.04745), which trains without a delicate warm-up. The frozen CNN
stands where the encoder was: its grid is normalized, projected, and given learned positions.

Captions are padded at the end only, so the causal mask keeps padding out of every word's sight and no other mask
is needed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn

from gridcap.common.config import TransformerConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.dropout import Dropout


class TransformerDecoder(Decoder):
    """memory = keys and values of the grid for layer after layer, (B, heads, P, D / heads) each.

    state = keys and values of the words so far for layer after layer, (B, K, t, D) each, t growing from 0. The
    attention that is given out is the last layer's look at the grid, the mean of its heads.

    Args:
        config: sizes; D is `embed_size`.
        vocabulary_size: V.
        cells: P.
        channels: C.
    """

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
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(size, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        cells = self.dropout(self.memory_norm(self.project(self.norm(grid)) + self.position))
        parts = self.memory(cells).chunk(2 * len(self.layers), -1)
        return tuple(_split_heads(part, self._heads) for part in parts)

    def initial_state(self, memory: Memory) -> State:
        empty = memory[0].new_zeros(len(memory[0]), 1, 0, self.embedding.embedding_dim)
        return (empty,) * len(memory)

    def _run(
        self, tokens: Tensor, state: State, memory: Memory, at: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """(B, K, T) tokens after the t of the state -> logits (B, K, T, V) or (N, V), state, attention (B, K, T, P)."""
        words = self.embedding(tokens)
        x = self.dropout(words + _sinusoids(state[0].shape[2], words))
        after: list[Tensor] = []
        attention = None
        for i, layer in enumerate(self.layers):
            part = slice(2 * i, 2 * i + 2)
            x, cache, attention = layer(x, state[part], memory[part], i == len(self.layers) - 1)
            after += cache
        assert attention is not None
        return self.output(self.dropout(self.output_norm(self._at(x, at)))), tuple(after), attention

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        logits, state, attention = self._run(tokens[..., None], state, memory)
        return logits[:, :, 0], state, attention[:, :, 0]

    def forward(self, memory: Memory, tokens: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1, -1) for part in self.initial_state(memory))
        logits, _, attention = self._run(tokens, state, memory, at)
        return logits, attention


class _Layer(nn.Module):
    """Words look at the words before, then at the grid, then a map of each word by itself; all added to the input.

    Queries, keys and values have no bias: a key's would change no softmax, and a value's is the output map's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.embed_size
        self._heads = config.heads
        self.dropout = Dropout(config.dropout)
        self.words_norm = nn.LayerNorm(size)
        self.words = nn.Linear(size, 3 * size, bias=False)
        self.words_output = nn.Linear(size, size)
        self.grid_norm = nn.LayerNorm(size)
        self.grid = nn.Linear(size, size, bias=False)
        self.grid_output = nn.Linear(size, size)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, config.feedforward_size),
            nn.ReLU(),
            Dropout(config.dropout),
            nn.Linear(config.feedforward_size, size),
        )

    def forward(
        self, x: Tensor, cache: State, memory: Memory, wants_attention: bool
    ) -> tuple[Tensor, State, Tensor | None]:
        """One layer.

        Args:
            x: (B, K, T, D); with words in the cache T is 1.
            cache: keys and values of the words before, (B, K, t, D).
            memory: keys and values of the grid, (B, heads, P, D / heads).
            wants_attention: also give the look at the grid, which keeps the fast kernel from being used.

        Returns:
            (B, K, T, D), the cache with the T words, and attention (B, K, T, P) float32 or None.
        """
        seen, cache = self._look_at_words(self.words_norm(x), cache)
        x = x + self.dropout(self.words_output(seen))
        seen, attention = self._look_at_grid(self.grid_norm(x), memory, wants_attention)
        x = x + self.dropout(self.grid_output(seen))
        return x + self.dropout(self.feedforward(x)), cache, attention

    def _look_at_words(self, x: Tensor, cache: State) -> tuple[Tensor, State]:
        query, key, value = self.words(x).chunk(3, -1)
        cache = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        queries, keys, values = (_split_heads(part.flatten(0, 1), self._heads) for part in (query, *cache))
        # A lone word sees all of the cache; several words come only with an empty one (`forward`).
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=x.shape[2] > 1)
        return _join_heads(seen).reshape(x.shape), cache

    def _look_at_grid(self, x: Tensor, memory: Memory, wants_attention: bool) -> tuple[Tensor, Tensor | None]:
        keys, values = memory
        query = _split_heads(self.grid(x).flatten(1, 2), self._heads)  # (B, heads, K T, d): the grid is not repeated
        if not wants_attention:
            return _join_heads(F.scaled_dot_product_attention(query, keys, values)).reshape(x.shape), None
        scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])
        weights = scores.float().softmax(-1)
        seen = _join_heads(weights.to(values.dtype) @ values).reshape(x.shape)
        return seen, weights.mean(1).reshape(*x.shape[:3], -1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, D) -> (N, heads, L, D / heads)."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    """(N, heads, L, D / heads) -> (N, L, D)."""
    return x.transpose(1, 2).flatten(2)


def _sinusoids(start: int, words: Tensor) -> Tensor:
    """Vaswani's positions for words (..., T, D) that `start` others stand before: (T, D).

    Sines stand in the first half and cosines in the second, not in turn: no linear map minds the order. An odd D
    lacks the last cosine.
    """
    count, size = words.shape[-2:]
    half = (size + 1) // 2
    rates = torch.exp(torch.arange(half, device=words.device) * (-math.log(10000.0) / half))
    angles = torch.arange(start, start + count, device=words.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :size].to(words.dtype)
