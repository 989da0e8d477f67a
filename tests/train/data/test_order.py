import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gridcap.train.data.order import EpochOrder

BLOCK, WINDOW = 256, 4096  # rows per block and per window
SHUFFLES = ("rows", "blocks")
shuffles = st.sampled_from(SHUFFLES)
NUMBERS = st.integers(0, 2**31)


def whole(count, seed=0, epoch=0, shuffle="rows"):
    return EpochOrder(count, seed, epoch, shuffle)[0:count]


def runs(rows, count):
    """Return the number of runs of consecutive rows; the last row of the store is followed by the first."""
    ordered = np.sort(rows)
    gaps = np.diff(ordered, append=ordered[0] + count)
    return int((gaps > 1).sum())


# --- permutation ---


@given(st.integers(1, 3000), NUMBERS, NUMBERS, shuffles)
def test_is_a_permutation(count, seed, epoch, shuffle):
    order = whole(count, seed, epoch, shuffle)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 4095, 4096, 4097, 4352, 3 * 4096 + 5, 20_000])
def test_is_a_permutation_at_block_and_window_boundaries(count, shuffle):
    assert np.array_equal(np.sort(whole(count, 1, 2, shuffle)), np.arange(count))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_chunks_of_a_million_rows_are_distinct_and_in_range(shuffle):
    order = EpochOrder(10**6, 4, 5, shuffle)
    chunks = [order[start : start + 3000] for start in (0, 123_456, 4096 * 100 - 1, 500_001, 10**6 - 3000)]
    seen = np.concatenate(chunks)
    assert len(seen) == len(set(seen.tolist())) == 15_000
    assert seen.min() >= 0
    assert seen.max() < 10**6


@given(st.data(), st.integers(1, 20_000), NUMBERS, NUMBERS, shuffles)
@hypothesis_settings(max_examples=60)
def test_slices_equal_the_whole_order(data, count, seed, epoch, shuffle):
    start = data.draw(st.integers(0, count), label="start")
    stop = data.draw(st.integers(start, count + 300), label="stop")
    part = EpochOrder(count, seed, epoch, shuffle)[start:stop]
    assert part.dtype == np.int64
    assert np.array_equal(part, whole(count, seed, epoch, shuffle)[start:stop])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_slices_of_huge_orders_need_little_memory(shuffle):
    count = 10**12  # 8 TB if it were stored
    order = EpochOrder(count, 3, 1, shuffle)
    for start in (0, count // 2 + 17, count - 500):
        part = order[start : start + 500]
        assert len(set(part.tolist())) == 500
        assert 0 <= part.min() <= part.max() < count
    spread = (
        order[0:500] if shuffle == "rows" else np.array([order[i : i + 1][0] for i in range(0, count, count // 99)])
    )
    assert 0.3 < spread.mean() / count < 0.7, "rows come from the whole store"


def test_empty_orders_and_slices():
    for shuffle in SHUFFLES:
        assert EpochOrder(0, 0, 0, shuffle)[0:5].tolist() == []
        assert EpochOrder(7, 0, 0, shuffle)[7:9].tolist() == []


# --- dependencies ---


@given(st.integers(20, 600), NUMBERS, NUMBERS, NUMBERS, shuffles)
def test_differs_by_epoch_and_by_seed(count, seed, a, b, shuffle):
    same = a == b
    assert np.array_equal(whole(count, seed, a, shuffle), whole(count, seed, b, shuffle)) == same
    assert np.array_equal(whole(count, a, seed, shuffle), whole(count, b, seed, shuffle)) == same


def test_seed_and_epoch_are_not_interchangeable():
    assert whole(50, 1, 2).tolist() != whole(50, 2, 1).tolist()
    assert whole(50, 3, 0).tolist() != whole(50, 0, 3).tolist()


@given(st.integers(1, 500), NUMBERS, NUMBERS, shuffles)
def test_depends_only_on_its_fields_and_changes_no_random_state(count, seed, epoch, shuffle):
    before = whole(count, seed, epoch, shuffle)
    np.random.seed(epoch % 1000)
    torch.manual_seed(epoch)
    random.seed(epoch)
    whole(count + 1, seed, epoch + 1, shuffle)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert np.array_equal(whole(count, seed, epoch, shuffle), before)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_order_is_stable_across_versions():
    """Resuming on another machine needs the same order: these numbers must never change."""
    assert whole(10, 0, 0).tolist() == [8, 2, 9, 7, 4, 5, 6, 0, 1, 3]
    assert whole(10, 3, 7).tolist() == [5, 2, 9, 7, 3, 4, 6, 0, 1, 8]
    assert whole(10, 3, 7, "blocks").tolist() == [2, 4, 8, 3, 9, 5, 6, 0, 7, 1]
    assert EpochOrder(100_000, 3, 7)[70_000:70_004].tolist() == [93259, 16739, 75754, 39780]
    assert EpochOrder(100_000, 3, 7, "blocks")[70_000:70_004].tolist() == [39679, 24909, 60161, 56550]


# --- shuffle=rows: statistically random ---


@pytest.mark.parametrize("count", [1000, 1024, 1025, 50_000])
def test_rows_move_by_a_third_of_the_count_on_average(count):
    for epoch in range(3):
        moved = np.abs(whole(count, 9, epoch) - np.arange(count)).mean()
        assert moved == pytest.approx(count / 3, rel=0.08)


@pytest.mark.parametrize("count", [97, 256, 1000])
def test_positions_are_uniform(count):
    """Chi-square test of the tenth of the epoch against the tenth of the store; 81 degrees of freedom."""
    epochs, parts = 400, 10
    places = np.arange(count) * parts // count
    seen = np.zeros((parts, parts))
    for epoch in range(epochs):
        np.add.at(seen, (places, whole(count, 7, epoch) * parts // count), 1)
    size = np.bincount(places)
    expected = epochs * np.outer(size, size) / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert 40 < chi_square < 140, "the 99.9% quantile is 126"


@pytest.mark.parametrize("count", [1000, 1024, 20_000])
def test_neighboring_rows_are_not_neighbors_in_the_epoch(count):
    steps = np.concatenate([np.diff(whole(count, 5, epoch)) for epoch in range(5)])
    _, often = np.unique(steps, return_counts=True)
    assert often.max() < 5 * 12, "no difference is preferred; 5 occurrences are expected"
    close = (np.abs(steps) == 1).sum()
    assert close < 40, "2 per epoch are expected"
    # The order of two successive rows is random and independent of the next two.
    up = steps > 0
    assert up.mean() == pytest.approx(0.5, abs=0.03)
    assert (up[1:] == up[:-1]).mean() == pytest.approx(1 / 3, abs=0.04)


def test_epochs_are_uncorrelated():
    places = np.array([np.argsort(whole(2000, 0, epoch)) for epoch in range(8)])
    others = np.corrcoef(places) - np.eye(8)
    assert np.abs(others).max() < 0.12


# --- shuffle=blocks: sequential reads ---


@pytest.mark.parametrize("count", [50_000, 16 * 4096, 100_003])
def test_a_window_reads_few_runs_of_rows(count):
    for epoch in range(3):
        order = whole(count, 2, epoch, "blocks")
        for start in range(0, count, WINDOW):
            window = order[start : start + WINDOW]
            assert runs(window, count) <= 16
            assert len(set((window // BLOCK).tolist())) <= 33, "blocks start at any row"


def test_rows_of_a_window_are_mixed():
    order = whole(50_000, 2, 0, "blocks")
    for start in (0, 5 * WINDOW):
        window = order[start : start + WINDOW]
        blocks = np.unique(window[:BLOCK] // BLOCK)
        assert len(blocks) > 16, "the first rows come from all blocks of the window"
        assert (np.diff(window) == 1).sum() < 20
        inside = np.argsort(np.argsort(window))  # numbered within the window
        assert np.abs(inside - np.arange(WINDOW)).mean() == pytest.approx(WINDOW / 3, rel=0.08)


def test_blocks_of_a_window_come_from_the_whole_store():
    order = whole(200_000, 1, 1, "blocks")
    means = [order[start : start + WINDOW].mean() / 200_000 for start in range(0, 190_000, WINDOW)]
    assert np.abs(np.array(means) - 0.5).max() < 0.35, "16 random blocks"


def boundaries(order, count):
    """Return the offsets within a block at which the runs of the first window start."""
    ordered = np.sort(order[:WINDOW])
    begins = ordered[np.diff(ordered, prepend=ordered[-1] - count) > 1]
    return {int(begin % BLOCK) for begin in begins}


def test_block_boundaries_change_every_epoch():
    count = 40 * WINDOW  # whole blocks, so that all boundaries of an epoch have the same offset
    offsets = [boundaries(EpochOrder(count, 0, epoch, "blocks")[0:WINDOW], count) for epoch in range(12)]
    assert all(len(begins) == 1 for begins in offsets)
    assert len(set.union(*offsets)) > 8


def test_short_block_contains_different_rows_every_epoch():
    """The short block is always in the last window, so its rows must change."""
    count = 5 * WINDOW + 100
    last = [EpochOrder(count, 0, epoch, "blocks")[5 * WINDOW : count] for epoch in range(10)]
    assert len({int(rows.min()) for rows in last}) == 10
    assert sum(count - 1 in rows for rows in last) < 4
