"""Validation during training: loss on the references, CIDEr of greedy captions, and health metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gridcap.common.config import AdaptedTrainConfig
from gridcap.common.progress import progress_bar
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import PAD, Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.engine.health import attention_entropy, duplicate_share
from gridcap.train.engine.job import Runtime
from gridcap.train.metrics.coco import cider
from gridcap.train.objectives.loss import masked_cross_entropy, perplexity


@torch.no_grad()
def validate(
    decoder: Decoder,
    data: CaptionedImages,
    vocabulary: Vocabulary,
    settings: AdaptedTrainConfig,
    runtime: Runtime,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Validate a decoder. The ranks share the images, and all of them return the same result.

    Args:
        decoder: decoder to validate.
        data: images and their captions.
        vocabulary: vocabulary of the decoder.
        settings: batch size and maximum length.
        runtime: hardware and ranks.
        before_batch: called before each batch, equally often on all ranks; may raise to stop the validation.

    Returns:
        val_loss: nats per token over all references, EOS included.
        val_perplexity: exp(val_loss).
        val_cider: CIDEr of the greedy captions.
        val_duplicate_share: share of the images that got the most common caption.
        val_attention_entropy: mean entropy of the attention weights, from 0 (one cell) to 1 (uniform); only for
            decoders with attention.
    """
    decoder.eval()
    ranks, device = runtime.ranks, runtime.device
    captions_per_image = max(len(captions) for captions in data.captions)
    batch_size = max(1, settings.batch_size // (ranks.world_size * settings.grad_accum_steps))  # fits in memory
    options = StreamOptions(batch_size, captions_per_image, settings.max_length, ranks=ranks)
    stream = CaptionStream(data, vocabulary, options)
    total, entropy, tokens = 0.0, 0.0, 0
    captions: dict[int, str] = {}
    batches = stream.in_order()
    rounds = range(-(-len(stream) // ranks.world_size))  # the last one has no batch for some ranks
    for _ in progress_bar(rounds, desc="validation", disable=not runtime.progress, leave=False):
        before_batch()
        if (cpu_batch := next(batches, None)) is None:
            break
        batch = cpu_batch.to(device)
        grids, targets = batch.grids.float(), batch.tokens[..., 1:]
        with runtime.autocast():
            logits, attention = decoder(decoder.encode(grids), batch.tokens[..., :-1], batch.target_index)
            loss, count = masked_cross_entropy(logits, targets.flatten()[batch.target_index])
            hypotheses = beam_search(decoder, grids, BeamOptions(1, settings.max_length))
        total, tokens = total + loss.item(), tokens + int(count)
        if attention is not None:
            entropy += attention_entropy(attention, targets != PAD).item()
        for image, hypothesis in zip(batch.images, hypotheses, strict=True):
            captions[int(image)] = vocabulary.decode(hypothesis.tokens)
    gathered = ranks.all_gather((total, entropy, tokens, captions))
    total, entropy, tokens = (sum(part[i] for part in gathered) for i in range(3))
    captions = dict(sorted(pair for part in gathered for pair in part[3].items()))
    row = {
        "val_loss": total / tokens,
        "val_perplexity": perplexity(total / tokens),
        "val_cider": cider(captions, {i: data.captions[i] for i in captions}, vocabulary.tokenizer.scoring),
        "val_duplicate_share": duplicate_share(captions.values()),
    }
    return row | ({"val_attention_entropy": entropy / tokens} if decoder.has_attention else {})
