"""The JPEG header reader agrees with Pillow, or leaves the file to Pillow."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gridcap.common.image import MAX_PIXELS
from gridcap.extract.images.jpeg import read_header, read_supported_jpeg


@pytest.mark.parametrize("orientation", [1, 6, 300])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xd8 comment"}])
def test_read_header_agrees_with_pillow(tmp_path: Path, orientation: int, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (70, 41)).save(tmp_path / "a.jpg", exif=exif, icc_profile=bytes(70_000), **options)
    assert read_header(bytearray((tmp_path / "a.jpg").read_bytes())) == (70 * 41, orientation)
    jpeg = read_supported_jpeg(tmp_path / "a.jpg")
    assert jpeg is not None
    assert (jpeg.pixels, jpeg.orientation) == (70 * 41, orientation)
    assert bytes(jpeg.data.numpy()) == (tmp_path / "a.jpg").read_bytes()


@given(st.binary(max_size=60), st.integers(0, 300))
def test_arbitrary_bytes_never_give_an_invalid_size(noise: bytes, at: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    data[at : at + len(noise)] = noise
    with contextlib.suppress(ValueError, IndexError):
        pixels, _ = read_header(data)
        assert 0 < pixels <= MAX_PIXELS


def test_incomplete_files_are_left_to_pillow(tmp_path: Path) -> None:
    Image.new("RGB", (70, 41)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-2])
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "."):
        assert read_supported_jpeg(tmp_path / name) is None
