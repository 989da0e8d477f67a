"""Decoding as configured: beam search (with MBR reranking) or sampling."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from gridcap.common.config import CaptionConfig
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.base import Hypothesis
from gridcap.train.decoding.beam import BeamOptions, beam_search_nbest
from gridcap.train.decoding.mbr import rerank_mbr
from gridcap.train.decoding.sampling import SamplingOptions, sample_hypotheses

ToUnits = Callable[[Sequence[int]], Sequence[Hashable]]


def generate_captions(
    decoder: Decoder,
    grids: Tensor,
    settings: CaptionConfig,
    generator: torch.Generator | None = None,
    to_units: ToUnits = tuple,
) -> list[Hypothesis]:
    """Decode one caption per image.

    Args:
        decoder: decoder in evaluation mode.
        grids: (B, P, C) grids on the decoder's device.
        settings: decoding method and its options.
        generator: random generator for sampling; see `sample_hypotheses`.
        to_units: converts token ids to the units that MBR reranking compares, such as `Vocabulary.scoring_units`.
    """
    if settings.decoding == "beam":
        return [best for (best,) in generate_nbest(decoder, grids, settings, 1, to_units)]
    options = SamplingOptions(settings.max_length, settings.temperature, settings.top_k, settings.top_p)
    return sample_hypotheses(decoder, grids, options, generator)


def generate_nbest(
    decoder: Decoder,
    grids: Tensor,
    settings: CaptionConfig,
    count: int | None = None,
    to_units: ToUnits = tuple,
) -> list[list[Hypothesis]]:
    """Return the n-best list of beam search per image, reranked if `settings.mbr` is set.

    Args:
        decoder: decoder in evaluation mode.
        grids: (B, P, C) grids on the decoder's device.
        settings: beam search options.
        count: hypotheses returned per image; None returns all finished ones.
        to_units: see `generate_captions`.
    """
    options = BeamOptions(settings.beam_size, settings.max_length, settings.length_penalty, settings.block_trigrams)
    if not settings.mbr:
        return beam_search_nbest(decoder, grids, options, count)
    lists = beam_search_nbest(decoder, grids, options)
    orders = [rerank_mbr([to_units(hypothesis.tokens) for hypothesis in hypotheses]) for hypotheses in lists]
    return [[hypotheses[i] for i in order][:count] for hypotheses, order in zip(lists, orders, strict=True)]
