"""Grids in 8 bits: half of float16's bytes, with a scale for each channel of each image.

    q = round(grid / scale),   scale = (largest value of the channel in this image) / 255

A ReLU's outputs are never negative, so all 256 levels serve them; a scale of its own for every image means that
no calibration is needed, that nothing is clipped, and that a row can be made without looking at others. The error
of a value is at most half its channel's scale, and float16's own rounding. (Scales are float16: where a channel's
largest value is below 0.015, they are that much coarser, and the error is below 1e-5 all the same.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

LEVELS = 255
_LARGEST_SCALE = np.float16(256.75)  # 255 times it is the largest product that float16 still holds
LARGEST = 65471.0  # the largest value: 255 of that scale
_TO_HALF = np.float32(2.0**-112)  # between the exponents of float32 and float16


def quantize(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grids -> 8 bits and their scales.

    Args:
        grids: (b, row, column, channel) or (b, channel), float16 or float32, from 0 to LARGEST; a refused image's
            grid is all NaN.

    Returns:
        uint8 of the same shape, and float16 (b, channel) scales; zeros and NaN for a refused image.
    """
    values = grids.astype(np.float32)
    cells = tuple(range(1, grids.ndim - 1))
    largest = values.max(axis=cells) if cells else values
    scale = (np.minimum(largest / LEVELS, _LARGEST_SCALE)).astype(np.float16)
    short = scale.astype(np.float32) * (LEVELS + 0.5) < largest  # float16 rounded it down, and 255 levels do not reach
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    divisor = scale.astype(np.float32)
    divisor[~(divisor > 0)] = 1  # a channel that is silent, or an image that was refused: all zeros
    values /= divisor.reshape(len(grids), *(1 for _ in cells), -1)
    np.rint(values, out=values)
    refused = np.isnan(scale).any(axis=1)
    values[refused] = 0
    return np.minimum(values, LEVELS, out=values).astype(np.uint8), scale


def dequantize(levels: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """8 bits and their scales -> a grid.

    Args:
        levels: (row, column, channel) or (channel,) uint8.
        scale: (channel,) float16.
        out: of the shape of `levels`, float16: what is filled.
    """
    # float32 -> float16 by moving bits, four times as fast as numpy's own: scaled by 2^-112 the exponents agree
    # (subnormal numbers too), and 13 bits of the fraction are rounded off.
    bits = (levels * (scale.astype(np.float32) * _TO_HALF)).view(np.uint32)
    bits += 0x1000
    bits >>= 13
    out.view(np.uint16)[...] = bits


def as_stored(grids: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    """Grids as they come back from a store: for uint8 with that type's error, which a decoder was trained on.

    Args:
        grids: (b, ..., channel) in the type that the store's readers return.
        stored: the type in the store.

    Returns:
        Of the same shape and type.
    """
    if stored != np.uint8:
        return grids
    out = np.empty_like(grids)
    for levels, scale, grid in zip(*quantize(grids), out, strict=True):
        dequantize(levels, scale, grid)
    return out
