"""Att2in2 as it is known, to compare with: what the field's repository of self-critical training has.

Luo 2020, "A Better Variant of Self-Critical Sequence Training" (arXiv:2003.09971), names that code. Trained with
`recipes/att2in.yaml`, whose settings are the known ones, it differs from our `att2in` in what we add: the grid is not
normalized, cells have no position, the first state is zero, words pass a ReLU, and UNK is written where it is likely.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gridcap.train.decoders.build
import gridcap.train.decoding.base
from gridcap.common.config import AttentionConfig
from gridcap.train.data.vocabulary import BOS, PAD
from gridcap.train.decoders.attention import AttentionDecoder
from gridcap.train.decoders.base import Memory, State


class Att2in2(AttentionDecoder):
    """Arguments, memory and state as those of `AttentionDecoder`."""

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


def stand_in() -> None:
    """Have every attention decoder that this process builds from now on be this one."""
    gridcap.train.decoders.build.AttentionDecoder = Att2in2  # type: ignore[attr-defined]
    gridcap.train.decoding.base.FORBIDDEN_TOKENS = (PAD, BOS)  # type: ignore[assignment]
