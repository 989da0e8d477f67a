"""LSTM whose initial state is made from the pooled grid.

After Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555), with the image in the initial state instead of the
first input, as the Keras captioning course and Xu et al. 2015 (arXiv:1502.03044, section 3.1.2) have it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.config import LstmConfig
from train.decoders.base import Decoder, Memory, State
from train.vocabulary import PAD


class LstmDecoder(Decoder):
    """memory = mean over cells of the normalised grid; h0 = tanh(W_h memory), c0 = W_c memory.

    Args:
        config: sizes.
        vocabulary_size: V.
        channels: C.
    """

    has_attention = False

    def __init__(self, config: LstmConfig, vocabulary_size: int, channels: int) -> None:
        super().__init__(config.blind)
        self.norm = nn.LayerNorm(channels)
        self.initial = nn.Linear(channels, 2 * config.hidden_size)
        self.embedding = nn.Embedding(vocabulary_size, config.embed_size, padding_idx=PAD)
        self.lstm = nn.LSTM(config.embed_size, config.hidden_size, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        return (self.norm(grid.mean(1)),)

    def initial_state(self, memory: Memory) -> State:
        hidden, cell = self.initial(self.dropout(memory[0])).unsqueeze(1).chunk(2, -1)
        return torch.tanh(hidden), cell

    def _run(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """(N, T) tokens and (N, H) states -> (N, T, V) logits."""
        words = self.dropout(self.embedding(tokens))
        hidden, (h, c) = self.lstm(words, (state[0][None].contiguous(), state[1][None].contiguous()))
        return self.output(self.dropout(hidden)), (h[0], c[0])

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        shape = tokens.shape
        logits, after = self._run(tokens.reshape(-1, 1), (state[0].flatten(0, 1), state[1].flatten(0, 1)))
        return logits.reshape(*shape, -1), (after[0].reshape(*shape, -1), after[1].reshape(*shape, -1)), None

    def forward(self, memory: Memory, tokens: Tensor) -> Tensor:
        b, k, t = tokens.shape
        state = tuple(part.expand(b, k, -1).flatten(0, 1) for part in self.initial_state(memory))
        return self._run(tokens.flatten(0, 1), state)[0].reshape(b, k, t, -1)
