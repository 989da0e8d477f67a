"""The Att2in2 decoder of the widely used self-critical training code, for comparison.

The code is the one cited by Luo 2020, "A Better Variant of Self-Critical Sequence Training" (arXiv:2003.09971). Unlike
Gridcap's `att2in`, its grid is not normalized, cells have no positional embedding, the initial state is zero, and token
embeddings pass a ReLU. It is trained with `recipes/att2in.yaml`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gridcap.train.decoders.build
from gridcap.common.config import AttentionConfig
from gridcap.train.decoders.attention import AttentionDecoder
from gridcap.train.decoders.base import Memory, State


class Att2in2(AttentionDecoder):
    """Reference Att2in2 decoder; same arguments, memory, and state as `AttentionDecoder`."""

    def __init__(self, config: AttentionConfig, vocabulary_size: int, cells: int, channels: int) -> None:
        super().__init__(config, vocabulary_size, cells, channels)
        self.embedding = nn.Sequential(self.embedding, nn.ReLU())  # type: ignore[assignment]
        self._hidden_size = config.hidden_size
        del self.norm, self.position, self.initial

    def _cells(self, grid: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.project(grid)))  # type: ignore[no-any-return]

    def initial_state(self, memory: Memory) -> State:
        start = torch.zeros(len(memory[0]), 1, self._hidden_size, device=memory[0].device)
        return (start,) * self.cell.states


def patch_attention_decoder() -> None:
    """Make `build_decoder` return `Att2in2` for the attention family in this process."""
    gridcap.train.decoders.build.AttentionDecoder = Att2in2  # type: ignore[attr-defined]
