"""Decoding of an image file into RGB pixels with Pillow."""

from __future__ import annotations

import errno
import io
import os
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile

from gridcap.common.errors import InvalidImageError
from gridcap.common.image.formats import MAX_PIXELS, open_image
from gridcap.common.image.metadata import apply_orientation, read_orientation, strip_metadata
from gridcap.common.image.reader import ImageReader
from gridcap.common.retry import is_transient
from gridcap.common.sources.registry import ImageFile

MAX_STRIPPED_BYTES = 3 * MAX_PIXELS
# Decoding one JPEG scan takes about 1.4 ns per pixel. The decoder gets so many scans per read that the reader can check
# the time about once per second.
SCANS_TIMES_PIXELS = 700_000_000

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # checked in _check_size
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # unusual metadata


def load_rgb(path: ImageFile, min_side: int | None = None) -> Image.Image:
    """Decode an image to RGB.

    The orientation is applied, transparency is composited over white, 16-bit gray and floating-point gray from 0 to 1
    are scaled to 8 bits, and of an animation the first frame is taken. Metadata never makes an image invalid.

    Args:
        path: JPEG, MPO, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC, or JPEG XL file.
        min_side: libjpeg may reduce a JPEG file to 1/2, 1/4, or 1/8 while it decodes it, as long as width and height
            stay at least this long. None: full size.

    Raises:
        InvalidImageError: missing, empty, truncated, not an image, too large, an unsupported pixel type, or it takes
            too long to decode.
        OSError: the file system failed, which says nothing about the image. Its `filename` is the path.
    """
    try:
        with ImageReader.open(path) as reader:
            try:
                return _decode(reader, min_side)
            except (InvalidImageError, MemoryError, Image.DecompressionBombError):
                raise
            except Exception as error:
                image = _decode_without_metadata(path, error, min_side)
                if image is None:
                    raise
                return image
    except (InvalidImageError, MemoryError):
        raise
    except OSError as error:
        raise _from_os_error(error, path) from error
    except Exception as error:  # Pillow's decoders raise many types for corrupted files
        if is_transient(error):
            raise
        raise InvalidImageError(_describe(error)) from error


def _decode(reader: ImageReader, min_side: int | None) -> Image.Image:
    with open_image(reader) as image:
        _check_size(image)
        if image.format in ("JPEG", "MPO"):
            reader.max_scans = max(1, SCANS_TIMES_PIXELS // max(1, image.width * image.height))
            if min_side is not None and min(image.size) >= 2 * min_side:
                image.draft(None, (min_side, min_side))
        if isinstance(image, TiffImageFile):
            # Pillow's own method parses all EXIF directories after decoding, and fails if one is corrupted.
            image.load_end = lambda: None  # type: ignore[method-assign]
        image.load()
        orientation = read_orientation(image)
        return apply_orientation(_to_rgb(image), orientation)


def _decode_without_metadata(path: ImageFile, error: Exception, min_side: int | None) -> Image.Image | None:
    """Decode an image whose metadata may be the reason for an error; None if it is not."""
    if is_transient(error) or (isinstance(error, OSError) and (error.errno is not None or _is_truncated(error))):
        return None
    if isinstance(path, Path) and path.stat().st_size > MAX_STRIPPED_BYTES:
        return None
    stripped = strip_metadata(path.read_bytes())
    if stripped is None:
        return None
    try:
        return apply_orientation(_decode(ImageReader(io.BytesIO(stripped.data)), min_side), stripped.orientation)
    except (InvalidImageError, MemoryError):
        raise
    except Exception:  # the pixels are corrupted as well: the first error is reported
        return None


def _check_size(image: Image.Image) -> None:
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):  # libtiff decodes whole tiles, even if the image covers only a part
        pixels = max(pixels, image.tag_v2.get(TILEWIDTH, 1) * image.tag_v2.get(TILELENGTH, 1))
    if pixels > MAX_PIXELS:
        raise InvalidImageError("too many pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to RGB.

    Raises:
        InvalidImageError: a pixel type whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray16_to_rgb(image)
    if image.mode == "I":
        raise InvalidImageError("32-bit or signed integer pixels (convert the image to 8 or 16 bits per channel)")
    if image.mode == "F":
        return _float_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray, or the 12-bit gray of some TIFF files, to 8 bits."""
    bits, inverted = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
        inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
    gray = (np.asarray(image, np.uint32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - gray if inverted else gray).convert("RGB")


def _float_to_rgb(image: Image.Image) -> Image.Image:
    """Scale floating-point gray from 0 to 1, the common convention, to 8 bits; no file states its range.

    Raises:
        InvalidImageError: other values, such as 0 to 255, NaN, or physical units.
    """
    gray = np.asarray(image, np.float32)
    if not (gray.min() >= 0 and gray.max() <= 1):  # also for NaN
        raise InvalidImageError("floating-point pixels outside 0 to 1 (convert the image to 8 or 16 bits per channel)")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        gray = 1 - gray
    return Image.fromarray(np.rint(255 * gray).astype(np.uint8)).convert("RGB")


def _is_empty(path: ImageFile) -> bool:
    return path.stat().st_size == 0 if isinstance(path, Path) else not path.read_bytes()


def _from_os_error(error: OSError, path: ImageFile) -> Exception:
    """Return the reason why an image is invalid, or the error itself if it is not the image's fault."""
    if isinstance(error, FileNotFoundError):
        return InvalidImageError("missing")
    if isinstance(error, IsADirectoryError):
        return InvalidImageError("is a folder")
    if isinstance(error, PermissionError):
        return InvalidImageError("no permission to read")
    if isinstance(error, UnidentifiedImageError):
        return InvalidImageError("empty file" if _is_empty(path) else "not an image")
    if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without a driver
        return InvalidImageError("not a regular file")
    if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP):
        return InvalidImageError(os.strerror(error.errno).lower())
    if error.errno == errno.EINVAL:  # a corrupted file that refers to a negative position
        return InvalidImageError(_describe(error))
    if error.errno is not None or is_transient(error):  # the machine's fault, such as a network folder that is gone
        error.filename = error.filename or str(path)  # the error for a failed read does not name the file
        return error
    return InvalidImageError(_describe(error))


def _is_truncated(error: Exception) -> bool:
    return "truncated" in str(error).lower()


def _describe(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if _is_truncated(error):
        return "truncated"
    return f"unreadable ({type(error).__name__}: {' '.join(str(error).split())})"[
        :200
    ]  # some messages have several lines


def decoder_name() -> str:
    """Return the name and version of the decoding library, for the provenance."""
    return f"pillow {PIL.__version__}"
