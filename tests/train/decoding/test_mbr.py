"""MBR reranking against the definition of the similarity."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.decoding.mbr import mean_similarity, rerank_mbr

CAPTIONS = st.lists(st.lists(st.integers(4, 7), max_size=7), min_size=1, max_size=6)


def similarity(one: list[int], other: list[int]) -> float:
    """Compute the definition n-gram by n-gram."""
    total = 0.0
    for n in range(1, 5):
        counts = []
        for caption in (one, other):
            grams = [tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)]
            counts.append({gram: grams.count(gram) for gram in grams})
        a, b = counts
        norms = [math.sqrt(sum(c * c for c in count.values())) for count in counts]
        if all(norms):
            total += sum(min(c, b[gram]) * b[gram] for gram, c in a.items() if gram in b) / (norms[0] * norms[1])
    return total / 4 * math.exp(-((len(one) - len(other)) ** 2) / 72)


@given(CAPTIONS)
def test_mean_similarity_is_the_mean_over_the_other_captions(captions: list[list[int]]) -> None:
    means = mean_similarity(captions)
    for i, one in enumerate(captions):
        others = [similarity(one, other) for j, other in enumerate(captions) if j != i]
        assert means[i] == pytest.approx(sum(others) / max(1, len(others)))
        assert -1e-12 <= means[i] <= 1 + 1e-12


def test_most_similar_caption_is_first_and_outlier_last() -> None:
    dog, puppy, cat = [4, 5, 6, 7, 8], [4, 5, 6, 7, 9], [10, 11, 12, 13, 14]
    assert rerank_mbr([cat, puppy, dog, dog]) == [2, 3, 1, 0]


def test_order_is_stable_without_similarity() -> None:
    assert rerank_mbr([[4], [5], [6]]) == [0, 1, 2]
    assert rerank_mbr([[4, 5]]) == [0]
    assert rerank_mbr([[], []]) == [0, 1]
