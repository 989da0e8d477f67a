"""Construction of a decoder from its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gridcap.common.config import AnyFamily, LstmConfig, TransformerConfig
from gridcap.train.decoders.attention import AttentionDecoder
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.lstm import LstmDecoder
from gridcap.train.decoders.transformer import TransformerDecoder


def build_decoder(config: AnyFamily, vocabulary_size: int, grid_shape: Sequence[int]) -> Decoder:
    """Build a decoder with newly initialized weights.

    Args:
        config: family and sizes of the decoder.
        vocabulary_size: V.
        grid_shape: (rows, columns, channels) of the grids.
    """
    cells, channels = math.prod(grid_shape[:-1]), grid_shape[-1]
    if isinstance(config, LstmConfig):
        return LstmDecoder(config, vocabulary_size, channels)
    if isinstance(config, TransformerConfig):
        return TransformerDecoder(config, vocabulary_size, cells, channels)
    return AttentionDecoder(config, vocabulary_size, cells, channels)
