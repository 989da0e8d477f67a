"""Item 15: the EXIF orientation is applied, and no metadata makes an image invalid."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from gridcap.common.image import load_rgb
from gridcap.common.image.metadata import strip_metadata

STORED = {  # EXIF orientation -> how an upright image is stored with it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "a.jpg": {"quality": 95, "subsampling": 0},
    "a.png": {},
    "a.webp": {"lossless": True},
    "a.tif": {},
}


def exif_bytes(entries: list[tuple[int, int, int, bytes]], big_endian: bool = False, tail: bytes = b"") -> bytes:
    """Return EXIF data from raw (tag, type, count, value) entries, valid or not."""
    order = ">" if big_endian else "<"
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + value[:4].ljust(4, b"\0") for tag, kind, count, value in entries
    )
    return b"Exif\0\0" + head + body + bytes(4) + tail


def orientation_entry(orientation: int, big_endian: bool = False) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(">H" if big_endian else "<H", orientation)


def store(image: Image.Image, orientation: int) -> Image.Image:
    method = STORED[orientation]
    return image if method is None else image.transpose(method)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("orientation", STORED)
def test_the_exif_orientation_is_applied_in_every_format(
    tmp_path: Path, quarters: Any, assert_quarters: Any, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    store(quarters(), orientation).save(tmp_path / name, exif=exif, **OPTIONS[name])
    assert_quarters(load_rgb(tmp_path / name), 8)


UNUSUAL = [  # tags that Pillow reads but cannot write back
    (0x010F, 3, 1, b"\x01\x00"),  # Make as a number
    (0x011A, 2, 4, b"abc\0"),  # XResolution as text
    (0x011A, 5, 1, b"\xff\xff\xff\xff"),  # XResolution outside the data
    (0x0128, 9, 1, b"\xff\xff\xff\xff"),  # ResolutionUnit negative
    (0x0100, 4, 1, b"\xff\xff\xff\xff"),  # ImageWidth far too large
    (0x0100, 9, 1, b"\xff\xff\xff\xff"),  # ImageWidth negative
    (0x0131, 1, 4, b"\xff\xfe\xfd\xfc"),  # Software as bytes
    (0x0132, 7, 4, b"\xff\xfe\xfd\xfc"),  # DateTime undefined
    (0x8769, 4, 1, b"\xff\xff\xff\x7f"),  # EXIF directory outside the data
    (0x8769, 2, 4, b"abc\0"),  # EXIF directory as text
    (0x8825, 4, 1, b"\x08\0\0\0"),  # GPS directory that contains itself
    (0x8825, 3, 2, b"\x08\0\x08\0"),  # two GPS directories
    (0xA005, 4, 1, b"\0\0\0\0"),  # interoperability directory at 0
    (0x0112, 3, 2, b"\x06\0\x06\0"),  # a second orientation
    (0x0201, 4, 1, b"\xff\xff\xff\xff"),  # thumbnail outside the data
    (0xEA1C, 7, 0x7FFFFFFF, b"\0\0\0\0"),  # padding of 2 GiB
    (0xFFFF, 13, 1, b"\0\0\0\0"),  # unknown tag, unknown type
    (0xC4A5, 12, 1, b"\0\0\0\0"),  # double outside the data
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("entry", UNUSUAL, ids=lambda entry: f"{entry[0]:#06x}-{entry[1]}")
def test_item_15_an_unusual_exif_tag_does_not_make_a_rotated_photo_invalid(
    tmp_path: Path, quarters: Any, assert_quarters: Any, name: str, entry: tuple[int, int, int, bytes]
) -> None:
    exif = exif_bytes([orientation_entry(6), entry])
    quarters().transpose(Image.Transpose.ROTATE_90).save(tmp_path / name, exif=exif, **OPTIONS[name])
    assert_quarters(load_rgb(tmp_path / name), 8)


ENTRIES = st.tuples(
    st.sampled_from([0x0100, 0x010F, 0x011A, 0x0131, 0x0201, 0x8769, 0x8825, 0x9286, 0xA005, 0xEA1C])
    | st.integers(0, 0xFFFF),
    st.integers(0, 16),
    st.integers(0, 8) | st.integers(0, 0xFFFFFFFF),
    st.binary(min_size=4, max_size=4),
).filter(lambda entry: entry[0] != 0x0112)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.jpg", "a.png", "a.webp"]),
    orientation=st.sampled_from(list(STORED)),
    entries=st.lists(ENTRIES, max_size=6),
    big_endian=st.booleans(),
    tail=st.binary(max_size=64),
)
def test_item_15_the_orientation_is_applied_whatever_the_other_exif_tags_are(
    tmp_path: Path,
    quarters: Any,
    assert_quarters: Any,
    name: str,
    orientation: int,
    entries: list[tuple[int, int, int, bytes]],
    big_endian: bool,
    tail: bytes,
) -> None:
    exif = exif_bytes([orientation_entry(orientation, big_endian), *entries], big_endian, tail)
    store(quarters(), orientation).save(tmp_path / name, exif=exif, **OPTIONS[name])
    assert_quarters(load_rgb(tmp_path / name), 8)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.jpg", "a.png", "a.webp"]),
    exif=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"Exif\0\0II*\0" + tail),
)
def test_item_15_random_exif_data_does_not_make_an_image_invalid(
    tmp_path: Path, quarters: Any, name: str, exif: bytes
) -> None:
    quarters().save(tmp_path / name, exif=exif or b"\0", **OPTIONS[name])
    assert sorted(load_rgb(tmp_path / name).size) == [32, 48]


# ------------------------------------------------------------------------------------------------ PNG chunks


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


PNG_METADATA = {
    "huge zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20))),
    "huge iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(8 << 20))),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(4 << 20))),
    "many tEXt": b"".join(chunk(b"tEXt", b"k%d\0" % i + b"x" * 1_000_000) for i in range(70)),
    "broken zTXt": chunk(b"zTXt", b"Comment\0\0not zlib"),
    "zTXt of an unknown method": chunk(b"zTXt", b"Comment\0\7data"),
    "huge iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(8 << 20))),
    "iCCP of an unknown method": chunk(b"iCCP", b"icc\0\7data"),
    "broken iCCP": chunk(b"iCCP", b"icc\0\0not zlib"),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0\0\0"),
    "short sRGB": chunk(b"sRGB", b""),
    "wrong checksum": chunk(b"tEXt", b"Comment\0text", crc=1),
    "short acTL": chunk(b"acTL", b"\0"),
    "empty eXIf": chunk(b"eXIf", b""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("metadata", PNG_METADATA.values(), ids=PNG_METADATA)
def test_item_15_png_metadata_does_not_make_an_image_invalid(
    tmp_path: Path, quarters: Any, assert_quarters: Any, metadata: bytes, position: str
) -> None:
    buffer = io.BytesIO()
    quarters().save(buffer, "png")
    data = buffer.getvalue()
    at = data.index(b"IDAT") - 4 if position == "before" else data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + metadata + data[at:])
    assert_quarters(load_rgb(tmp_path / "a.png"), 0)


def test_item_15_the_orientation_survives_when_metadata_is_stripped(
    tmp_path: Path, quarters: Any, assert_quarters: Any
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + PNG_METADATA["huge zTXt"] + data[at:])
    assert_quarters(load_rgb(tmp_path / "a.png"), 0)


def test_a_palette_png_keeps_its_transparency_when_metadata_is_stripped(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0])
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (8 << 20), zip=True)
    image.save(tmp_path / "a.png", transparency=0, pnginfo=info)
    assert load_rgb(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


# --------------------------------------------------------------------------------------------- JPEG segments


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


JPEG_METADATA = {
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "broken ICC": segment(0xE2, b"ICC_PROFILE\0"),
    "broken MPF": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "empty MPF": segment(0xE2, b"MPF\0"),
    "broken Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1\0"),
    "broken XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<x:xmpmeta"),
    "broken EXIF": segment(0xE1, b"Exif\0\0broken"),
    "comment": segment(0xFE, b"\xff\xfe\xfd"),
    "short Adobe": segment(0xEE, b"Adobe"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metadata", JPEG_METADATA.values(), ids=JPEG_METADATA)
def test_item_15_jpeg_metadata_does_not_make_an_image_invalid(
    tmp_path: Path, quarters: Any, assert_quarters: Any, metadata: bytes
) -> None:
    buffer = io.BytesIO()
    quarters().save(buffer, "jpeg", quality=95, subsampling=0)
    data = buffer.getvalue()
    first = 2 + 2 + int.from_bytes(data[4:6], "big")  # after the JFIF segment
    (tmp_path / "a.jpg").write_bytes(data[:first] + metadata + data[first:])
    assert_quarters(load_rgb(tmp_path / "a.jpg"), 8)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.webp", "a.png"])
def test_item_15_a_broken_icc_profile_does_not_make_an_image_invalid(
    tmp_path: Path, quarters: Any, assert_quarters: Any, name: str
) -> None:
    quarters().save(tmp_path / name, icc_profile=b"not a profile" * 9000, **OPTIONS[name])
    assert_quarters(load_rgb(tmp_path / name), 8)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tag=st.sampled_from([34665, 34853, 40965, 700, 33723, 34377, 34675, 37724, 282, 283, 296, 305, 306, 50341]),
    kind=st.integers(1, 13),
    count=st.integers(1, 4) | st.integers(0, 0xFFFFFFFF),
    value=st.integers(0, 0xFFFFFFFF),
)
def test_item_15_tiff_metadata_does_not_make_an_image_invalid(
    tmp_path: Path, tag: int, kind: int, count: int, value: int
) -> None:
    entries = [(256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (274, 3, 1, 3)]
    entries += [(273, 4, 1, 300), (277, 3, 1, 1), (278, 4, 1, 2), (279, 4, 1, 4), (tag, kind, count, value)]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)
    (tmp_path / "a.tif").write_bytes(data.ljust(300, b"\0") + bytes([1, 2, 3, 4]))
    image = load_rgb(tmp_path / "a.tif")
    assert [image.getpixel((x, y))[0] for y in range(2) for x in range(2)] == [4, 3, 2, 1]


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_stripping_accepts_any_bytes(tail: bytes) -> None:
    for signature in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF89a"):
        strip_metadata(signature + tail)
