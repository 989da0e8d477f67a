"""JPEG decoding with libjpeg-turbo through simplejpeg: the pixels of Pillow, in two thirds of the time.

Pillow uses the same library, but reads a file in blocks, keeps four bytes per pixel, and holds Python's global lock for
part of the time. Files that need more than plain decoding, such as unusual color spaces, and files with any error or
warning are left to Pillow, which also decides which files are invalid.
"""

from __future__ import annotations

from importlib import util

import numpy as np

from gridcap.common.errors import UserError
from gridcap.common.image import START_OF_SCAN
from gridcap.common.image.decode import SCANS_TIMES_PIXELS
from gridcap.common.sources.registry import ImageFile
from gridcap.extract.images.jpeg import read_jpeg_bytes

SCALES = (8, 4, 2)  # reductions that libjpeg computes with a smaller inverse DCT, and that Pillow uses


def has_turbo() -> bool:
    """Return whether simplejpeg is installed."""
    return util.find_spec("simplejpeg") is not None


def turbo_version() -> str:
    """Return the version of simplejpeg, for the provenance.

    Raises:
        UserError: it is not installed.
    """
    if not has_turbo():
        raise UserError("--jpeg-decoder turbo: needs simplejpeg", "pip install 'gridcap[fast]', or use pillow")
    import simplejpeg

    return str(simplejpeg.__version__)


def decode_turbo(path: ImageFile, min_side: int | None) -> np.ndarray | None:
    """Decode a JPEG file as `common.image.load_rgb` does.

    Args:
        path: image file of any format.
        min_side: as for `load_rgb`.

    Returns:
        uint8 (H, W, 3), RGB, upright; None for a file that Pillow must decode.
    """
    import simplejpeg

    if (jpeg := read_jpeg_bytes(path)) is None:
        return None
    data, pixels, orientation = jpeg
    if data.count(START_OF_SCAN) * pixels > SCANS_TIMES_PIXELS:  # takes long, and only Pillow has a time limit
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        scale = _scale(height, width, min_side)
        size = -(-height // scale), -(-width // scale)
        image: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=size[0], min_width=size[1])
    except ValueError:  # corrupted: Pillow decides whether the image is valid
        return None
    if image.shape[:2] != size:
        return None
    return image if orientation == 1 else _apply_orientation(image, orientation)


def _scale(height: int, width: int, min_side: int | None) -> int:
    """Return the reduction that Pillow's `draft` chooses."""
    largest = 1 if min_side is None else min(height // min_side, width // min_side)
    return next((scale for scale in SCALES if scale <= largest), 1)


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip (H, W, 3) upright, given its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
