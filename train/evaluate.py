"""Evaluate a checkpoint on a feature store: captions, metrics, perplexity, and what the captions are like."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gridcap.common.config import CaptionConfig
from gridcap.common.device import choose_device
from gridcap.common.files import write_json, write_text
from gridcap.common.progress import progress_bar
from gridcap.common.store.provenance import check_same_features
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import SPECIALS, tokenize
from gridcap.train.decoding.generate import generate_captions
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.metrics.coco import Scores, score_captions
from gridcap.train.objectives.loss import masked_cross_entropy, perplexity

NOVEL = "novel_captions"


@dataclass(frozen=True)
class Evaluation:
    """The captions of a data set and their scores.

    Attributes:
        captions: image id -> caption.
        file_names: image id -> file name.
        references: image id -> captions.
        scores: metrics; the first value is the perplexity of the references under teacher forcing.
        language: what the captions are like, by name; see `language_of`.
        looks: image id -> the words of its caption and where the decoder looked at each, (words, P) float32 or None;
            empty if they were not to be kept.
    """

    captions: dict[int, str]
    file_names: dict[int, str]
    references: dict[int, tuple[str, ...]]
    scores: Scores
    language: dict[str, float]
    looks: dict[int, tuple[list[str], np.ndarray | None]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything but the scores of single images, for a file."""
        return {
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.scores.values.items()},
            "language": self.language,
            "tokenizer": self.scores.tokenizer,
            "left_out": self.scores.left_out,
            "captions": [
                {"image_id": i, "file_name": self.file_names[i], "caption": text, "references": [*self.references[i]]}
                for i, text in self.captions.items()
            ],
        }

    def as_csv(self) -> str:
        """A line an image: image_id, file_name, caption, and every metric's score of it."""
        metrics = [*dict.fromkeys(name for each in self.scores.per_image.values() for name in each)]
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["image_id", "file_name", "caption", *metrics])
        for i, caption in self.captions.items():
            rows.writerow([i, self.file_names[i], caption, *(_short(self.scores.per_image[i].get(m)) for m in metrics)])
        return text.getvalue()


def _short(score: float | None) -> str:
    """Six decimals; nothing for what was not measured."""
    return "" if score is None else f"{score:.6f}"


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint,
    data: CaptionedImages,
    search: CaptionConfig,
    device_name: str = "auto",
    training_captions: Collection[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    keep_looks: bool = False,
) -> Evaluation:
    """Caption every image and score the captions against all references.

    Args:
        checkpoint: the decoder, or several as one.
        data: images with grids and references.
        search: how to decode.
        device_name: auto, cpu, cuda, ...
        training_captions: those the decoder was trained on; None leaves out the share of novel captions.
        seed: of captions that are drawn by chance.
        progress: show a progress bar.
        keep_looks: give the attention of every word too.

    Raises:
        MismatchError: the decoder was trained on other features.
    """
    check_same_features(
        checkpoint.provenance, data.store.provenance, f"{checkpoint.path} was trained on", f"{data.store.path} holds"
    )
    device = choose_device(device_name)
    decoder, vocabulary = checkpoint.decoder.to(device), checkpoint.vocabulary
    per_image = max(len(captions) for captions in data.captions)
    stream = CaptionStream(
        data, vocabulary, StreamOptions(search.batch_size, per_image, checkpoint.config.train.max_length)
    )
    generator = torch.Generator().manual_seed(seed)
    captions: dict[int, str] = {}
    references: dict[int, tuple[str, ...]] = {}
    names: dict[int, str] = {}
    looks: dict[int, tuple[list[str], np.ndarray | None]] = {}
    total, words = 0.0, 0
    with progress_bar(total=len(data), unit="image", desc="captions", disable=not progress, leave=False) as bar:
        for batch in stream.in_order():
            moved = batch.to(device)
            grids = moved.grids.float()
            logits, _ = decoder(decoder.encode(grids), moved.tokens[..., :-1], moved.target_index)
            loss, count = masked_cross_entropy(logits, moved.tokens[..., 1:].flatten()[moved.target_index])
            total, words = total + loss.item(), words + int(count)
            found = generate_captions(decoder, grids, search, generator)
            for position, hypothesis in zip(batch.images, found, strict=True):
                row = int(data.rows[position])
                image_id = int(data.store.image_ids[row])
                captions[image_id] = vocabulary.decode(hypothesis.tokens)
                references[image_id] = data.captions[position]
                names[image_id] = data.store.file_names[row]
                if keep_looks:
                    looks[image_id] = [vocabulary.tokens[token] for token in hypothesis.tokens], hypothesis.attention
            bar.update(len(batch.images))
    scores = score_captions(captions, references)
    scores.values = {"perplexity": perplexity(total / words), **scores.values}
    language = language_of(captions, references, len(vocabulary) - len(SPECIALS), training_captions)
    if NOVEL not in language:
        scores.left_out[NOVEL] = "needs the captions that the decoder was trained on"
    return Evaluation(captions, names, references, scores, language, looks)


def language_of(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    vocabulary_words: int,
    training_captions: Collection[str] | None,
) -> dict[str, float]:
    """What captions are like, whatever the images show. Words are those of `train.vocabulary.tokenize`.

    Args:
        captions: image id -> caption.
        references: image id -> captions.
        vocabulary_words: how many words the decoder could write.
        training_captions: those the decoder was trained on.

    Returns:
        words_used: distinct words in the captions.
        vocabulary_words: as given.
        distinct_captions: distinct captions / captions.
        novel_captions: share of the captions that are none of the training captions, word by word; only with
            those given.
        mean_length: words a caption.
        mean_reference_length: words a reference.
    """
    written = [tuple(tokenize(text)) for text in captions.values()]
    lengths = [len(tokenize(text)) for texts in references.values() for text in texts]
    language: dict[str, float] = {
        "words_used": len({word for words in written for word in words}),
        "vocabulary_words": vocabulary_words,
        "distinct_captions": len(set(written)) / len(written),
    }
    if training_captions is not None:
        wanted = set(written)
        known = {words for text in training_captions if (words := tuple(tokenize(text))) in wanted}
        language[NOVEL] = sum(words not in known for words in written) / len(written)
    return language | {
        "mean_length": sum(map(len, written)) / len(written),
        "mean_reference_length": sum(lengths) / len(lengths),
    }


def write_evaluation(evaluation: Evaluation, path: Path, made_by: Mapping[str, Any]) -> list[Path]:
    """Write everything to `path`, and beside it the scores of every image and COCO's results format.

    Args:
        evaluation: what was found.
        path: of the JSON file.
        made_by: checkpoints, features, search and seed, in plain values: it stands first in the file.

    Returns:
        The files: `path`; <stem>.scores.csv, UTF-8, a line an image; <stem>.coco-results.json,
        [{"image_id": ..., "caption": ...}], as pycocotools and the COCO server read it.
    """
    scores, results = (path.with_name(f"{path.stem}.{end}") for end in ("scores.csv", "coco-results.json"))
    write_json(path, {"made_by": dict(made_by), **evaluation.as_json()})
    write_text(scores, evaluation.as_csv())
    write_json(results, [{"image_id": i, "caption": text} for i, text in evaluation.captions.items()])
    return [path, scores, results]
