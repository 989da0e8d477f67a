"""Captioners as tutorials write them: float32, word by word, the grid projected anew at every word.

They stand beside ours in the benchmarks, with the same sizes; nobody should use them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NaiveAttention(nn.Module):
    """Bahdanau attention and a recurrent cell, called once a word on one caption a row, the grid repeated for each.

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

    def start(self, grids: Tensor) -> tuple[Tensor, ...]:
        """(N, P, C) -> the first state."""
        zeros = grids.new_zeros(len(grids), self.hidden)
        return (zeros,) if isinstance(self.cell, nn.GRUCell) else (zeros, zeros)

    def word(self, tokens: Tensor, state: tuple[Tensor, ...], grids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N,) tokens -> (N, V) logits and the next state."""
        cells = torch.relu(self.project(grids))
        scores = self.score(torch.tanh(self.key(cells) + self.query(state[0])[:, None]))
        context = (scores.softmax(1) * cells).sum(1)
        seen = torch.cat([self.embedding(tokens), context], -1)
        state = (self.cell(seen, state[0]),) if isinstance(self.cell, nn.GRUCell) else self.cell(seen, state)
        return self.output(state[0]), state


class NaiveInit(nn.Module):
    """An LSTM whose first state comes from the mean cell, called once a word."""

    def __init__(self, embed: int, hidden: int, bottleneck: int, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(channels, bottleneck), nn.ELU(), nn.Linear(bottleneck, hidden), nn.ELU())
        self.embedding, self.cell = nn.Embedding(vocabulary, embed), nn.LSTMCell(embed, hidden)
        self.output = nn.Sequential(nn.Linear(hidden, bottleneck), nn.ELU(), nn.Linear(bottleneck, vocabulary))

    def start(self, grids: Tensor) -> tuple[Tensor, ...]:
        """(N, P, C) -> the first state."""
        first = self.first(grids.mean(1))
        return first, first

    def word(self, tokens: Tensor, state: tuple[Tensor, ...], grids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N,) tokens -> (N, V) logits and the next state."""
        state = self.cell(self.embedding(tokens), state)
        return self.output(state[0]), state


def naive_step(
    model: NaiveAttention | NaiveInit, optimizer: torch.optim.Optimizer, grids: Tensor, tokens: Tensor
) -> None:
    """One step of training: (B, P, C) grids and (B, K, T) captions, every caption a row of its own."""
    b, k, length = tokens.shape
    repeated, rows = grids.repeat_interleave(k, 0), tokens.reshape(b * k, length)
    state, loss = model.start(repeated), torch.zeros(())
    for t in range(length - 1):
        logits, state = model.word(rows[:, t], state, repeated)
        loss = loss + nn.functional.cross_entropy(logits, rows[:, t + 1])
    optimizer.zero_grad()
    torch.autograd.backward(loss / (length - 1))
    optimizer.step()
