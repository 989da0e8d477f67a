"""Scaled decoding of large JPEG files is close to decoding in full size, and leaves other files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gridcap.common.image.resize as resize
from gridcap.common.image import load_image, load_rgb
from gridcap.common.image.metadata import TRANSPOSE


def photo(width: int, height: int) -> Image.Image:
    """Return a smooth random picture with fine noise."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"format": "MPO"}], ids=str)
def test_the_difference_is_less_than_half_a_level_on_average(
    tmp_path: Path, resize_mode: str, options: dict[str, Any]
) -> None:
    photo(1008, 756).save(tmp_path / "a.jpg", quality=90, **options)
    full = load_image(tmp_path / "a.jpg", 75, resize_mode, scaled_decoding=False).astype(int)
    scaled = load_image(tmp_path / "a.jpg", 75, resize_mode).astype(int)
    assert load_rgb(tmp_path / "a.jpg", 150).size == (252, 189)
    assert 0 < abs(scaled - full).mean() < 0.5
    assert abs(scaled - full).max() <= 4


@pytest.mark.parametrize(
    ("size", "name", "expected"),
    [
        ((640, 480), "a.jpg", (640, 480)),  # COCO
        ((1195, 4000), "a.jpg", (1195, 4000)),  # half of it would be less than twice the side
        ((1196, 1300), "a.jpg", (598, 650)),
        ((1400, 1300), "a.png", (1400, 1300)),
    ],
)
def test_the_scaled_image_has_at_least_twice_the_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], name: str, expected: tuple[int, int]
) -> None:
    sizes = []
    real = resize.stretch
    monkeypatch.setattr(resize, "stretch", lambda image, side: sizes.append(image.size) or real(image, side))
    photo(*size).save(tmp_path / name)
    scaled, full = (load_image(tmp_path / name, 299, "stretch", flag) for flag in (True, False))
    assert sizes == [expected, size]
    if expected == size:
        np.testing.assert_array_equal(scaled, full)


@pytest.mark.parametrize("orientation", TRANSPOSE)
def test_the_orientation_is_applied_after_scaling(
    tmp_path: Path, quarters: Any, assert_quarters: Any, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    quarters(480, 320).transpose(TRANSPOSE[inverse]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert_quarters(load_rgb(tmp_path / "a.jpg", 40), 6, (60, 40))


def test_truncated_files_and_corrupted_metadata_are_handled_as_in_full_size(
    tmp_path: Path, invalid_reason: Any
) -> None:
    photo(640, 480).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert invalid_reason(tmp_path / "cut.jpg") == "truncated"
    (tmp_path / "icc.jpg").write_bytes(data[:2] + b"\xff\xe2\0\x10ICC_PROFILE\0\0" + data[2:])  # corrupted
    np.testing.assert_array_equal(
        load_image(tmp_path / "icc.jpg", 64, "stretch"), load_image(tmp_path / "a.jpg", 64, "stretch")
    )
