"""GRU with additive attention over the grid's cells.

Attention: Bahdanau, Cho, Bengio 2015 (arXiv:1409.0473), score_p = v . tanh(W_1 cell_p + W_2 state). The layout,
context and word together into a GRU, is that of TensorFlow's "Image captioning with visual attention" tutorial
after Xu et al. 2015 (arXiv:1502.03044). Two things are ours: the grid is layer-normalised, so that any encoder's
scale will do, and every cell gets a learned position, since attention by itself does not know where a cell is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.config import AttentionConfig
from train.decoders.base import Decoder, Memory, State
from train.vocabulary import PAD


class AttentionDecoder(Decoder):
    """memory = (cells (B, P, E), their keys (B, P, A)); the keys W_1 cell_p are made once an image.

    Args:
        config: sizes.
        vocabulary_size: V.
        cells: P.
        channels: C.
    """

    has_attention = True

    def __init__(self, config: AttentionConfig, vocabulary_size: int, cells: int, channels: int) -> None:
        super().__init__(config.blind)
        embed, hidden, attention = config.embed_size, config.hidden_size, config.attention_size
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, embed)
        self.position = nn.Parameter(torch.randn(cells, embed) * 0.02)
        self.key = nn.Linear(embed, attention)
        self.query = nn.Linear(hidden, attention, bias=False)
        self.score = nn.Linear(attention, 1, bias=False)
        self.initial = nn.Linear(embed, hidden)
        self.embedding = nn.Embedding(vocabulary_size, embed, padding_idx=PAD)
        self.gru = nn.GRUCell(2 * embed, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.hidden_output = nn.Linear(hidden + embed, hidden)
        self.output = nn.Linear(hidden, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        cells = self.dropout(torch.relu(self.project(self.norm(grid)) + self.position))
        return cells, self.key(cells)

    def initial_state(self, memory: Memory) -> State:
        return (torch.tanh(self.initial(memory[0].mean(1, keepdim=True))),)

    def _attend(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """(B, K, H) states -> (B, K, E) contexts and (B, K, P) weights."""
        cells, keys = memory
        energy = torch.tanh(keys[:, None] + self.query(hidden)[:, :, None])
        weights = self.score(energy).squeeze(-1).float().softmax(-1).to(cells.dtype)
        return weights @ cells, weights

    def _advance(self, words: Tensor, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        context, weights = self._attend(hidden, memory)
        inputs = torch.cat([context, words], -1)
        after = self.gru(inputs.flatten(0, 1), hidden.flatten(0, 1)).reshape(*words.shape[:2], -1)
        return after, context, weights

    def _logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        features = self.hidden_output(self.dropout(torch.cat([hidden, context], -1)))
        return self.output(self.dropout(torch.relu(features)))  # type: ignore[no-any-return]

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        hidden, context, weights = self._advance(self.dropout(self.embedding(tokens)), state[0], memory)
        return self._logits(hidden, context), (hidden,), weights

    def forward(self, memory: Memory, tokens: Tensor) -> Tensor:
        b, k, t = tokens.shape
        words = self.dropout(self.embedding(tokens))
        hidden = self.initial_state(memory)[0].expand(b, k, -1)
        states, contexts = [], []
        for i in range(t):
            hidden, context, _ = self._advance(words[:, :, i], hidden, memory)
            states.append(hidden)
            contexts.append(context)
        return self._logits(torch.stack(states, 2), torch.stack(contexts, 2))
