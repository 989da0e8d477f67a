"""Row selection agrees with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.store.selection import select_rows

COUNTS = st.integers(0, 12)
BOUNDS = st.none() | st.integers(-15, 15)


@given(COUNTS, BOUNDS, BOUNDS, st.none() | st.integers(-3, 3).filter(bool))
def test_slices(count: int, start: int | None, stop: int | None, step: int | None) -> None:
    key = slice(start, stop, step)
    assert select_rows(key, count).tolist() == np.arange(count)[key].tolist()


@given(COUNTS, st.lists(st.integers(-14, 13)), st.sampled_from([list, np.int64, np.int8]))
def test_integers(count: int, rows: list[int], kind: type) -> None:
    key = rows if kind is list else np.array(rows, kind)
    try:
        want = np.arange(count)[np.array(rows, np.int64)].tolist()
    except IndexError:
        with pytest.raises(IndexError, match="out of range"):
            select_rows(key, count)
    else:
        got = select_rows(key, count)
        assert (got.dtype, got.tolist()) == (np.int64, want)


@given(COUNTS, st.lists(st.booleans(), min_size=1))
def test_masks(count: int, mask: list[bool]) -> None:
    if len(mask) == count:
        assert select_rows(np.array(mask), count).tolist() == np.flatnonzero(mask).tolist()
    else:
        with pytest.raises(IndexError, match="mask"):
            select_rows(mask, count)


def test_large_unsigned_integers_do_not_wrap_around() -> None:
    with pytest.raises(IndexError, match="out of range"):
        select_rows(np.array([2**64 - 1], np.uint64), 5)
