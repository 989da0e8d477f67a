"""Validation while training: loss on the references, CIDEr of greedy captions, signs of ill health."""

from __future__ import annotations

import torch

from gridcap.common.config import TrainConfig
from gridcap.common.progress import progress_bar
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import PAD, Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.engine.distributed import ALONE, Ranks
from gridcap.train.engine.health import attention_spread, most_common_share
from gridcap.train.metrics.coco import cider
from gridcap.train.objectives.loss import masked_cross_entropy, perplexity


@torch.no_grad()
def validate(
    decoder: Decoder,
    data: CaptionedImages,
    vocabulary: Vocabulary,
    settings: TrainConfig,
    device: torch.device,
    precision: torch.dtype,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> dict[str, float]:
    """Validate a decoder; of several processes each takes its share, and all get the result.

    Returns:
        val_loss in nats a word (EOS counted, every reference), val_perplexity = exp(val_loss), val_cider,
        val_commonest (share of the images that got the most frequent caption) and, of a decoder with attention,
        val_attention_spread (0: one cell, 1: everywhere alike).
    """
    decoder.eval()
    per_image = max(len(captions) for captions in data.captions)
    size = max(1, settings.batch_size // (ranks.world * settings.grad_accum_steps))  # what fits in training fits here
    stream = CaptionStream(data, vocabulary, StreamOptions(size, per_image, settings.max_length, ranks=ranks))
    total, spread, words = 0.0, 0.0, 0
    captions: dict[int, str] = {}
    batches = progress_bar(
        stream.in_order(), total=-(-len(stream) // ranks.world), desc="validation", disable=not progress, leave=False
    )
    for batch in batches:
        moved = batch.to(device)
        grids, targets = moved.grids.float(), moved.tokens[..., 1:]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits, attention = decoder(decoder.encode(grids), moved.tokens[..., :-1], moved.target_index)
            loss, count = masked_cross_entropy(logits, targets.flatten()[moved.target_index])
            found = beam_search(decoder, grids, BeamOptions(1, settings.max_length))
        total, words = total + loss.item(), words + int(count)
        if attention is not None:
            spread += attention_spread(attention, targets != PAD).item()
        captions.update({int(i): vocabulary.decode(h.tokens) for i, h in zip(batch.images, found, strict=True)})
    everywhere = ranks.gather((total, spread, words, captions))
    total, spread, words = (sum(part[i] for part in everywhere) for i in range(3))
    captions = dict(sorted(pair for part in everywhere for pair in part[3].items()))
    mean = total / words
    row = {
        "val_loss": mean,
        "val_perplexity": perplexity(mean),
        "val_cider": cider(captions, {i: data.captions[i] for i in captions}),
        "val_commonest": most_common_share(captions.values()),
    }
    return row | ({"val_attention_spread": spread / words} if decoder.has_attention else {})
