"""Minimum Bayes risk (MBR) reranking: choose the hypothesis that is most similar to the others.

Kumar and Byrne 2004, "Minimum Bayes-Risk Decoding for Statistical Machine Translation"; called consensus reranking
for captions by Devlin et al. 2015 (arXiv:1505.04467). Content that many hypotheses share is more often right than the
single most likely hypothesis.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from gridcap.train.metrics.ciderd import ORDERS, SIGMA


def rerank_mbr(captions: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return the indices of an image's captions, sorted by decreasing `mean_similarity`; ties keep their order."""
    order: list[int] = np.argsort(-mean_similarity(captions), kind="stable").tolist()
    return order


def mean_similarity(captions: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Return the mean similarity of each caption to the others.

    The similarity is CIDEr-D (arXiv:1411.5726, section 7) with equal n-gram weights: the mean over n = 1 ... 4 of the
    cosine of the n-gram counts, with the candidate's counts clipped at the reference's, times
    exp(-(difference in length)^2 / (2 * 6^2)).

    Args:
        captions: K captions as token ids, or as words.

    Returns:
        (K,) float64 in [0, 1]; 0 for a single caption.
    """
    lengths = np.array([len(caption) for caption in captions], np.float64)
    similarity = np.zeros((len(captions), len(captions)))
    for order in range(1, ORDERS + 1):
        grams = [[tuple(c[i : i + order]) for i in range(len(c) - order + 1)] for c in captions]
        index = {gram: i for i, gram in enumerate(dict.fromkeys(gram for caption in grams for gram in caption))}
        counts = np.zeros((len(captions), len(index)))
        for row, caption in enumerate(grams):
            np.add.at(counts[row], [index[gram] for gram in caption], 1)
        norms = np.sqrt((counts**2).sum(1)).clip(min=1)
        clipped = (np.minimum(counts[:, None], counts[None]) * counts[None]).sum(-1)
        similarity += clipped / (norms[:, None] * norms[None]) / ORDERS
    similarity *= np.exp(-((lengths[:, None] - lengths[None]) ** 2) / (2 * SIGMA**2))
    np.fill_diagonal(similarity, 0)
    return np.asarray(similarity.sum(1) / max(1, len(captions) - 1))
