"""Settings of decoding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gridcap.common.config.section import Section

Decoding = Literal["beam", "sample"]


class CaptionConfig(Section):
    """How captions are decoded, in evaluation and for new photos."""

    decoding: Decoding = Field("beam", description="beam: beam search; sample: sample from the distribution")
    beam_size: PositiveInt = Field(3, description="hypotheses kept per image; 1 is greedy decoding")
    max_length: PositiveInt = Field(30, description="maximum caption length in tokens")
    length_penalty: float = Field(
        0.7, ge=0, description="exponent of the length that divides the log-probability; 0 favors short captions"
    )
    block_trigrams: bool = Field(False, description="beam only: never repeat a trigram within a caption")
    temperature: PositiveFloat = Field(
        1.0, description="sample only: sampling temperature: <1 sharpens the distribution, >1 flattens it"
    )
    top_k: PositiveInt | None = Field(None, description="sample only: sample from the k most probable tokens")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample only: nucleus sampling from the smallest set with this total probability"
    )
    mbr: bool = Field(False, description="beam only: MBR (consensus) reranking of the hypotheses; use beam_size 15")
    batch_size: PositiveInt = Field(50, description="images per decoding batch")

    @model_validator(mode="after")
    def _options_match_decoding(self) -> CaptionConfig:
        if self.decoding == "beam" and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k, and top_p require decoding: sample")
        if self.decoding == "sample" and self.block_trigrams:
            raise ValueError("block_trigrams requires decoding: beam")
        if self.mbr and (self.decoding == "sample" or self.beam_size < 3):
            raise ValueError("mbr requires decoding: beam and a beam_size of at least 3 (15 works well)")
        return self
