"""Quantization of grids to 8 bits, with one scale per channel and image.

    q = round(grid / scale),   scale = (largest value of the channel in this image) / 255

This halves the size of float16 grids. The outputs of a ReLU are never negative, so all 256 levels are usable; with one
scale per image, no calibration is needed, no value is clipped, and rows are independent. The error of a value is at
most half the scale of its channel plus float16 rounding. (Scales are float16: where the largest value of a channel is
below 0.015, they are coarser, but the error is still below 1e-5.)
"""

from __future__ import annotations

import numpy as np

LEVELS = 255
_MAX_SCALE = np.float16(256.75)  # 255 * 256.75 is the largest product that float16 can represent
MAX_VALUE = 65471.0  # 255 * 256.75
_FLOAT16_EXPONENT_SHIFT = np.float32(2.0**-112)  # difference of the exponent biases of float32 and float16


def quantize(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize grids to 8 bits.

    Args:
        grids: (b, row, column, channel) or (b, channel), float16 or float32, from 0 to MAX_VALUE; the grid of an
            invalid image is all NaN.

    Returns:
        Levels, uint8 of the same shape, and scales, (b, channel) float16; zeros and NaN for an invalid image.
    """
    values = to_float32(grids)
    cells = tuple(range(1, grids.ndim - 1))
    largest = values.max(axis=cells) if cells else values
    scale = (np.minimum(largest / LEVELS, _MAX_SCALE)).astype(np.float16)
    # Where float16 rounded the scale down so far that 255 levels do not reach the largest value, take the next one.
    short = scale.astype(np.float32) * (LEVELS + 0.5) < largest
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    divisor = scale.astype(np.float32)
    divisor[~(divisor > 0)] = 1  # all-zero channels and invalid images get all zeros
    values /= divisor.reshape(len(grids), *(1 for _ in cells), -1)
    np.rint(values, out=values)
    values[np.isnan(scale).any(axis=1)] = 0
    return np.minimum(values, LEVELS, out=values).astype(np.uint8), scale


def to_float32(grids: np.ndarray) -> np.ndarray:
    """Return a float32 copy. For float16, torch takes a twentieth of NumPy's time."""
    if grids.dtype != np.float16 or not grids.flags.writeable:
        return grids.astype(np.float32)
    import torch  # loaded already where many grids are quantized

    copy: np.ndarray = torch.from_numpy(np.ascontiguousarray(grids)).float().numpy()
    return copy


def dequantize(levels: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Compute a grid from its levels and scales.

    Args:
        levels: (row, column, channel) or (channel,) uint8.
        scale: (channel,) float16.
        out: float16 array of the shape of `levels` to fill.
    """
    # Converts float32 to float16 with integer operations, four times as fast as NumPy: after scaling by 2^-112 the
    # exponents agree (also for subnormal numbers), and 13 bits of the mantissa are rounded off.
    bits = (levels * (scale.astype(np.float32) * _FLOAT16_EXPONENT_SHIFT)).view(np.uint32)
    bits += 0x1000
    bits >>= 13
    out.view(np.uint16)[...] = bits
