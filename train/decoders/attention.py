"""Recurrent decoders with additive attention over the grid's cells; the recurrent parts are in `cells.py`.

The attention is Bahdanau's (arXiv:1409.0473), first used over a grid by Xu et al. 2015 (arXiv:1502.03044). Three
things are ours: the grid is layer-normalized, so that any encoder's scale will do; every cell gets a learned
position, since attention by itself does not know where a cell is; and the first state is made from the mean cell
for every recurrent part, also for att2in and top-down, whose papers start from zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gridcap.common.config import AttentionConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.additive import additive_keys
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.cells import CELLS, Cell
from gridcap.train.decoders.dropout import Dropout
from gridcap.train.decoders.looped import looped


class AttentionDecoder(Decoder):
    """memory = (cells (B, P, E), what `additive_keys` makes of them (B, P, A), what the cell wants of the mean cell).

    Output "hidden": words from the state. Output "deep" (Xu et al. 2015, equation 7): words from
    tanh(E y + L_h h + L_z z), with y the last word, h the state and z the context; the tanh is that of their code.

    Args:
        config: sizes and layout.
        vocabulary_size: V.
        cells: P.
        channels: C.
    """

    has_attention = True

    def __init__(self, config: AttentionConfig, vocabulary_size: int, cells: int, channels: int) -> None:
        super().__init__(config.zero_features)
        embed, hidden = config.embed_size, config.hidden_size
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, embed)
        self.position = nn.Parameter(torch.randn(cells, embed) * 0.02)
        self.key = nn.Linear(embed, config.attention_size, bias=False)
        self.embedding = nn.Embedding(vocabulary_size, embed, padding_idx=PAD)
        self.cell: Cell = CELLS[config.cell](config)
        self.initial = nn.Linear(embed, self.cell.states * hidden)
        self.dropout = Dropout(config.dropout)
        self.deep = nn.Linear(hidden + embed, embed) if config.output_layer == "deep" else None
        self.output = nn.Linear(embed if self.deep is not None else hidden, vocabulary_size)

    def _cells(self, grid: Tensor) -> Tensor:
        """(B, P, C) -> the cells (B, P, E) that are looked at."""
        projected = self.project(self.norm(grid))
        return self.dropout(torch.relu(projected + self.position.to(projected.dtype)))  # type: ignore[no-any-return]

    def _project(self, grid: Tensor) -> Memory:
        cells = self._cells(grid)
        return cells, additive_keys(self.key(cells)), *self.cell.image_part(cells.mean(1))

    def initial_state(self, memory: Memory) -> State:
        start = torch.tanh(self.initial(memory[0].mean(1, keepdim=True)))
        # In the weights' type: under autocast the state is summed up over the words and must not be rounded.
        return start.to(self.initial.weight.dtype).chunk(self.cell.states, -1)

    def _logits(self, hidden: Tensor, seen: tuple[Tensor, Tensor] | None) -> Tensor:
        """(..., H) states, and for the deep output (..., E) words and (..., E) contexts -> (..., V)."""
        features = self.dropout(hidden)
        if self.deep is not None:
            assert seen is not None
            word, context = seen
            features = self.dropout(torch.tanh(word + self.deep(torch.cat([features, context], -1))))
        return self.output(features)  # type: ignore[no-any-return]

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        cells, keys, *image = memory
        words = self.dropout(self.embedding(tokens[..., None]))
        word = self.cell.word_part(words, tuple(image))[:, :, 0]
        look = self.cell(word, state, self.cell.attention.scene(cells, keys))
        return self._logits(look.hidden, (words[:, :, 0], look.context)), look.state, look.weights

    def forward(self, memory: Memory, tokens: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        cells, keys, *image = memory
        words = self.dropout(self.embedding(tokens))
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        looks = []
        # unbind, since taking word after word by its number would cost a whole (B, K, T, G) each on the way back
        each, scene = self.cell.word_part(words, tuple(image)).unbind(2), self.cell.attention.scene(cells, keys)
        with looped(self.cell):
            for word in each:
                looks.append(self.cell(word, state, scene))
                state = looks[-1].state
        hidden = self._at(torch.stack([look.hidden for look in looks], 2), at)
        seen = None
        if self.deep is not None:
            seen = self._at(words, at), self._at(torch.stack([look.context for look in looks], 2), at)
        return self._logits(hidden, seen), torch.stack([look.weights for look in looks], 2)
