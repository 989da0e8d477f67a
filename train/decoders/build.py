"""A decoder from its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.config import AttentionConfig, LstmConfig
from train.decoders.attention import AttentionDecoder
from train.decoders.base import Decoder
from train.decoders.lstm import LstmDecoder


def build_decoder(config: LstmConfig | AttentionConfig, vocabulary_size: int, grid_shape: Sequence[int]) -> Decoder:
    """Build a decoder with fresh weights.

    Args:
        config: its family and sizes.
        vocabulary_size: V.
        grid_shape: (row, column, channel) of the grids it will see.
    """
    channels = grid_shape[-1]
    if isinstance(config, LstmConfig):
        return LstmDecoder(config, vocabulary_size, channels)
    return AttentionDecoder(config, vocabulary_size, math.prod(grid_shape[:-1]), channels)
