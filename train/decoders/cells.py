"""The recurrent parts of the attention decoder: what is done with a word, the state and a look at the grid.

A cell works on parts of sums. What the words add is made for all T words in one product before the loop
(`word_part`), what the image as a whole adds once an image (`image_part`); in the loop there is one product with
the state, which makes the attention's query as well, and one with the context. Every product's bias stands where
it is cheapest, so some of them have none.

Axes as in `base.py`: B images, K captions, P cells, T words, H hidden, E embedding (of words and of cells), A size
of the space of the attention, G width of the sums of one step.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gridcap.common.config import AttentionConfig
from gridcap.train.decoders.additive import additive_scores
from gridcap.train.decoders.base import Memory, State
from gridcap.train.decoders.looped import LoopedLinear, LoopedMean


class CellOutput(NamedTuple):
    """One step's result: the state after it, and what the words are made from.

    Attributes:
        state: tensors (B, K, H).
        hidden: (B, K, H), the tensor of the state that the words are made from.
        context: (B, K, E), what was seen.
        weights: (B, K, P) float32, where.
    """

    state: State
    hidden: Tensor
    context: Tensor
    weights: Tensor


class AttentionInputs(NamedTuple):
    """What the attention looks at, and what it needs for it.

    Attributes:
        mean: of the cells (B, P, E), weighted.
        keys: (B, P, A), from `additive_keys`.
        double: (A,), as `additive_scores` wants it.
    """

    mean: LoopedMean
    keys: Tensor
    double: Tensor


class Attention(nn.Module):
    """Additive attention (Bahdanau et al. 2015, arXiv:1409.0473): score_p = v . tanh(key_p + query).

    Args:
        hidden: H.
        size: A.
        gated: weigh the context by beta = sigmoid(f(h)), a scalar (Xu et al. 2015, arXiv:1502.03044, 4.2.1).
    """

    def __init__(self, hidden: int, size: int, gated: bool) -> None:
        super().__init__()
        self.score = nn.Linear(size, 1, bias=False)
        self.gate = nn.Linear(hidden, 1) if gated else None

    def scene(self, cells: Tensor, keys: Tensor) -> AttentionInputs:
        """What `forward` looks at, for any number of words, of cells (B, P, E) and keys (B, P, A)."""
        return AttentionInputs(LoopedMean(cells), keys, 2 * self.score.weight[0])

    def forward(self, query: Tensor, hidden: Tensor, scene: AttentionInputs) -> tuple[Tensor, Tensor]:
        """CellOutput at the grid.

        Args:
            query: (B, K, A).
            hidden: (B, K, H), the state that the query was made from.
            scene: from `scene`.

        Returns:
            contexts (B, K, E) and weights (B, K, P) float32.
        """
        weights = additive_scores(scene.keys, query, scene.double).softmax(-1, dtype=torch.float32)
        context = scene.mean(weights)
        if self.gate is not None:
            context = context * torch.sigmoid(self.gate(hidden))
        return context, weights


class Cell(nn.Module, abc.ABC):
    """A recurrent cell that looks at the grid at every step.

    Args:
        config: sizes.
        word_gates: G / H, how many sums of size H the word enters.
    """

    states: int  # tensors in the state, H wide each

    def __init__(self, config: AttentionConfig, word_gates: int) -> None:
        super().__init__()
        self.from_word = nn.Linear(config.embed_size, word_gates * config.hidden_size)
        self.attention = Attention(config.hidden_size, config.attention_size, config.context_gate)

    def image_part(self, mean: Tensor) -> Memory:
        """What the cell wants to have in the memory, made from the mean cell (B, E)."""
        return ()

    def word_part(self, words: Tensor, image: Memory) -> Tensor:
        """The words' part of the sums, for any number of words at once.

        Args:
            words: (B, K, T, E).
            image: from `image_part`.

        Returns:
            (B, K, T, G).
        """
        return self.from_word(words)  # type: ignore[no-any-return]

    @abc.abstractmethod
    def forward(self, word: Tensor, state: State, scene: AttentionInputs) -> CellOutput:
        """One step.

        Args:
            word: (B, K, G), from `word_part`.
            state: tensors (B, K, H).
            scene: from `Attention.scene`.
        """


class AttendThenUpdate(Cell):
    """A cell that looks with the state it had before the word.

    Args:
        config: sizes.
        gates: sums of size H that word and state enter.
        context_gates: those that the context enters.
    """

    def __init__(self, config: AttentionConfig, gates: int, context_gates: int) -> None:
        super().__init__(config, gates)
        hidden = config.hidden_size
        self._split = (config.attention_size, gates * hidden)
        self.from_hidden = LoopedLinear(hidden, sum(self._split))
        self.from_context = LoopedLinear(config.embed_size, context_gates * hidden, bias=False)

    def forward(self, word: Tensor, state: State, scene: AttentionInputs) -> CellOutput:
        query, sums = self.from_hidden(state[0]).split(self._split, -1)
        context, weights = self.attention(query, state[0], scene)
        after = self._update(word, sums, self.from_context(context), state)
        return CellOutput(after, after[0], context, weights)

    @abc.abstractmethod
    def _update(self, word: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        """The next state from the parts of the sums that word, state and context make."""


class GruCell(AttendThenUpdate):
    """Context and word into a GRU: TensorFlow's "Image captioning with visual attention" tutorial."""

    states = 1

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config, 3, 3)

    def _update(self, word: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        size = state[0].shape[-1]
        seen_gates, seen_candidate = (word + context).split_with_sizes((2 * size, size), -1)
        hidden_gates, hidden_candidate = hidden.split_with_sizes((2 * size, size), -1)
        reset, update = torch.sigmoid(seen_gates + hidden_gates).chunk(2, -1)
        candidate = torch.tanh(seen_candidate + reset * hidden_candidate)
        return (torch.lerp(candidate.to(state[0].dtype), state[0], update.to(state[0].dtype)),)


class LstmCell(AttendThenUpdate):
    """Context and word into an LSTM: Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044)."""

    states = 2

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config, 4, 4)

    def _update(self, word: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        return _lstm(word + hidden + context, state[1])


class Att2inCell(AttendThenUpdate):
    """The context enters only the LSTM's candidate, the larger of two: Rennie et al. 2017 (arXiv:1612.00563).

    The maxout of two candidates, without a tanh, is that of the code released with the paper.
    """

    states = 2

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config, 5, 2)

    def _update(self, word: Tensor, hidden: Tensor, context: Tensor, state: State) -> State:
        size = state[1].shape[-1]
        gates, candidates = (word + hidden).to(state[1].dtype).split_with_sizes((3 * size, 2 * size), -1)
        into, forget, out = torch.sigmoid(gates).chunk(3, -1)
        one, other = (candidates + context).chunk(2, -1)
        candidate = torch.relu(one - other) + other  # the larger one: torch.maximum's way back is longer
        cell = forget * state[1] + into * candidate
        return out * torch.tanh(cell), cell


class TopDownCell(Cell):
    """Two LSTMs: Anderson et al. 2018, "Bottom-Up and Top-Down Attention" (arXiv:1707.07998).

    The first reads the second's state, the mean cell and the word, and asks for the look; the second reads the
    context and the first's new state, and the words are made from it. state = (h2, h1, c2, c1).
    """

    states = 4

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config, 4)
        hidden = config.hidden_size
        self._split = (config.attention_size, 4 * hidden)
        self.from_mean = nn.Linear(config.embed_size, 4 * hidden, bias=False)
        self.from_first = LoopedLinear(hidden, 4 * hidden, bias=False)  # for the first LSTM, of the step before
        self.from_second = LoopedLinear(hidden, 8 * hidden, bias=False)  # for the first and for the second
        self.from_hidden = LoopedLinear(hidden, sum(self._split))  # the first's new state, for the look and the second
        self.from_context = LoopedLinear(config.embed_size, 4 * hidden, bias=False)

    def image_part(self, mean: Tensor) -> Memory:
        return (self.from_mean(mean),)

    def word_part(self, words: Tensor, image: Memory) -> Tensor:
        return super().word_part(words, image) + image[0][:, None, None]

    def forward(self, word: Tensor, state: State, scene: AttentionInputs) -> CellOutput:
        h2, h1, c2, c1 = state
        for_first, for_second = self.from_second(h2).chunk(2, -1)
        h1, c1 = _lstm(word + for_first + self.from_first(h1), c1)
        query, sums = self.from_hidden(h1).split(self._split, -1)
        context, weights = self.attention(query, h1, scene)
        h2, c2 = _lstm(sums + for_second + self.from_context(context), c2)
        return CellOutput((h2, h1, c2, c1), h2, context, weights)


def _lstm(sums: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The LSTM's pointwise part. The sums stand as (input, forget, output, candidate), so one sigmoid does three."""
    size = cell.shape[-1]
    # Not slices, each of which costs two passes on the way back.
    gates, candidate = sums.split_with_sizes((3 * size, size), -1)
    into, forget, out = torch.sigmoid(gates).chunk(3, -1)
    cell = forget * cell + into * torch.tanh(candidate)
    return out * torch.tanh(cell), cell


CELLS: dict[str, type[GruCell] | type[LstmCell] | type[Att2inCell] | type[TopDownCell]] = {
    "gru": GruCell,
    "lstm": LstmCell,
    "att2in": Att2inCell,
    "top-down": TopDownCell,
}
