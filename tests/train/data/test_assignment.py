"""Splitting one store into training, validation, and test images."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcap.common.errors import CheckpointError
from gridcap.train.data.assignment import FILE, assign_splits, read_assignment

fractions = st.floats(0, 0.49)


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60), fractions, fractions, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_groups_stay_together_and_the_order_does_not_matter(
    groups: list[str], val: float, test: float, seed: int
) -> None:
    assigned = assign_splits(groups, val, test, seed)
    split_of: dict[str, str] = {}
    for group, split in zip(groups, assigned, strict=True):
        assert split_of.setdefault(group, split) == split
    shuffled = random.Random(0).sample(groups, len(groups))
    assert assign_splits(shuffled, val, test, seed) == [split_of[group] for group in shuffled]


def test_shares_are_exact_without_groups() -> None:
    names = [f"{i}.jpg" for i in range(100)]
    assigned = assign_splits(names, 0.1, 0.2, 0)
    assert Counter(assigned) == {"train": 70, "val": 10, "test": 20}
    assert assign_splits(names, 0.1, 0.2, 1) != assigned


def test_assignment_files_are_checked(tmp_path: Any) -> None:
    assert read_assignment(tmp_path) is None
    (tmp_path / FILE).write_text('{"a.jpg": "train", "b.jpg": "test"}')
    assert read_assignment(tmp_path) == {"a.jpg": "train", "b.jpg": "test"}
    for content in ("{", "[]", '{"a.jpg": "other"}', '{"a.jpg": 1}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(CheckpointError, match=r"splits\.json: corrupted"):
            read_assignment(tmp_path)
