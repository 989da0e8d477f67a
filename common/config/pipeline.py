"""The configuration of a complete run."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import Field

from gridcap.common.config.caption import CaptionConfig
from gridcap.common.config.data import DataConfig
from gridcap.common.config.extract import ExtractConfig
from gridcap.common.config.section import Section
from gridcap.common.config.train import TrainConfig


class PipelineConfig(Section):
    """The configuration of a complete run: data, extract, train, caption."""

    seed: int = Field(
        0, ge=0, description="random seed: subsets, initial weights, epoch order, dropout, sampled captions"
    )
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    caption: CaptionConfig = CaptionConfig()

    def to_yaml(self, *sections: str) -> str:
        """Return the resolved settings as YAML: all of them, or the seed and the named sections."""
        values = {key: value for key, value in self.model_dump(mode="json").items() if _is_selected(key, sections)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)

    def changed_settings(self, *sections: str) -> dict[str, Any]:
        """Return key path -> value of the settings that differ from the defaults, optionally of some sections only."""
        changed = super().changed_settings()
        return {key: value for key, value in changed.items() if _is_selected(key.partition(".")[0], sections)}


def _is_selected(key: str, sections: tuple[str, ...]) -> bool:
    return not sections or key in ("seed", *sections)
