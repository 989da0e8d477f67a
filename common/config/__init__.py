"""The typed configuration of a run.

``load_config`` reads a YAML file, applies a recipe and command-line settings, and returns a ``PipelineConfig``. All
commands share one file, so a key means the same thing everywhere. Relative paths are relative to the current folder.
"""

from gridcap.common.config.adapt import AdaptedTrainConfig, adapt, describe_choice
from gridcap.common.config.caption import CaptionConfig
from gridcap.common.config.data import DataConfig, SplitConfig, max_invalid_count
from gridcap.common.config.decoders import DecoderConfig, DecoderSettings
from gridcap.common.config.extract import ExtractConfig
from gridcap.common.config.keys import describe_key
from gridcap.common.config.load import build_config, load_config
from gridcap.common.config.pipeline import PipelineConfig
from gridcap.common.config.recipes import read_recipe, recipe_names
from gridcap.common.config.train import ScheduleConfig, TrainConfig, VocabularyConfig

__all__ = [
    "AdaptedTrainConfig",
    "CaptionConfig",
    "DataConfig",
    "DecoderConfig",
    "DecoderSettings",
    "ExtractConfig",
    "PipelineConfig",
    "ScheduleConfig",
    "SplitConfig",
    "TrainConfig",
    "VocabularyConfig",
    "adapt",
    "build_config",
    "describe_choice",
    "describe_key",
    "load_config",
    "max_invalid_count",
    "read_recipe",
    "recipe_names",
]
