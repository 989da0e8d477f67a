"""Row selection with NumPy's indexing rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rows = slice | range | Sequence[int] | Sequence[bool] | np.ndarray


def select_rows(rows: Rows, count: int) -> np.ndarray:
    """Resolve a row selection.

    Args:
        rows: a slice, integers (negative ones count from the end), or a boolean mask with one value per row.
        count: number of rows.

    Returns:
        Row numbers from 0, (m,) int64.

    Raises:
        IndexError: a row is out of range, the mask has another length, or the selection has another type.
    """
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count), dtype=np.int64)
    selected = np.asarray(rows)
    if selected.ndim != 1:
        raise IndexError(f"rows must be one-dimensional, got {selected.ndim} axes")
    if selected.dtype == bool:
        if len(selected) != count:
            raise IndexError(f"the boolean mask has {len(selected)} values for {count} rows")
        return np.flatnonzero(selected)
    if not len(selected):
        return np.empty(0, np.int64)
    if selected.dtype.kind not in "iu":
        raise IndexError(f"rows must be a slice, integers, or a boolean mask, got {selected.dtype}")
    low, high = int(selected.min()), int(selected.max())
    if low < -count or high >= count:
        raise IndexError(f"row {low if low < -count else high} is out of range for {count} rows")
    selected = selected.astype(np.int64, copy=False)
    return np.where(selected < 0, selected + count, selected) if low < 0 else selected
