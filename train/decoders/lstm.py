"""LSTM decoder over the pooled grid, with three ways to inject the image.

* first-input: the image is the first input of the LSTM, before BOS (Vinyals et al. 2015, "Show and Tell",
  arXiv:1411.4555).
* initial-state: the initial state is computed from the image, optionally through bottlenecks, as in the captioning
  week of the Higher School of Economics' "Introduction to Deep Learning" course (in Keras: CNN, ELU bottleneck,
  h0 = c0, LSTM, ELU bottleneck, output projection).
* every-step: the image is concatenated to every token embedding.

Tanti et al. 2017 (arXiv:1703.09137) compare the three as pre-inject, init-inject, and par-inject.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name in PyTorch code)
from torch import Tensor, nn

from gridcap.common.config import LstmConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State
from gridcap.train.decoders.dropout import Dropout


class LstmDecoder(Decoder):
    """LSTM decoder without attention.

    memory = (image (B, D),): the (normalized) mean feature after the layers that are applied once per image. D is C for
    initial-state without a bottleneck, the bottleneck size with one, and E (the embedding size) for the other two.
    state = (h, c), (B, K, H) each.

    Args:
        config: sizes and layout.
        vocabulary_size: V.
        channels: C.
    """

    has_attention = False

    def __init__(self, config: LstmConfig, vocabulary_size: int, channels: int) -> None:
        super().__init__(config.zero_features)
        embed, hidden = config.embed_size, config.hidden_size
        self._injection = config.image_injection
        self.norm = nn.LayerNorm(channels) if config.normalize_grid else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.image_bottleneck = _bottleneck(channels, config.image_bottleneck)
        self._has_bottleneck = config.image_bottleneck is not None
        size = config.image_bottleneck or channels
        if config.image_injection == "initial-state":
            self.initial = nn.Linear(size, hidden if self._has_bottleneck else 2 * hidden)
        else:
            self.image_embedding = nn.Linear(size, embed)
        self.embedding = nn.Embedding(vocabulary_size, embed, padding_idx=PAD)
        self.lstm = nn.LSTM(2 * embed if config.image_injection == "every-step" else embed, hidden, batch_first=True)
        self.output_bottleneck = _bottleneck(hidden, config.output_bottleneck)
        self.output = nn.Linear(config.output_bottleneck or hidden, vocabulary_size)

    def _project(self, grid: Tensor) -> Memory:
        image = self.image_bottleneck(self.dropout(self.norm(grid.mean(1))))
        return (image if self._injection == "initial-state" else self.image_embedding(image),)

    def initial_state(self, memory: Memory) -> State:
        (image,) = memory
        if self._injection == "initial-state":
            start = self.initial(image)[:, None]
            if self._has_bottleneck:
                start = F.elu(start)
                return start, start
            hidden, cell = start.chunk(2, -1)
            return torch.tanh(hidden), cell
        zero = self.embedding.weight.new_zeros(len(image), 1, self.lstm.hidden_size)
        if self._injection == "every-step":
            return zero, zero
        return self._run_lstm(image[:, None, None], (zero, zero))[1]

    def _run_lstm(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the LSTM over (B, K, T, D) inputs from a (B, K, H) state.

        Returns:
            Hidden states (B, K, T, H) and the final state.
        """
        b, k, t, _ = inputs.shape
        dtype = self.embedding.weight.dtype  # under autocast, inputs may be bfloat16, but nn.LSTM needs one dtype
        hidden, cell = (part.to(dtype).reshape(1, b * k, -1).contiguous() for part in state)
        outputs, after = self.lstm(inputs.to(dtype).flatten(0, 1), (hidden, cell))
        return outputs.reshape(b, k, t, -1), tuple(part.reshape(b, k, -1) for part in after)

    def _run(
        self, tokens: Tensor, state: State, memory: Memory, positions: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the logits (B, K, T, V) or (N, V) after (B, K, T) tokens, and the final state."""
        inputs = self.dropout(self.embedding(tokens))
        if self._injection == "every-step":
            image = memory[0][:, None, None].to(inputs.dtype)
            inputs = torch.cat([image.expand_as(inputs), inputs], -1)
        hidden, state = self._run_lstm(inputs, state)
        features = self.dropout(self._gather_positions(hidden, positions))
        return self.output(self.output_bottleneck(features)), state

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        logits, state = self._run(tokens[..., None], state, memory)
        return logits[:, :, 0], state, None

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        return self._run(tokens, state, memory, positions)[0], None


def _bottleneck(size: int, bottleneck: int | None) -> nn.Module:
    return nn.Identity() if bottleneck is None else nn.Sequential(nn.Linear(size, bottleneck), nn.ELU())
