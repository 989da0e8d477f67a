"""Likeness by hand, and that the odd one out comes last."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.decoding.mbr import mean_similarity, rerank_mbr

CAPTIONS = st.lists(st.lists(st.integers(4, 7), max_size=7), min_size=1, max_size=6)


def likeness(one: list[int], other: list[int]) -> float:
    """The definition, n-gram by n-gram."""
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
def test_likeness_is_the_mean_over_the_others(captions: list[list[int]]) -> None:
    found = mean_similarity(captions)
    for i, one in enumerate(captions):
        others = [likeness(one, other) for j, other in enumerate(captions) if j != i]
        assert found[i] == pytest.approx(sum(others) / max(1, len(others)))
        assert -1e-12 <= found[i] <= 1 + 1e-12


def test_the_one_that_says_what_most_say_comes_first_and_the_odd_one_last() -> None:
    dog, puppy, cat = [4, 5, 6, 7, 8], [4, 5, 6, 7, 9], [10, 11, 12, 13, 14]
    assert rerank_mbr([cat, puppy, dog, dog]) == [2, 3, 1, 0]


def test_without_any_likeness_the_order_stays() -> None:
    assert rerank_mbr([[4], [5], [6]]) == [0, 1, 2]
    assert rerank_mbr([[4, 5]]) == [0]
    assert rerank_mbr([[], []]) == [0, 1]
