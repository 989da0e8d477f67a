"""Recurrent decoders with additive attention over the grid cells; the recurrent cells are in `cells.py`.

The attention is that of Bahdanau et al. 2015 (arXiv:1409.0473), first used on image grids by Xu et al. 2015
(arXiv:1502.03044). The defaults differ from the papers: the grid is layer-normalized, so that encoders of any scale
work; every cell has a learned position embedding, because attention alone is permutation-invariant; and the initial
state is computed from the mean cell, where Att2in and Top-Down use zeros. The recipes disable what their papers lack.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from gridcap.common.config import DecoderConfig
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder, Memory, State, compute_dtype
from gridcap.train.decoders.layers.additive import additive_powers
from gridcap.train.decoders.layers.cells import CELLS, AttentionCell, AttentionInputs, Cell, CellSizes
from gridcap.train.decoders.registry import register_decoder

AttentionOutput = Literal["hidden", "deep", "dense"]
InitialState = Literal["zeros", "mean"]


class AttentionConfig(DecoderConfig):
    """Recurrent decoder with additive attention over the grid cells."""

    family: Literal["attention"] = "attention"
    embed_size: PositiveInt = Field(512, description="token embedding size")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="dropout probability on features, embeddings, and the output layer's input"
    )
    hidden_size: PositiveInt = Field(512, description="size of the hidden state")
    attention_size: PositiveInt = Field(256, description="hidden size of the additive attention")
    cell: AttentionCell = Field("att2in", description="recurrent cell, and where the context vector enters it")
    context_gate: bool = Field(
        False, description="scale the context vector by a gate computed from the state (Xu et al. 2015)"
    )
    output_layer: AttentionOutput = Field(
        "deep",
        description="input of the output layer: hidden (state), dense (linear layer of the state), or deep (state, "
        "context, last token)",
    )
    initial_state: InitialState = Field("mean", description="initial state: zeros, or computed from the mean cell")
    normalize_grid: bool = Field(True, description="layer-normalize the features of each cell")
    project_grid: bool = Field(
        True, description="embed each cell with a linear layer and a ReLU; false: attend to the features themselves"
    )
    cell_positions: bool = Field(True, description="add a learned position embedding to each cell")
    input_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout probability on features and embeddings; null: as dropout"
    )
    attention_reg: NonNegativeFloat = Field(
        0.0, description="weight of the doubly stochastic penalty per caption; 64 is that of the code of Xu et al. 2015"
    )


@register_decoder("attention")
class AttentionDecoder(Decoder):
    """Recurrent decoder with attention.

    memory = (cells (B, P, D), attention keys (B, P, A), their `additive_powers`, cell-specific projection of the mean
    feature), where D is `embed_size`, or C without `project_grid`. With `output_layer` "hidden", the logits are
    computed from the hidden state; with "dense", from a linear layer of it. With "deep" (Xu et al. 2015, equation 7),
    they are computed from tanh(E y + L_h h + L_z z), where y is the last token, h the hidden state, and z the context
    vector; the tanh is that of the authors' code.

    Args:
        config: sizes and layout.
        vocabulary_size: V.
        cells: P.
        channels: C.
    """

    config_class = AttentionConfig
    has_attention = True

    def __init__(self, config: AttentionConfig, vocabulary_size: int, cells: int, channels: int) -> None:
        super().__init__(config.zero_features)
        embed, hidden = config.embed_size, config.hidden_size
        self._hidden_size = hidden
        self.norm = nn.LayerNorm(channels) if config.normalize_grid else None
        self.project = nn.Linear(channels, embed) if config.project_grid else None
        width = embed if config.project_grid else channels  # D
        self.position = nn.Parameter(torch.randn(cells, width) * 0.02) if config.cell_positions else None
        self.key = nn.Linear(width, config.attention_size, bias=False)
        self.embedding = nn.Embedding(vocabulary_size, embed, padding_idx=PAD)
        sizes = CellSizes(embed, hidden, config.attention_size, width, config.context_gate)
        self.cell: Cell = CELLS[config.cell](sizes)
        self.initial = nn.Linear(width, self.cell.states * hidden) if config.initial_state == "mean" else None
        self.input_dropout = nn.Dropout(config.dropout if config.input_dropout is None else config.input_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.deep = nn.Linear(hidden + width, embed) if config.output_layer == "deep" else None
        self.dense = nn.Linear(hidden, hidden) if config.output_layer == "dense" else None
        self.output = nn.Linear(embed if self.deep is not None else hidden, vocabulary_size)

    def _cells(self, grid: Tensor) -> Tensor:
        """Return the cells (B, P, D) of a (B, P, C) grid."""
        cells = grid if self.norm is None else self.norm(grid)
        # Without a projection, cast to its dtype: under autocast, context vectors are computed in that of the keys.
        cells = cells.to(compute_dtype(self.key)) if self.project is None else self.project(cells)
        if self.position is not None:
            cells = cells + self.position.to(cells.dtype)
        if self.project is not None:
            cells = torch.relu(cells)
        return self.input_dropout(cells)  # type: ignore[no-any-return]

    def _project(self, grid: Tensor) -> Memory:
        cells = self._cells(grid)
        keys = self.key(cells)
        return cells, keys, additive_powers(keys), *self.cell.project_image(cells.mean(1))

    def initial_state(self, memory: Memory) -> State:
        # Keep the state in the dtype of the weights: under autocast, rounding would accumulate over time steps.
        dtype = self.embedding.weight.dtype
        if self.initial is None:
            zeros = memory[0].new_zeros(len(memory[0]), 1, self._hidden_size, dtype=dtype)
            return (zeros,) * self.cell.states
        start = torch.tanh(self.initial(memory[0].mean(1, keepdim=True)))
        return start.to(dtype).chunk(self.cell.states, -1)

    def _logits(self, hidden: Tensor, deep_inputs: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the logits (..., V).

        Args:
            hidden: (..., H) hidden states.
            deep_inputs: token embeddings (..., E) and context vectors (..., D), for the deep output layer.
        """
        features = self.dropout(hidden)
        if self.deep is not None:
            assert deep_inputs is not None
            embedded, context = deep_inputs
            features = self.dropout(torch.tanh(embedded + self.deep(torch.cat([features, context], -1))))
        if self.dense is not None:
            features = self.dense(features)
        return self.output(features)  # type: ignore[no-any-return]

    def step(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        attended, image = AttentionInputs(*memory[:3]), memory[3:]
        embedded = self.input_dropout(self.embedding(tokens[..., None]))
        inputs = self.cell.project_tokens(embedded, image)[:, :, 0]
        output = self.cell(inputs, state, attended)
        return self._logits(output.hidden, (embedded[:, :, 0], output.context)), output.state, output.weights

    def forward(self, memory: Memory, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        attended, image = AttentionInputs(*memory[:3]), memory[3:]
        embedded = self.input_dropout(self.embedding(tokens))
        state = tuple(part.expand(-1, tokens.shape[1], -1) for part in self.initial_state(memory))
        outputs = []
        # unbind: indexing by time step would allocate a (B, K, T, G) gradient per step in the backward pass.
        steps = self.cell.project_tokens(embedded, image).unbind(2)
        for inputs in steps:
            outputs.append(self.cell(inputs, state, attended))
            state = outputs[-1].state
        hidden = self._gather_positions(torch.stack([output.hidden for output in outputs], 2), positions)
        deep_inputs = None
        if self.deep is not None:
            context = torch.stack([output.context for output in outputs], 2)
            deep_inputs = self._gather_positions(embedded, positions), self._gather_positions(context, positions)
        return self._logits(hidden, deep_inputs), torch.stack([output.weights for output in outputs], 2)
