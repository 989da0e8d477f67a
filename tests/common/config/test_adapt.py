"""Training settings that follow from the size of the data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.config import TrainConfig, VocabularyConfig, adapt, describe_choice
from gridcap.common.config.adapt import chosen_settings


@pytest.mark.parametrize(
    ("images", "captions", "expected"),
    [
        (24, 48, (40, 10, 1)),
        (600, 3_000, (40, 10, 2)),
        (2_400, 12_000, (25, 10, 3)),
        (5_000, 25_000, (12, 10, 3)),
        (29_000, 145_000, (12, 58, 5)),
        (82_783, 414_113, (12, 64, 5)),
    ],
)
def test_open_settings_follow_from_the_size_of_the_data(
    images: int, captions: int, expected: tuple[int, int, int]
) -> None:
    before = TrainConfig()
    after = adapt(before, images, captions)
    assert (after.epochs, after.batch_size, after.vocabulary.min_count) == expected
    assert chosen_settings(before, after) == dict(
        zip(("epochs", "batch_size", "vocabulary.min_count"), expected, strict=True)
    )
    changed = {"epochs", "batch_size", "vocabulary"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)


@given(st.integers(1, 10**7), st.integers(1, 10**8))
def test_more_data_never_means_more_epochs_or_a_smaller_batch(images: int, captions: int) -> None:
    less, more = adapt(TrainConfig(), images, captions), adapt(TrainConfig(), images + 1, captions + 1)
    assert less.epochs >= more.epochs
    assert less.batch_size <= more.batch_size
    assert less.vocabulary.min_count <= more.vocabulary.min_count


def test_given_settings_are_kept() -> None:
    before = TrainConfig(epochs=3, batch_size=7, vocabulary=VocabularyConfig(min_count=4, max_size=100))
    after = adapt(before, 600, 3000)
    assert (after.epochs, after.batch_size, after.vocabulary.min_count, after.vocabulary.max_size) == (3, 7, 4, 100)
    assert chosen_settings(before, after) == {}
    assert describe_choice(before, 600, 3000) is None
    assert adapt(after, 1, 1) is after


def test_the_choice_is_described_in_one_line() -> None:
    assert describe_choice(TrainConfig(epochs=3), 600, 3000) == (
        "chosen for 600 images and 3,000 captions: batch_size 10, vocabulary.min_count 2 "
        "(override with --set train.KEY=VALUE)"
    )
