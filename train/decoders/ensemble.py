"""Ensemble of decoders: the mean of their probabilities (Vinyals et al. 2015, arXiv:1411.4555, section 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gridcap.train.decoders.base import Decoder, Memory, State


class Ensemble(Decoder):
    """Decoder that averages the token probabilities of its members at every step.

    Memory and state are the concatenated tuples of the members. The logits are float32 log-probabilities, and the
    attention is the mean over the members that have attention.

    Args:
        decoders: decoders of any family, with the same vocabulary and grid shape.

    Raises:
        ValueError: `decoders` is empty.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__(zero_features=False)  # members with zero_features zero the grid themselves
        if not decoders:
            raise ValueError("an ensemble needs at least one decoder")
        self.members = nn.ModuleList(decoders)
        self.has_attention = any(decoder.has_attention for decoder in decoders)
        # Number of tensors in each member's memory and state; constant, but unknown before the first call.
        self._memory_lengths: list[int] = []
        self._state_lengths: list[int] = []

    def _decoders(self) -> Iterator[Decoder]:
        for member in self.members:
            assert isinstance(member, Decoder)
            yield member

    def _project(self, grid: Tensor) -> Memory:
        parts = [member.encode(grid) for member in self._decoders()]
        self._memory_lengths = [len(part) for part in parts]
        return _concatenate(parts)

    def initial_state(self, memory: Memory) -> State:
        memories = _split(memory, self._memory_lengths)
        parts = [member.initial_state(own) for member, own in zip(self._decoders(), memories, strict=True)]
        self._state_lengths = [len(part) for part in parts]
        return _concatenate(parts)

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        memories, states = _split(memory, self._memory_lengths), _split(state, self._state_lengths)
        logits, after, attentions = zip(
            *(
                member.step(tokens, own_state, own_memory)
                for member, own_state, own_memory in zip(self._decoders(), states, memories, strict=True)
            ),
            strict=True,
        )
        return _mean_probability(logits), _concatenate(after), _mean_attention(attentions)

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        memories = _split(memory, self._memory_lengths)
        logits, attentions = zip(
            *(member(own, tokens, positions) for member, own in zip(self._decoders(), memories, strict=True)),
            strict=True,
        )
        return _mean_probability(logits), _mean_attention(attentions)


def _concatenate(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(tensor for part in parts for tensor in part)


def _split(tensors: tuple[Tensor, ...], lengths: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Undo `_concatenate`."""
    remaining = iter(tensors)
    return [tuple(next(remaining) for _ in range(length)) for length in lengths]


def _mean_probability(logits: Sequence[Tensor]) -> Tensor:
    total = functools.reduce(torch.logaddexp, (part.float().log_softmax(-1) for part in logits))
    return total - math.log(len(logits))


def _mean_attention(attentions: Sequence[Tensor | None]) -> Tensor | None:
    available = [attention for attention in attentions if attention is not None]
    return torch.stack(available).mean(0) if available else None
