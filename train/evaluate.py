"""Evaluation of a checkpoint on a feature store: captions, metrics, perplexity, and statistics."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the conventional name)

from gridcap.common.config import CaptionConfig
from gridcap.common.device import choose_device
from gridcap.common.progress import progress_bar
from gridcap.common.store.provenance import check_same_features
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import SPECIALS
from gridcap.train.decoding.base import Hypothesis
from gridcap.train.decoding.generate import generate_captions
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.evaluation import Evaluation
from gridcap.train.metrics.bootstrap import bootstrap_intervals
from gridcap.train.metrics.coco import score_captions
from gridcap.train.metrics.statistics import NOVEL_CAPTIONS, caption_statistics
from gridcap.train.metrics.sufficient import perplexity


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `evaluate`.

    Attributes:
        device: auto, cpu, cuda, ...
        seed: seed of sampling.
        training_captions: captions that the decoder was trained on; None omits the share of novel captions.
        keep_attention: return the attention weights of every token.
        progress: show a progress bar.
    """

    device: str = "auto"
    seed: int = 0
    training_captions: Collection[str] | None = None
    keep_attention: bool = False
    progress: bool = True


def evaluate(
    checkpoint: Checkpoint,
    data: CaptionedImages,
    decoding: CaptionConfig,
    options: EvaluationOptions = EvaluationOptions(),
) -> Evaluation:
    """Caption every image and score the captions against all references.

    Args:
        checkpoint: decoder, or an ensemble.
        data: images with grids and references.
        decoding: decoding method and its options.
        options: device, seed, and what to return.

    Raises:
        MismatchError: the decoder was trained on other features.
    """
    provenance = data.store.provenance
    check_same_features(
        checkpoint.provenance, provenance, f"{checkpoint.path} was trained on", f"{data.store.path} contains"
    )
    hypotheses, losses = _decode(checkpoint, data, decoding, options)
    vocabulary = checkpoint.vocabulary
    ids = [int(data.store.image_id[row]) for row in data.rows]
    captions = {i: vocabulary.decode(hypothesis.tokens) for i, hypothesis in zip(ids, hypotheses, strict=True)}
    references = dict(zip(ids, data.captions, strict=True))
    names = {i: data.store.file_name[row] for i, row in zip(ids, data.rows, strict=True)}
    attention = {}
    if options.keep_attention:
        attention = {
            i: (vocabulary.texts(hypothesis.tokens), hypothesis.attention)
            for i, hypothesis in zip(ids, hypotheses, strict=True)
        }
    tokenizer = vocabulary.tokenizer.scoring
    scores = score_captions(captions, references, tokenizer)
    scores.values = {"perplexity": float(perplexity(losses.sum(0, keepdims=True))["perplexity"][0]), **scores.values}
    scores.statistics.tables["perplexity"] = losses
    scores.intervals = bootstrap_intervals(scores.statistics)
    size = len(vocabulary) - len(SPECIALS) if tokenizer is vocabulary.tokenizer else None
    statistics = caption_statistics(captions, references, size, options.training_captions, tokenizer)
    if NOVEL_CAPTIONS not in statistics:
        scores.unavailable[NOVEL_CAPTIONS] = "requires the captions that the decoder was trained on"
    return Evaluation(captions, names, references, scores, statistics, attention)


@torch.no_grad()
def _decode(
    checkpoint: Checkpoint, data: CaptionedImages, decoding: CaptionConfig, options: EvaluationOptions
) -> tuple[list[Hypothesis], np.ndarray]:
    """Return a caption per image, and the statistics of the perplexity of its references under teacher forcing.

    Returns:
        N captions, and (N, 2) float64: loss in nats and number of tokens, over all references of the image.
    """
    device = choose_device(options.device)
    decoder, vocabulary = checkpoint.decoder.to(device), checkpoint.vocabulary
    max_captions = max(len(captions) for captions in data.captions)
    stream_options = StreamOptions(decoding.batch_size, max_captions, checkpoint.config.train.max_length)
    generator = torch.Generator().manual_seed(options.seed)
    hypotheses: list[Hypothesis] = []
    losses = []
    with progress_bar(total=len(data), unit="image", desc="captions", disable=not options.progress, leave=False) as bar:
        for batch in CaptionStream(data, vocabulary, stream_options).in_order():
            moved = batch.to(device)
            grids = moved.grids.float()
            logits, _ = decoder(decoder.encode(grids), moved.tokens[..., :-1], moved.target_index)
            targets = moved.tokens[..., 1:].flatten()[moved.target_index]
            loss = F.cross_entropy(logits.float(), targets, reduction="none").double()
            image = moved.target_index // moved.tokens[0, :, 1:].numel()
            sums = loss.new_zeros(len(grids), 2)
            losses.append(sums.index_add_(0, image, torch.stack([loss, torch.ones_like(loss)], 1)).cpu().numpy())
            hypotheses += generate_captions(decoder, grids, decoding, generator, vocabulary.scoring_units)
            bar.update(len(batch.images))
    return hypotheses, np.concatenate(losses)
