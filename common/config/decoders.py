"""Settings of the decoders: one section per family, selected by the key `family`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from gridcap.common.config.section import Section

ImageInput = Literal["first-input", "initial-state", "every-step"]
AttentionCell = Literal["gru", "lstm", "att2in", "top-down"]
AttentionOutput = Literal["hidden", "deep", "dense"]
InitialState = Literal["zeros", "mean"]


class AnyDecoderConfig(Section):
    """Settings that all families share."""

    embed_size: PositiveInt = Field(256, description="token embedding size (transformer: model size)")
    dropout: float = Field(
        0.3, ge=0, lt=1, description="dropout probability on features, embeddings, and the output layer's input"
    )
    zero_features: bool = Field(False, description="replace the features by zeros (language-only baseline)")


class LstmConfig(AnyDecoderConfig):
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


class AttentionConfig(AnyDecoderConfig):
    """Recurrent decoder with additive attention over the grid cells."""

    family: Literal["attention"] = "attention"
    hidden_size: PositiveInt = Field(512, description="size of the hidden state")
    attention_size: PositiveInt = Field(256, description="hidden size of the additive attention")
    cell: AttentionCell = Field("gru", description="recurrent cell, and where the context vector enters it")
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


class TransformerConfig(AnyDecoderConfig):
    """Transformer decoder with cross-attention over the projected grid."""

    family: Literal["transformer"] = "transformer"
    layers: PositiveInt = Field(3, description="decoder layers")
    heads: PositiveInt = Field(8, description="attention heads; must divide embed_size")
    feedforward_size: PositiveInt = Field(1024, description="hidden size of the feedforward layers")

    @model_validator(mode="after")
    def _heads_divide_embed_size(self) -> TransformerConfig:
        if self.embed_size % self.heads:
            raise ValueError(f"embed_size {self.embed_size} is not a multiple of heads {self.heads}")
        return self


FAMILIES: dict[str, type[AnyDecoderConfig]] = {
    "attention": AttentionConfig,
    "lstm": LstmConfig,
    "transformer": TransformerConfig,
}
DecoderFamily = Literal["attention", "lstm", "transformer"]
AnyFamily = LstmConfig | AttentionConfig | TransformerConfig
DecoderConfig = Annotated[AnyFamily, Field(discriminator="family")]
