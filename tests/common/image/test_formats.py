"""Formats that need a plugin: detection, missing packages, and the orientation."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gridcap.common.image import load_rgb
from gridcap.common.image.formats import jxl_size


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("name", ["a.heic", "a.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_container_is_applied_once(
    tmp_path: Path, quarters: Any, assert_quarters: Any, name: str, orientation: int
) -> None:
    """The encoders turn the EXIF orientation into a rotation of the container."""
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Pillow's transpose method that undoes it
    image = quarters() if stored is None else quarters().transpose(Image.Transpose(stored))
    image.save(tmp_path / name, exif=with_orientation(orientation), quality=95)
    assert_quarters(load_rgb(tmp_path / name), 12)


def test_an_exif_orientation_without_a_rotation_in_the_container_is_ignored(
    tmp_path: Path, quarters: Any, assert_quarters: Any
) -> None:
    """The orientation in the container takes precedence in HEIC and JPEG XL files, as all viewers do it."""
    quarters().save(tmp_path / "a.jxl", lossless=True, exif=with_orientation(6))
    assert_quarters(load_rgb(tmp_path / "a.jxl"), 0)


def test_a_jpeg_xl_file_made_from_a_jpeg_file_is_upright(tmp_path: Path, quarters: Any, assert_quarters: Any) -> None:
    quarters().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=95, exif=with_orientation(6))
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True, exif=with_orientation(6))
    with Image.open(tmp_path / "a.jxl") as transcoded:
        assert getattr(transcoded, "jpeg", False), "the JPEG data is kept"
    assert_quarters(load_rgb(tmp_path / "a.jxl"), 12)


@pytest.mark.parametrize(
    ("name", "module", "text"),
    [
        ("a.heic", "pillow_heif", "HEIC file, which needs gridcap[heif]: pip install 'gridcap[heif]'"),
        ("a.jxl", "pillow_jxl", "JPEG XL file, which needs gridcap[jxl]: pip install 'gridcap[jxl]'"),
        ("a.avif", "PIL._avif", "AVIF file, which needs Pillow 11.3 or newer: pip install -U pillow"),
    ],
)
def test_a_missing_plugin_is_named_whatever_the_file_is_called(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quarters: Any,
    invalid_reason: Any,
    name: str,
    module: str,
    text: str,
) -> None:
    quarters().save(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "a.jpg")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else real(wanted))
    assert invalid_reason(tmp_path / "a.jpg") == text


@pytest.mark.parametrize("name", ["a.heic", "a.avif", "a.jxl"])
def test_damaged_files_are_invalid(tmp_path: Path, quarters: Any, invalid_reason: Any, name: str) -> None:
    quarters(96, 96).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for length in (16, len(data) // 3, len(data) * 2 // 3):
        (tmp_path / name).write_bytes(data[:length])
        assert len(invalid_reason(tmp_path / name).splitlines()) == 1


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (300, 200), (640, 480), (90, 51), (1000, 3000), (160, 90)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_file_is_read_from_its_header(
    tmp_path: Path, size: tuple[int, int], container: bool
) -> None:
    Image.new("L", size).save(tmp_path / "a.jxl", use_container=container, effort=1)
    assert jxl_size((tmp_path / "a.jxl").read_bytes()) == size


def test_a_jpeg_xl_bomb_is_not_decoded(tmp_path: Path, invalid_reason: Any) -> None:
    """Its plugin decodes a file when it opens it."""
    height = (1 << 18) - 1
    bits = 0 | 2 << 1 | (height - 1) << 3 | 1 << 21  # not small; 18 bits of height; as wide as high
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + struct.pack("<Q", bits) + bytes(50))
    assert jxl_size((tmp_path / "a.jxl").read_bytes()) == (height, height)
    assert invalid_reason(tmp_path / "a.jxl") == "too many pixels"
