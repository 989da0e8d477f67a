"""Evaluate a checkpoint on a feature store: captions, metrics, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.config import CaptionConfig
from common.device import choose_device
from common.files import write_json
from common.store import check_same_features
from train.checkpoint import Checkpoint
from train.loss import masked_cross_entropy, perplexity
from train.metrics import Scores, score_captions
from train.search import beam_search
from train.stream import CaptionedImages, CaptionStream


@dataclass(frozen=True)
class Evaluation:
    """The captions of a data set and their scores.

    Attributes:
        captions: image id -> caption.
        file_names: image id -> file name.
        references: image id -> captions.
        scores: metrics; perplexity of the references under teacher forcing is among the values.
    """

    captions: dict[int, str]
    file_names: dict[int, str]
    references: dict[int, tuple[str, ...]]
    scores: Scores

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.scores.values.items()},
            "tokenizer": self.scores.tokenizer, "left_out": self.scores.left_out,
            "captions": [
                {"image_id": i, "file_name": self.file_names[i], "caption": text, "references": [*self.references[i]]}
                for i, text in self.captions.items()
            ],
        }  # fmt: skip


@torch.inference_mode()
def evaluate(
    checkpoint: Checkpoint,
    data: CaptionedImages,
    search: CaptionConfig,
    device_name: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Caption every image by beam search and score the captions against all references.

    Args:
        checkpoint: the decoder.
        data: images with grids and references.
        search: beam size, length, batch size.
        device_name: auto, cpu, cuda, ...
        progress: show a progress bar.

    Raises:
        MismatchError: the decoder was trained on other features.
    """
    check_same_features(
        checkpoint.provenance, data.store.provenance, f"{checkpoint.path} was trained on", f"{data.store.path} holds"
    )
    device = choose_device(device_name)
    decoder, vocabulary = checkpoint.decoder.to(device), checkpoint.vocabulary
    per_image = max(len(captions) for captions in data.captions)
    stream = CaptionStream(data, vocabulary, search.batch_size, per_image, checkpoint.config.train.max_length)
    captions: dict[int, str] = {}
    references: dict[int, tuple[str, ...]] = {}
    names: dict[int, str] = {}
    total, words = 0.0, 0
    with tqdm(total=len(data), unit="image", desc="captions", disable=not progress, leave=False) as bar:
        for batch in stream.in_order():
            moved = batch.to(device)
            grids = moved.grids.float()
            logits = decoder(decoder.encode(grids), moved.tokens[..., :-1])
            loss, count = masked_cross_entropy(logits, moved.tokens[..., 1:])
            total, words = total + loss.item(), words + int(count)
            found = beam_search(decoder, grids, search.beam_size, search.max_length, search.length_penalty)
            for position, hypothesis in zip(batch.images, found, strict=True):
                row = int(data.rows[position])
                image_id = int(data.store.image_ids[row])
                captions[image_id] = vocabulary.decode(hypothesis.tokens)
                references[image_id] = data.captions[position]
                names[image_id] = data.store.file_names[row]
            bar.update(len(batch.images))
    scores = score_captions(captions, references)
    scores.values["perplexity"] = perplexity(total / words)
    return Evaluation(captions, names, references, scores)


def write_evaluation(evaluation: Evaluation, path: Path) -> Path:
    """Write everything to `path`, and beside it the captions alone as COCO's results format.

    Returns:
        The path of the COCO results file: [{"image_id": ..., "caption": ...}].
    """
    write_json(path, evaluation.as_json())
    results = path.with_name(f"{path.stem}.coco-results.json")
    write_json(results, [{"image_id": i, "caption": text} for i, text in evaluation.captions.items()])
    return results
