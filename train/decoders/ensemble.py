"""Several decoders as one, by the mean of their probabilities (Vinyals et al. 2015, arXiv:1411.4555, section 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gridcap.train.decoders.base import Decoder, Memory, State


class Ensemble(Decoder):
    """A decoder whose probabilities are the mean of its members', word by word.

    Memory and state are the members' tuples one after the other. The logits are float32 logarithms of
    probabilities, and the attention is the mean over the members that have one.

    Args:
        decoders: of any families, for one vocabulary and grids of one shape.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__(zero_features=False)  # a blind member covers the grid for itself
        if not decoders:
            raise ValueError("an ensemble needs at least one decoder")
        self.members = nn.ModuleList(decoders)
        self.has_attention = any(decoder.has_attention for decoder in decoders)
        # Tensors in each member's memory and state: always the same, but known only once they were made.
        self._memory_lengths: list[int] = []
        self._state_lengths: list[int] = []

    def _decoders(self) -> Iterator[Decoder]:
        for member in self.members:
            assert isinstance(member, Decoder)
            yield member

    def _project(self, grid: Tensor) -> Memory:
        parts = [member.encode(grid) for member in self._decoders()]
        self._memory_lengths = [len(part) for part in parts]
        return _joined(parts)

    def initial_state(self, memory: Memory) -> State:
        memories = _divided(memory, self._memory_lengths)
        parts = [member.initial_state(own) for member, own in zip(self._decoders(), memories, strict=True)]
        self._state_lengths = [len(part) for part in parts]
        return _joined(parts)

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        memories, states = _divided(memory, self._memory_lengths), _divided(state, self._state_lengths)
        logits, after, attentions = zip(
            *(
                member.step(tokens, own_state, own_memory)
                for member, own_state, own_memory in zip(self._decoders(), states, memories, strict=True)
            ),
            strict=True,
        )
        return _mean_probability(logits), _joined(after), _mean_attention(attentions)

    def forward(self, memory: Memory, tokens: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        memories = _divided(memory, self._memory_lengths)
        logits, attentions = zip(
            *(member(own, tokens, at) for member, own in zip(self._decoders(), memories, strict=True)), strict=True
        )
        return _mean_probability(logits), _mean_attention(attentions)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(tensor for part in parts for tensor in part)


def _divided(joined: tuple[Tensor, ...], lengths: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The parts that `_joined` put together."""
    tensors = iter(joined)
    return [tuple(next(tensors) for _ in range(length)) for length in lengths]


def _mean_probability(logits: Sequence[Tensor]) -> Tensor:
    total = functools.reduce(torch.logaddexp, (part.float().log_softmax(-1) for part in logits))
    return total - math.log(len(logits))


def _mean_attention(attentions: Sequence[Tensor | None]) -> Tensor | None:
    there = [attention for attention in attentions if attention is not None]
    return torch.stack(there).mean(0) if there else None
