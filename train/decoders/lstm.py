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
from gridcap.train.decoders.base import Decoder, Memory, State, compute_dtype


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
        self.dropout = nn.Dropout(config.dropout)
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

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the state: under autocast, rounding would accumulate over time steps."""
        return self.embedding.weight.dtype

    def initial_state(self, memory: Memory) -> State:
        (image,) = memory
        if self._injection == "initial-state":
            start = self.initial(image)[:, None].to(self._dtype)
            if self._has_bottleneck:
                start = F.elu(start)
                return start, start
            hidden, cell = start.chunk(2, -1)
            return torch.tanh(hidden), cell
        zero = image.new_zeros(len(image), 1, self.lstm.hidden_size, dtype=self._dtype)
        if self._injection == "every-step":
            return zero, zero
        return self._run_lstm(image[:, None, None], (zero, zero))[1]

    def _lstm_parameters(self) -> list[nn.Parameter]:
        """Return the weights (4 H, D) and (4 H, H) and two biases (4 H,): input, forget, candidate, and output gate."""
        return list(self.lstm.parameters())

    def _run_lstm(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the LSTM over (B, K, T, D) inputs from a (B, K, H) state.

        It computes in the dtype of the other layers: some versions of torch cast the weights of an RNN to float16 under
        autocast on CUDA, whatever the autocast dtype is.

        Returns:
            Hidden states (B, K, T, H) and the final state.
        """
        b, k, t, _ = inputs.shape
        parameters, dtype = self._lstm_parameters(), compute_dtype(self.output)
        flat = torch.cat([part.to(dtype).flatten() for part in parameters])  # one block of memory, as cuDNN expects
        views = torch.split(flat, [part.numel() for part in parameters])
        weights = [view.view_as(part) for view, part in zip(views, parameters, strict=True)]
        start = tuple(part.to(dtype).reshape(1, b * k, -1).contiguous() for part in state)
        with torch.autocast(inputs.device.type, enabled=False):
            outputs, *after = torch.lstm(
                inputs.to(dtype).flatten(0, 1), start, weights, True, 1, 0.0, self.training, False, True
            )
        return outputs.reshape(b, k, t, -1), tuple(part.reshape(b, k, -1).to(self._dtype) for part in after)

    def _inputs(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Return the inputs (..., D) of the LSTM for (B, K, ...) tokens."""
        inputs: Tensor = self.dropout(self.embedding(tokens))
        if self._injection == "every-step":
            image = memory[0].view(-1, *(1,) * (tokens.ndim - 1), memory[0].shape[-1]).to(inputs.dtype)
            inputs = torch.cat([image.expand_as(inputs), inputs], -1)
        return inputs

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.output(self.output_bottleneck(self.dropout(hidden)))  # type: ignore[no-any-return]

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        from_input, from_hidden, input_bias, hidden_bias = self._lstm_parameters()
        hidden, cell = state
        gates = F.linear(self._inputs(tokens, memory), from_input, input_bias)
        gates = gates + F.linear(hidden.to(gates.dtype), from_hidden, hidden_bias)
        into, forget, candidate, out = gates.to(cell.dtype).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(into) * torch.tanh(candidate)
        hidden = torch.sigmoid(out) * torch.tanh(cell)
        return self._logits(hidden), (hidden, cell), None

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        hidden, _ = self._run_lstm(self._inputs(tokens, memory), state)
        return self._logits(self._gather_positions(hidden, positions)), None


def _bottleneck(size: int, bottleneck: int | None) -> nn.Module:
    return nn.Identity() if bottleneck is None else nn.Sequential(nn.Linear(size, bottleneck), nn.ELU())
