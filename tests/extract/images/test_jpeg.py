"""A look at a JPEG file's header says what Pillow reads there, or that the file is for Pillow."""

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
from gridcap.extract.images.jpeg import _look_at_header, read_supported_jpeg


@pytest.mark.parametrize("orientation", [1, 6, 300])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xd8 no header"}])
def test_the_header_says_what_pillow_reads_there(tmp_path: Path, orientation: int, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (70, 41)).save(tmp_path / "a.jpg", exif=exif, icc_profile=bytes(70_000), **options)
    assert _look_at_header(bytearray((tmp_path / "a.jpg").read_bytes())) == (70 * 41, orientation)
    found = read_supported_jpeg(tmp_path / "a.jpg")
    assert found is not None
    assert (found.pixels, found.orientation) == (70 * 41, orientation)
    assert bytes(found.data.numpy()) == (tmp_path / "a.jpg").read_bytes()


@given(st.binary(max_size=60), st.integers(0, 300))
def test_any_bytes_are_a_header_or_none(noise: bytes, at: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    data[at : at + len(noise)] = noise
    with contextlib.suppress(ValueError, IndexError):
        pixels, _ = _look_at_header(data)
        assert 0 < pixels <= MAX_PIXELS


def test_what_is_no_whole_jpeg_file_is_for_pillow(tmp_path: Path) -> None:
    Image.new("RGB", (70, 41)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "."):
        assert read_supported_jpeg(tmp_path / name) is None
