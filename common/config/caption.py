"""Settings of decoding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gridcap.common.config.section import Section

Search = Literal["beam", "sample"]


class CaptionConfig(Section):
    """How captions are decoded, in evaluation and for new photos."""

    decoding: Search = Field("beam", description="beam: the likeliest caption; sample: one drawn by chance")
    beam_size: PositiveInt = Field(3, description="hypotheses kept per image; 1 is greedy search")
    max_length: PositiveInt = Field(30, description="longest caption, in words")
    length_penalty: float = Field(
        0.7, ge=0, description="log-probability is divided by length to this power: 0 favors short captions"
    )
    block_trigrams: bool = Field(False, description="never write the same three words twice in a caption")
    temperature: PositiveFloat = Field(1.0, description="sample only: below 1 bolder in what is likely, above 1 freer")
    top_k: PositiveInt | None = Field(None, description="sample only: draw from the k likeliest words")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample only: draw from the likeliest words that make up this probability"
    )
    mbr: bool = Field(
        False,
        description="beam only: of a beam's captions take the one most like the others; wants a beam_size of 15",
    )
    batch_size: PositiveInt = Field(50, description="images decoded together")

    @model_validator(mode="after")
    def _sampling_options_need_sampling(self) -> CaptionConfig:
        if self.decoding == "beam" and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p are for decoding: sample")
        if self.decoding == "sample" and self.block_trigrams:
            raise ValueError("block_trigrams is for decoding: beam")
        if self.mbr and (self.decoding == "sample" or self.beam_size < 3):
            raise ValueError("mbr is for decoding: beam, with a beam_size of 3 and more (15 does well)")
        return self
