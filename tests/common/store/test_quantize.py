"""8-bit quantization: errors of at most half a level, no clipping, NaN for invalid images, independent rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gridcap.common.store.codecs import find_codec
from gridcap.common.store.quantize import dequantize, quantize, to_float32


def round_trip(grids: np.ndarray) -> np.ndarray:
    return find_codec("uint8").round_trip(grids)


@st.composite
def grids(draw: st.DrawFn) -> np.ndarray:
    """Non-negative float16 values of any size, including subnormal numbers."""
    shape = draw(st.sampled_from([(1, 1, 1, 1), (2, 2, 3, 4), (3, 5)]))
    values = st.floats(0, 65504, width=16, allow_subnormal=True)
    return draw(hnp.arrays(np.float16, shape, elements=values))


@settings(deadline=None, max_examples=200)
@given(grid=grids())
@example(grid=np.array([[[[0.0004003]]]], np.float16))  # its scale is subnormal and was rounded down
def test_error_is_at_most_half_a_level(grid: np.ndarray) -> None:
    got = round_trip(grid).astype(np.float64)
    assert np.isfinite(got).all()
    cells = tuple(range(1, grid.ndim - 1))
    largest = grid.astype(np.float64).max(axis=cells, keepdims=True) if cells else grid.astype(np.float64)
    level = largest / 255 * (1 + 2**-10) + 2**-24  # float16 rounds the scale, and 2^-24 is its smallest number
    rounding = 2**-11 * got + 2**-25
    assert (np.abs(got - grid) <= 0.501 * level + rounding).all()


def test_zero_is_exact_and_the_largest_value_is_not_clipped() -> None:
    grid = np.zeros((1, 2, 2, 3), np.float16)
    grid[0, 0, 0] = [1.0, 300.0, 65504.0]
    got = round_trip(grid)
    np.testing.assert_allclose(got[0, 0, 0].astype(np.float64), [1.0, 300.0, 65504.0], rtol=1e-3)
    assert not got[0, 1].any()


def test_invalid_image_is_nan_and_does_not_affect_others() -> None:
    both = np.random.default_rng(0).random((2, 2, 2, 8)).astype(np.float16)
    alone = round_trip(both[1:])
    both[0] = np.nan
    got = round_trip(both)
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1], alone[0])


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_scale_per_channel_and_image(kind: type) -> None:
    grid = np.ones((2, 4, 4, 3), kind) * np.array([0.1, 1.0, 1e3], kind)
    grid[1] *= 2
    levels, scale = quantize(grid)
    assert (levels.dtype, levels.shape, scale.dtype, scale.shape) == (np.uint8, grid.shape, np.float16, (2, 3))
    assert (levels == 255).all()
    np.testing.assert_allclose(scale[1] / scale[0], 2, rtol=2e-3)


def test_dequantize_multiplies_levels_by_scale() -> None:
    rng = np.random.default_rng(1)
    levels = rng.integers(0, 256, (8, 8, 64)).astype(np.uint8)
    scale = rng.random(64).astype(np.float16)
    out = np.empty(levels.shape, np.float16)
    dequantize(levels, scale, out)
    exact = levels.astype(np.float64) * scale.astype(np.float64)
    assert (np.abs(out - exact) <= np.spacing(exact.astype(np.float16)).astype(np.float64) / 2 + 1e-12).all()


def test_codecs_without_quantization_return_grids_unchanged() -> None:
    grid = np.array([[-1.5, 2.0]], np.float32)
    assert find_codec("float32").round_trip(grid) is grid


@given(hnp.arrays(np.uint16, (3, 7)))
def test_float16_is_converted_exactly(bits: np.ndarray) -> None:
    halves = bits.view(np.float16)
    np.testing.assert_array_equal(to_float32(halves), halves.astype(np.float32))
    np.testing.assert_array_equal(to_float32(halves[:, ::2]), halves[:, ::2].astype(np.float32))


@given(grids(), st.sampled_from([0.0, -0.0, -1e-7, 65440.0, 65504.0, np.inf, -np.inf, np.nan]))
def test_representable_values_are_finite_and_not_negative(grid: np.ndarray, value: float) -> None:
    grid = np.minimum(grid, 65440)
    grid.flat[0] = value
    with np.errstate(invalid="ignore"):
        _, representable = find_codec("uint8").encode(grid)
    assert representable.tolist() == [(row.min() >= 0 and row.max() <= 65471) for row in grid.astype(np.float64)]
