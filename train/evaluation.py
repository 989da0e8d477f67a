"""The result of an evaluation, and its files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gridcap.common.files import write_json, write_text
from gridcap.train.metrics.bootstrap import LEVEL, RESAMPLES, SEED
from gridcap.train.metrics.coco import Scores


@dataclass(frozen=True)
class Evaluation:
    """The captions of a data set and their scores.

    Attributes:
        captions: image id -> caption.
        file_names: image id -> file name.
        references: image id -> captions.
        scores: metrics; the first value is the perplexity of the references under teacher forcing.
        statistics: statistics of the captions by name; see `caption_statistics`.
        attention: image id -> tokens of its caption and their attention weights, (T, P) float32 or None; empty unless
            requested.
    """

    captions: dict[int, str]
    file_names: dict[int, str]
    references: dict[int, tuple[str, ...]]
    scores: Scores
    statistics: dict[str, float]
    attention: dict[int, tuple[list[str], np.ndarray | None]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything except the scores per image, as plain values."""
        return {
            "metrics": {name: _finite(value) for name, value in self.scores.values.items()},
            "intervals": {name: [*map(_finite, ends)] for name, ends in self.scores.intervals.items()},
            "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            "statistics": self.statistics,
            "tokenizer": self.scores.tokenizer,
            "unavailable": self.scores.unavailable,
            "captions": [
                {"image_id": i, "file_name": self.file_names[i], "caption": text, "references": [*self.references[i]]}
                for i, text in self.captions.items()
            ],
        }

    def as_csv(self) -> str:
        """Return one line per image: image_id, file_name, caption, and the score of every metric."""
        metrics = [*dict.fromkeys(name for each in self.scores.per_image.values() for name in each)]
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["image_id", "file_name", "caption", *metrics])
        for i, caption in self.captions.items():
            scores = self.scores.per_image[i]
            rows.writerow([i, self.file_names[i], caption, *(_format_score(scores.get(m)) for m in metrics)])
        return text.getvalue()


def evaluation_files(path: Path) -> list[Path]:
    """Return the files that `write_evaluation` writes."""
    return [path, *(path.with_name(f"{path.stem}.{end}") for end in ("scores.csv", "coco-results.json"))]


def write_evaluation(evaluation: Evaluation, path: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write an evaluation as three files.

    Args:
        evaluation: captions and scores.
        path: JSON file with everything except the scores per image.
        settings: checkpoints, features, decoding, and seed, as plain values; the first entry of the file.

    Returns:
        `path`; <stem>.scores.csv (UTF-8, one line per image); and <stem>.coco-results.json
        ([{"image_id": ..., "caption": ...}], the results format of pycocotools and the COCO server).
    """
    _, scores, results = files = evaluation_files(path)
    write_json(path, {"settings": dict(settings), **evaluation.as_json()})
    write_text(scores, evaluation.as_csv())
    write_json(results, [{"image_id": i, "caption": text} for i, text in evaluation.captions.items()])
    return files


def _finite(value: float) -> float | None:
    """Return a value that JSON can represent."""
    return value if math.isfinite(value) else None


def _format_score(score: float | None) -> str:
    """Return six decimals, or an empty string for a score that was not computed."""
    return "" if score is None else f"{score:.6f}"
