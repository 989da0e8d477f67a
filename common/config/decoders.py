"""Settings of the decoder. Each family has its own section, in the module of the decoder."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, PositiveInt

from gridcap.common.config.section import Section


class DecoderSettings(Section):
    """The section `train.decoder` before the settings of its family are known: they are neither checked nor completed.

    Commands that need the decoder replace it by the `DecoderConfig` of the family; the others need not load it.
    """

    model_config = ConfigDict(extra="allow")

    family: str = "attention"

    def changed_settings(self) -> dict[str, Any]:
        """Return key -> value of the settings that differ from the defaults."""
        family = {} if self.family == DecoderSettings().family else {"family": self.family}
        return family | super().changed_settings() | (self.model_extra or {})


class DecoderConfig(DecoderSettings):
    """Settings that all families share. A family adds its own, and overrides the default of `family`."""

    model_config = ConfigDict(extra="forbid")

    embed_size: PositiveInt = Field(256, description="token embedding size (transformer: model size)")
    dropout: float = Field(
        0.3, ge=0, lt=1, description="dropout probability on features, embeddings, and the output layer's input"
    )
    zero_features: bool = Field(False, description="replace the features by zeros (language-only baseline)")
