"""Image formats: detection by content, and the Pillow plugins that some of them need."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from gridcap.common.errors import InvalidImageError

BASE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # for an EPS file, Pillow would run Ghostscript
MAX_PIXELS = 89_478_485  # Pillow's limit, where it only warns: 256 MiB of RGB
HEADER_BYTES = 64
JXL_CODESTREAM = b"\xff\x0a"
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width / height (ISO/IEC 18181-1, table D.2)
JXL_SIZE_BITS = (9, 13, 18, 30)
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}


def open_image(file: io.BufferedReader) -> Image.Image:
    """Open an image file with the decoder of its format.

    Only JPEG XL files are decoded at once, by their plugin.

    Args:
        file: the file, at its start.

    Raises:
        InvalidImageError: the format needs a package that is not installed, which the reason names, or a JPEG XL file
            is unreadable or has too many pixels.
        PIL.UnidentifiedImageError: not an image in a supported format.
    """
    header = file.peek(HEADER_BYTES)[:HEADER_BYTES]
    if header[4:8] == b"ftyp":
        size = int.from_bytes(header[:4], "big")
        brands = {header[8:12], *(header[start : start + 4] for start in range(16, min(size, len(header)), 4))}
        if brands & AVIF_BRANDS:
            return Image.open(file, formats=_require("AVIF", "PIL._avif", lambda _: None, "Pillow 11.3 or newer"))
        if brands & HEIF_BRANDS:
            return Image.open(file, formats=_require("HEIF", "pillow_heif", _register_heif, "gridcap[heif]"))
    if header.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        width, height = jxl_size(file.read())
        file.seek(0)
        if width * height > MAX_PIXELS:
            raise InvalidImageError("too many pixels")
        formats = _require("JXL", "pillow_jxl", lambda _: None, "gridcap[jxl]")
        try:
            return Image.open(file, formats=formats)
        except RuntimeError as error:  # libjxl's message is about building libjxl
            raise InvalidImageError("unreadable JPEG XL file") from error
    return Image.open(file, formats=BASE_FORMATS)


def jxl_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG XL file from its header.

    Raises:
        ValueError: a container without a codestream.
    """
    if data.startswith(JXL_CONTAINER):
        data = _jxl_codestream(data)
    bits, position = int.from_bytes(data[2:14].ljust(12, b"\0"), "little"), 0

    def read(count: int) -> int:
        nonlocal position
        value = bits >> position & ((1 << count) - 1)
        position += count
        return value

    small = read(1)

    def read_side() -> int:
        return 8 * (1 + read(5)) if small else 1 + read(JXL_SIZE_BITS[read(2)])

    height, ratio = read_side(), read(3)
    if ratio:
        numerator, denominator = JXL_RATIOS[ratio - 1]
        return height * numerator // denominator, height
    return read_side(), height


def _jxl_codestream(data: bytes) -> bytes:
    """Return the start of the codestream in a JPEG XL container (ISO/IEC 18181-2)."""
    position = 0
    while position + 8 <= len(data):
        size, kind, header = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8], 8
        if size == 1:  # a 64-bit size follows
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            start = position + header + 4 * (kind == b"jxlp")  # jxlp: a sequence number comes first
            return data[start : start + HEADER_BYTES]
        if size < header:  # 0: up to the end of the file
            break
        position += size
    raise ValueError("JPEG XL container without a codestream")


def _require(name: str, module: str, register: Callable[[Any], None], package: str) -> tuple[str]:
    """Load the plugin of a format and return the format for `Image.open`."""
    if importlib.util.find_spec(module) is None:
        label = {"HEIF": "HEIC", "JXL": "JPEG XL"}.get(name, name)
        command = f"pip install '{package}'" if "[" in package else "pip install -U pillow"
        raise InvalidImageError(f"{label} file, which needs {package}: {command}")
    register(importlib.import_module(module))
    return (name,)


def _register_heif(module: Any) -> None:
    if "HEIF" not in Image.OPEN:
        module.register_heif_opener()
