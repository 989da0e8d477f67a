"""Metadata: reading the EXIF orientation, and removing metadata that Pillow cannot parse."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

ORIENTATION = 0x0112
TRANSPOSE = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
JPEG_SIGNATURE = b"\xff\xd8"
JPEG_COMMENT = 0xFE
JPEG_START_OF_SCAN = 0xDA


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a decoded image, 1 (upright) to 8. Unreadable metadata counts as upright.

    libheif and libjxl rotate while they decode, by the orientation in the container, which takes precedence over EXIF.
    A JPEG XL file that was made from a JPEG file without loss is decoded to that JPEG file, which is not rotated yet.
    """
    if image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    try:
        exif = image.tag_v2 if isinstance(image, TiffImageFile) else image.getexif()
        return _valid_orientation(exif.get(ORIENTATION))
    except Exception:  # Pillow's parsers raise many types for corrupted metadata
        return 1


def apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """Rotate or flip an image so that it is upright. No metadata is written, unlike `ImageOps.exif_transpose`."""
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def _valid_orientation(value: object) -> int:
    return value if isinstance(value, int) and value in TRANSPOSE else 1


@dataclass(frozen=True)
class Stripped:
    """An image file without its metadata.

    Attributes:
        data: content of the file.
        orientation: EXIF orientation that was removed, 1 to 8.
    """

    data: bytes
    orientation: int


def strip_metadata(data: bytes) -> Stripped | None:
    """Remove all metadata from a PNG or JPEG file, keeping what affects the pixels.

    Pillow parses text, color profiles, and vendor segments while it opens a file, and fails if they are corrupted or
    very large.

    Returns:
        The stripped file; None for other formats, or if there is nothing to remove.
    """
    if data.startswith(PNG_SIGNATURE):
        parts, exif = _strip_png(data)
    elif data.startswith(JPEG_SIGNATURE):
        parts, exif = _strip_jpeg(data)
    else:
        return None
    stripped = b"".join(parts)
    if stripped == data:
        return None
    return Stripped(stripped, _parse_orientation(exif))


def _parse_orientation(exif: bytes) -> int:
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        return _valid_orientation(parsed.get(ORIENTATION))
    except Exception:  # as in `read_orientation`
        return 1


def _strip_png(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the pieces to keep and the content of the EXIF chunk."""
    parts, exif = [PNG_SIGNATURE], b""
    position = len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind, body = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if kind in PNG_PIXEL_CHUNKS:
            parts.append(data[position:end])
        elif kind == b"eXIf" and int.from_bytes(data[end - 4 : end], "big") == zlib.crc32(kind + body):
            exif = body
        position = end
    return parts, exif


def _strip_jpeg(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the pieces to keep and the content of the EXIF segment.

    The JFIF and Adobe segments are kept: decoders derive the color space from them.
    """
    parts, exif = [JPEG_SIGNATURE], b""
    position = len(JPEG_SIGNATURE)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (0xFF, 0):  # fill bytes
            position += 1
            continue
        if marker == JPEG_START_OF_SCAN:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        if not (0xE0 <= marker <= 0xEF or marker == JPEG_COMMENT) or _sets_color_space(marker, body):
            parts.append(data[position:end])
        position = end
    parts.append(data[position:])
    return parts, exif


def _sets_color_space(marker: int, body: bytes) -> bool:
    is_jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
    return is_jfif or (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)
