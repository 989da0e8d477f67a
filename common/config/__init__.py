"""The configuration of a whole run: one file, typed, refused when it contradicts itself.

`load_config` reads the file, lays a recipe and flags over it, and returns a `PipelineConfig`. Every command uses
the same file, so a key means the same thing everywhere. Relative paths are relative to the current folder.
"""

from common.config.caption import CaptionConfig
from common.config.data import DataConfig, SplitConfig, allowed_bad
from common.config.decoders import (
    AnyFamily,
    AttentionConfig,
    DecoderConfig,
    LstmConfig,
    TransformerConfig,
)
from common.config.extract import ExtractConfig
from common.config.load import describe_key, load_config, recipe_names
from common.config.pipeline import PipelineConfig
from common.config.train import ScheduleConfig, TrainConfig, VocabularyConfig

__all__ = [
    "AnyFamily",
    "AttentionConfig",
    "CaptionConfig",
    "DataConfig",
    "DecoderConfig",
    "ExtractConfig",
    "LstmConfig",
    "PipelineConfig",
    "ScheduleConfig",
    "SplitConfig",
    "TrainConfig",
    "TransformerConfig",
    "VocabularyConfig",
    "allowed_bad",
    "describe_key",
    "load_config",
    "recipe_names",
]
