"""Every kind of image file is decoded to the right pixels or is invalid with a reason."""

from __future__ import annotations

import errno
import io
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from gridcap.common.image import InvalidImageError, decoder_name, load_image, load_rgb

RED, GREEN, BLUE = (220, 30, 30), (20, 160, 60), (30, 50, 210)
WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.jpg", {"quality": 95, "subsampling": 0}, 6),
        ("a.jpg", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("a.jpeg", {"quality": 75}, 12),
        ("a.jfif", {"quality": 75}, 12),
        ("a.png", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.webp", {"quality": 90}, 16),
        ("a.bmp", {}, 0),
        ("a.tif", {}, 0),
        ("a.tiff", {"compression": "tiff_lzw"}, 0),
        ("a.gif", {}, 0),
        ("a.mpo", {"quality": 95, "subsampling": 0}, 6),
        ("a.avif", {"quality": 95, "subsampling": "4:4:4"}, 6),
        ("a.heic", {"quality": 95, "chroma": 444}, 6),
        ("a.jxl", {"lossless": True}, 0),
        ("a.jxl", {"lossless": True, "use_container": True}, 0),
    ],
)
def test_every_format_returns_the_saved_pixels(
    tmp_path: Path, quarters: Any, assert_quarters: Any, name: str, options: dict[str, object], tolerance: int
) -> None:
    quarters().save(tmp_path / name, **options)
    assert_quarters(load_rgb(tmp_path / name), tolerance)


def test_the_format_is_detected_from_the_content(tmp_path: Path, quarters: Any, assert_quarters: Any) -> None:
    quarters().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert_quarters(load_rgb(tmp_path / "a.jpg"), 0)


def test_a_gray_jpeg_becomes_three_equal_channels(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "gray.jpg", quality=98)
    pixels = np.asarray(load_rgb(tmp_path / "gray.jpg")).astype(int)
    assert (pixels == pixels[..., :1]).all()
    assert abs(pixels[..., 0] - ramp).max() <= 4


def test_a_cmyk_jpeg_keeps_its_colors(tmp_path: Path, quarters: Any, assert_quarters: Any) -> None:
    quarters().convert("CMYK").save(tmp_path / "print.jpg", quality=98, subsampling=0)
    assert Image.open(tmp_path / "print.jpg").mode == "CMYK"
    assert_quarters(load_rgb(tmp_path / "print.jpg"), 8)


def test_a_palette_png_keeps_its_colors(tmp_path: Path, quarters: Any, assert_quarters: Any) -> None:
    quarters().quantize(4).save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert_quarters(load_rgb(tmp_path / "p.png"), 1)


def _palette_with_a_transparent_entry() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (2, 0, 4, 4))
    return image, {"transparency": 1}


def _palette_with_alpha() -> tuple[Image.Image, dict[str, object]]:
    image, _ = _palette_with_a_transparent_entry()
    return image, {"transparency": bytes([255, 0])}


def _rgb_with_a_transparent_color() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("RGB", (4, 4), RED)
    image.paste(BLUE, (2, 0, 4, 4))
    return image, {"transparency": BLUE}


def _rgba() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("RGBA", (4, 4), (*RED, 255))
    image.paste((*BLUE, 0), (2, 0, 4, 4))
    return image, {}


@pytest.mark.parametrize(
    "make",
    [_palette_with_a_transparent_entry, _palette_with_alpha, _rgb_with_a_transparent_color, _rgba],
    ids=lambda f: f.__name__,
)
def test_transparent_pixels_of_a_png_are_white(tmp_path: Path, make: Callable) -> None:
    image, options = make()
    image.save(tmp_path / "clear.png", **options)
    pixels = np.asarray(load_rgb(tmp_path / "clear.png"))
    assert (pixels[:, :2] == RED).all()
    assert (pixels[:, 2:] == WHITE).all()


def test_half_transparent_pixels_are_composited_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (200, 0, 100, 51)).save(tmp_path / "a.png")  # 51 / 255 = 0.2
    Image.new("LA", (3, 3), (100, 51)).save(tmp_path / "la.png")
    assert abs(np.asarray(load_rgb(tmp_path / "a.png")).astype(int) - (244, 204, 224)).max() <= 1
    assert abs(np.asarray(load_rgb(tmp_path / "la.png")).astype(int) - 224).max() <= 1


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_rgb(tmp_path / name))
        assert pixels.shape == (16, 16, 3)
        np.testing.assert_array_equal(pixels[..., 1].ravel(), np.arange(256), name)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.arange(256, dtype=np.int32).reshape(16, 16), "integer pixels"),
        (np.linspace(-0.1, 1, 256, dtype=np.float32).reshape(16, 16), "floating-point pixels outside 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "floating-point pixels"),
        (np.linspace(0, 255, 256, dtype=np.float32).reshape(16, 16), "floating-point pixels"),
    ],
)
def test_item_07_integer_and_float_images_are_not_stored_as_black(
    tmp_path: Path, invalid_reason: Any, pixels: np.ndarray, reason: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode in ("I", "F")
    assert reason in invalid_reason(tmp_path / "a.tif")


def test_floating_point_gray_from_0_to_1_is_scaled(tmp_path: Path) -> None:
    Image.fromarray((np.arange(256) / 255).astype(np.float32).reshape(16, 16)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "a.tif"))[..., 1].ravel(), np.arange(256))


def _write_gray_tiff(path: Path, bits: int, photometric: int, data: bytes) -> None:
    """Write a 4 x 1 little-endian gray TIFF."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)


def test_item_07_12_bit_gray_is_scaled_not_stored_as_black(tmp_path: Path) -> None:
    packed = bytes([0x00, 0x05, 0x55, 0xAA, 0xAF, 0xFF])  # 0x000, 0x555, 0xaaa, 0xfff
    _write_gray_tiff(tmp_path / "a.tif", 12, 1, packed)
    assert np.asarray(load_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == [0x00, 0x55, 0xAA, 0xFF]


def test_item_07_16_bit_gray_with_white_as_zero_is_inverted(tmp_path: Path) -> None:
    _write_gray_tiff(tmp_path / "a.tif", 16, 0, np.array([0, 0x5555, 0xAAAA, 0xFFFF], "<u2").tobytes())
    assert np.asarray(load_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == [0xFF, 0xAA, 0x55, 0x00]


def test_item_07_every_pixel_type_that_pillow_reads_from_tiff_is_handled() -> None:
    """A new high-dynamic-range mode in Pillow must not be converted to RGB by clipping."""
    known = {
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "I;16",
        "I;16B",
        "I;16L",
        "I",
        "F",
    }
    assert {mode for mode, _ in TiffImagePlugin.OPEN_INFO.values()} <= known


def test_a_one_bit_image_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (4, 4), 0)
    image.paste(1, (0, 0, 2, 4))
    image.save(tmp_path / "bit.png")
    pixels = np.asarray(load_rgb(tmp_path / "bit.png"))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_an_animation_returns_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE, GREEN)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(load_rgb(tmp_path / name)) == RED).all()


# ---------------------------------------------------------------------------------------------- invalid images


def png_of_declared_size(path: Path, width: int, height: int, rows: int | None = None) -> None:
    """Write a black 1-bit PNG; with `rows`, only that many rows are present."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_a_truncated_jpeg_is_invalid_and_not_padded_with_gray(tmp_path: Path, invalid_reason: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    for share in (0.5, 0.8, 0.95):
        (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * share)])
        assert invalid_reason(tmp_path / "a.jpg") == "truncated"


def test_an_empty_file_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    (tmp_path / "a.jpg").touch()
    assert invalid_reason(tmp_path / "a.jpg") == "empty file"


def test_a_text_file_is_not_an_image(tmp_path: Path, invalid_reason: Any) -> None:
    (tmp_path / "a.jpg").write_text("<html>404 not found</html>")
    assert invalid_reason(tmp_path / "a.jpg") == "not an image"


def test_a_folder_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    (tmp_path / "a.jpg").mkdir()
    assert invalid_reason(tmp_path / "a.jpg") == "is a folder"


def test_a_missing_file_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    assert invalid_reason(tmp_path / "a.jpg") == "missing"
    assert invalid_reason(tmp_path / "no_folder" / "a.jpg") == "missing"


def test_a_file_without_read_permission_is_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invalid_reason: Any
) -> None:
    def deny(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    # root, which runs the tests in containers, may read every file
    monkeypatch.setattr("gridcap.common.image.reader._open_nonblocking", deny)
    assert invalid_reason(tmp_path / "a.jpg") == "no permission to read"


def test_item_23_a_failed_read_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("gridcap.common.image.decode.ImageReader.read", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        load_rgb(tmp_path / "a.png")
    assert caught.value.filename == str(tmp_path / "a.png")


def test_a_file_that_refers_to_an_impossible_position_is_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invalid_reason: Any
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    Image.new("RGB", (8, 8)).save(tmp_path / "a.tif")
    monkeypatch.setattr("gridcap.common.image.decode.ImageReader.seek", fail)
    assert "Invalid argument" in invalid_reason(tmp_path / "a.tif")


@pytest.mark.parametrize("link", [False, True])
def test_named_pipes_and_devices_are_invalid_without_waiting(tmp_path: Path, invalid_reason: Any, link: bool) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    if link:
        (tmp_path / "a.jpg").unlink()
        (tmp_path / "a.jpg").symlink_to("/dev/zero")
    assert invalid_reason(tmp_path / "a.jpg") == "not a regular file"


def test_a_socket_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    with socket.socket(socket.AF_UNIX) as created:
        created.bind(os.path.relpath(tmp_path / "a.jpg"))
        assert invalid_reason(tmp_path / "a.jpg") == "not a regular file"


def test_a_jpeg_with_thousands_of_scans_exceeds_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invalid_reason: Any
) -> None:
    """A progressive JPEG may have any number of scans over all of its pixels, and each takes time."""
    buffer = io.BytesIO()
    Image.new("L", (2048, 2048), 77).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    path = tmp_path / "scans.jpg"
    path.write_bytes(whole[:-2] + 40 * last_scan + whole[-2:])
    assert load_image(path, 8, "stretch").min() == 77, "a few more scans are decoded"
    path.write_bytes(whole[:-2] + 20_000 * last_scan + whole[-2:])
    monkeypatch.setattr("gridcap.common.image.reader.MAX_SECONDS", 0.2)
    assert invalid_reason(path) == "takes more than 0.2 s to decode"


def test_ghostscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invalid_reason: Any) -> None:
    """Pillow detects an EPS file under any name and would run Ghostscript on it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    assert invalid_reason(tmp_path / "a.jpg") == "not an image"
    assert not (tmp_path / "ran").exists()


def test_a_tile_larger_than_the_image_is_not_decoded(tmp_path: Path, invalid_reason: Any) -> None:
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 22_000, 323: 22_000, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))
    assert invalid_reason(tmp_path / "a.tif") == "too many pixels"


def test_a_decompression_bomb_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    bomb = tmp_path / "bomb.png"
    png_of_declared_size(bomb, 30_000, 30_000)
    assert bomb.stat().st_size < 1 << 20
    assert invalid_reason(bomb) == "too many pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_just_over_the_pixel_limit_is_invalid(tmp_path: Path, invalid_reason: Any) -> None:
    png_of_declared_size(tmp_path / "large.png", 10_000, 10_000, rows=1)  # Pillow only warns of these
    assert invalid_reason(tmp_path / "large.png") == "too many pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_pixel_limit_holds_while_other_threads_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quarters: Any, invalid_reason: Any
) -> None:
    """Several threads decode images: none of them may lift the limit for the others."""
    quarters(8, 8).save(tmp_path / "small.png")
    png_of_declared_size(tmp_path / "large.png", 10_000, 10_000, rows=1)
    real_open = Image.open
    small_opened, large_opened, small_done = threading.Event(), threading.Event(), threading.Event()

    def interleaved_open(file: io.BufferedReader, formats: Sequence[str]) -> Image.Image:
        if Path(file.name).name == "small.png":
            small_opened.set()
            large_opened.wait(10)
        else:
            large_opened.set()
            small_done.wait(10)
        return real_open(file, formats=formats)

    def load_small() -> None:
        load_rgb(tmp_path / "small.png")
        small_done.set()

    monkeypatch.setattr(Image, "open", interleaved_open)
    other = threading.Thread(target=load_small)
    other.start()
    small_opened.wait(10)
    try:
        assert invalid_reason(tmp_path / "large.png") == "too many pixels"
    finally:
        other.join()


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the parts of a corrupted TIFF that it skips
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "gif"])
def test_a_corrupted_image_is_decoded_or_invalid(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "a.jpg"
    reasons = []
    for i in range(60):
        data = bytearray(whole)
        if i % 2:
            data = data[: rng.integers(1, len(data))]
        else:
            for at in rng.integers(0, len(data), 8):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert load_image(path, 16, "stretch").shape == (16, 16, 3)
        except InvalidImageError as error:
            reasons.append(str(error))
    assert len(reasons) > 5
    for reason in reasons:
        assert 0 < len(reason) <= 200
        assert "\n" not in reason
        assert " object at 0x" not in reason, "reasons are stored in the shard, so they must be reproducible"


def test_decoder_name_contains_the_version() -> None:
    name, version = decoder_name().split(" ")
    assert name == "pillow"
    assert version[0].isdigit()
