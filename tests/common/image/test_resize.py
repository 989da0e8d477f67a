"""Resizing to a square: stretch, crop, letterbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gridcap.common.image import LETTERBOX_GRAY, load_image
from gridcap.common.image.resize import stretch

RED, GREEN, BLUE = (220, 30, 30), (20, 160, 60), (30, 50, 210)


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 5), (299, 299), (640, 427)])
def test_every_size_becomes_the_requested_square(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    Image.new("RGB", size, BLUE).save(tmp_path / "a.png")
    square = load_image(tmp_path / "a.png", 299, resize_mode)
    assert square.shape == (299, 299, 3)
    assert square.dtype == np.uint8
    assert (square == BLUE).all(-1).any(), "the image has vanished"


def test_a_single_pixel_fills_the_square(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 8, "stretch") == GREEN).all()


def test_an_image_of_the_target_size_is_unchanged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for resize_mode in ("stretch", "crop", "letterbox"):
        np.testing.assert_array_equal(load_image(tmp_path / "a.png", 32, resize_mode), noise)


def bands(path: Path, vertical: bool = False) -> None:
    """Write three 40 x 40 squares in a row (or in a column): red, green, blue."""
    pixels = np.empty((40, 120, 3), np.uint8)
    pixels[:, :40], pixels[:, 40:80], pixels[:, 80:] = RED, GREEN, BLUE
    Image.fromarray(pixels.transpose(1, 0, 2) if vertical else pixels).save(path)


@pytest.mark.parametrize("vertical", [False, True])
def test_stretch_keeps_the_whole_image_and_not_its_aspect_ratio(tmp_path: Path, vertical: bool) -> None:
    bands(tmp_path / "a.png", vertical)
    square = load_image(tmp_path / "a.png", 60, "stretch")
    square = square.transpose(1, 0, 2) if vertical else square
    for column, color in ((8, RED), (30, GREEN), (52, BLUE)):
        assert (square[:, column] == color).all()


@pytest.mark.parametrize("vertical", [False, True])
def test_crop_keeps_the_center_square(tmp_path: Path, vertical: bool) -> None:
    bands(tmp_path / "a.png", vertical)
    square = load_image(tmp_path / "a.png", 60, "crop")
    assert (square[2:-2, 2:-2] == GREEN).all()


@pytest.mark.parametrize("vertical", [False, True])
def test_letterbox_keeps_the_whole_image_and_its_aspect_ratio_and_pads_with_gray(
    tmp_path: Path, vertical: bool
) -> None:
    bands(tmp_path / "a.png", vertical)
    square = load_image(tmp_path / "a.png", 60, "letterbox")
    square = square.transpose(1, 0, 2) if vertical else square
    assert (square[:19] == LETTERBOX_GRAY).all()
    assert (square[41:] == LETTERBOX_GRAY).all()
    for column, color in ((8, RED), (30, GREEN), (52, BLUE)):
        assert (square[22:38, column] == color).all()


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_downsampling_is_antialiased(tmp_path: Path, resize_mode: str) -> None:
    """Without antialiasing, fine stripes become black or white instead of gray."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    square = load_image(tmp_path / "a.png", 32, resize_mode).astype(int)
    assert abs(square - 127).max() <= 8


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 299), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_stretch_equals_pillow_to_one_gray_level(width: int, height: int, side: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)).astype(int)
    actual = stretch(Image.fromarray(pixels), side)
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    difference = abs(actual - expected)
    assert difference.max() <= 2
    assert (difference == 2).mean() < 0.001


@pytest.mark.parametrize("size", [(20_000, 3), (3, 20_000), (1, 1)])
def test_stretch_equals_pillow_for_extreme_aspect_ratios(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert abs(stretch(Image.fromarray(pixels), 64) - expected).max() <= 1


def test_pillow_resizes_on_processors_without_avx(monkeypatch: pytest.MonkeyPatch, quarters: Any) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    image = quarters()
    assert np.array_equal(stretch(image, 20), np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR)))
