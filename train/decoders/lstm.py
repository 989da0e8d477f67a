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

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name in PyTorch code)
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from gridcap.common.config import DecoderConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State, compute_dtype, disable_autocast
from gridcap.train.decoders.registry import register_decoder

ImageInput = Literal["first-input", "initial-state", "every-step"]


class LstmConfig(DecoderConfig):
    """LSTM conditioned on the mean-pooled features."""

    family: Literal["lstm"] = "lstm"
    hidden_size: PositiveInt = Field(512, description="size of the hidden state")
    image_injection: ImageInput = Field("initial-state", description="where the image features enter the LSTM")
    normalize_grid: bool = Field(True, description="layer-normalize the mean-pooled features")
    image_bottleneck: PositiveInt | None = Field(
        None, description="size of an ELU layer between the pooled features and the LSTM; null: no such layer"
    )
    output_bottleneck: PositiveInt | None = Field(
        None, description="size of an ELU layer between the LSTM and the output projection; null: no such layer"
    )


@register_decoder("lstm")
class LstmDecoder(Decoder):
    """LSTM decoder without attention.

    memory = (image (B, D),): the (normalized) mean feature after the layers that are applied once per image. D is C for
    initial-state without a bottleneck, the bottleneck size with one, and E (the embedding size) for the other two.
    state = (h, c), (B, K, H) each.

    Args:
        config: sizes and layout.
        vocabulary_size: V.
        cells: P; not used.
        channels: C.
    """

    config_class = LstmConfig
    has_attention = False

    def __init__(self, config: LstmConfig, vocabulary_size: int, cells: int, channels: int) -> None:
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
        self.lstm = _Lstm(2 * embed if config.image_injection == "every-step" else embed, hidden)
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
        after: State = self.lstm(image[:, None, None], (zero, zero), compute_dtype(self.output))[1]
        return after

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
        hidden, cell = self.lstm.step(self._inputs(tokens, memory), state)
        return self._logits(hidden), (hidden, cell), None

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        hidden, _ = self.lstm(self._inputs(tokens, memory), state, compute_dtype(self.output))
        return self._logits(self._gather_positions(hidden, positions)), None


class _Lstm(nn.Module):
    """The parameters of `nn.LSTM`, which torch.compile does not support, and its function.

    Args:
        size: D.
        hidden: H.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.hidden_size = hidden
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden, size).uniform_(-bound, bound))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-bound, bound))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound))

    def forward(self, inputs: Tensor, state: State, dtype: torch.dtype) -> tuple[Tensor, State]:
        """Run all time steps.

        Args:
            inputs: (B, K, T, D).
            state: hidden state and cell state, (B, K, H) each.
            dtype: dtype to compute in. Under autocast on CUDA, some versions of torch choose float16 for RNNs, whatever
                the autocast dtype is, so autocast is disabled.

        Returns:
            Hidden states (B, K, T, H) in that dtype, and the final state in the dtype of the parameters.
        """
        b, k, t, _ = inputs.shape
        parameters = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        flat = torch.cat([part.to(dtype).flatten() for part in parameters])  # one block of memory, as cuDNN expects
        parts = torch.split(flat, [part.numel() for part in parameters])
        weights = [part.view_as(like) for part, like in zip(parts, parameters, strict=True)]
        start = tuple(part.to(dtype).reshape(1, b * k, -1).contiguous() for part in state)
        with disable_autocast(inputs.device):
            outputs, *after = torch.lstm(
                inputs.to(dtype).flatten(0, 1), start, weights, True, 1, 0.0, self.training, False, True
            )
        dtype = self.weight_hh_l0.dtype
        return outputs.reshape(b, k, t, -1), tuple(part.reshape(b, k, -1).to(dtype) for part in after)

    def step(self, inputs: Tensor, state: State) -> State:
        """Return the state after one time step, for inputs (B, K, D)."""
        hidden, cell = state
        gates = F.linear(inputs, self.weight_ih_l0, self.bias_ih_l0)
        gates = gates + F.linear(hidden.to(gates.dtype), self.weight_hh_l0, self.bias_hh_l0)
        into, forget, candidate, out = gates.to(cell.dtype).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(into) * torch.tanh(candidate)
        return torch.sigmoid(out) * torch.tanh(cell), cell


def _bottleneck(size: int, bottleneck: int | None) -> nn.Module:
    return nn.Identity() if bottleneck is None else nn.Sequential(nn.Linear(size, bottleneck), nn.ELU())
