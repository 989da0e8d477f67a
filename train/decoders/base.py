"""The decoder contract. Search, training, the report and the page use only this, so a new decoder is one file.

Axes: B images, K hypotheses or captions of each image, P grid cells, C channels, T tokens, V vocabulary,
H hidden. An image's K hypotheses share its memory: the grid is projected once and never repeated.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]  # tensors (B, K, ...)
Memory = tuple[Tensor, ...]  # tensors (B, ...)


class Decoder(nn.Module, abc.ABC):
    """A caption decoder over a grid.

    Args:
        zero_features: replace the grid by zeros: the baseline that knows only the language.
    """

    has_attention: bool  # whether `step` returns attention

    def __init__(self, zero_features: bool) -> None:
        super().__init__()
        self._zero_features = zero_features

    def encode(self, grid: Tensor) -> Memory:
        """Project the grid, once an image.

        Args:
            grid: (B, P, C) float.
        """
        return self._project(torch.zeros_like(grid) if self._zero_features else grid)

    @abc.abstractmethod
    def _project(self, grid: Tensor) -> Memory:
        """As `encode`, of the grid that the decoder may see."""

    @abc.abstractmethod
    def initial_state(self, memory: Memory) -> State:
        """The state before the first token: tensors (B, 1, ...), one hypothesis an image."""

    @abc.abstractmethod
    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        """One token further.

        Args:
            tokens: (B, K) int64, the last token of each hypothesis.
            state: tensors (B, K, ...).
            memory: from `encode`.

        Returns:
            logits (B, K, V); the next state, whose tensors may have grown along an axis after K; attention
            (B, K, P) float32 that sums to 1 over the cells, or None for a decoder without attention.
        """

    @abc.abstractmethod
    def forward(self, memory: Memory, tokens: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing from `initial_state` on: the logits after each of the given tokens.

        Args:
            memory: from `encode`.
            tokens: (B, K, T) int64.
            at: (N,) int64, the places among the B * K * T after which logits are wanted. Captions have different
                lengths, so about half of all places are padding, and the vocabulary is the dearest part.

        Returns:
            logits (B, K, T, V), or (N, V) with `at`; and attention (B, K, T, P) or None; equal to those of T calls
            of `step` (up to rounding, and to dropout while training).
        """

    @staticmethod
    def _at(features: Tensor, at: Tensor | None) -> Tensor:
        """(B, K, T, ...) -> (N, ...): those of the wanted places."""
        return features if at is None else features.flatten(0, 2).index_select(0, at)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]
