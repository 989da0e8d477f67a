"""Axis layouts of imported arrays."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

Layout = Literal["hwc", "chw", "nc", "c"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_AXES = {"hwc": 3, "chw": 3, "nc": 2, "c": 1}
_BY_AXES: dict[int, Layout] = {3: "hwc", 2: "nc", 1: "c"}


class LayoutError(ValueError):
    """An array does not have a plausible or supported layout."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)  # both are in `args`, so that the exception can be pickled
        self.hint = hint

    def __str__(self) -> str:
        return str(self.args[0])


def as_grid(array: np.ndarray, layout: Layout | None = None) -> np.ndarray:
    """Return an array as a grid (rows, columns, channels).

    Args:
        array: numbers of any dtype.
        layout: "hwc" (rows, columns, channels), "chw" (channels, rows, columns), "nc" (cells, channels), or "c"
            (channels). None chooses "hwc", "nc", or "c" by the number of axes, and rejects arrays with fewer channels
            than rows, columns, or cells: those are most likely channel-first.

    Raises:
        LayoutError: the layout is implausible or does not fit the shape, or cells do not form a square.
    """
    if array.dtype.kind not in "fiu":
        raise LayoutError(f"contains {array.dtype}, not numbers", "save arrays of numbers")
    detected = layout or _BY_AXES.get(array.ndim)
    shape = array.shape
    if detected is None or array.size == 0:
        raise LayoutError(
            f"has the shape {shape}, not (rows, columns, channels), (cells, channels), or (channels,)",
            "remove axes such as that of a batch of one, and save one array per image",
        )
    if detected == "c" and array.size == max(shape):
        return array.reshape(1, 1, -1)
    if array.ndim != _AXES[detected]:
        raise LayoutError(
            f"has the shape {shape}, but --layout {detected} needs {_AXES[detected]} axes", "pass another --layout"
        )
    if layout is None:
        _check_plausible(shape)
    if detected == "chw":
        return array.transpose(1, 2, 0)
    return array if detected == "hwc" else _square_cells(array)


def _check_plausible(shape: tuple[int, ...]) -> None:
    """Raise LayoutError for shapes with fewer channels than rows, columns, or cells."""
    if max(shape) == shape[-1]:
        return
    if len(shape) == 3:
        raise LayoutError(
            f"has the shape {shape}: read as (rows, columns, channels), it has only {shape[-1]} channels"
            + (f"; it looks like (channels, rows, columns) with {shape[0]} channels" if max(shape) == shape[0] else ""),
            "pass --layout chw if channels come first, or --layout hwc if the shape is right",
        )
    raise LayoutError(
        f"has the shape {shape}: read as (cells, channels), it has only {shape[-1]} channels; "
        f"it looks like (channels, cells)",
        "transpose the arrays to (cells, channels), or pass --layout nc if the shape is right",
    )


def _square_cells(array: np.ndarray) -> np.ndarray:
    """Reshape (cells, channels) to a square grid."""
    cells = len(array)
    side = math.isqrt(cells)
    if side**2 != cells:
        raise LayoutError(
            f"has the shape {array.shape}: {cells} cells do not form a square grid",
            "use grid features; adaptive region features (10 to 100 regions per image) are not supported",
        )
    return array.reshape(side, side, -1)
