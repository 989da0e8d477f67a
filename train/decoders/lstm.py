"""LSTM that sees the pooled grid, with a choice of where the image enters.

first-input: the image is the LSTM's first word, read before BOS from a zero state (Vinyals et al. 2015, "Show and
Tell", arXiv:1411.4555). initial-state: the image makes the state that the words start from, with bottlenecks if
wanted, which is the layout of the captioning week of the Higher School of Economics' "Introduction to Deep
Learning" course (in Keras: CNN, ELU bottleneck, h0 = c0, LSTM, ELU bottleneck, words). every-step: the image stands
beside each word. Tanti et al. 2017 (arXiv:1703.09137) compare the three, as pre-inject, init-inject and par-inject.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn

from gridcap.common.config import LstmConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.dropout import Dropout


class LstmDecoder(Decoder):
    """memory = (image (B, D),): the normalized mean over the cells, then the layers that it needs only once.

    D is C for initial-state without a bottleneck, the bottleneck's size with one, and E (the words' size) where the
    image is read as a word is. state = (h, c), both (B, K, H).

    Args:
        config: sizes and layout.
        vocabulary_size: V.
        channels: C.
    """

    has_attention = False

    def __init__(self, config: LstmConfig, vocabulary_size: int, channels: int) -> None:
        super().__init__(config.zero_features)
        embed, hidden = config.embed_size, config.hidden_size
        self._image = config.image_injection
        self.norm = nn.LayerNorm(channels)
        self.dropout = Dropout(config.dropout)
        self.image_bottleneck = _narrow(channels, config.image_bottleneck)
        self._narrowed = config.image_bottleneck is not None
        seen = config.image_bottleneck or channels
        if config.image_injection == "initial-state":
            self.initial = nn.Linear(seen, hidden if self._narrowed else 2 * hidden)
        else:
            self.image_embedding = nn.Linear(seen, embed)
        self.embedding = nn.Embedding(vocabulary_size, embed, padding_idx=PAD)
        self.lstm = nn.LSTM(2 * embed if config.image_injection == "every-step" else embed, hidden, batch_first=True)
        self.output_bottleneck = _narrow(hidden, config.output_bottleneck)
        self.output = nn.Linear(config.output_bottleneck or hidden, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        image = self.image_bottleneck(self.dropout(self.norm(grid.mean(1))))
        return (image if self._image == "initial-state" else self.image_embedding(image),)

    def initial_state(self, memory: Memory) -> State:
        (image,) = memory
        if self._image == "initial-state":
            start = self.initial(image)[:, None]
            if self._narrowed:
                start = F.elu(start)
                return start, start
            hidden, cell = start.chunk(2, -1)
            return torch.tanh(hidden), cell
        zero = self.embedding.weight.new_zeros(len(image), 1, self.lstm.hidden_size)
        if self._image == "every-step":
            return zero, zero
        return self._read(image[:, None, None], (zero, zero))[1]

    def _read(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, K, T, ...) inputs and (B, K, H) states -> all T hidden states (B, K, T, H), and the last state."""
        b, k, t, _ = inputs.shape
        dtype = self.embedding.weight.dtype  # under autocast parts come as bfloat16, and nn.LSTM wants one type
        hidden, cell = (part.to(dtype).reshape(1, b * k, -1).contiguous() for part in state)
        every, after = self.lstm(inputs.to(dtype).flatten(0, 1), (hidden, cell))
        return every.reshape(b, k, t, -1), tuple(part.reshape(b, k, -1) for part in after)

    def _run(self, tokens: Tensor, state: State, memory: Memory, at: Tensor | None = None) -> tuple[Tensor, State]:
        """(B, K, T) tokens -> (B, K, T, V) logits, or (N, V), and the state after them."""
        inputs = self.dropout(self.embedding(tokens))
        if self._image == "every-step":
            image = memory[0][:, None, None].to(inputs.dtype)
            inputs = torch.cat([image.expand_as(inputs), inputs], -1)
        hidden, state = self._read(inputs, state)
        return self.output(self.output_bottleneck(self.dropout(self._at(hidden, at)))), state

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        logits, state = self._run(tokens[..., None], state, memory)
        return logits[:, :, 0], state, None

    def forward(self, memory: Memory, tokens: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        return self._run(tokens, state, memory, at)[0], None


def _narrow(size: int, bottleneck: int | None) -> nn.Module:
    return nn.Identity() if bottleneck is None else nn.Sequential(nn.Linear(size, bottleneck), nn.ELU())
