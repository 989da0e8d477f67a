"""Sufficient statistics: per-image numbers whose sums over any set of images determine its corpus metrics.

BLEU, METEOR, and perplexity are not means over images: they divide sums of counts. With the counts of every image
stored, the metrics of a resample are a matrix product and a formula, so a bootstrap does not score any caption again.

The document frequencies of CIDEr stay those of the complete data set. They are part of the metric, like the references,
and the same for all systems. A resample contains only 63% of the images, some of them several times; frequencies
counted in it would shift all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BLEU_ORDERS = 4
# Constants of pycocoevalcap that prevent divisions by zero.
_TINY, _SMALL = 1e-15, 1e-9
# METEOR 1.5, English, task "rank" (Denkowski and Lavie 2014); the matches are exact, stem, synonym, and paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of N images.

    Attributes:
        tables: (N, k) float64 by name. "BLEU", "METEOR", and "perplexity" are in the formats of `bleu`, `meteor`, and
            `perplexity`. Any other name is a metric that is the mean over the images, with k = 1.
    """

    tables: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return N."""
        return len(next(iter(self.tables.values())))

    def metrics(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Compute all corpus metrics of multisets of images.

        Args:
            counts: (R, N) number of times that each of R multisets contains each image.

        Returns:
            metric -> (R,) float64.
        """
        sums = counts.astype(np.float64) @ np.concatenate([*self.tables.values()], axis=1)
        ends = np.cumsum([table.shape[1] for table in self.tables.values()])
        images = counts.sum(1)
        metrics: dict[str, np.ndarray] = {}
        for name, part in zip(self.tables, np.split(sums, ends[:-1], axis=1), strict=True):
            metrics |= FORMULAS[name](part) if name in FORMULAS else {name: part[:, 0] / images}
        return metrics


def bleu_table(comparisons: Sequence[Mapping[str, object]]) -> np.ndarray:
    """Return the statistics of BLEU from the `ctest` of pycocoevalcap's BleuScorer: (N, 10), see `bleu`."""
    rows = []
    for each in comparisons:
        length = each["testlen"]
        closest = min((abs(reference - length), reference) for reference in each["reflen"])[1]  # type: ignore[attr-defined]
        rows.append([length, closest, *each["guess"], *each["correct"]])  # type: ignore[misc]
    return np.array(rows, np.float64)


def bleu(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Compute BLEU-1 to BLEU-4 as pycocoevalcap does.

    Args:
        sums: (R, 10): length, length of the closest reference, number of n-grams (4), number of matches (4).
    """
    length, reference = sums[:, 0], sums[:, 1]
    guesses, correct = sums[:, 2 : 2 + BLEU_ORDERS], sums[:, 2 + BLEU_ORDERS :]
    precision = np.cumprod((correct + _TINY) / (guesses + _SMALL), axis=1)
    ratio = (length + _TINY) / (reference + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return {f"BLEU-{n + 1}": precision[:, n] ** (1 / (n + 1)) * brevity for n in range(BLEU_ORDERS)}


def meteor(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Compute METEOR as version 1.5 does with `-l en -norm`.

    Args:
        sums: (R, 23), the numbers that the program prints for SCORE: words and function words of the caption and the
            reference (4); for each kind of match, the matched content words of both and the matched function words of
            both (16); chunks; and the matched words of both.
    """
    length, reference, function, reference_function = sums[:, :4].T
    matches = sums[:, 4:20].reshape(-1, len(_MATCH_WEIGHTS), 4)
    content_weight = np.array([_DELTA, _DELTA, 1 - _DELTA, 1 - _DELTA])
    weighted = np.einsum("rmk,m,k->rk", matches, _MATCH_WEIGHTS, content_weight)
    precision = _divide(weighted[:, 0] + weighted[:, 2], _DELTA * (length - function) + (1 - _DELTA) * function)
    recall = _divide(
        weighted[:, 1] + weighted[:, 3], _DELTA * (reference - reference_function) + (1 - _DELTA) * reference_function
    )
    mean = _divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    chunks, matched, reference_matched = sums[:, 20:].T
    fragmentation = _divide(chunks, (matched + reference_matched) / 2)
    total = matches.sum(1)
    equal = (total[:, 0] + total[:, 2] == length) & (total[:, 1] + total[:, 3] == reference) & (chunks == 1)
    return {"METEOR": mean * (1 - _GAMMA * np.where(equal, 0, fragmentation) ** _BETA)}


def perplexity(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the perplexity of the references.

    Args:
        sums: (R, 2): loss in nats and number of tokens, over all references.
    """
    with np.errstate(over="ignore"):
        return {"perplexity": np.exp(sums[:, 0] / sums[:, 1])}


FORMULAS: Mapping[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "BLEU": bleu,
    "METEOR": meteor,
    "perplexity": perplexity,
}


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    quotient: np.ndarray = np.divide(a, b, out=np.zeros_like(a), where=b != 0)
    return quotient
