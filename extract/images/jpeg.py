"""Which JPEG files a decoder for the common case may have, from a look at their headers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from gridcap.common.image import MAX_PIXELS, SCAN, WatchedFile

_LARGEST_FILE = 3 * MAX_PIXELS  # bytes; Pillow need not read a larger one as a whole
_ORIENTATION = 0x0112
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
# Of other frames (lossless, arithmetic codes, ...), and those that nothing belongs to: not before the first scan.
_NOT_HERE = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xDA)}
_MOST_SCANS = 100  # progressive files have about ten
_END_OF_IMAGE = b"\xff\xd9"


class Jpeg:
    """A whole gray or color JPEG file, not decoded.

    Attributes:
        path: where it is.
        data: its bytes, (n,) uint8.
        pixels: width times height.
        orientation: EXIF's, 1 to 8; 1 is upright.
    """

    def __init__(self, path: Path, data: bytearray, pixels: int, orientation: int) -> None:
        self.path = path
        self.data = torch.frombuffer(data, dtype=torch.uint8)
        self.pixels = pixels
        self.orientation = orientation


def read_supported_jpeg(path: Path) -> Jpeg | None:
    """A file for nvJPEG, or None if it is one for Pillow: of another kind, damaged, not readable, too large.

    A file that does not end as a JPEG does may be truncated, of which nvJPEG need not complain; one of very many scans
    may take minutes, and here nothing would cut it off.
    """
    try:
        data = _read_whole(path)
        pixels, orientation = _look_at_header(data)
    except Exception:  # Pillow will meet it again, and say why
        return None
    whole = data.endswith(_END_OF_IMAGE) and data.count(SCAN) <= _MOST_SCANS
    return Jpeg(path, data, pixels, orientation) if whole else None


def _read_whole(path: Path) -> bytearray:
    """A file's bytes; InvalidImageError or ValueError if it is no regular file, or a very large one."""
    with WatchedFile(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_FILE:
            raise ValueError("not for nvJPEG")
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("it became shorter")
        return data


def _look_at_header(data: bytearray) -> tuple[int, int]:
    """Pixels and EXIF orientation of a JPEG file (ITU-T T.81, annex B.2).

    Pillow would tell too, in a tenth of a millisecond, which for thousands of files a second is too much.

    Raises:
        ValueError, IndexError: it is no JPEG file, or none that nvJPEG decodes as Pillow does.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG file")
    at, pixels, orientation, exif = 2, 0, 1, None
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        kind = data[at + 1]
        if kind == 0xFF:  # to fill up
            at += 1
            continue
        body, end = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xDA:
            break
        if kind < 0xC0 or kind in _NOT_HERE or end < body or (kind in _FRAMES and pixels):
            raise ValueError("not for nvJPEG")
        if kind in _FRAMES:
            pixels = int.from_bytes(data[body + 1 : body + 3], "big") * int.from_bytes(data[body + 3 : body + 5], "big")
            components = bytes(data[body + 6 : end : 3])  # their names
            if data[body] != 8 or data[body + 5] != len(components) or components == b"RGB":
                raise ValueError("not 8 bits, or RGB is stored")
            if len(components) not in (1, 3):
                raise ValueError("neither gray nor color")
        elif kind == 0xE1 and data.startswith(b"Exif\0\0", body):
            if exif is not None:
                raise ValueError("EXIF in several pieces, which Pillow joins")
            exif = Image.Exif()
            exif.load(bytes(data[body:end]))
            orientation = exif.get(_ORIENTATION, 1)
        elif kind == 0xEE and data.startswith(b"Adobe", body) and data[body + 11] == 0:
            raise ValueError("RGB is stored, not YCbCr")
        elif (kind == 0xE2 and data.startswith(b"MPF\0", body)) or (
            kind == 0xE1 and data.find(b"Orientation", body, end) >= 0
        ):
            raise ValueError("several pictures, or an orientation in XMP")
        at = end
    if not 0 < pixels <= MAX_PIXELS:
        raise ValueError("no size, or too large")
    return pixels, orientation
