"""Axis layouts of imported arrays: plausible ones are detected, and channel-first arrays are never misread."""

from __future__ import annotations

import numpy as np
import pytest

from gridcap.extract.importers.layout import LAYOUTS, LayoutError, as_grid


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype="f4").reshape(shape)


@pytest.mark.parametrize(
    ("shape", "grid_shape"),
    [((8, 8, 2048), (8, 8, 2048)), ((7, 9, 512), (7, 9, 512)), ((49, 512), (7, 7, 512)), ((2048,), (1, 1, 2048))],
)
def test_layouts_are_detected_by_the_number_of_axes(shape: tuple[int, ...], grid_shape: tuple[int, ...]) -> None:
    array = ramp(*shape)
    assert np.array_equal(as_grid(array), array.reshape(grid_shape))


@pytest.mark.parametrize("shape", [(2048, 8, 8), (512, 7, 7), (2048, 1, 1), (2048, 7, 9)])
def test_item_03_channel_first_arrays_are_rejected_with_the_likely_layout(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"looks like \(channels, rows, columns\)") as caught:
        as_grid(ramp(*shape))
    assert "--layout chw" in caught.value.hint


@pytest.mark.parametrize("shape", [(8, 2048, 8), (2048, 49), (1024, 64)])
def test_item_03_other_implausible_arrays_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=f"only {shape[-1]} channels"):
        as_grid(ramp(*shape))


def test_item_03_an_explicit_layout_is_not_second_guessed() -> None:
    array = ramp(16, 3, 4)
    assert np.array_equal(as_grid(array, "chw"), np.moveaxis(array, 0, -1))
    assert np.array_equal(as_grid(array, "hwc"), array)
    assert as_grid(ramp(64, 5), "nc").shape == (8, 8, 5)
    for shape in ((2048,), (2048, 1, 1), (1, 1, 2048)):
        assert as_grid(ramp(*shape), "c").shape == (1, 1, 2048)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_does_not_fit_the_shape_is_rejected(layout: str) -> None:
    with pytest.raises(LayoutError, match=f"--layout {layout} needs"):
        as_grid(ramp(1, 2, 3, 4), layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("array", [ramp(50, 64), ramp(1, 2, 3, 4), ramp(0, 4), np.array(["a"])], ids=str)
def test_arrays_that_are_not_grids_are_rejected(array: np.ndarray) -> None:
    with pytest.raises(LayoutError):
        as_grid(array)
