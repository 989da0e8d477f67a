import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gridcap.train.data.order import EpochOrder

BLOCK, WINDOW = 256, 4096  # rows side by side, and rows that are mixed
SHUFFLES = ("rows", "blocks")
shuffles = st.sampled_from(SHUFFLES)
NUMBERS = st.integers(0, 2**31)


def whole(count, seed=0, epoch=0, shuffle="rows"):
    return EpochOrder(count, seed, epoch, shuffle)[0:count]


def stretches(rows, count):
    """How many runs of neighbors some rows are; the first and the last of the store are neighbors too."""
    ordered = np.sort(rows)
    gaps = np.diff(ordered, append=ordered[0] + count)
    return int((gaps > 1).sum())


# --- a permutation that needs no list ---


@given(st.integers(1, 3000), NUMBERS, NUMBERS, shuffles)
def test_is_a_permutation(count, seed, epoch, shuffle):
    order = whole(count, seed, epoch, shuffle)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 4095, 4096, 4097, 4352, 3 * 4096 + 5, 20_000])
def test_is_a_permutation_at_the_borders_of_blocks_and_windows(count, shuffle):
    assert np.array_equal(np.sort(whole(count, 1, 2, shuffle)), np.arange(count))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_chunks_of_a_million_have_no_repeats_and_stay_in_range(shuffle):
    order = EpochOrder(10**6, 4, 5, shuffle)
    chunks = [order[start : start + 3000] for start in (0, 123_456, 4096 * 100 - 1, 500_001, 10**6 - 3000)]
    seen = np.concatenate(chunks)
    assert len(seen) == len(set(seen.tolist())) == 15_000
    assert seen.min() >= 0
    assert seen.max() < 10**6


@given(st.data(), st.integers(1, 20_000), NUMBERS, NUMBERS, shuffles)
@hypothesis_settings(max_examples=60)
def test_a_slice_is_that_part_of_the_whole(data, count, seed, epoch, shuffle):
    start = data.draw(st.integers(0, count), label="start")
    stop = data.draw(st.integers(start, count + 300), label="stop")
    part = EpochOrder(count, seed, epoch, shuffle)[start:stop]
    assert part.dtype == np.int64
    assert np.array_equal(part, whole(count, seed, epoch, shuffle)[start:stop])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_slice_of_a_million_million_needs_no_array_of_that_size(shuffle):
    count = 10**12  # its list would be 8 TB
    order = EpochOrder(count, 3, 1, shuffle)
    for start in (0, count // 2 + 17, count - 500):
        part = order[start : start + 500]
        assert len(set(part.tolist())) == 500
        assert 0 <= part.min() <= part.max() < count
    spread = (
        order[0:500] if shuffle == "rows" else np.array([order[i : i + 1][0] for i in range(0, count, count // 99)])
    )
    assert 0.3 < spread.mean() / count < 0.7, "they come from everywhere"


def test_nothing_is_in_an_order_of_nothing():
    for shuffle in SHUFFLES:
        assert EpochOrder(0, 0, 0, shuffle)[0:5].tolist() == []
        assert EpochOrder(7, 0, 0, shuffle)[7:9].tolist() == []


# --- what it depends on ---


@given(st.integers(20, 600), NUMBERS, NUMBERS, NUMBERS, shuffles)
def test_differs_by_epoch_and_by_seed(count, seed, a, b, shuffle):
    same = a == b
    assert np.array_equal(whole(count, seed, a, shuffle), whole(count, seed, b, shuffle)) == same
    assert np.array_equal(whole(count, a, seed, shuffle), whole(count, b, seed, shuffle)) == same


def test_seed_and_epoch_are_not_the_same_number_twice():
    assert whole(50, 1, 2).tolist() != whole(50, 2, 1).tolist()
    assert whole(50, 3, 0).tolist() != whole(50, 0, 3).tolist()


@given(st.integers(1, 500), NUMBERS, NUMBERS, shuffles)
def test_depends_on_nothing_but_its_fields(count, seed, epoch, shuffle):
    before = whole(count, seed, epoch, shuffle)
    np.random.seed(epoch % 1000)
    torch.manual_seed(epoch)
    random.seed(epoch)
    whole(count + 1, seed, epoch + 1, shuffle)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert np.array_equal(whole(count, seed, epoch, shuffle), before)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_is_the_same_in_every_version():
    """A resume on another machine needs the same order: these numbers must never change."""
    assert whole(10, 0, 0).tolist() == [8, 2, 9, 7, 4, 5, 6, 0, 1, 3]
    assert whole(10, 3, 7).tolist() == [5, 2, 9, 7, 3, 4, 6, 0, 1, 8]
    assert whole(10, 3, 7, "blocks").tolist() == [2, 4, 8, 3, 9, 5, 6, 0, 7, 1]
    assert EpochOrder(100_000, 3, 7)[70_000:70_004].tolist() == [93259, 16739, 75754, 39780]
    assert EpochOrder(100_000, 3, 7, "blocks")[70_000:70_004].tolist() == [39679, 24909, 60161, 56550]


# --- rows: as good as drawn by chance ---


@pytest.mark.parametrize("count", [1000, 1024, 1025, 50_000])
def test_rows_move_a_third_of_the_whole_on_average(count):
    for epoch in range(3):
        moved = np.abs(whole(count, 9, epoch) - np.arange(count)).mean()
        assert moved == pytest.approx(count / 3, rel=0.08)


@pytest.mark.parametrize("count", [97, 256, 1000])
def test_every_row_comes_everywhere_equally_often(count):
    """Chi-square of which tenth of the epoch a row of which tenth of the store comes in; 81 degrees of freedom."""
    epochs, parts = 400, 10
    places = np.arange(count) * parts // count
    seen = np.zeros((parts, parts))
    for epoch in range(epochs):
        np.add.at(seen, (places, whole(count, 7, epoch) * parts // count), 1)
    size = np.bincount(places)
    expected = epochs * np.outer(size, size) / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert 40 < chi_square < 140, "0.1% of chance is above 126"


@pytest.mark.parametrize("count", [1000, 1024, 20_000])
def test_neighbours_in_the_store_are_no_neighbours_in_the_epoch(count):
    steps = np.concatenate([np.diff(whole(count, 5, epoch)) for epoch in range(5)])
    _, often = np.unique(steps, return_counts=True)
    assert often.max() < 5 * 12, "no step from one row to the next is a habit; by chance it is taken 5 times"
    close = (np.abs(steps) == 1).sum()
    assert close < 40, "by chance 2 an epoch"
    # The order of neighbors is a coin's toss, and says nothing about the next two.
    up = steps > 0
    assert up.mean() == pytest.approx(0.5, abs=0.03)
    assert (up[1:] == up[:-1]).mean() == pytest.approx(1 / 3, abs=0.04)


def test_epochs_have_nothing_to_do_with_one_another():
    places = np.array([np.argsort(whole(2000, 0, epoch)) for epoch in range(8)])
    others = np.corrcoef(places) - np.eye(8)
    assert np.abs(others).max() < 0.12


# --- blocks: whole stretches are read ---


@pytest.mark.parametrize("count", [50_000, 16 * 4096, 100_003])
def test_a_window_of_blocks_touches_few_stretches(count):
    for epoch in range(3):
        order = whole(count, 2, epoch, "blocks")
        for start in range(0, count, WINDOW):
            window = order[start : start + WINDOW]
            assert stretches(window, count) <= 16
            assert len(set((window // BLOCK).tolist())) <= 33, "a block begins anywhere"


def test_the_rows_of_a_window_are_mixed():
    order = whole(50_000, 2, 0, "blocks")
    for start in (0, 5 * WINDOW):
        window = order[start : start + WINDOW]
        blocks = np.unique(window[:BLOCK] // BLOCK)
        assert len(blocks) > 16, "the first rows come from all blocks of the window"
        assert (np.diff(window) == 1).sum() < 20
        inside = np.argsort(np.argsort(window))  # numbered within the window
        assert np.abs(inside - np.arange(WINDOW)).mean() == pytest.approx(WINDOW / 3, rel=0.08)


def test_the_blocks_of_a_window_come_from_all_over_the_store():
    order = whole(200_000, 1, 1, "blocks")
    means = [order[start : start + WINDOW].mean() / 200_000 for start in range(0, 190_000, WINDOW)]
    assert np.abs(np.array(means) - 0.5).max() < 0.35, "16 blocks drawn by chance"


def borders(order, count):
    """Where the stretches of the first window begin, within a block's length."""
    ordered = np.sort(order[:WINDOW])
    begins = ordered[np.diff(ordered, prepend=ordered[-1] - count) > 1]
    return {int(begin % BLOCK) for begin in begins}


def test_blocks_begin_elsewhere_each_epoch():
    count = 40 * WINDOW  # whole blocks, so that all of an epoch's borders are alike
    found = [borders(EpochOrder(count, 0, epoch, "blocks")[0:WINDOW], count) for epoch in range(12)]
    assert all(len(begins) == 1 for begins in found)
    assert len(set.union(*found)) > 8


def test_the_short_block_holds_other_rows_each_epoch():
    """It comes in the last window always; so which rows it holds must change."""
    count = 5 * WINDOW + 100
    last = [EpochOrder(count, 0, epoch, "blocks")[5 * WINDOW : count] for epoch in range(10)]
    assert len({int(rows.min()) for rows in last}) == 10
    assert sum(count - 1 in rows for rows in last) < 4
