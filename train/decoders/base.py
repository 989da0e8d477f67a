"""The decoder contract.

Decoding, training, the report, and the web page use only this contract, so a new decoder is one new module.

Axes: B images, K captions (or hypotheses) per image, P grid cells, C channels, T time steps, V vocabulary size,
H hidden size. The K hypotheses of an image share its memory: the grid is projected once and never repeated.
"""

from __future__ import annotations

import abc
import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gridcap.common.config import DecoderConfig

State = tuple[Tensor, ...]  # tensors (B, K, ...)
Memory = tuple[Tensor, ...]  # tensors (B, ...)


class Decoder(nn.Module, abc.ABC):
    """Caption decoder over a feature grid.

    A registered decoder (`registry.py`) has the constructor arguments config, an instance of `config_class`;
    vocabulary_size, V; cells, P; and channels, C.

    Args:
        zero_features: replace the grid with zeros, for a language-only baseline.
    """

    config_class: ClassVar[type[DecoderConfig]]  # of a registered decoder
    has_attention: bool  # whether `step` returns attention weights

    def __init__(self, zero_features: bool) -> None:
        super().__init__()
        self._zero_features = zero_features

    def encode(self, grid: Tensor) -> Memory:
        """Project the grid, once per image.

        Args:
            grid: (B, P, C) float.
        """
        return self._project(torch.zeros_like(grid) if self._zero_features else grid)

    @abc.abstractmethod
    def _project(self, grid: Tensor) -> Memory:
        """Implement `encode`; with `zero_features`, the grid is all zeros."""

    @abc.abstractmethod
    def initial_state(self, memory: Memory) -> State:
        """Return the state before the first token: tensors (B, 1, ...), one hypothesis per image."""

    @abc.abstractmethod
    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        """Advance every hypothesis by one token.

        Args:
            tokens: (B, K) int64, the last token of each hypothesis.
            state: tensors (B, K, ...).
            memory: result of `encode`.

        Returns:
            Logits (B, K, V); the next state, whose tensors may have grown along an axis after K; and attention
            weights (B, K, P) float32 that sum to 1 over the cells, or None for a decoder without attention.
        """

    @abc.abstractmethod
    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits after each of the given tokens (teacher forcing), starting from `initial_state`.

        The result equals T calls of `step`, up to rounding and, in training mode, dropout.

        Args:
            memory: result of `encode`.
            tokens: (B, K, T) int64.
            positions: (N,) int64 flat indices into B * K * T of the tokens whose logits are computed (default: all).
                About half of all positions are padding, and the output projection dominates the cost.

        Returns:
            Logits (B, K, T, V), or (N, V) with `positions`; and attention weights (B, K, T, P) or None.
        """

    @staticmethod
    def _gather_positions(features: Tensor, positions: Tensor | None) -> Tensor:
        """Select (N, ...) flat positions of (B, K, T, ...) features; None returns the features unchanged."""
        return features if positions is None else features.flatten(0, 2).index_select(0, positions)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """Return the dtype that a layer computes in: the autocast dtype if autocast is enabled, or else the weight's."""
    kind = layer.weight.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else layer.weight.dtype


def disable_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which operators compute in the dtypes of their inputs."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
