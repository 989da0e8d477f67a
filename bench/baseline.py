"""Baseline decoders as in common tutorials: float32, one cell call per token, the grid projected in every time step.

They have the same sizes as the Gridcap decoders that they are compared with, and are for benchmarks only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BaselineAttention(nn.Module):
    """Additive attention and a recurrent cell, called once per token; the grid is repeated for every caption.

    Args:
        cell: "gru" or "lstm".
        embed, hidden, attention: sizes.
        vocabulary: V.
        channels: C of the grid.
    """

    def __init__(self, cell: str, embed: int, hidden: int, attention: int, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, embed)
        self.key, self.query = nn.Linear(embed, attention), nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1)
        self.embedding = nn.Embedding(vocabulary, embed)
        self.cell = (nn.GRUCell if cell == "gru" else nn.LSTMCell)(2 * embed, hidden)
        self.hidden, self.output = hidden, nn.Linear(hidden, vocabulary)

    def initial_state(self, grids: Tensor) -> tuple[Tensor, ...]:
        """Return a zero state for grids (N, P, C)."""
        zeros = grids.new_zeros(len(grids), self.hidden)
        return (zeros,) if isinstance(self.cell, nn.GRUCell) else (zeros, zeros)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...], grids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits (N, V) and the next state for tokens (N,)."""
        cells = torch.relu(self.project(grids))
        scores = self.score(torch.tanh(self.key(cells) + self.query(state[0])[:, None]))
        context = (scores.softmax(1) * cells).sum(1)
        inputs = torch.cat([self.embedding(tokens), context], -1)
        state = (self.cell(inputs, state[0]),) if isinstance(self.cell, nn.GRUCell) else self.cell(inputs, state)
        return self.output(state[0]), state


class BaselineLSTM(nn.Module):
    """An LSTM initialized from the mean of the grid cells, called once per token."""

    def __init__(self, embed: int, hidden: int, bottleneck: int, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.initial = nn.Sequential(nn.Linear(channels, bottleneck), nn.ELU(), nn.Linear(bottleneck, hidden), nn.ELU())
        self.embedding, self.cell = nn.Embedding(vocabulary, embed), nn.LSTMCell(embed, hidden)
        self.output = nn.Sequential(nn.Linear(hidden, bottleneck), nn.ELU(), nn.Linear(bottleneck, vocabulary))

    def initial_state(self, grids: Tensor) -> tuple[Tensor, ...]:
        """Return the initial state for grids (N, P, C)."""
        hidden = self.initial(grids.mean(1))
        return hidden, hidden

    def step(self, tokens: Tensor, state: tuple[Tensor, ...], grids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits (N, V) and the next state for tokens (N,)."""
        state = self.cell(self.embedding(tokens), state)
        return self.output(state[0]), state


def baseline_step(
    model: BaselineAttention | BaselineLSTM, optimizer: torch.optim.Optimizer, grids: Tensor, tokens: Tensor
) -> None:
    """Train on one batch of grids (B, P, C) and captions (B, K, T); every caption is a row of its own."""
    b, k, length = tokens.shape
    repeated, rows = grids.repeat_interleave(k, 0), tokens.reshape(b * k, length)
    state, loss = model.initial_state(repeated), torch.zeros(())
    for t in range(length - 1):
        logits, state = model.step(rows[:, t], state, repeated)
        loss = loss + nn.functional.cross_entropy(logits, rows[:, t + 1])
    optimizer.zero_grad()
    torch.autograd.backward(loss / (length - 1))
    optimizer.step()
