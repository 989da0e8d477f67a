"""Selection of the JPEG files that nvJPEG and libjpeg-turbo decode as Pillow does, from their headers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from gridcap.common.image import MAX_PIXELS, START_OF_SCAN, ImageReader
from gridcap.common.sources.registry import ImageFile, Member

_MAX_BYTES = 3 * MAX_PIXELS
_MAX_SCANS = 100  # progressive files have about ten
_EXIF_ORIENTATION = 0x0112
_END_OF_IMAGE = b"\xff\xd9"
# Frame markers that nvJPEG decodes: baseline, extended, and progressive DCT with Huffman coding.
_FRAMES = {0xC0, 0xC1, 0xC2}
# Other frame types (lossless, arithmetic coding, ...), and markers that are not allowed before the first scan.
_UNSUPPORTED = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xDA)}


class Jpeg:
    """An undecoded, complete grayscale or color JPEG file.

    Attributes:
        path: the file.
        data: its bytes, uint8 (n,).
        pixels: width times height.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
    """

    def __init__(self, path: Path, data: bytearray, pixels: int, orientation: int) -> None:
        self.path = path
        self.data = torch.frombuffer(data, dtype=torch.uint8)
        self.pixels = pixels
        self.orientation = orientation


def read_supported_jpeg(path: Path) -> Jpeg | None:
    """Read a JPEG file that nvJPEG can decode, or return None if Pillow must handle the file.

    Files without an end marker may be truncated, which nvJPEG does not always report. Files with very many scans can
    take minutes to decode, and nvJPEG has no time limit.
    """
    jpeg = read_jpeg_bytes(path)
    return None if jpeg is None or jpeg[0].count(START_OF_SCAN) > _MAX_SCANS else Jpeg(path, *jpeg)


def read_jpeg_bytes(path: ImageFile) -> tuple[bytearray, int, int] | None:
    """Return the bytes, the number of pixels, and the EXIF orientation of a complete JPEG file.

    Returns None for other files, and for files that only Pillow decodes as Pillow does.
    """
    try:
        data = _read_file(path)
        pixels, orientation = read_header(data)
    except Exception:  # Pillow reads the file next and gives the reason
        return None
    return (data, pixels, orientation) if data.endswith(_END_OF_IMAGE) else None


def _read_file(path: ImageFile) -> bytearray:
    """Read a regular file of at most `_MAX_BYTES` bytes; InvalidImageError or ValueError otherwise."""
    if isinstance(path, Member):
        return bytearray(path.read_bytes())
    with ImageReader.open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise ValueError("file too large")
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("file was truncated while it was read")
        return data


def read_header(data: bytearray) -> tuple[int, int]:
    """Return the number of pixels and the EXIF orientation of a JPEG file (ITU-T T.81, annex B.2).

    Pillow needs 0.1 ms for this, which is too slow for thousands of files per second.

    Raises:
        ValueError, IndexError: not a JPEG file, or not one that nvJPEG decodes as Pillow does.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG file")
    position, pixels, orientation, has_exif = 2, 0, 1, False
    while True:
        if data[position] != 0xFF:
            raise ValueError("marker expected")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan
            break
        start, end = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker < 0xC0 or marker in _UNSUPPORTED or end < start or (marker in _FRAMES and pixels):
            raise ValueError("unsupported marker")
        if marker in _FRAMES:
            pixels = _frame_pixels(data, start, end)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start):
            if has_exif:
                raise ValueError("EXIF in several segments, which Pillow joins")
            has_exif = True
            exif = Image.Exif()
            exif.load(bytes(data[start:end]))
            orientation = exif.get(_EXIF_ORIENTATION, 1)
        else:
            _check_segment(data, marker, start, end)
        position = end
    if not 0 < pixels <= MAX_PIXELS:
        raise ValueError("no frame header, or too many pixels")
    return pixels, orientation


def _frame_pixels(data: bytearray, start: int, end: int) -> int:
    """Return the number of pixels in a frame header; ValueError unless it is 8-bit grayscale or YCbCr."""
    component_ids = bytes(data[start + 6 : end : 3])
    if data[start] != 8 or data[start + 5] != len(component_ids) or component_ids == b"RGB":
        raise ValueError("not 8 bits per sample, or stored as RGB")
    if len(component_ids) not in (1, 3):
        raise ValueError("neither grayscale nor color")
    height, width = (int.from_bytes(data[start + at : start + at + 2], "big") for at in (1, 3))
    return height * width


def _check_segment(data: bytearray, marker: int, start: int, end: int) -> None:
    """Raise ValueError for application segments that change how Pillow interprets the image."""
    if marker == 0xEE and data.startswith(b"Adobe", start) and data[start + 11] == 0:
        raise ValueError("stored as RGB instead of YCbCr")
    if marker == 0xE2 and data.startswith(b"MPF\0", start):
        raise ValueError("several images in one file")
    if marker == 0xE1 and data.find(b"Orientation", start, end) >= 0:
        raise ValueError("orientation in XMP")
