"""The configuration of a whole run."""

from __future__ import annotations

import yaml
from pydantic import Field

from gridcap.common.config.caption import CaptionConfig
from gridcap.common.config.data import DataConfig
from gridcap.common.config.extract import ExtractConfig
from gridcap.common.config.section import Section
from gridcap.common.config.train import TrainConfig


class PipelineConfig(Section):
    """One complete run: data, extract, train, caption."""

    seed: int = Field(
        0, ge=0, description="seed of subsets, initial weights, epoch order, dropout, and captions that are drawn"
    )
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    caption: CaptionConfig = CaptionConfig()

    def to_yaml(self, *sections: str) -> str:
        """The resolved values as YAML; only the named sections (and the seed) if any are named."""
        values = self.model_dump(mode="json")
        chosen = {k: v for k, v in values.items() if not sections or k in ("seed", *sections)}
        return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=100)
