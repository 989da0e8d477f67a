"""Recurrent cells of the attention decoder.

The pre-activations of a cell are sums of projections of the token, the state, the context vector, and the image. The
token projections of all T steps are computed in one matmul before the loop (`project_tokens`), the image projection
once per image (`project_image`). The loop contains one matmul with the state, which also produces the attention query,
and one with the context vector. Each sum has one bias, in the term where it is cheapest, so some layers have none.

Axes as in `base.py`, and: E embedding size, D size of a grid cell, A attention size, G size of the pre-activations.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gridcap.train.decoders.base import Memory, State
from gridcap.train.decoders.layers.additive import additive_scores

AttentionCell = Literal["gru", "lstm", "att2in", "top-down"]


@dataclass(frozen=True)
class CellSizes:
    """Sizes of a cell.

    Attributes:
        embed: E.
        hidden: H.
        attention: A.
        width: D.
        context_gate: multiply the context vector by a gate computed from the state.
    """

    embed: int
    hidden: int
    attention: int
    width: int
    context_gate: bool = False


class CellOutput(NamedTuple):
    """Result of one step of a cell.

    Attributes:
        state: next state, tensors (B, K, H).
        hidden: (B, K, H), the tensor of the state that the logits are computed from.
        context: (B, K, D) context vectors.
        weights: (B, K, P) float32 attention weights.
    """

    state: State
    hidden: Tensor
    context: Tensor
    weights: Tensor


class AttentionInputs(NamedTuple):
    """Inputs of the attention that are the same at every step.

    Attributes:
        cells: (B, P, D) values, of which the context vector is a weighted mean.
        keys: (B, P, A).
        powers: (B, P, A), from `additive_powers`.
    """

    cells: Tensor
    keys: Tensor
    powers: Tensor


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015, arXiv:1409.0473): score_p = v . tanh(key_p + query).

    Args:
        hidden: H.
        size: A.
        gated: multiply the context vector by the scalar beta = sigmoid(f(h)) (Xu et al. 2015, arXiv:1502.03044,
            section 4.2.1).
    """

    def __init__(self, hidden: int, size: int, gated: bool) -> None:
        super().__init__()
        self.score = nn.Linear(size, 1, bias=False)
        self.gate = nn.Linear(hidden, 1) if gated else None

    def forward(self, query: Tensor, hidden: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Attend to the grid.

        Args:
            query: (B, K, A).
            hidden: (B, K, H), the hidden state that the query was computed from.
            inputs: cells and keys.

        Returns:
            Context vectors (B, K, D) and attention weights (B, K, P) float32.
        """
        weights = additive_scores(inputs.keys, inputs.powers, query, self.score.weight[0]).softmax(-1)
        context = weights.to(inputs.cells.dtype) @ inputs.cells
        if self.gate is not None:
            context = context * torch.sigmoid(self.gate(hidden))
        return context, weights


class Cell(nn.Module, abc.ABC):
    """A recurrent cell that attends to the grid at every step.

    Args:
        sizes: sizes.
        token_gates: G / H, number of pre-activations of size H that receive the token.
    """

    states: int  # number of (B, K, H) tensors in the state

    def __init__(self, sizes: CellSizes, token_gates: int) -> None:
        super().__init__()
        self.from_token = nn.Linear(sizes.embed, token_gates * sizes.hidden)
        self.attention = Attention(sizes.hidden, sizes.attention, sizes.context_gate)

    def project_image(self, mean: Tensor) -> Memory:
        """Return the cell-specific projection of the mean feature (B, D), as tensors for the memory."""
        return ()

    def project_tokens(self, embedded: Tensor, image: Memory) -> Tensor:
        """Return the token terms of the pre-activations, for any number of time steps.

        Args:
            embedded: (B, K, T, E) token embeddings.
            image: result of `project_image`.

        Returns:
            (B, K, T, G).
        """
        return self.from_token(embedded)  # type: ignore[no-any-return]

    @abc.abstractmethod
    def forward(self, token: Tensor, state: State, inputs: AttentionInputs) -> CellOutput:
        """Advance by one step.

        Args:
            token: (B, K, G), one step of `project_tokens`.
            state: tensors (B, K, H).
            inputs: inputs of the attention.
        """


class AttendThenUpdate(Cell):
    """A cell that attends with its previous hidden state, then updates the state.

    Args:
        sizes: sizes.
        gates: number of pre-activations of size H that receive the token and the state.
        context_gates: number of those that receive the context vector.
    """

    def __init__(self, sizes: CellSizes, gates: int, context_gates: int) -> None:
        super().__init__(sizes, gates)
        hidden = sizes.hidden
        self._split = (sizes.attention, gates * hidden)
        self.from_hidden = nn.Linear(hidden, sum(self._split))
        self.from_context = nn.Linear(sizes.width, context_gates * hidden, bias=False)

    def forward(self, token: Tensor, state: State, inputs: AttentionInputs) -> CellOutput:
        query, hidden = self.from_hidden(state[0]).split(self._split, -1)
        context, weights = self.attention(query, state[0], inputs)
        after = self._update(token, hidden, self.from_context(context), state)
        return CellOutput(after, after[0], context, weights)

    @abc.abstractmethod
    def _update(self, token: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        """Return the next state from the pre-activation terms of the token, the hidden state, and the context."""


class GruCell(AttendThenUpdate):
    """GRU over the token and the context vector: TensorFlow's "Image captioning with visual attention" tutorial."""

    states = 1

    def __init__(self, sizes: CellSizes) -> None:
        super().__init__(sizes, 3, 3)

    def _update(self, token: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        size = state[0].shape[-1]
        input_gates, input_candidate = (token + context).split_with_sizes((2 * size, size), -1)
        hidden_gates, hidden_candidate = hidden.split_with_sizes((2 * size, size), -1)
        reset, update = torch.sigmoid(input_gates + hidden_gates).chunk(2, -1)
        candidate = torch.tanh(input_candidate + reset * hidden_candidate)
        return (torch.lerp(candidate.to(state[0].dtype), state[0], update.to(state[0].dtype)),)


class LstmCell(AttendThenUpdate):
    """LSTM over the token and the context vector: Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044)."""

    states = 2

    def __init__(self, sizes: CellSizes) -> None:
        super().__init__(sizes, 4, 4)

    def _update(self, token: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        return _lstm(token + hidden + context, state[1])


class Att2inCell(AttendThenUpdate):
    """LSTM whose context vector enters only the candidate: Rennie et al. 2017 (arXiv:1612.00563).

    The candidate is a maxout of two, without a tanh, as in the code released with the paper.
    """

    states = 2

    def __init__(self, sizes: CellSizes) -> None:
        super().__init__(sizes, 5, 2)

    def _update(self, token: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        size = state[1].shape[-1]
        gates, candidates = (token + hidden).to(state[1].dtype).split_with_sizes((3 * size, 2 * size), -1)
        into, forget, out = torch.sigmoid(gates).chunk(3, -1)
        first, second = (candidates + context).chunk(2, -1)
        candidate = torch.relu(first - second) + second  # the maximum; torch.maximum has a slower backward pass
        cell = forget * state[1] + into * candidate
        return out * torch.tanh(cell), cell


class TopDownCell(Cell):
    """Attention LSTM and language LSTM: Anderson et al. 2018, "Bottom-Up and Top-Down Attention" (arXiv:1707.07998).

    The attention LSTM reads the language LSTM's hidden state, the mean feature, and the token, and produces the query.
    The language LSTM reads the context vector and the attention LSTM's new hidden state; the logits are computed from
    it. state = (h2, h1, c2, c1), where 1 is the attention LSTM and 2 the language LSTM.
    """

    states = 4

    def __init__(self, sizes: CellSizes) -> None:
        super().__init__(sizes, 4)
        hidden = sizes.hidden
        self._split = (sizes.attention, 4 * hidden)
        self.from_mean = nn.Linear(sizes.width, 4 * hidden, bias=False)
        self.from_first = nn.Linear(hidden, 4 * hidden, bias=False)  # previous h1 -> LSTM 1
        self.from_second = nn.Linear(hidden, 8 * hidden, bias=False)  # previous h2 -> LSTM 1 and LSTM 2
        self.from_hidden = nn.Linear(hidden, sum(self._split))  # new h1 -> query and LSTM 2
        self.from_context = nn.Linear(sizes.width, 4 * hidden, bias=False)

    def project_image(self, mean: Tensor) -> Memory:
        return (self.from_mean(mean),)

    def project_tokens(self, embedded: Tensor, image: Memory) -> Tensor:
        return super().project_tokens(embedded, image) + image[0][:, None, None]

    def forward(self, token: Tensor, state: State, inputs: AttentionInputs) -> CellOutput:
        h2, h1, c2, c1 = state
        to_first, to_second = self.from_second(h2).chunk(2, -1)
        h1, c1 = _lstm(token + to_first + self.from_first(h1), c1)
        query, hidden = self.from_hidden(h1).split(self._split, -1)
        context, weights = self.attention(query, h1, inputs)
        h2, c2 = _lstm(hidden + to_second + self.from_context(context), c2)
        return CellOutput((h2, h1, c2, c1), h2, context, weights)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the pointwise part of an LSTM and return the new hidden and cell state.

    Args:
        gates: (B, K, 4 H) pre-activations, ordered input, forget, output, candidate, so that one sigmoid covers three.
        cell: (B, K, H) cell state.
    """
    size = cell.shape[-1]
    # split_with_sizes: each slice would cost two extra passes in the backward pass.
    gates, candidate = gates.split_with_sizes((3 * size, size), -1)
    into, forget, out = torch.sigmoid(gates).chunk(3, -1)
    cell = forget * cell + into * torch.tanh(candidate)
    return out * torch.tanh(cell), cell


CELLS: dict[str, type[GruCell] | type[LstmCell] | type[Att2inCell] | type[TopDownCell]] = {
    "gru": GruCell,
    "lstm": LstmCell,
    "att2in": Att2inCell,
    "top-down": TopDownCell,
}
