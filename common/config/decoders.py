"""The decoders' settings: one section a family, chosen by the key `family`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from gridcap.common.config.section import Section

ImageInput = Literal["first-input", "initial-state", "every-step"]
AttentionCell = Literal["gru", "lstm", "att2in", "top-down"]
AttentionOutput = Literal["hidden", "deep"]


class AnyDecoderConfig(Section):
    """What every family has."""

    embed_size: PositiveInt = Field(256, description="size of a word embedding (transformer: of the model)")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on the grid, the embeddings and before the output")
    zero_features: bool = Field(
        False, description="replace the grid by zeros: the baseline that knows only the language"
    )


class LstmConfig(AnyDecoderConfig):
    """LSTM that sees the pooled grid."""

    family: Literal["lstm"] = "lstm"
    hidden_size: PositiveInt = Field(512, description="size of the recurrent state")
    image_injection: ImageInput = Field("initial-state", description="where the LSTM gets the image")
    image_bottleneck: PositiveInt | None = Field(
        None, description="a narrow ELU layer of this size between the pooled grid and the LSTM"
    )
    output_bottleneck: PositiveInt | None = Field(
        None, description="a narrow ELU layer of this size between the LSTM and the words"
    )


class AttentionConfig(AnyDecoderConfig):
    """Recurrent decoder with additive attention over the grid's cells."""

    family: Literal["attention"] = "attention"
    hidden_size: PositiveInt = Field(512, description="size of the recurrent state")
    attention_size: PositiveInt = Field(256, description="size of the space in which state and cells are compared")
    cell: AttentionCell = Field("gru", description="the recurrent part, and where the context enters it")
    context_gate: bool = Field(False, description="weigh the context by a scalar made from the state (Xu 2015)")
    output_layer: AttentionOutput = Field(
        "deep", description="what words are made from: hidden, the state; deep, state, context and last word"
    )
    attention_reg: NonNegativeFloat = Field(
        0.0, description="weight of the penalty that makes the looks at each cell sum to 1 over a caption (Xu 2015)"
    )


class TransformerConfig(AnyDecoderConfig):
    """Transformer decoder over the projected grid."""

    family: Literal["transformer"] = "transformer"
    layers: PositiveInt = Field(3, description="decoder layers")
    heads: PositiveInt = Field(8, description="attention heads; embed_size must be a multiple")
    feedforward_size: PositiveInt = Field(1024, description="size of the layers' inner linear map")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> TransformerConfig:
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
