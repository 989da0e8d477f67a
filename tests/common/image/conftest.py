"""Test images with four colored quarters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  # registers JPEG XL for saving
import pytest
from PIL import Image

from gridcap.common.image import InvalidImageError, load_image

pillow_heif.register_heif_opener()  # for saving
RED, GREEN, BLUE, YELLOW = (220, 30, 30), (20, 160, 60), (30, 50, 210), (240, 220, 20)


@pytest.fixture
def quarters() -> Callable[..., Image.Image]:
    """quarters(width, height): red top left, green top right, blue bottom left, yellow bottom right."""

    def make(width: int = 48, height: int = 32) -> Image.Image:
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[: height // 2, : width // 2] = RED
        pixels[: height // 2, width // 2 :] = GREEN
        pixels[height // 2 :, : width // 2] = BLUE
        pixels[height // 2 :, width // 2 :] = YELLOW
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def assert_quarters() -> Callable[..., None]:
    """assert_quarters(image, tolerance, size) compares the centers of the quarters with their colors."""

    def check(image: Image.Image, tolerance: int, size: tuple[int, int] = (48, 32)) -> None:
        assert image.mode == "RGB"
        assert image.size == size
        pixels = np.asarray(image).astype(int)
        height, width = pixels.shape[:2]
        for (row, column), color in {(1, 1): RED, (1, 3): GREEN, (3, 1): BLUE, (3, 3): YELLOW}.items():
            center = pixels[height * row // 4, width * column // 4]
            assert abs(center - color).max() <= tolerance, (row, column, center, color)

    return check


@pytest.fixture
def invalid_reason() -> Callable[[Path], str]:
    """invalid_reason(path) loads an invalid image and returns the reason."""

    def load(path: Path) -> str:
        with pytest.raises(InvalidImageError) as caught:
            load_image(path, 16, "stretch")
        return str(caught.value)

    return load
