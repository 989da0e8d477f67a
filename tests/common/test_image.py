"""Every kind of file a photo folder holds becomes the right pixels, or is refused with a reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gridcap.common.image import (
    LETTERBOX_GRAY,
    InvalidImageError,
    _stretched,
    decoder_name,
    image_path,
    load_image,
    load_rgb,
)

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (20, 160, 60), (30, 50, 210), (240, 220, 20)
WHITE = (255, 255, 255)


def quarters(width: int = 48, height: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, yellow bottom right."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return Image.fromarray(pixels)


def assert_quarters(image: Image.Image, tolerance: int, size: tuple[int, int] = (48, 32)) -> None:
    assert image.mode == "RGB"
    assert image.size == size
    pixels = np.asarray(image).astype(int)
    height, width = pixels.shape[:2]
    centres = {(1, 1): RED, (1, 3): GREEN, (3, 1): BLUE, (3, 3): YELLOW}
    for (row, column), color in centres.items():
        found = pixels[height * row // 4, width * column // 4]
        assert abs(found - color).max() <= tolerance, (row, column, found, color)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.jpg", {"quality": 95, "subsampling": 0}, 6),
        ("a.jpg", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("a.jpeg", {"quality": 75}, 12),
        ("a.png", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.webp", {"quality": 90}, 16),
        ("a.bmp", {}, 0),
        ("a.tif", {}, 0),
        ("a.tiff", {"compression": "tiff_lzw"}, 0),
        ("a.gif", {}, 0),
    ],
)
def test_every_format_gives_the_pixels_that_were_saved(
    tmp_path: Path, name: str, options: dict[str, object], tolerance: int
) -> None:
    quarters().save(tmp_path / name, **options)
    assert_quarters(load_rgb(tmp_path / name), tolerance)


def test_the_format_is_told_from_the_content_and_not_from_the_name(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert_quarters(load_rgb(tmp_path / "a.jpg"), 0)


def test_a_grey_jpeg_becomes_three_equal_channels(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "gray.jpg", quality=98)
    pixels = np.asarray(load_rgb(tmp_path / "gray.jpg")).astype(int)
    assert (pixels == pixels[..., :1]).all()
    assert abs(pixels[..., 0] - ramp).max() <= 4


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    quarters().convert("CMYK").save(tmp_path / "print.jpg", quality=98, subsampling=0)
    assert Image.open(tmp_path / "print.jpg").mode == "CMYK"
    assert_quarters(load_rgb(tmp_path / "print.jpg"), 8)


_UPRIGHT = {  # EXIF orientation -> how an upright picture is stored under it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", list(_UPRIGHT))
def test_a_photo_turned_by_its_exif_orientation_comes_out_upright(tmp_path: Path, orientation: int) -> None:
    stored, turn = quarters(), _UPRIGHT[orientation]
    if turn is not None:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "phone.jpg", quality=95, subsampling=0, exif=exif)
    assert_quarters(load_rgb(tmp_path / "phone.jpg"), 8)


def test_a_palette_png_keeps_its_colours(tmp_path: Path) -> None:
    quarters().quantize(4).save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert_quarters(load_rgb(tmp_path / "p.png"), 1)


def _palette_with_a_clear_entry() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (2, 0, 4, 4))
    return image, {"transparency": 1}


def _palette_half_clear() -> tuple[Image.Image, dict[str, object]]:
    image, _ = _palette_with_a_clear_entry()
    return image, {"transparency": bytes([255, 0])}


def _rgb_with_a_clear_color() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("RGB", (4, 4), RED)
    image.paste(BLUE, (2, 0, 4, 4))
    return image, {"transparency": BLUE}


def _rgba() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("RGBA", (4, 4), (*RED, 255))
    image.paste((*BLUE, 0), (2, 0, 4, 4))
    return image, {}


@pytest.mark.parametrize(
    "make",
    [_palette_with_a_clear_entry, _palette_half_clear, _rgb_with_a_clear_color, _rgba],
    ids=lambda f: f.__name__,
)
def test_what_is_transparent_in_a_png_is_white(tmp_path: Path, make: Callable) -> None:
    image, options = make()
    image.save(tmp_path / "clear.png", **options)
    pixels = np.asarray(load_rgb(tmp_path / "clear.png"))
    assert (pixels[:, :2] == RED).all()
    assert (pixels[:, 2:] == WHITE).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (200, 0, 100, 51)).save(tmp_path / "a.png")  # 51 / 255 = a fifth
    Image.new("LA", (3, 3), (100, 51)).save(tmp_path / "la.png")
    assert abs(np.asarray(load_rgb(tmp_path / "a.png")).astype(int) - (244, 204, 224)).max() <= 1
    assert abs(np.asarray(load_rgb(tmp_path / "la.png")).astype(int) - 224).max() <= 1


def test_sixteen_bit_grey_is_scaled_and_not_cut(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_rgb(tmp_path / name))
        assert pixels.shape == (16, 16, 3)
        np.testing.assert_array_equal(pixels[..., 1].ravel(), np.arange(256), name)


def test_a_one_bit_image_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (4, 4), 0)
    image.paste(1, (0, 0, 2, 4))
    image.save(tmp_path / "bit.png")
    pixels = np.asarray(load_rgb(tmp_path / "bit.png"))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE, GREEN)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(load_rgb(tmp_path / name)) == RED).all()


# ---------------------------------------------------------------------------------------------- refused files


def png_of_declared_size(path: Path, width: int, height: int, rows: int | None = None) -> None:
    """A black 1-bit PNG; with `rows` given, only so many of its rows are there."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def refused(path: Path) -> str:
    with pytest.raises(InvalidImageError) as caught:
        load_image(path, 16, "stretch")
    return str(caught.value)


def test_a_truncated_jpeg_is_refused_and_not_padded_with_grey(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    for share in (0.5, 0.8, 0.95):
        (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * share)])
        assert refused(tmp_path / "a.jpg") == "truncated"


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert refused(tmp_path / "a.jpg") == "empty file"


def test_text_under_an_images_name_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>404 not found</html>")
    assert refused(tmp_path / "a.jpg") == "not an image"


def test_a_folder_under_an_images_name_is_called_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    assert refused(tmp_path / "a.jpg") == "is a folder"


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.jpg") == "missing"
    assert refused(tmp_path / "no_folder" / "a.jpg") == "missing"


def test_a_file_nobody_may_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gridcap.common.image.os.open", refuse)  # root, who runs CI, may read everything
    assert refused(tmp_path / "a.jpg") == "no permission to read"


@pytest.mark.parametrize("link", [False, True])
def test_a_named_pipe_or_a_device_is_not_waited_for(tmp_path: Path, link: bool) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    if link:
        (tmp_path / "a.jpg").unlink()
        (tmp_path / "a.jpg").symlink_to("/dev/zero")
    assert refused(tmp_path / "a.jpg") == "not a regular file"


def test_a_small_jpeg_that_would_be_decoded_for_minutes_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progressive JPEG may have any number of scans over all of its pixels; each takes its time."""
    buffer = io.BytesIO()
    Image.new("L", (2048, 2048), 77).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    path = tmp_path / "scans.jpg"
    path.write_bytes(whole[:-2] + 40 * last_scan + whole[-2:])
    assert load_image(path, 8, "stretch").min() == 77, "some more are decoded"
    path.write_bytes(whole[:-2] + 20_000 * last_scan + whole[-2:])
    monkeypatch.setattr("gridcap.common.image.MAX_SECONDS", 0.2)
    assert refused(path) == "takes more than 0.2 s to decode"


def test_no_other_program_is_asked_to_draw_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes an EPS under any name for what it is, and runs Ghostscript on it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    assert refused(tmp_path / "a.jpg") == "not an image"
    assert not (tmp_path / "ran").exists()


def test_a_tile_larger_than_the_image_is_not_decoded(tmp_path: Path) -> None:
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 22_000, 323: 22_000, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))
    assert refused(tmp_path / "a.tif") == "too many pixels"


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png"])
def test_a_name_that_leads_out_of_the_folder_is_refused_always(tmp_path: Path, name: str, follow: bool) -> None:
    with pytest.raises(InvalidImageError, match="its name leads out"):
        image_path(tmp_path, name, follow)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidImageError, match="cannot be one of a file"):
        image_path(tmp_path, name, False)


def test_a_socket_is_no_image(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "a.jpg"))
        assert refused(tmp_path / "a.jpg") == "not a regular file"


def test_a_link_that_leads_out_of_the_folder_is_followed_only_if_asked(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for place in (folder / "sub", elsewhere):
        (place / "a.png").touch()
    (folder / "in.png").symlink_to("sub/a.png")
    (folder / "out.png").symlink_to(elsewhere / "a.png")
    (folder / "back.png").symlink_to("../elsewhere/a.png")
    (folder / "other").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(folder)
    for root in (folder, tmp_path / "link"):
        for name in ("sub/a.png", "in.png"):
            assert image_path(root, name, False) == root / name
        for name in ("out.png", "back.png", "other/a.png"):
            assert image_path(root, name, True) == root / name
            with pytest.raises(InvalidImageError, match=r"leads out of the image folder.*follow_links"):
                image_path(root, name, False)


def test_a_small_file_that_unpacks_to_a_billion_pixels_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    png_of_declared_size(bomb, 30_000, 30_000)
    assert bomb.stat().st_size < 1 << 20
    assert refused(bomb) == "too many pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_just_over_the_limit_is_refused_too(tmp_path: Path) -> None:
    png_of_declared_size(tmp_path / "large.png", 10_000, 10_000, rows=1)  # Pillow only warns of these
    assert refused(tmp_path / "large.png") == "too many pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_pixel_limit_holds_while_other_threads_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are decoded by several threads: what one of them does must not lift the limit for another."""
    quarters(8, 8).save(tmp_path / "small.png")
    png_of_declared_size(tmp_path / "large.png", 10_000, 10_000, rows=1)
    real_open = Image.open
    small_is_in, large_is_in, small_is_out = threading.Event(), threading.Event(), threading.Event()

    def interleaved_open(file: io.BufferedReader, formats: Sequence[str]) -> Image.Image:
        if Path(file.name).name == "small.png":
            small_is_in.set()
            large_is_in.wait(10)
        else:
            large_is_in.set()
            small_is_out.wait(10)
        return real_open(file, formats=formats)

    def load_small() -> None:
        load_rgb(tmp_path / "small.png")
        small_is_out.set()

    monkeypatch.setattr(Image, "open", interleaved_open)
    other = threading.Thread(target=load_small)
    other.start()
    small_is_in.wait(10)
    try:
        assert refused(tmp_path / "large.png") == "too many pixels"
    finally:
        other.join()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it skips in a damaged TIFF
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "gif"])
def test_no_damage_makes_anything_but_an_image_or_a_refusal(tmp_path: Path, kind: str) -> None:
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
        assert " object at 0x" not in reason, "reasons go into the shard: they must be the same on every run"


# ------------------------------------------------------------------------------------------------- geometries


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 5), (299, 299), (640, 427)])
def test_every_size_becomes_the_square_asked_for(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    Image.new("RGB", size, BLUE).save(tmp_path / "a.png")
    square = load_image(tmp_path / "a.png", 299, resize_mode)
    assert square.shape == (299, 299, 3)
    assert square.dtype == np.uint8
    assert (square == BLUE).all(-1).any(), "the picture has vanished"


def test_a_single_pixel_fills_the_square(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 8, "stretch") == GREEN).all()


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for resize_mode in ("stretch", "crop", "letterbox"):
        np.testing.assert_array_equal(load_image(tmp_path / "a.png", 32, resize_mode), noise)


def bands(path: Path, upright: bool = False) -> None:
    """Three 40 x 40 squares side by side: red, green, blue (or one below the other)."""
    pixels = np.empty((40, 120, 3), np.uint8)
    pixels[:, :40], pixels[:, 40:80], pixels[:, 80:] = RED, GREEN, BLUE
    Image.fromarray(pixels.transpose(1, 0, 2) if upright else pixels).save(path)


@pytest.mark.parametrize("upright", [False, True])
def test_stretch_keeps_the_whole_image_and_changes_its_aspect(tmp_path: Path, upright: bool) -> None:
    bands(tmp_path / "a.png", upright)
    square = load_image(tmp_path / "a.png", 60, "stretch")
    square = square.transpose(1, 0, 2) if upright else square
    for column, color in ((8, RED), (30, GREEN), (52, BLUE)):
        assert (square[:, column] == color).all()


@pytest.mark.parametrize("upright", [False, True])
def test_crop_keeps_the_centre_square(tmp_path: Path, upright: bool) -> None:
    bands(tmp_path / "a.png", upright)
    square = load_image(tmp_path / "a.png", 60, "crop")
    assert (square[2:-2, 2:-2] == GREEN).all()


@pytest.mark.parametrize("upright", [False, True])
def test_letterbox_keeps_the_whole_image_its_aspect_and_pads_with_grey(tmp_path: Path, upright: bool) -> None:
    bands(tmp_path / "a.png", upright)
    square = load_image(tmp_path / "a.png", 60, "letterbox")
    square = square.transpose(1, 0, 2) if upright else square
    assert (square[:19] == LETTERBOX_GRAY).all()
    assert (square[41:] == LETTERBOX_GRAY).all()
    for column, color in ((8, RED), (30, GREEN), (52, BLUE)):
        assert (square[22:38, column] == color).all()


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_resizing_down_averages_and_does_not_skip_pixels(tmp_path: Path, resize_mode: str) -> None:
    """Without antialiasing, fine stripes come out black or white instead of gray."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    square = load_image(tmp_path / "a.png", 32, resize_mode).astype(int)
    assert abs(square - 127).max() <= 8


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 299), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_an_image_is_stretched_as_pillow_does_it_to_one_level(width: int, height: int, side: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pillows = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)).astype(int)
    ours = _stretched(Image.fromarray(pixels), side)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert abs(ours - pillows).max() <= 1


@pytest.mark.parametrize("size", [(20_000, 3), (3, 20_000), (1, 1)])
def test_the_longest_images_too(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    pillows = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert abs(_stretched(Image.fromarray(pixels), 64) - pillows).max() <= 1


def test_a_processor_for_which_torch_has_no_quick_loops_has_pillow_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    image = quarters()
    assert np.array_equal(_stretched(image, 20), np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR)))


def test_the_decoder_names_itself_with_a_version() -> None:
    name, version = decoder_name().split(" ")
    assert name == "pillow"
    assert version[0].isdigit()
