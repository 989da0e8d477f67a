"""An image file -> a square uint8 array, by Pillow."""

from __future__ import annotations

import errno
import io
import os
import stat
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

LETTERBOX_GREY = 128
MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a GiB of RGB
MAX_SECONDS = 10  # of computing for one image; waiting for a disk is not counted
# The bytes that the decoder of JPEG is given at once, between looks at the clock, times the pixels. A scan has ten
# bytes at least, and was measured to take 1.4 ns a pixel: so the next look comes after a second or so.
_BYTES_TIMES_PIXELS = 7_000_000_000
_SMALLEST_PIECE = 256

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is checked below
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # on odd metadata, in the middle of a bar


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason, in a few words."""


class _WatchedFile(io.BufferedReader):
    """A file whose reader gets an error once it has computed for too long.

    The time that a JPEG takes has no limit in its size: thousands of its scans, each of a few bytes, may go over all
    of its pixels. A thread cannot be stopped from outside, but Pillow's decoders come back for more of the file.
    """

    def __init__(self, path: Path) -> None:
        # Without O_NONBLOCK a named pipe would be waited for before it can be looked at.
        super().__init__(io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))
        self._begin = time.thread_time()
        if not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
            self.close()
            raise BadImageError("not a regular file")

    def read(self, size: int | None = -1, /) -> bytes:
        # The many small reads of a header need no look: it takes longer than they do.
        if (size is None or not 0 <= size < _SMALLEST_PIECE) and time.thread_time() - self._begin > MAX_SECONDS:
            raise BadImageError(f"takes more than {MAX_SECONDS} s to decode")
        return super().read(size)


def image_path(folder: Path, name: str, follow_links: bool) -> Path:
    """Where an image of a folder is.

    Raises:
        BadImageError: a link leads out of the folder, and that is not allowed.
    """
    path = folder / name
    if not follow_links and _may_leave(folder, name):
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
        if not inside:
            raise BadImageError("a link leads out of the image folder (--set data.follow_links=true allows it)")
    return path


def _may_leave(folder: Path, name: str) -> bool:
    """Whether a name has a link on its way; much quicker than to find out where it leads."""
    if name.startswith("/") or ".." in name:
        return True
    place = str(folder)
    for part in name.split("/"):
        place = f"{place}/{part}"
        if os.path.islink(place):  # noqa: PTH114 (a Path takes longer than the question)
            return True
    return False


def load_square(path: Path, side: int, geometry: str) -> np.ndarray:
    """Decode an image and make it square. Resizing is Pillow's bilinear filter, which is antialiased.

    Args:
        path: JPEG, PNG, WebP, BMP, TIFF or GIF.
        side: of the result, in pixels.
        geometry: "stretch" (the whole image, its aspect ratio changed: the habit of the Keras and TensorFlow
            line), "crop" (the centre square) or "letterbox" (the whole image, grey bars).

    Returns:
        uint8 (side, side, 3), RGB.

    Raises:
        BadImageError: missing, empty, truncated, no image, too large, or takes too long.
    """
    return np.asarray(_square(load_rgb(path), side, geometry))


def load_view(path: Path, side: int, geometry: str, longest: int) -> np.ndarray:
    """What `load_square` covers of an image, for showing: the whole image in its own proportions when it was
    stretched, else the square that was cut or padded.

    Args:
        path, side, geometry: as for `load_square`.
        longest: the result's longer side in pixels, at most.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        BadImageError: as for `load_square`.
    """
    picture = load_rgb(path)
    if geometry != "stretch":
        picture = _square(picture, side, geometry)
    picture.thumbnail((longest, longest))
    return np.asarray(picture)


def load_rgb(path: Path) -> Image.Image:
    """Decode an image: EXIF rotation applied, transparency over white, 16-bit grey scaled to 8 bits, the first
    frame of an animation.

    Raises:
        BadImageError: missing, empty, truncated, no image, too large, or takes too long.
    """
    try:
        with _WatchedFile(path) as file, Image.open(file) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise BadImageError("too many pixels")
            if image.format in ("JPEG", "MPO"):
                image.decodermaxblock = max(_SMALLEST_PIECE, min(1 << 16, _BYTES_TIMES_PIXELS // max(1, pixels)))
            return _to_rgb(ImageOps.exif_transpose(image))
    except (BadImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise BadImageError("missing") from error
    except IsADirectoryError as error:
        raise BadImageError("is a folder") from error
    except PermissionError as error:
        raise BadImageError("no permission to read") from error
    except Image.DecompressionBombError as error:
        raise BadImageError("too many pixels") from error
    except UnidentifiedImageError as error:
        raise BadImageError("empty file" if path.stat().st_size == 0 else "not an image") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP):
            raise BadImageError(os.strerror(error.errno).lower()) from error
        if error.errno is not None:  # the machine's trouble, not the image's: a network folder that is gone
            raise
        raise BadImageError(_reason(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise BadImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if "truncated" in str(error).lower():
        return "truncated"
    return f"unreadable ({type(error).__name__}: {error})"[:200]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, side: int, geometry: str) -> Image.Image:
    if geometry == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    if geometry == "letterbox":
        scale = side / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        whole = Image.new("RGB", (side, side), (LETTERBOX_GREY,) * 3)
        fitted = image.resize((width, height), Image.Resampling.BILINEAR)
        whole.paste(fitted, ((side - width) // 2, (side - height) // 2))
        return whole
    return image.resize((side, side), Image.Resampling.BILINEAR)


def decoder_name() -> str:
    """The decoding library, for the provenance."""
    return f"pillow {PIL.__version__}"
