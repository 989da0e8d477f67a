"""Of several captions of an image the one that is most like the others.

A beam's likeliest caption is often an odd one: what many of its hypotheses say in other words is more likely to be
right than any one of them. Choosing it is minimum Bayes risk decoding (Kumar and Byrne 2004, "Minimum Bayes-Risk
Decoding for Statistical Machine Translation"); Devlin et al. 2015 (arXiv:1505.04467) choose among captions so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gridcap.train.metrics.ciderd import ORDERS, SIGMA


def rerank_mbr(captions: Sequence[Sequence[int]]) -> list[int]:
    """The positions of an image's captions, the one most like the others first; ties stay in the order given."""
    order: list[int] = np.argsort(-mean_similarity(captions), kind="stable").tolist()
    return order


def mean_similarity(captions: Sequence[Sequence[int]]) -> np.ndarray:
    """How like the others each of some captions is.

    Two are compared as CIDEr-D does (arXiv:1411.5726, section 7), all n-grams weighing alike: the mean over n = 1 ... 4
    of the cosine of their counts, the one's clipped at the other's, times exp(-(difference in length)^2 / (2 * 6^2)).

    Args:
        captions: K of them, as word ids.

    Returns:
        (K,) float64 from 0 to 1; 0 for one alone.
    """
    lengths = np.array([len(caption) for caption in captions], np.float64)
    alike = np.zeros((len(captions), len(captions)))
    for order in range(1, ORDERS + 1):
        grams = [[tuple(c[i : i + order]) for i in range(len(c) - order + 1)] for c in captions]
        number = {gram: i for i, gram in enumerate(dict.fromkeys(gram for some in grams for gram in some))}
        counts = np.zeros((len(captions), len(number)))
        for row, some in enumerate(grams):
            np.add.at(counts[row], [number[gram] for gram in some], 1)
        norms = np.sqrt((counts**2).sum(1)).clip(min=1)
        shared = (np.minimum(counts[:, None], counts[None]) * counts[None]).sum(-1)
        alike += shared / (norms[:, None] * norms[None]) / ORDERS
    alike *= np.exp(-((lengths[:, None] - lengths[None]) ** 2) / (2 * SIGMA**2))
    np.fill_diagonal(alike, 0)
    return np.asarray(alike.sum(1) / max(1, len(captions) - 1))
